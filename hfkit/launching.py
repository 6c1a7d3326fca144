"""The same command on several processes, one for each GPU, through torch's launcher."""

import logging
import os
import signal
import sys

from hfkit.errors import HfkitError, OptionError
from hfkit.options import LaunchOptions


def launch(options: LaunchOptions) -> bool:
    """Run this command line on `options.num_processes` processes; False if there is nothing to launch.

    Raises:
        HfkitError: a process was killed.
        SystemExit: a process failed, or all were asked to stop; they have said why.
    """
    if options.num_processes == 1 or "LOCAL_RANK" in os.environ:
        return False
    if options.num_processes % options.num_machines:
        raise OptionError("--num-processes is of all machines together: it must be a multiple of --num-machines")
    if options.num_machines > 1 and not options.main_process_ip:
        raise OptionError("--num-machines needs --main-process-ip, the address of machine 0")
    here = options.num_processes // options.num_machines
    for name, value in {
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // here),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": 60,  # seconds to save, before they are killed
    }.items():
        os.environ.setdefault(name, str(value))
    logging.disable()  # of the launcher: the processes say themselves what matters
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if options.num_machines == 1:
        arguments = ["--standalone"]
    else:
        arguments = ["--nnodes", str(options.num_machines), "--node-rank", str(options.machine_rank)]
        arguments += ["--master-addr", str(options.main_process_ip), "--master-port", str(options.main_process_port)]
    try:
        run.run(run.parse_args([*arguments, "--nproc-per-node", str(here), "-m", "hfkit", *sys.argv[1:]]))
        return True
    except SignalException as stop:
        code = 128 + stop.sigval
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failed: failed[1].timestamp)
        code = first.exitcode
        if code < 0:
            why = f"process {rank} was killed ({signal.Signals(-code).name})"
            raise HfkitError(f"{why}; --resume goes on from the newest checkpoint") from error
    sys.exit(code)
