"""What the tests of training share: small corpora, small runs, and a process that is killed again and again.

As a script (`python tests/trials.py TASK.json`) it imports hfkit once and forks a child for each trial, since a fresh
`hfkit` takes seconds to start. It prints what the trials did, as JSON, and asserts nothing.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

WORDS = "rain wind stone river light the of and a over under sings falls waits".split()
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


def fork(task: dict[str, Any], folder: str, log: Path) -> int:
    """`hfkit COMMAND` in a child, which writes what it says into `log`; its process id."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    code = 70
    try:
        from hfkit import cli

        sys.argv = ["hfkit", *task["command"], "-o", folder, "--resume"]
        cli.main()
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


def run_trials(task: dict[str, Any]) -> dict[str, Any]:
    """A run that nothing disturbs, then runs that get signals at random moments, and are resumed until they are done.

    task: `folder` to work in; `command`, without the output folder; `count` of signals to be sent; their `names`, one
    of them is drawn each time; `seed`.
    """
    import torch

    import hfkit.pretraining  # noqa: F401, so that no child has to
    from hfkit import cli  # noqa: F401

    torch.set_num_threads(1)
    folder, draw = Path(task["folder"]), random.Random(task["seed"])
    log, seconds = folder / "log", []
    for name in ("first", "whole"):  # the first one fills caches
        started = time.monotonic()
        assert wait(fork(task, str(folder / name), log), 120) == 0, log.read_text()
        seconds.append(time.monotonic() - started)
    result = {"whole": outcome(folder / "whole"), "outcomes": [], "codes": [], "log": ""}
    number = 0
    while task["count"] > 0:
        number += 1
        target, quota, code = str(folder / f"run{number}"), draw.randint(2, 5), None
        while code != 0:
            child = fork(task, target, log)
            if quota and task["count"]:
                time.sleep(draw.uniform(0, 0.8 * seconds[1]))
                os.kill(child, getattr(signal, draw.choice(task["names"])))  # in vain where it is done already
                quota, task["count"] = quota - 1, task["count"] - 1
            code = wait(child, 120)
            result["codes"].append(code)
            if code not in (0, -9, 143, 130):
                return result | {"log": log.read_text()}
        result["outcomes"].append(outcome(target))
    return result | {"log": log.read_text()}


if __name__ == "__main__":
    print(json.dumps(run_trials(json.loads(Path(sys.argv[1]).read_text()))))
