"""What a file of a corpus holds, and its text: encodings, compression, and where a bad byte stands."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError

_CHUNK = 1 << 20  # bytes
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def kind_of(path: Path, chosen: bool) -> str | None:
    """What a file holds, by its content and then by its name; None for what is no text."""
    try:
        with _open(path) as file:
            head = file.read(_CHUNK)
    except (OSError, EOFError, zlib.error) as error:
        raise HfkitError(f"cannot read the corpus ({path}): {getattr(error, 'strerror', None) or error}") from error
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    binary = b"\0" in head[:8192] and _encoding(head) == "utf-8-sig"
    if binary or not head.strip():
        if chosen:
            what = "is no text: convert it to UTF-8" if binary else "is empty: there is nothing to learn"
            raise HfkitError(f"the corpus {what} ({path})")
        return None
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".txt", ".md")):
        return "text"
    if name.endswith((".csv", ".tsv")):
        return "table"
    start = head.decode(_encoding(head), "replace").lstrip()
    if start[0] == "[" and name.endswith(".json"):
        return "json"
    try:  # a JSON object that ends with its line
        return "lines" if isinstance(json.loads(start.split("\n", 1)[0]), dict) else "text"
    except (ValueError, RecursionError):
        if name.endswith((".json", ".jsonl", ".ndjson")):
            return "json" if name.endswith(".json") else "lines"
        return "text"


def _open(path: Path) -> Any:
    file = path.open("rb")
    if file.peek(2)[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    return file


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), "utf-8-sig")


def read_text(path: Path, errors: str) -> Iterator[str]:
    """The text of a file, newlines as \\n, without its byte-order mark."""
    position, lines, data = 0, 1, b""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    with _open(path) as file:
        decoder = None
        try:
            while data := file.read(_CHUNK):
                decoder = decoder or codecs.getincrementaldecoder(_encoding(data))(errors)
                text = decoder.decode(data)
                lines, position = lines + text.count("\n"), position + len(data)
                yield newlines.decode(text)
            yield newlines.decode(decoder.decode(b"", True) if decoder else "", True)
        except UnicodeDecodeError as error:
            start = position + len(data) - len(error.object) + error.start
            line = lines + error.object[: error.start].count(b"\n")
            raise HfkitError(
                f"not {error.encoding.upper()} ({path}, line {line}, byte {start + 1}): convert it, "
                "or --errors replace"
            ) from None
        except (EOFError, zlib.error, OSError) as error:
            raise HfkitError(f"cannot read the corpus ({path}): {error}") from error
