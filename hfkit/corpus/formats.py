"""What a file of a corpus holds, and its text: formats, encodings, compression, and where an invalid byte is."""

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
from typing import IO

from hfkit.errors import HfkitError

LONGEST_LINE = 1 << 28  # characters of a line or a field: a small compressed file may hold gigabytes of zeros
_LONGEST_VALUE = 1 << 27  # characters of a JSON object that holds all rows
_CHUNK = 1 << 20  # bytes
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "stream"}
_SUFFIXES = {
    **dict.fromkeys((".txt", ".md"), "text"), ".csv": "csv", ".tsv": "tsv", ".ipynb": "text",
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
}  # fmt: skip
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
_DAMAGE = (OSError, EOFError, zlib.error)  # what reading a damaged file raises, compressed or not
# What hfkit cannot read, by its first bytes, and what to do instead.
_FOREIGN = {
    b"%PDF-": ("a PDF", "convert it to text (pdftotext FILE)"),
    b"PK\x03\x04": ("a zip archive", "unpack it (unzip FILE) and give the folder"),
    b"BZh": ("compressed with bzip2", "unpack it first (bunzip2 FILE)"),
    b"\xfd7zXZ\0": ("compressed with xz", "unpack it first (unxz FILE)"),
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "unpack it first (unzstd FILE)"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it (7z x FILE) and give the folder"),
    b"Rar!": ("a RAR archive", "unpack it (unrar x FILE) and give the folder"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", "save it as text or CSV"),
    b"{\\rtf": ("a rich text document", "save it as plain text"),
    b"SQLite format 3": ("an SQLite database", "export a table as CSV"),
    b"GGUF": ("a model", "did you mean -m FILE?"),
}
# Documents that are zip archives, by a name that each of them has in it.
_ZIPPED = {
    b"word/document.xml": ("a Word document", "save it as plain text"),
    b"xl/workbook.xml": ("an Excel workbook", "save it as CSV"),
    b"ppt/presentation.xml": ("a PowerPoint file", "save it as plain text"),
    b"mimetypeapplication/epub": ("an e-book", "convert it to text (pandoc FILE -o FILE.txt)"),
    b"mimetypeapplication/vnd.oasis": ("an OpenDocument file", "save it as plain text or CSV"),
}  # fmt: skip
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # written by `datasets`


def kind_of(path: Path, chosen: bool) -> str | None:
    """What a file holds, decided by its content first and its name second; None if it holds no text.

    The kinds are text, csv, tsv, json (one array), lines (a JSON object on each line), parquet, arrow and stream (the
    two formats of Arrow). A file that was not `chosen` by name but found in a folder is rows only where that is
    certain: a JSON file without an array of objects is read as text there.

    Raises:
        HfkitError: the file cannot be read, or was chosen and is empty or of a format that hfkit does not read.
    """
    try:
        with _open(path) as file:
            head = file.read(_CHUNK)
    except _DAMAGE as error:
        raise _read_error(path, error) from error
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if foreign := _foreign_format(path, head):
        if not chosen:
            return None
        name, remedy = foreign
        raise HfkitError(f"{path} is {name}, which is not read as a corpus: {remedy.replace('FILE', str(path))}")
    start = head.decode(_encoding(head), "replace").lstrip()
    if not start and chosen:
        raise HfkitError(f"the corpus is empty ({path}): it holds no text")
    if not start or (not chosen and ("\0" in start[:8192] or path.name in _METADATA)):
        return None
    name = path.name.lower().removesuffix(".gz")
    return _SUFFIXES.get(Path(name).suffix) or _json_kind(start, name.endswith(".json"), chosen)


def _foreign_format(path: Path, head: bytes) -> tuple[str, str] | None:
    """What a file is that hfkit does not read, and what to do; None for others."""
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it (tar xf FILE) and give the folder"
    if path.suffix == ".safetensors":
        return _FOREIGN[b"GGUF"]
    if head.startswith(b"PK\x03\x04"):
        for name, foreign in _ZIPPED.items():
            if name in head:
                return foreign
    return next((foreign for magic, foreign in _FOREIGN.items() if head.startswith(magic)), None)


def _json_kind(start: str, named: bool, chosen: bool) -> str:
    """The kind of a file that may be JSON, by how it starts; `named`: its name ends with .json."""
    line, _, rest = start.partition("\n")
    try:
        is_object = isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        is_object = False
    if is_object and rest.lstrip()[:1] == "{":
        return "lines"
    if named and (chosen or re.match(r'(\{\s*"[^{}]*)?\[\s*\{', start)):
        return "json"
    return "lines" if is_object and chosen else "text"


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), "utf-8-sig")


def _read_error(path: Path, error: Exception) -> HfkitError:
    return HfkitError(f"cannot read the corpus ({path}): {getattr(error, 'strerror', None) or error}")


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """`path` itself, or a temporary file with its decompressed content.

    Raises:
        HfkitError: the compressed data is damaged.
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
        raise _read_error(path, error) from error


def read_text(path: Path, errors: str) -> Iterator[str]:
    r"""The text of a file in chunks: every line ends with \n, and the byte-order mark is left out.

    errors: what to do with invalid bytes, "strict" or "replace". NUL counts as invalid: a file that has it is binary.

    Raises:
        HfkitError: the file is damaged or has an invalid byte; the message has the line and the byte, from 1.
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
        # error.object is what the decoder held back from the previous chunk, followed by this chunk.
        byte = position + len(data) - len(error.object) + error.start + 1
        valid = error.object[: error.start].decode(error.encoding, "ignore")
        line += newlines.decode(valid, True).count("\n")
        name = encoding.removesuffix("-sig").upper()
        raise HfkitError(
            f"not {name} text ({path}, line {line}, byte {byte}): convert it, or --errors replace"
        ) from None
    except _DAMAGE as error:
        raise _read_error(path, error) from error


def read_whole(path: Path, errors: str) -> str:
    """The text of a file at once. HfkitError as from `read_text`, or if it is too long for that."""
    parts, size = [], 0
    for text in read_text(path, errors):
        parts.append(text)
        size += len(text)
        if size > _LONGEST_VALUE:
            limit = f"{_LONGEST_VALUE >> 20} million characters"
            raise HfkitError(f"a JSON object of more than {limit} ({path}): write each row on a line (JSON Lines)")
    return "".join(parts)


def read_lines(path: Path, errors: str) -> Iterator[str]:
    r"""Lines of a file. Only \n ends one: str.splitlines would also split at U+2028 and the like.

    Raises:
        HfkitError: as from `read_text`, or a line is too long to be read at once.
    """
    parts: list[str] = []
    size, number = 0, 1
    for text in read_text(path, errors):
        first, *others = text.split("\n")
        parts.append(first)
        size += len(first)
        if size > LONGEST_LINE:
            limit = f"{LONGEST_LINE >> 20} million characters"
            raise HfkitError(f"a line of more than {limit} ({path}, line {number}): split it, or give a plain text")
        for line in others:
            yield "".join(parts)
            parts, size, number = [line], len(line), number + 1
    yield "".join(parts)
