"""Several processes learn what one would; each cause of an end is said once, by whoever knows it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import trials
from support.shell import run
from transformers import AutoModelForCausalLM

import hfkit
from hfkit.cli import train
from hfkit.errors import HfkitError, OptionError
from hfkit.options import LaunchOptions

SMALL = [
    "--max-steps",
    6,
    "--eval-steps",
    3,
    "--per-device-train-batch-size",
    2,
    "--no-bf16",
    "--learning-rate",
    "1e-3",
]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hfkit"]


@pytest.fixture(scope="module")
def alone(still, corpus, tmp_path_factory) -> dict:
    """What one process comes to with the batches of two."""
    options = {**trials.SMALL, "per_device_train_batch_size": 4}
    return hfkit.finetune(corpus, model=still, output_dir=tmp_path_factory.mktemp("runs") / "alone", **options).metrics


def check_same(folder: Path, alone: dict) -> None:
    """Two processes have seen the same sequences in each step, and have measured the same held-out ones."""
    metrics = json.loads((folder / "metrics.json").read_text())
    assert trials.losses(metrics) == pytest.approx(trials.losses(alone), rel=1e-5)
    measured = [[loss for _, loss, _ in trials.scores(each)] for each in (metrics, alone)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert metrics["tokens"] == alone["tokens"] and metrics["loss_stderr"] == pytest.approx(
        alone["loss_stderr"], rel=1e-3
    )
    AutoModelForCausalLM.from_pretrained(folder)


def lines(result) -> list[str]:
    return result.stderr.decode().splitlines()


def test_finetune_on_two_processes(still, corpus, tmp_path, alone):
    """Two processes learn what one would, and one of them speaks."""
    folder = tmp_path / "run"
    result = run("finetune", corpus, "-m", still, "-o", folder, *SMALL, "--num-processes", 2)
    assert (result.returncode, result.stdout.decode()) == (0, f"{folder}\n"), result.stderr
    check_same(folder, alone)
    assert all(line.startswith("hfkit: ") for line in lines(result)), result.stderr
    assert len([line for line in lines(result) if "step 6 of 6" in line]) == 1


@pytest.mark.slow
def test_torchrun(still, corpus, tmp_path, alone):
    """torchrun itself works, too."""
    command = [*TORCHRUN, "finetune", corpus, "-m", still, "-o", tmp_path / "run", *SMALL]
    result = subprocess.run(list(map(str, command)), capture_output=True, timeout=120)
    assert (result.returncode, result.stdout.decode()) == (0, f"{tmp_path / 'run'}\n"), result.stderr
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_accelerate_launch(still, corpus, tmp_path, alone):
    """`accelerate launch` works, too."""
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hfkit", "finetune", corpus, "-m", still]
    command = [sys.executable, *command, "-o", tmp_path / "run", *SMALL]
    result = subprocess.run(list(map(str, command)), capture_output=True, timeout=120)
    assert (result.returncode, result.stdout.decode()) == (0, f"{tmp_path / 'run'}\n"), result.stderr
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "streaming", "lora", "accumulation"])
def test_finetune_every_kind_on_two_processes(tiny, corpus, tmp_path, kind):
    """Every kind of run can be shared."""
    command = ["finetune", corpus, "-m", tiny]
    if kind == "pretrain":
        command = ["pretrain", corpus, "--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--n-positions", 32]
    more = {"streaming": ["--streaming", "--eval-file", corpus], "lora": ["--lora"],
            "accumulation": ["--gradient-accumulation-steps", 2]}.get(kind, [])  # fmt: skip
    result = run(*command, "-o", tmp_path / "run", *SMALL, *more, "--num-processes", 2)
    assert (result.returncode, result.stdout.decode()) == (0, f"{tmp_path / 'run'}\n"), result.stderr
    assert all(line.startswith("hfkit: ") for line in lines(result)), result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["loss"] < metrics["loss_before"] and len(trials.losses(metrics)) == 6
    assert hfkit.load(tmp_path / "run")


def start(corpus, model, folder, *more) -> subprocess.Popen:
    """Two processes with so many steps that something can happen to them."""
    command = [sys.executable, "-m", "hfkit", "finetune", corpus, "-m", model, "-o", folder, "--num-processes", 2]
    command += ["--max-steps", 3000, "--eval-steps", 500, "--save-steps", 50, "--no-bf16", *more]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Process id of each rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            if parent == process.pid and ranks:
                found[ranks[0]] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_two_processes(tiny, corpus, tmp_path, number):
    """Asked to stop, all processes save and one says so."""
    process = start(corpus, tiny, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "checkpoint-50" / "manifest.json")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    said = [line for line in err.decode().splitlines() if "error" in line or "stopped" in line]
    assert process.returncode == 128 + number and out == b"", err
    assert len(said) == 1 and said[0].startswith("hfkit: stopped as asked: step "), err
    assert said[0].endswith(" --resume"), err
    assert all(line.startswith("hfkit: ") for line in err.decode().splitlines()), err


@pytest.mark.slow
def test_resume_two_processes(tiny, corpus, tmp_path):
    """A resumed run of two processes is bit-identical to the uninterrupted one."""
    steps = ["--max-steps", 120, "--eval-steps", 40, "--save-steps", 10, "--no-bf16"]
    command = ["finetune", corpus, "-m", tiny, *steps, "--num-processes", 2]
    assert run(*command, "-o", tmp_path / "whole").returncode == 0
    typed = [sys.executable, "-m", "hfkit", *map(str, command), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(typed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(tmp_path / "run" / "checkpoints" / "checkpoint-20" / "manifest.json")
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(90) == 1
    assert run(*command, "-o", tmp_path / "run", "--resume").returncode == 0
    assert trials.outcome(tmp_path / "run") == trials.outcome(tmp_path / "whole")
    result = run(*command[:-1], 1, "-o", tmp_path / "run", "--resume")
    assert result.returncode == 1 and b"processes was 2, is 1" in result.stderr


@pytest.mark.slow
def test_launch_with_one_process_killed(tiny, corpus, tmp_path):
    """A process that is killed ends all, and is named."""
    process = start(corpus, tiny, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "checkpoint-50" / "manifest.json")
    started, ranks = time.monotonic(), workers(process)
    os.kill(ranks[1], signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1 and time.monotonic() - started < 60
    errors = [line for line in err.decode().splitlines() if "error" in line]
    assert "process 1 was killed (SIGKILL); --resume continues from the newest checkpoint" in errors[-1]
    assert len(errors) <= 2 and all("lost the other processes" in line for line in errors[:-1]), err
    assert not [
        pid
        for pid in ranks.values()
        if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.slow
def test_launch_with_an_error_in_all(tiny, corpus, tmp_path):
    """An error that only the processes can find is one line."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    result = run("finetune", corpus, "-m", folder, "-o", tmp_path / "run", *SMALL, "--num-processes", 2)
    assert result.returncode == 1 and result.stdout == b""
    assert len(lines(result)) == 1 and "cannot be loaded" in lines(result)[0], result.stderr


