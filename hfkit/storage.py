"""Files that appear whole or not at all, and folders that one process writes at a time."""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from hfkit.errors import HfkitError


def write_text(path: Path, text: str) -> None:
    """Write a file aside, make it durable, then give it its name: a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Every file in `folder` on the disk, with the modes that the umask gives (safetensors: 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(0o666 & ~mask)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(path)


def publish(staging: Path, target: Path) -> None:
    """Give a finished folder its name. What stood there goes only when the new one is in place."""
    make_durable(staging)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(staging, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_writable(folder: Path) -> None:
    """Create `folder` and see that files can be written there.

    Raises:
        HfkitError: they cannot.
    """
    probe = folder / f".{os.getpid()}.probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HfkitError(f"cannot write to {folder}: {reason}; name another --output-dir") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink()


def check_space(folder: Path, needed: int) -> None:
    """HfkitError if fewer than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HfkitError(f"{folder} has {free:,} bytes free, {needed:,} are needed: make room, then --resume")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; it is free again when the process ends, however it ends.

    Raises:
        HfkitError: another process holds it; the message names it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise HfkitError(f"{folder} is in use by {holder}: wait for it, or name another --output-dir") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
