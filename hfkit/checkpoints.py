"""Checkpoints that survive: complete and verified, or not used; and a run that stops when it is asked to.

Trainer writes a checkpoint's files in place, one after another, and takes the highest number for the newest. Here a
manifest with every file's size and SHA-256, written last, is what makes a checkpoint one.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from hfkit import processes
from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.options import TrainOptions
from hfkit.storage import check_space, make_durable, write_text

_MANIFEST = "manifest.json"
_PICKLES = ("training_args.bin",)  # nobody needs it


def commit(checkpoint: Path) -> None:
    """Make what Trainer wrote into `checkpoint` durable and verifiable."""
    for name in _PICKLES:
        (checkpoint / name).unlink(missing_ok=True)
    make_durable(checkpoint)
    write_text(checkpoint / _MANIFEST, json.dumps({"files": _digests(checkpoint)}, indent=1))


def _digests(checkpoint: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[str(path.relative_to(checkpoint))] = {"size": path.stat().st_size, "sha256": digest}
    return found


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        expected = json.loads((checkpoint / _MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_MANIFEST} cannot be read"
    found = _digests(checkpoint)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            return f"{name} is {'missing' if name not in found else 'not what was written'}"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def find_newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies. What does not is moved aside, never deleted.

    Raises:
        HfkitError: there are checkpoints, and none of them is whole.
    """
    checkpoints = list_checkpoints(folder)
    for checkpoint in checkpoints:
        fault = find_fault(checkpoint)
        if not fault:
            return checkpoint
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        note(f"{checkpoint} is left out: {fault} (now {aside.name})")
    if checkpoints:
        raise HfkitError(f"no checkpoint is whole ({folder}): --overwrite begins anew")
    return None


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and that of step `best`; call it after a commit."""
    for checkpoint in list_checkpoints(folder)[keep:]:
        if step_of(checkpoint) != best:
            (checkpoint / _MANIFEST).unlink(missing_ok=True)  # first: half a deletion must not look whole
            shutil.rmtree(checkpoint)


class Stop:
    """Ctrl-C and SIGTERM as a wish, granted at the end of a step; a second Ctrl-C is obeyed at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        note("stopping: this step is finished and saved first")

    def asked(self) -> bool:
        """Whether any of the processes was asked to stop; all of them must call this together."""
        return processes.any_of(self.signal is not None)


class Saving(TrainerCallback):
    """Checkpoint and measure at the steps that are due.

    A checkpoint is safe before its step is measured, and a run that was interrupted in between measures first. The
    last step alone is measured before it is saved, so that the last checkpoint has all scores.
    """

    def __init__(self, folder: Path, measuring: Any, options: TrainOptions, stop: Stop) -> None:
        """measuring: has `measure(state, control)`, `has_measured(state)` and `best(state)`."""
        self.folder, self.measuring, self.options, self.stop = folder, measuring, options, stop

    def _is_due(self, state: Any) -> bool:
        return state.global_step % self.options.eval_steps == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due(state):
            self.measuring.measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Here and at no other point of a step is what Trainer saves exact: it goes on to the bit.
        last = state.global_step == state.max_steps
        if last:
            self.measuring.measure(state, control)
        asked = self.stop.asked()
        extra = self.options.save_steps and state.global_step % self.options.save_steps == 0
        control.should_training_stop |= asked
        control.should_save = (
            self.measuring.has_measured(state) if last else bool(asked or extra or self._is_due(state))
        )
        if control.should_save and processes.rank == 0 and (earlier := list_checkpoints(self.folder)):
            size = sum(path.stat().st_size for path in earlier[0].rglob("*") if path.is_file())
            check_space(self.folder, int(1.1 * size))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.gather([])  # Trainer does not wait for what the other processes write
        if processes.rank == 0:
            commit(self.folder / f"checkpoint-{state.global_step}")
            rotate(self.folder, self.options.save_total_limit, self.measuring.best(state))
        processes.gather([])
        if self._is_due(state):
            self.measuring.measure(state, control)
