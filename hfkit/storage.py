"""Files that appear whole or not at all, folders that one process writes at a time, and what in them is hfkit's.

Only what hfkit wrote is ever replaced, deleted or given other permissions. Each output folder holds a list of the
names that hfkit wrote there (`.hfkit.json`); everything else belongs to someone else.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfkit.console import note
from hfkit.errors import HfkitError, LockedError, first_line

LIST, LOCK = ".hfkit.json", ".hfkit.lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.hfkit")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def temporary(path: Path) -> Path:
    """A name beside `path` that only this process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.hfkit")


def owned(folder: Path) -> set[str]:
    """Names in `folder` that hfkit wrote, from the list that it keeps there; none where there is no list."""
    try:
        names = json.loads((folder / LIST).read_text("utf-8"))["files"]
        return {name for name in names if isinstance(name, str) and Path(name).name == name != ".."}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def add_owned(folder: Path, names: Iterable[str]) -> None:
    """Add `names` to the list of what hfkit writes in `folder`. Call it before they are written."""
    listed = owned(folder)
    if not {*names} <= listed:
        write_text(folder / LIST, json.dumps({"files": sorted({*listed, *names})}))


def _is_ours(path: Path, listed: set[str]) -> bool:
    return path.name in listed or path.name in (LIST, LOCK) or bool(_TEMPORARY.fullmatch(path.name))


def find_foreign(folder: Path) -> list[str]:
    """Paths below `folder`, relative to it, that hfkit did not write; hidden files included."""
    listed, foreign = owned(folder), []
    for path in sorted(folder.iterdir()):
        if not _is_ours(path, listed):
            foreign.append(path.name)
        elif (path / LIST).is_file() and not path.is_symlink():
            foreign += [f"{path.name}/{name}" for name in find_foreign(path)]
    return foreign


def check_owned(folder: Path, *, hidden: bool = False) -> None:
    """See that hfkit wrote everything in `folder`. Hidden files do not matter unless `hidden`: nobody touches them.

    Raises:
        HfkitError: it did not; the message names what is someone else's.
    """
    foreign = [name for name in find_foreign(folder) if hidden or not re.search(r"(^|/)\.", name)]
    if foreign:
        more = f" and {len(foreign) - 2} more" if len(foreign) > 2 else ""
        raise HfkitError(
            f"{folder} holds {', '.join(foreign[:2])}{more}, which hfkit did not write: name another --output-dir"
        )


def remove_owned(folder: Path, *, keep: Iterable[str] = ()) -> None:
    """Delete what hfkit wrote in `folder`, but for the names in `keep`, the list and the lock."""
    listed = owned(folder)
    for path in sorted(folder.iterdir()):
        if path.name in (LIST, LOCK, *keep) or not _is_ours(path, listed):
            continue
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif (path / LIST).is_file():
            remove_owned(path)
            for name in (LIST, LOCK):
                (path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something foreign is in it
                path.rmdir()
        else:
            shutil.rmtree(path)


def remove_temporary(folder: Path) -> None:
    """Delete what processes that were killed have left behind."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file aside, make it durable, then give it its name: a crash leaves the old file or the new one."""
    check_regular(path)
    aside = temporary(path)
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


def check_regular(path: Path) -> None:
    """HfkitError where `path` is a device, a pipe or a folder, which must not be replaced by a file."""
    if path.exists() and not path.is_file():
        raise HfkitError(f"{path} is not a regular file: name another file")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Write every file of a folder that hfkit alone has written to the disk."""
    _make_durable([folder, *folder.rglob("*")])


def make_names_durable(folder: Path, names: Iterable[str]) -> None:
    """The same for these files of a folder in which others may stand."""
    _make_durable([folder, *(folder / name for name in names)])


def _make_durable(paths: list[Path]) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted(paths, reverse=True):  # a folder after what is in it
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors writes 0600
            with path.open("rb") as file:
                os.fsync(file.fileno())


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
    probe = temporary(folder / "probe")
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
        LockedError: another process holds it; the message names it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise HfkitError(f"cannot lock {folder}: {first_line(error)} ({LOCK}); name another --output-dir") from error
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            used = f"{folder} is in use by {_holder(folder)}"
            if not wait:
                raise LockedError(f"{used}: wait for it, or name another --output-dir") from None
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
        if text := (folder / LOCK).read_text():
            return text
        time.sleep(0.02)
    return "another process"
