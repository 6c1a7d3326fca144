"""The rows of tables, JSON, Parquet, Arrow and Hub data sets, each with the place where it stands."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError
from hfkit.files import read_text
from hfkit.options import CorpusOptions
from hfkit.sources import reach_hub

csv.field_size_limit(1 << 30)  # a field may be a book
Row = tuple[dict[str, Any], str]


def read_rows(path: Path, kind: str, errors: str) -> Iterator[Row]:
    """Rows of a table or of JSON, each with where it stands."""
    if kind in ("parquet", "arrow"):
        yield from _columnar_rows(path, kind)
        return
    chunks = read_text(path, errors)
    if kind == "table":
        yield from _table_rows(path, chunks)
    elif kind == "lines":
        for number, line in enumerate(_lines(chunks), 1):
            if line.strip():
                yield _object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
    else:
        value = _parse("".join(chunks), str(path))
        if isinstance(value, dict):  # {"data": [...]}
            value = next((v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)), [value])
        for number, row in enumerate(value, 1):
            yield _object(row, f"{path}, row {number}")


def _lines(chunks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        yield from whole
    yield rest


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise HfkitError(f"not JSON ({where}): {reason}") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise HfkitError(f'not an object ({where}): write rows such as {{"text": ...}}')
    return row, where


def _table_rows(path: Path, chunks: Iterable[str]) -> Iterator[Row]:
    lines = (line + "\n" for line in _lines(chunks))
    header = next(lines)
    delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t|", key=header.count)
    number = 1
    try:
        names = next(csv.reader([header], delimiter=delimiter, strict=True))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            number = reader.line_num + 1
            if not any(row):  # an empty line
                continue
            if len(row) != len(names):
                raise csv.Error(f"{len(row)} fields, the header has {len(names)}")
            yield dict(zip(names, row, strict=True)), f"{path}, line {number}"
    except csv.Error as error:
        raise HfkitError(f"not a table ({path}, line {number}): {error}") from None


def _columnar_rows(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            batches = pq.ParquetFile(path).iter_batches(batch_size=1024)
        else:
            source = pa.memory_map(str(path))
            try:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                batches = iter(pa.ipc.open_stream(source))
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}, row {number}"
    except (pa.ArrowException, OSError) as error:
        raise HfkitError(f"cannot read the corpus ({path}): {str(error).splitlines()[0]}") from error


def read_hub_rows(name: str, options: CorpusOptions) -> Iterator[Row]:
    """Rows of a data set of the Hub."""
    from datasets import load_dataset
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        reach_hub(name)
    try:
        rows = load_dataset(
            name, options.dataset_config_name, split=options.dataset_split, streaming=options.streaming
        )
        for number, row in enumerate(rows, 1):
            yield row, f"hf://{name}, row {number}"
    except Exception as error:  # the Hub's and the format's own errors, of many classes
        raise HfkitError(f"cannot read hf://{name}: {str(error).splitlines()[0]}") from error
