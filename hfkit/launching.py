"""The same command on several processes, one for each GPU, through torch's launcher."""

import os
import signal
import subprocess
import sys
from typing import Any

from hfkit.errors import HfkitError, OptionError, StoppedError
from hfkit.options import LaunchOptions


def launch(options: LaunchOptions) -> bool:
    """Run this command line on `options.num_processes` processes; False if there is nothing to launch.

    Raises:
        HfkitError: a process failed; it has said why.
        StoppedError: Ctrl-C or SIGTERM, which every process gets.
    """
    if options.num_processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    if options.num_processes % options.num_machines:
        raise OptionError("--num-processes is of all machines together: it must be a multiple of --num-machines")
    if options.num_machines > 1 and not options.main_process_ip:
        raise OptionError("--num-machines needs --main-process-ip, the address of machine 0")
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", str(options.num_processes // options.num_machines)]
    if options.num_machines == 1:
        command += ["--standalone"]
    else:
        command += ["--nnodes", str(options.num_machines), "--node-rank", str(options.machine_rank)]
        command += ["--master-addr", str(options.main_process_ip), "--master-port", str(options.main_process_port)]
    process = subprocess.Popen([*command, "-m", "hfkit", *sys.argv[1:]])  # noqa: S603, ourselves
    stopped: list[int] = []

    def forward(number: int, frame: Any) -> None:
        stopped.append(number)
        process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    code = process.wait()
    if stopped:
        raise StoppedError("stopped as asked; --resume goes on", stopped[0])
    if code:
        raise HfkitError("a process failed: see its line above")
    return True
