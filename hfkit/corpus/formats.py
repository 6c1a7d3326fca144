"""What a file of a corpus holds, and its text: encodings, compression, and where a bad byte stands."""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from hfkit.errors import HfkitError, first_line
from hfkit.hub import endpoint, reach_hub
from hfkit.options import CorpusOptions, DataOptions

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


csv.field_size_limit(1 << 30)  # a field may be a book
_ROWS = 128  # that are unpacked together
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can say it, UTF-8 cannot
Row = tuple[dict[str, Any], str]


def read_rows(path: Path, kind: str, errors: str) -> Iterator[Row]:
    """Rows of a file of this kind, each with where it stands. An array in JSON is read whole, the rest bit by bit.

    Raises:
        HfkitError: the file is damaged; the message has the line, or the row.
    """
    match kind:
        case "csv" | "tsv":
            return _table_rows(path, _lines(read_text(path, errors)), kind)
        case "lines":
            return _line_rows(path, errors)
        case "json":
            return _array_rows(path, errors)
        case _:
            return _columnar_rows(path, kind)


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    """Lines as they are in a text file: not at U+2028 and the like, where str.splitlines would end them."""
    parts: list[str] = []
    for chunk in chunks:
        first, *others = chunk.split("\n")
        parts.append(first)
        for line in others:
            yield "".join(parts)
            parts = [line]
    yield "".join(parts)


def _line_rows(path: Path, errors: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(read_text(path, errors)), 1):
        if line.strip():
            yield _object(_parse_json(line, path, number, errors), f"{path}, line {number}")


def _array_rows(path: Path, errors: str) -> Iterator[Row]:
    value = _parse_json("".join(read_text(path, errors)), path, 1, errors)
    if isinstance(value, dict):  # {"data": [...]}, or one row
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if lists and "messages" not in value else [value]
    if not isinstance(value, list):
        raise HfkitError(f"no rows ({path}): write an array of objects, or an object in each line")
    for number, row in enumerate(value, 1):
        yield _object(row, f"{path}, row {number}")


def _parse_json(text: str, path: Path, line: int, errors: str) -> Any:
    """JSON that begins at `line`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise HfkitError(f"not JSON ({where}): {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise HfkitError(f"not JSON ({path}, line {line}): {first_line(error)}") from None
    if "\\ud" in text or "\\uD" in text:
        plain = json.dumps(value, ensure_ascii=False)
        if _HALF.search(plain):
            if errors == "strict":
                raise HfkitError(f"half a surrogate pair ({path}, line {line}): mend it, or --errors replace")
            value = json.loads(_HALF.sub("\ufffd", plain))
    return value


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise HfkitError(f'not an object ({where}): write rows such as {{"text": ...}}')
    return row, where


def _table_rows(path: Path, lines: Iterator[str], kind: str) -> Iterator[Row]:
    header = next(lines)
    delimiter = "\t" if kind == "tsv" else max(",;\t|", key=header.count)
    reader = csv.reader((line + "\n" for line in chain([header], lines)), delimiter=delimiter, strict=True)
    names: list[str] = []
    begin = 1
    try:
        for row in reader:
            if names and any(row):  # not an empty line
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} fields, the header has {len(names)}")
                yield dict(zip(names, row, strict=True)), f"{path}, line {begin}"
            names, begin = names or row, reader.line_num + 1
    except csv.Error as error:
        raise HfkitError(f"not a table ({path}, line {begin}): {error}") from None


def _columnar_rows(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        with unpacked(path) as plain, pa.memory_map(str(plain)) as source:
            for batch in _batches(source, kind):
                for start in range(0, batch.num_rows, _ROWS):
                    for row in batch.slice(start, _ROWS).to_pylist():
                        number += 1
                        yield row, f"{path}, row {number}"
    except (pa.ArrowException, ValueError, OSError) as error:  # ValueError: also bytes that are not UTF-8
        raise HfkitError(f"cannot read the corpus ({path}, after row {number}): {first_line(error)}") from error


def _batches(source: Any, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    match kind:
        case "parquet":
            yield from pq.ParquetFile(source).iter_batches(batch_size=_ROWS)
        case "arrow":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        case _:
            yield from pa.ipc.open_stream(source)


def read_hub_rows(name: str, options: CorpusOptions) -> Iterator[Row]:
    """Rows of a data set of the Hub.

    Raises:
        HfkitError: it cannot be reached within seconds, or read.
    """
    from datasets import ClassLabel, load_dataset
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        try:
            reach_hub(name)
        except HfkitError as error:
            raise HfkitError(
                f"the Hub cannot be reached ({endpoint()}): go online, set HF_ENDPOINT to a mirror, "
                f"or HF_HUB_OFFLINE=1 if {name} is cached"
            ) from error
    streaming = isinstance(options, DataOptions) and options.streaming
    number = 0
    try:
        # With this prefix never a folder here that has the same name.
        whole = f"hf://datasets/{name}"
        rows = load_dataset(whole, options.dataset_config_name, split=options.dataset_split, streaming=streaming)
        kinds = getattr(rows, "features", None) or {}
        named = {column: dict(enumerate(kind.names)) for column, kind in kinds.items() if isinstance(kind, ClassLabel)}
        for number, row in enumerate(rows, 1):
            # Labels are kept as numbers there, of which -1 is none.
            row |= {column: names.get(row[column]) for column, names in named.items()}
            yield row, f"hf://{name}, row {number}"
    except Exception as error:  # the Hub's and the format's own errors, of many classes
        raise HfkitError(f"cannot read hf://{name} (after row {number}): {first_line(error)}") from error
