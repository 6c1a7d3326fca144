"""What the tests of training share: small corpora, small runs, and a process that is killed again and again.

As a script (`python tests/support/trials.py TASK.json`) it imports hfkit once and forks a child for each trial, since
a fresh `hfkit` takes seconds to start. It prints what the trials did, as JSON, and asserts nothing.
"""

import gc
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hfkit.cli import app

WORDS = "rain wind stone river light the of and a over under sings falls waits".split()
CHINESE = "从前有座山，山里有个庙。庙里有个老和尚，在给小和尚讲故事！我爱你们读书写字“”…—"
SMALL = {"max_steps": 6, "eval_steps": 3, "per_device_train_batch_size": 2, "bf16": False, "learning_rate": 1e-3}


def write_corpus(path: Path, documents: int = 24, seed: int = 0) -> str:
    """Documents of some 200 bytes each."""
    draw = random.Random(seed)
    texts = (" ".join(draw.choices(WORDS, k=40)) for _ in range(documents))
    path.write_text("<|endoftext|>".join(texts))
    return str(path)


def losses(metrics: dict[str, Any]) -> list[float]:
    """Trainer's loss of each step."""
    return [entry["loss"] for entry in metrics["history"] if "loss" in entry]


def scores(metrics: dict[str, Any]) -> list[tuple[int, float, str]]:
    """What was measured on the way: step, loss, sample."""
    found = {entry["step"]: entry["eval_loss"] for entry in metrics["history"] if "eval_loss" in entry}
    samples = {entry["measured"]: entry["sample"] for entry in metrics["history"] if "measured" in entry}
    assert len(samples) == sum("measured" in entry for entry in metrics["history"])  # each once
    return [(step, found[step], samples[step]) for step in sorted(found)]


def digest(folder: str | Path) -> str:
    """Of the weights in a folder."""
    path = next(iter(Path(folder).glob("*model.safetensors")))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(folder: str | Path) -> dict[str, Any]:
    """What a run came to, to the bit."""
    metrics = json.loads((Path(folder) / "metrics.json").read_text())
    return {"losses": losses(metrics), "scores": [list(each) for each in scores(metrics)], "weights": digest(folder)}


def make_brisk(set_attribute: Callable[[str, Any], Any]) -> None:
    """Take from a small run what takes most of its time: the picture, the guess of the speed, long samples, and
    collections of garbage that look at all of torch.
    """
    set_attribute("hfkit.training.runs.make_files", lambda *_: {})
    set_attribute("hfkit.tuning.search.make_files", lambda *_: {})
    set_attribute("hfkit.training.plan._speed", lambda *_: 1e9)
    set_attribute("hfkit.training.monitor.SAMPLE_TOKENS", 6)
    set_attribute("hfkit.training.runs._TOKENS", 2)
    gc.collect()
    gc.freeze()


