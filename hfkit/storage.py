"""Files that appear whole or not at all, and folders that one process writes at a time."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hfkit.console import note
from hfkit.errors import HfkitError, first_line

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, make it durable, then give it its name: a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:  # a full disk does not say where
        raise HfkitError(f"cannot write {path}: {first_line(error)}; mend that and run it again") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


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
    if target.exists():
        _exchange(staging, target)
        sync_folder(target.parent)
        shutil.rmtree(staging)
    else:
        os.replace(staging, target)
        sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Two folders change names, in one step where the system has that (Linux)."""
    with contextlib.suppress(AttributeError):
        rename = ctypes.CDLL(None).renameat2
        if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
            return
    old = other.with_name(f".{other.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(other, old)
    os.replace(one, other)
    os.replace(old, one)


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


def folder_size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_space(folder: Path, needed: int) -> None:
    """HfkitError if fewer than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HfkitError(f"{folder} has {free:,} bytes free, {needed:,} are needed: make room, then --resume")


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False, tell: bool = True) -> Iterator[None]:
    """Hold `folder` for this process; it is free again when the process ends, however it ends.

    wait: until it is free, where that may be. tell: say so, as that may take long.

    Raises:
        HfkitError: another process holds it; the message names it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            used = f"{folder} is in use by {_holder(folder)}"
            if not wait:
                raise HfkitError(f"{used}: wait for it, or name another --output-dir") from None
            if tell:
                note(f"{used}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _holder(folder: Path) -> str:
    """What the process that holds `folder` says of itself; just after it took it, nothing yet."""
    for _ in range(10):
        if text := (folder / ".lock").read_text():
            return text
        time.sleep(0.02)
    return "another process"
