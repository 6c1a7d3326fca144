"""Checkpoints that survive a crash, and signals that stop a run at the end of a step.

Trainer writes the files of a checkpoint in place, one after another, and takes the highest number for the newest.
hfkit writes a manifest with the size and the SHA-256 of every file, last of all: a folder without a manifest that
matches is not a checkpoint.
"""

import contextlib
import json
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from hfkit import processes
from hfkit.console import note
from hfkit.errors import HfkitError, first_line
from hfkit.storage import make_durable, sha256_of, sync_folder, write_text

_MANIFEST = "manifest.json"
_UNFINISHED = "it was not finished"


def commit(checkpoint: Path) -> None:
    """Make the files that Trainer wrote into `checkpoint` durable and verifiable."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nothing here reads
    make_durable(checkpoint)
    sync_folder(checkpoint.parent)
    write_text(checkpoint / _MANIFEST, json.dumps({"files": _digests(checkpoint)}, indent=1))


def _digests(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file, by its path in the checkpoint."""
    digests = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            name = str(path.relative_to(checkpoint))
            digests[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    return digests


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        expected = dict(json.loads((checkpoint / _MANIFEST).read_text("utf-8"))["files"])
    except FileNotFoundError:
        return _UNFINISHED
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return f"{_MANIFEST} cannot be read"
    actual = _digests(checkpoint)
    for name in sorted({*expected, *actual}):
        if expected.get(name) != actual.get(name):
            return f"{name} is {'missing' if name not in actual else 'not what was written'}"
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, damaged ones included."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(checkpoints, key=step_of, reverse=True)


def find_newest(folder: Path, best: int | None = None) -> Path | None:
    """The checkpoint of step `best` if it verifies, else the newest one that does; None if none was finished yet.

    Damaged checkpoints that were tried first lose their manifest, so that `rotate` deletes them after the next save.

    Raises:
        HfkitError: there are checkpoints, and all of them are damaged.
    """
    faults: dict[Path, str] = {}
    for newest in sorted(list_checkpoints(folder), key=lambda path: step_of(path) != best):
        if not (fault := find_fault(newest)):
            break
        faults[newest] = fault
    else:
        newest = None
    # A run that was interrupted in its very first save has lost nothing.
    if not newest and faults and list(faults.values()) != [_UNFINISHED]:
        what = "; ".join(f"{checkpoint.name}: {fault}" for checkpoint, fault in faults.items())
        raise HfkitError(f"every checkpoint is damaged ({folder}: {what}): --overwrite starts over")
    for checkpoint, fault in faults.items():
        (checkpoint / _MANIFEST).unlink(missing_ok=True)
        note(f"{checkpoint} is skipped: {fault}")
    return newest


def rotate(folder: Path, keep: int, best: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and that of step `best`; call it after a commit."""
    checkpoints = list_checkpoints(folder)
    finished = [path for path in checkpoints if (path / _MANIFEST).is_file()]
    kept = [*finished[:keep], *(path for path in finished if step_of(path) == best)]
    for checkpoint in checkpoints:
        if checkpoint in kept:
            continue
        try:
            (checkpoint / _MANIFEST).unlink(missing_ok=True)  # first: half a deletion must not look whole
            shutil.rmtree(checkpoint)
        except OSError as error:
            raise HfkitError(f"cannot delete {checkpoint}: {first_line(error)}; fix that, then --resume") from error


class Stop:
    """Ctrl-C and SIGTERM stop a run at the end of a step; a second Ctrl-C stops it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # Python accepts handlers nowhere else
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
        with contextlib.suppress(RuntimeError):  # the signal arrived while something else was writing to stderr
            note("stopping: this step is finished and saved first")

    def asked(self) -> bool:
        """Whether any process was asked to stop; all of them must call this together."""
        return processes.any_of(self.signal is not None)