def fork(task: dict[str, Any], folder: str, log: Path) -> int:
    """`hfkit COMMAND` in a child, which writes what it says into `log`; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    code = 70
    try:
        sys.argv = ["hfkit", *task["command"], "-o", folder, "--resume"]
        app.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit status of a child as subprocess has it; None, and the child is gone, if it hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _watch(call: Callable[[], None]) -> Callable[[], None]:
    """Let every operation on files begin with `call`; what takes that back."""
    operations = [(os, name) for name in ("open", "fsync", "replace", "unlink", "rmdir", "mkdir", "chmod")]
    originals = {(owner, name): getattr(owner, name) for owner, name in [*operations, (io, "open")]}

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            call()
            result = original(*arguments, **keywords)
            if isinstance(result, io.BufferedWriter):
                wrap(result, "write")
            return result

        setattr(owner, name, wrapped)

    for owner, name in originals:
        wrap(owner, name)
    return lambda: [setattr(*place, original) for place, original in originals.items()]


def _at_each(folder: Path, backup: Path) -> Iterator[Callable[[Callable[[], None]], Callable[[], None]]]:
    """For 1, 2, 3 ... with `folder` as it was: a way to watch that acts at so manieth an operation on files."""
    shutil.copytree(folder, backup)
    for count in itertools.count(1):
        shutil.rmtree(folder)
        shutil.copytree(backup, folder, copy_function=os.link)
        left = [count]

        def watch(act: Callable[[], None], left: list[int] = left) -> Callable[[], None]:
            def call() -> None:
                left[0] -= 1
                if not left[0]:
                    act()

            return _watch(call)

        yield watch


def killed_at_each(act: Callable[[], Any], folder: Path, backup: Path) -> Iterator[bool]:
    """Do `act`, which changes `folder`, in a child that is killed at its first operation on files; then anew, at its
    second, and so on until it is done. After each: whether it is.
    """
    for watch in _at_each(folder, backup):
        if not (child := os.fork()):
            try:
                watch(lambda: os.kill(os.getpid(), signal.SIGKILL))
                act()
                os._exit(0)
            finally:
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        yield code == 0
        if code == 0:
            return


def failing_at_each(number: int, act: Callable[[], Any], folder: Path, backup: Path) -> Iterator[Exception | None]:
    """As `killed_at_each`, but the operation fails with the error `number`. After each: what `act` made of it.

    None where it does not matter, and at the end, when nothing failed.
    """

    failed = []

    def fail() -> None:
        failed.append(True)
        raise OSError(number, os.strerror(number))

    for watch in _at_each(folder, backup):
        failed.clear()
        restore, found = watch(fail), None
        try:
            act()
        except Exception as error:
            found = error
        finally:
            restore()
        yield found
        if not failed:
            return


def run_trials(task: dict[str, Any]) -> dict[str, Any]:
    """A run that nothing disturbs, then runs that get signals at random moments, and are resumed until they are done.

    task: `folder` to work in; `command`, without the output folder; `names` of the signals to send, in this order;
    `seed`. Of each process: the signal it got, and its exit status.
    """
    import torch

    torch.set_num_threads(1)
    make_brisk(pytest.MonkeyPatch().setattr)
    folder, draw, names = Path(task["folder"]), random.Random(task["seed"]), list(task["names"])
    log, seconds = folder / "log", []
    for name in ("first", "whole"):  # the first one fills caches
        started = time.monotonic()
        assert wait(fork(task, str(folder / name), log), 120) == 0, log.read_text()
        seconds.append(time.monotonic() - started)
    result = {"whole": outcome(folder / "whole"), "outcomes": [], "ends": []}
    for number in itertools.count():
        target, signals, code = str(folder / f"run{number}"), draw.randint(2, 5), None
        while code != 0:
            name, child = None, fork(task, target, log)
            if signals and names:
                name, signals = names.pop(0), signals - 1
                time.sleep(draw.uniform(0, 0.8 * seconds[1]))
                os.kill(child, getattr(signal, name))
            code = wait(child, 120)
            if name and code == 0:  # it was done already, so this one does not count
                names.insert(0, name)
            result["ends"].append([name, code])
            if code is None or code > 0 and code < 128:
                return result | {"log": log.read_text()}
        result["outcomes"].append(outcome(target))
        if not names:
            return result | {"log": log.read_text()}
    raise AssertionError("it goes on until it returns")


def run_searches(task: dict[str, Any]) -> dict[str, Any]:
    """A search by so many `processes` at once, one of which is killed, or all, and started again.

    task: `folder`, `command`, `seed` as for `run_trials`; `kills`; the `seconds` that a search takes. Of each kill:
    the trials that were finished then.
    """
    folder, draw, log = Path(task["folder"]), random.Random(task["seed"]), Path(task["folder"]) / "log"
    share, target, result = task["seconds"] / (task["kills"] + 1), folder / "run", {"kills": [], "ends": []}
    for kill in range(task["kills"]):
        children = [fork(task, str(target), log) for _ in range(task["processes"])]
        while len(list(target.glob("trial-*/run.json"))) <= kill:  # a trial is under way
            time.sleep(0.002)
        time.sleep(draw.uniform(0, share))
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
        if kill + 1 < task["kills"]:
            [os.kill(child, signal.SIGKILL) for child in children[1:]]
            [os.waitpid(child, 0) for child in children[1:]]
        result["kills"].append(finished_trials(target))
    children = children[1:] or [fork(task, str(target), log)]
    result["ends"] = [wait(child, 300) for child in children]
    return result | {"log": log.read_text(), "final": finished_trials(target)}


def finished_trials(folder: Path) -> list[int]:
    """Numbers of the trials in a study that are complete or pruned."""
    import sqlite3

    with sqlite3.connect(folder / "study.db") as study:
        return [row[0] for row in study.execute("SELECT number FROM trials WHERE state IN ('COMPLETE', 'PRUNED')")]


if __name__ == "__main__":
    print(json.dumps(run_trials(json.loads(Path(sys.argv[1]).read_text()))))
