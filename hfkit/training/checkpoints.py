"""Checkpoints that survive: complete and verified, or not used; and a run that stops when it is asked to.

Trainer writes a checkpoint's files in place, one after another, and takes the highest number for the newest. Here a
manifest with every file's size and SHA-256, written last, is what makes a checkpoint one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from hfkit import processes
from hfkit.console import note
from hfkit.errors import DivergedError, HfkitError, first_line
from hfkit.storage import make_durable, sync_folder, write_text

_MANIFEST = "manifest.json"
_UNFINISHED = "it was not finished"
_ASIDE = "damaged-"  # put before the name of a checkpoint that is not whole
_PICKLES = ("training_args.bin",)  # nobody needs it


def commit(checkpoint: Path) -> None:
    """Make what Trainer wrote into `checkpoint` durable and verifiable."""
    for name in _PICKLES:
        (checkpoint / name).unlink(missing_ok=True)
    make_durable(checkpoint)
    sync_folder(checkpoint.parent)
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
        return _UNFINISHED
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
    """The newest checkpoint that verifies. Newer ones that do not are moved aside, until there is another.

    Raises:
        HfkitError: there are checkpoints, and none of them is whole.
    """
    faults: dict[Path, str] = {}
    newest = None
    for checkpoint in list_checkpoints(folder):
        fault = find_fault(checkpoint)
        if not fault:
            newest = checkpoint
            break
        faults[checkpoint] = fault
    # The very first may have been interrupted: then nothing was saved, and nothing is lost.
    if not newest and faults and list(faults.values()) != [_UNFINISHED]:
        what = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in faults.items())
        raise HfkitError(f"no checkpoint is whole ({folder}: {what}): --overwrite begins anew")
    for checkpoint, fault in faults.items():
        aside = checkpoint.with_name(f"{_ASIDE}{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        note(f"{checkpoint} is left out: {fault} (now {aside.name})")
    return newest


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and that of step `best`; call it after a commit."""
    old = [path for path in list_checkpoints(folder)[keep:] if step_of(path) != best]
    for checkpoint in [*old, *folder.glob(f"{_ASIDE}*")]:
        try:
            (checkpoint / _MANIFEST).unlink(missing_ok=True)  # first: half a deletion must not look whole
            shutil.rmtree(checkpoint)
        except OSError as error:
            raise HfkitError(f"cannot delete {checkpoint}: {first_line(error)}; mend that, then --resume") from error


def diverged(what: str, step: int, learning_rate: float) -> DivergedError:
    """The error of a training that can only get worse."""
    return DivergedError(
        f"{what} at step {step}: lower --learning-rate (it is {learning_rate:g}) and --overwrite; "
        "the last checkpoint is kept"
    )


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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        with contextlib.suppress(RuntimeError):  # it came while something else was being written there
            note("stopping: this step is finished and saved first")

    def asked(self) -> bool:
        """Whether any of the processes was asked to stop; all of them must call this together."""
        return processes.any_of(self.signal is not None)
