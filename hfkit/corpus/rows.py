"""The rows of tables, JSON, Parquet and Arrow files, and of data sets on the Hub."""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from hfkit.corpus.formats import read_text, split_lines, unpacked
from hfkit.errors import HfkitError, first_line
from hfkit.hub import reach_hub
from hfkit.options import CorpusOptions, DataOptions

csv.field_size_limit(1 << 30)  # a field may be a book
_BATCH = 128  # rows
_SURROGATE = re.compile("[\ud800-\udfff]")  # an unpaired one: JSON can express it, UTF-8 cannot
Row = tuple[dict[str, Any], str]  # columns, and where the row is: "FILE, line N"


def read_rows(path: Path, kind: str, errors: str) -> Iterator[Row]:
    """Rows of a file of this kind. A JSON array is read at once, all else in small parts.

    Raises:
        HfkitError: the file is damaged; the message has the line or the row.
    """
    match kind:
        case "csv" | "tsv":
            return _read_table(path, split_lines(read_text(path, errors)), kind)
        case "lines":
            return _read_lines(path, errors)
        case "json":
            return _read_array(path, errors)
        case _:
            return _read_columnar(path, kind)


def column_names(row: Iterable[Any]) -> str:
    """The columns of a row, for a message."""
    return ", ".join(map(repr, row))


def _read_lines(path: Path, errors: str) -> Iterator[Row]:
    for number, line in enumerate(split_lines(read_text(path, errors)), 1):
        if line.strip():
            yield _check_object(_parse_json(line, path, number, errors), f"{path}, line {number}")


def _read_array(path: Path, errors: str) -> Iterator[Row]:
    value = _parse_json("".join(read_text(path, errors)), path, 1, errors)
    if isinstance(value, dict):  # {"data": [...]}, or a single row
        arrays = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = arrays[0] if arrays and "messages" not in value else [value]
    if not isinstance(value, list):
        raise HfkitError(f"no rows ({path}): write an array of objects, or an object on each line")
    for number, row in enumerate(value, 1):
        yield _check_object(row, f"{path}, row {number}")


def _parse_json(text: str, path: Path, line: int, errors: str) -> Any:
    """The value of a JSON text that starts on `line` of a file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise HfkitError(f"not valid JSON ({where}): {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise HfkitError(f"not valid JSON ({path}, line {line}): {first_line(error)}") from None
    if "\\ud" in text or "\\uD" in text:
        decoded = json.dumps(value, ensure_ascii=False)
        if _SURROGATE.search(decoded):
            if errors == "strict":
                raise HfkitError(f"an unpaired surrogate ({path}, line {line}): fix it, or --errors replace")
            value = json.loads(_SURROGATE.sub("\ufffd", decoded))
    return value


def _check_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise HfkitError(f'not an object ({where}): write rows such as {{"text": ...}}')
    return row, where


def _read_table(path: Path, lines: Iterator[str], kind: str) -> Iterator[Row]:
    header = next(lines)
    delimiter = "\t" if kind == "tsv" else max(",;\t|", key=header.count)
    reader = csv.reader((line + "\n" for line in chain([header], lines)), delimiter=delimiter, strict=True)
    names: list[str] = []
    start = 1  # line of the row, which may have several
    try:
        for row in reader:
            if names and any(row):  # not an empty line
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} fields, the header has {len(names)}")
                yield dict(zip(names, row, strict=True)), f"{path}, line {start}"
            names, start = names or row, reader.line_num + 1
    except csv.Error as error:
        raise HfkitError(f"not a valid table ({path}, line {start}): {error}") from None


def _read_columnar(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        with unpacked(path) as plain, pa.memory_map(str(plain)) as source:
            for batch in _read_batches(source, kind):
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield row, f"{path}, row {number}"
    except (pa.ArrowException, ValueError, OSError) as error:  # ValueError: also a string that is not UTF-8
        raise HfkitError(f"cannot read the corpus ({path}, after row {number}): {first_line(error)}") from error


def _read_batches(source: Any, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    match kind:
        case "parquet":
            yield from pq.ParquetFile(source).iter_batches(batch_size=_BATCH)
        case "arrow":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        case _:
            yield from pa.ipc.open_stream(source)


def read_hub_rows(name: str, options: CorpusOptions) -> Iterator[Row]:
    """Rows of a data set on the Hub.

    Raises:
        HfkitError: the Hub cannot be reached within seconds, or the data set cannot be read.
    """
    from datasets import ClassLabel, load_dataset
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        try:
            reach_hub(name)
        except HfkitError as error:
            raise HfkitError(
                f"the Hub cannot be reached ({constants.ENDPOINT}): go online, set HF_ENDPOINT to a mirror, "
                f"or HF_HUB_OFFLINE=1 if {name} is cached"
            ) from error
    streaming = isinstance(options, DataOptions) and options.streaming
    number = 0
    try:
        # The prefix keeps `datasets` from reading a local folder of the same name.
        url = f"hf://datasets/{name}"
        rows = load_dataset(url, options.dataset_config_name, split=options.dataset_split, streaming=streaming)
        features = getattr(rows, "features", None) or {}
        labels = {
            column: dict(enumerate(kind.names)) for column, kind in features.items() if isinstance(kind, ClassLabel)
        }
        for number, row in enumerate(rows, 1):
            # A ClassLabel is stored as a number; -1 means that the row has no label.
            row |= {column: names.get(row[column]) for column, names in labels.items()}
            yield row, f"hf://{name}, row {number}"
    except Exception as error:  # the Hub's and the format's own errors, of many classes
        raise HfkitError(f"cannot read hf://{name} (after row {number}): {first_line(error)}") from error
