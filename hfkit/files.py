"""What a file of a corpus holds, and its text: encodings, compression, and where a bad byte stands."""

import codecs
import contextlib
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hfkit.errors import HfkitError

_CHUNK = 1 << 20  # bytes
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "stream"}
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
_DAMAGE = (OSError, EOFError, zlib.error)  # of a file, or of what is compressed in it
# What `datasets` writes beside the rows.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def kind_of(path: Path, chosen: bool) -> str | None:
    """What a file holds, by its content and then by its name; None for what is no text.

    The kinds are text, csv, tsv, json (one array), lines (a JSON object in each), parquet, arrow and stream (Arrow's
    two formats). Unless the file was `chosen`, but stood in a folder, JSON that has no rows in it is a text.
    """
    try:
        with _open(path) as file:
            head = file.read(_CHUNK)
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
    if kind := next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None):
        return kind
    start = head.decode(_encoding(head), "replace").lstrip()
    if not start and chosen:
        raise HfkitError(f"the corpus is empty ({path}): it holds no text")
    if not start or (not chosen and ("\0" in start[:8192] or path.name in _ABOUT)):
        return None
    name = path.name.lower().removesuffix(".gz")
    kinds = {".txt": "text", ".md": "text", ".csv": "csv", ".tsv": "tsv", ".jsonl": "lines", ".ndjson": "lines"}
    return kinds.get(Path(name).suffix) or _json_kind(start, name.endswith(".json"), chosen)


def _json_kind(start: str, named: bool, chosen: bool) -> str:
    """Whether a file is JSON, and of which kind; named: its name says that it is."""
    line, _, rest = start.partition("\n")
    try:
        whole = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        whole = False
    if whole and rest.lstrip()[:1] == "{":
        return "lines"
    if named and (chosen or re.match(r'(\{\s*"[^{}]*)?\[\s*\{', start)):
        return "json"
    return "lines" if whole and chosen else "text"


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")  # type: ignore[return-value]


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), "utf-8-sig")


def _unreadable(path: Path, error: Exception) -> HfkitError:
    return HfkitError(f"cannot read the corpus ({path}): {getattr(error, 'strerror', None) or error}")


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """`path` itself, or a file for the time being with what is compressed in it.

    Raises:
        HfkitError: what is compressed is damaged.
    """
    try:
        with _open(path) as file, contextlib.ExitStack() as stack:
            if isinstance(file, gzip.GzipFile):
                copy = stack.enter_context(tempfile.NamedTemporaryFile())
                shutil.copyfileobj(file, copy)
                copy.flush()
                path = Path(copy.name)
            yield path
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def read_text(path: Path, errors: str) -> Iterator[str]:
    """The text of a file, newlines as \\n, without its byte-order mark.

    errors: of bytes that are no text: "strict" or "replace". So is NUL: it may be valid, but what has it is a binary.

    Raises:
        HfkitError: it is damaged, or has such a byte; the message has the line and the byte, counted from 1.
    """
    position, line, decoder, encoding = 0, 1, None, ""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    try:
        with _open(path) as file:
            while True:
                data = file.read(_CHUNK)
                if not decoder:
                    encoding = _encoding(data)
                    decoder = codecs.getincrementaldecoder(encoding)(errors)
                if encoding == "utf-8-sig":
                    data = data.replace(b"\0", b"\xff")
                text = newlines.decode(decoder.decode(data, not data), not data)
                yield text
                position, line = position + len(data), line + text.count("\n")
                if not data:
                    return
    except UnicodeDecodeError as error:
        byte = position + len(data) - len(error.object) + error.start + 1
        before: Any = error.object[: error.start].decode(error.encoding, "ignore")
        line += newlines.decode(before, True).count("\n")
        name = encoding.removesuffix("-sig").upper()
        raise HfkitError(
            f"not {name} text ({path}, line {line}, byte {byte}): convert it, or --errors replace"
        ) from None
    except _DAMAGE as error:
        raise _unreadable(path, error) from error
