"""Files that appear whole or not at all, and folders that one process writes at a time.

hfkit replaces, deletes and changes only what it wrote itself. Each output folder holds a list of those names
(`.hfkit.json`), with the SHA-256 of weights; everything else in it belongs to someone else.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hfkit.console import note
from hfkit.errors import HfkitError, LockedError, first_line

LIST, LOCK = ".hfkit.json", ".hfkit.lock"
_WEIGHTS = (".safetensors", ".gguf")
_TEMPORARY = re.compile(r"\..+\.\d+\.hfkit")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def temporary(path: Path) -> Path:
    """A name beside `path` that only this process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.hfkit")


def _read_list(folder: Path) -> dict[str, str | None]:
    """Name -> SHA-256, or None. Empty without a list."""
    try:
        files = json.loads((folder / LIST).read_text("utf-8"))["files"]
        names = [name for name in files if isinstance(name, str) and Path(name).name == name != ".."]
        return {name: files[name] if isinstance(files, dict) else None for name in names}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def owned(folder: Path) -> set[str]:
    """Names in `folder` that hfkit wrote, from the list in the folder. Empty without a list."""
    return {*_read_list(folder)}


def add_owned(folder: Path, names: Iterable[str], weights: Path | None = None) -> None:
    """Add `names` to the list of what hfkit writes in `folder`. Call it before they are written.

    weights: a folder with the weight files that will be among them; `check_weights` compares with these.
    """
    listed = _read_list(folder)
    files = listed | {name: listed.get(name) for name in names}
    files |= {path.name: sha256_of(path) for path in weights.iterdir() if path.suffix in _WEIGHTS} if weights else {}
    if files != listed:
        write_text(folder / LIST, json.dumps({"files": dict(sorted(files.items()))}))


def check_weights(folder: Path) -> None:
    """Raise HfkitError if weights in `folder` differ from what hfkit wrote there. Others' folders are not checked."""
    for name, digest in _read_list(folder).items():
        path = folder / name
        if digest and path.is_file() and sha256_of(path) != digest:
            advice = f"make them again, or, if you changed them on purpose, delete {folder / LIST}"
            raise HfkitError(f"the weights are not those that hfkit wrote ({path}): {advice}")


def sha256_of(path: Path) -> str:
    """SHA-256 of the content of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_ours(path: Path, listed: set[str]) -> bool:
    return path.name in listed or path.name in (LIST, LOCK) or bool(_TEMPORARY.fullmatch(path.name))


def find_foreign(folder: Path) -> list[str]:
    """Relative paths of what hfkit did not write in `folder`, hidden files included."""
    listed, foreign = owned(folder), []
    for path in sorted(folder.iterdir()):
        if not _is_ours(path, listed):
            foreign.append(path.name)
        elif (path / LIST).is_file() and not path.is_symlink():
            foreign += [f"{path.name}/{name}" for name in find_foreign(path)]
    return foreign


def check_owned(folder: Path, *, hidden: bool = False) -> None:
    """Check that hfkit wrote everything in `folder`.

    hidden: check hidden files too. Otherwise they do not matter, as nobody touches them.

    Raises:
        HfkitError: someone else wrote a file there; the message names it.
    """
    foreign = [name for name in find_foreign(folder) if hidden or not re.search(r"(^|/)\.", name)]
    if foreign:
        more = f" and {len(foreign) - 2} more" if len(foreign) > 2 else ""
        raise HfkitError(
            f"{folder} holds {', '.join(foreign[:2])}{more}, which hfkit did not write: name another --output-dir"
        )


def remove_owned(folder: Path, *, keep: Iterable[str] = ()) -> None:
    """Delete what hfkit wrote in `folder`, except the names in `keep`, the list and the lock."""
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
            with contextlib.suppress(OSError):  # someone else's file is in it
                path.rmdir()
        else:
            shutil.rmtree(path)


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files of processes that were killed."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file, sync it, then rename it to `path`: a crash leaves the old file or the new one."""
    check_regular(path)
    aside = temporary(path)
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:  # the error of a full disk does not name the file
        raise HfkitError(f"cannot write {path}: {first_line(error)}; fix that and try again") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def check_regular(path: Path, *, links: bool = True) -> None:
    """Raise HfkitError if `path` is a device, a pipe or a folder; without `links`, also if it is a link."""
    if (path.exists() and not path.is_file()) or (path.is_symlink() and not links):
        raise HfkitError(f"{path} is not a regular file: name another file")


