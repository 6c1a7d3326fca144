"""What a file of a corpus holds, and its text: formats, encodings, compression, and where an invalid byte is."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError, first_line

LONGEST = 1 << 28  # characters of a line, a field or a JSON value: a small compressed file may hold gigabytes of zeros
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises, compressed or not
TEXTS = ("text", "notebook")  # kinds of files without rows
_CHUNK = 1 << 20  # bytes
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "stream"}
_SUFFIXES = {"txt": "text", "md": "text", "ipynb": "notebook", "csv": "csv", "tsv": "tsv"}
_SUFFIXES |= {"jsonl": "lines", "ndjson": "lines"}
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before UTF-16's, which begins like the first
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What hfkit cannot read, by its first bytes, and what to do instead.
_FOREIGN = {
    b"%PDF-": "a PDF: convert it to text (pdftotext FILE)",
    b"PK\x03\x04": "a zip archive: unpack it (unzip FILE) and give the folder",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard: unpack it first (unzstd FILE)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive: unpack it (7z x FILE) and give the folder",
    b"Rar!": "a RAR archive: unpack it (unrar x FILE) and give the folder",
    b"\xd0\xcf\x11\xe0": "an old Office document: save it as text or CSV",
    b"{\\rtf": "a rich text document: save it as plain text",
    b"SQLite format 3": "an SQLite database: export a table as CSV",
    b"GGUF": "a model: did you mean -m FILE?",
}
# Documents that are zip archives, by a name that each of them has in it.
_ZIPPED = {
    b"word/document.xml": "a Word document: save it as plain text",
    b"xl/workbook.xml": "an Excel workbook: save it as CSV",
    b"ppt/presentation.xml": "a PowerPoint file: save it as plain text",
    b"mimetypeapplication/epub": "an e-book: convert it to text (pandoc FILE -o FILE.txt)",
    b"mimetypeapplication/vnd.oasis": "an OpenDocument file: save it as plain text or CSV",
}


def kind_of(path: Path, chosen: bool) -> str | None:
    """What a file holds, decided by its content first and its name second; None if it holds no text.

    The kinds are text, notebook, csv, tsv, json (one array or object), lines (a JSON object on each line), parquet,
    arrow and stream (the two formats of Arrow). A file that was not `chosen` by name but found in a folder is rows
    only where that is certain: a JSON file without an array of objects is read as text there.

    Raises:
        HfkitError: the file cannot be read, or was chosen and is empty or of a format that hfkit does not read.
    """
    try:
        with open_file(path) as file:
            head = file.read(_CHUNK)
    except DAMAGE as error:
        raise _read_error(path, error) from error
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    if foreign := _foreign_format(path, head):
        if not chosen:
            return None
        name, _, remedy = foreign.replace("FILE", str(path)).partition(": ")
        raise HfkitError(f"{path} is {name}, which is not read as a corpus: {remedy}")
    start = head.decode(_encoding(head), "replace").lstrip()
    if not start and chosen:
        raise HfkitError(f"the corpus is empty ({path}): it holds no text")
    if not start or (not chosen and "\0" in start[:8192]):
        return None
    suffix = re.sub(r"\.(gz|bz2|xz)$", "", path.name.lower()).rpartition(".")[2]
    return _SUFFIXES.get(suffix) or _json_kind(start, suffix == "json", chosen)


def _foreign_format(path: Path, head: bytes) -> str | None:
    """What a file is that hfkit does not read, and what to do; None for others."""
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it (tar xf FILE) and give the folder"
    if path.suffix == ".safetensors":
        return _FOREIGN[b"GGUF"]
    inside = _ZIPPED.items() if head.startswith(b"PK\x03\x04") else ()
    matches = [foreign for name, foreign in inside if name in head]
    matches += [foreign for magic, foreign in _FOREIGN.items() if head.startswith(magic)]
    return matches[0] if matches else None


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


def open_file(path: Path) -> Any:
    """Open a file to read its bytes, decompressed."""
    with path.open("rb") as file:
        head = file.read(6)
    for magic, open_compressed in _COMPRESSED.items():
        if head.startswith(magic):
            return open_compressed(path)
    return path.open("rb")


def _encoding(head: bytes) -> str:
    return next((encoding for mark, encoding in _BOMS.items() if head.startswith(mark)), "utf-8-sig")


def _read_error(path: Path, error: Exception) -> HfkitError:
    return HfkitError(f"cannot read the corpus ({path}): {first_line(error)}")


def read_text(path: Path, errors: str) -> Iterator[str]:
    r"""The text of a file in chunks: every line ends with \n, and the byte-order mark is left out.

    errors: what to do with invalid bytes, "strict" or "replace". NUL counts as invalid: a file that has it is binary.

    Raises:
        HfkitError: the file is damaged or has an invalid byte; the message has the line and the byte, from 1.
    """
    position, line, decoder, encoding = 0, 1, None, ""
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    try:
        with open_file(path) as file:
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
        place = f"{path}, line {line}, byte {byte}"
        name = encoding.removesuffix("-sig").upper()
        raise HfkitError(f"not {name} text ({place}): convert it, or --errors replace") from None
    except DAMAGE as error:
        raise _read_error(path, error) from error


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
        if size > LONGEST:
            limit = f"{LONGEST >> 20} million characters"
            raise HfkitError(f"a line of more than {limit} ({path}, line {number}): split it, or give a plain text")
        for line in others:
            yield "".join(parts)
            parts, size, number = [line], len(line), number + 1
    yield "".join(parts)