@pytest.mark.slow
def test_launch_with_an_error_in_the_first(tiny, corpus, tmp_path):
    """An error of the first process does not leave the others waiting."""
    from hfkit.storage import lock

    command = [*TORCHRUN, "finetune", corpus, "-m", tiny, "-o", tmp_path / "run", *SMALL]
    (tmp_path / "run").mkdir()
    with lock(tmp_path / "run"):
        started = time.monotonic()
        result = subprocess.run(list(map(str, command)), capture_output=True, timeout=100)
    assert result.returncode == 1 and time.monotonic() - started < 60
    assert len([line for line in lines(result) if line.startswith("hfkit: error")]) == 1, result.stderr
    assert f"in use by process {os.getpid()}" in result.stderr.decode()


# launching


@pytest.fixture
def launched(monkeypatch):
    """What torch's launcher would be asked to start."""
    from torch.distributed import run as torchrun

    asked = []
    monkeypatch.setattr(torchrun, "run", lambda arguments: asked.append(arguments))
    monkeypatch.setattr(sys, "argv", ["hfkit", "finetune", "corpus.txt", "--num-processes", "8"])
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("logging.disable", lambda: None)
    for name in ("OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    return asked


def test_launch_on_one_machine(launched):
    """One machine starts all processes with the same command."""
    assert train.launch_processes(LaunchOptions(num_processes=8)) is True
    asked = launched[0]
    assert (asked.nproc_per_node, asked.standalone, asked.module, asked.training_script) == ("8", True, True, "hfkit")
    assert asked.training_script_args == ["finetune", "corpus.txt", "--num-processes", "8"]


def test_launch_on_several_machines(launched):
    """One of several machines starts its share."""
    machines = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29400}
    assert train.launch_processes(LaunchOptions(num_processes=16, **machines))
    asked = launched[0]
    assert (asked.nproc_per_node, asked.nnodes, asked.node_rank) == ("8", "2", 1)
    assert (asked.master_addr, asked.master_port) == ("10.0.0.1", 29400)


def test_launch_nothing(launched, monkeypatch):
    """Nothing is started for one process, or by a process that was started."""
    assert train.launch_processes(LaunchOptions()) is False
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert train.launch_processes(LaunchOptions(num_processes=2)) is False and not launched


def test_launch_bad_machines(launched):
    """Machines that do not fit together are a usage error."""
    with pytest.raises(OptionError, match="it must be a multiple of --num-machines"):
        train.launch_processes(LaunchOptions(num_processes=3, num_machines=2, main_process_ip="a"))
    with pytest.raises(OptionError, match="--num-machines needs --main-process-ip"):
        train.launch_processes(LaunchOptions(num_processes=2, num_machines=2))


def test_launch_exit_code(launched, monkeypatch):
    """The exit code says what became of the processes."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def end(error):
        def raise_it(arguments):
            raise error

        monkeypatch.setattr(torchrun, "run", raise_it)
        with pytest.raises((SystemExit, HfkitError)) as found:
            train.launch_processes(LaunchOptions(num_processes=2))
        return found.value

    def failure(code):
        return ChildFailedError("hfkit", {1: ProcessFailure(1, 4711, code, "/no/such/file")})

    assert end(SignalException("", signal.SIGTERM)).code == 143
    assert end(failure(2)).code == 2  # it has said why
    assert "process 1 was killed (SIGSEGV)" in str(end(failure(-11)))