def check_free(path: Path, *, overwrite: bool, flag: str) -> None:
    """Raise HfkitError if something exists at `path`, unless it may be overwritten. `flag` names another place."""
    if path.exists() and not overwrite:
        raise HfkitError(f"{path} exists: --overwrite replaces it, or name another {flag}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can sync a folder (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_durable(folder: Path) -> None:
    """Sync everything in a folder that hfkit alone has written, and give files the mode of the umask."""
    make_names_durable(folder, (path.relative_to(folder) for path in folder.rglob("*")))


def make_names_durable(folder: Path, names: Iterable[str | Path]) -> None:
    """`make_durable` for these files of a folder that may hold files of others."""
    mask = os.umask(0)
    os.umask(mask)
    for path in sorted([folder, *(folder / name for name in names)], reverse=True):  # a folder after what is in it
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            path.chmod(0o666 & ~mask)  # safetensors writes 0600
            with path.open("r+b") as file:
                os.fsync(file.fileno())


def publish(staging: Path, target: Path) -> None:
    """Rename a finished folder to `target`. A folder that is there goes only after the new one is in place."""
    make_durable(staging)
    if target.exists():
        _exchange(staging, target)
        sync_folder(target.parent)
        shutil.rmtree(staging)
    else:
        os.replace(staging, target)
        sync_folder(target.parent)


def _exchange(staging: Path, target: Path) -> None:
    """Exchange the names of two folders, in one step where the system can (Linux): a kill loses neither."""
    with contextlib.suppress(AttributeError, TypeError):  # another C library, Windows
        rename = ctypes.CDLL(None).renameat2
        if rename(_AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    os.replace(staging, target)
    os.replace(old, staging)


def check_home(folder: Path) -> None:
    """Raise HfkitError for a path that still begins with "~", which would be a new folder of that name here."""
    if folder.parts[:1] == ("~",):
        raise HfkitError(f"no home directory ({folder}): set HOME, or HF_HOME to a folder of yours")


def make_writable(folder: Path) -> None:
    """Create `folder` and check that files can be written there. Raises HfkitError if they cannot."""
    check_home(folder)
    probe = temporary(folder / "probe")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
    except (OSError, ValueError) as error:
        raise HfkitError(f"cannot write to {folder}: {first_line(error)}; name another --output-dir") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink()


def check_space(folder: Path, needed: int) -> None:
    """Raise HfkitError if fewer than `needed` bytes are free in `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HfkitError(f"{folder} has {free:,} bytes free, {needed:,} are needed: make room, then --resume")


def lock_file(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends. False if another process holds it, unless `wait`."""
    from filelock import lock_descriptor

    return lock_descriptor(file.fileno(), blocking=wait)


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False, tell: bool = True) -> Iterator[None]:
    """Hold `folder` for this process. It is free again when the process ends, however it ends.

    wait: wait until it is free. tell: print a note then, as that may take long.

    Raises:
        LockedError: another process holds it; the message names the process and its host.
    """
    path = folder / LOCK
    try:
        # Never through a link that somebody put there; Windows does not follow one either when it creates a file.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise HfkitError(f"cannot lock {folder}: {first_line(error)} ({LOCK}); name another --output-dir") from error
    with os.fdopen(descriptor, "r+b") as file, contextlib.ExitStack() as end:
        if not lock_file(file):
            message = f"{folder} is in use by {_holder(path)}"
            if not wait:
                raise LockedError(f"{message}: wait for it, or name another --output-dir")
            if tell:
                note(f"{message}: waiting for it")
            lock_file(file, wait=True)
        file.truncate(0)
        # Windows keeps others from reading the locked byte, the first one.
        file.write(f" process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        end.callback(file.truncate, 0)  # or the next holder passes for this process until it has written its own name
        yield


def _holder(path: Path) -> str:
    """The process that holds a lock, as it wrote it there. Right after it took the lock nothing is written yet."""
    for _ in range(10):
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(1)
            if text := file.read().decode("utf-8", "replace"):
                return text
        time.sleep(0.02)
    return "another process"
