"""The rows of tables, JSON, Parquet and Arrow files, of data sets on the Hub, and the cells of notebooks."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from hfkit.console import note_once
from hfkit.corpus.formats import DAMAGE, LONGEST, open_file, read_lines, read_text
from hfkit.errors import HfkitError, first_line
from hfkit.hub import endpoint, reach_hub
from hfkit.options import CorpusOptions, DataOptions

csv.field_size_limit(LONGEST)
_BATCH = 128  # rows
_SURROGATE = re.compile("[\ud800-\udfff]")  # an unpaired one: JSON can express it, UTF-8 cannot
_START, _NEXT = re.compile(r"\s*\[\s*(?P<end>])?"), re.compile(r"\s*(,\s*|(?P<end>]))")  # of a JSON array
_ROW_COLUMNS = {"text", "messages", "conversations", "conversation", "prompt", "question", "chosen"}  # of a row
_ROW_TEXTS = ("content", "document", "body")  # likewise, where they are texts
Row = tuple[dict[str, Any], str]  # columns, and where the row is: "FILE, line N"


def row_error(reason: str, where: str, remedy: str = "fix or delete the row") -> HfkitError:
    """The error for a row that cannot be used."""
    return HfkitError(f"{reason} ({where}): {remedy}")


def column_names(row: Iterable[Any]) -> str:
    """The columns of a row, for a message."""
    return ", ".join(map(repr, row))


def read_rows(path: Path, kind: str, errors: str, split: str = "train") -> Iterator[Row]:
    """Rows of a file of this kind, read in small parts; only a JSON object that holds the rows is read at once.

    split: which of the arrays of a JSON object to read, if it has several. HfkitError names the line of any damage.
    """
    match kind:
        case "csv" | "tsv":
            return _read_table(path, read_lines(path, errors), kind)
        case "lines":
            return _read_lines(path, errors)
        case "json":
            return _read_json(path, errors, split)
        case _:
            return _read_columnar(path, kind)


def _read_lines(path: Path, errors: str) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path, errors), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise HfkitError(f"not valid JSON ({where}, column {error.colno}): {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise HfkitError(f"not valid JSON ({where}): {first_line(error)}") from None
            yield _check_object(_check_surrogates(value, line, where, errors), where)


def _read_json(path: Path, errors: str, split: str) -> Iterator[Row]:
    """The rows of a JSON array, or of one in a JSON object; SQuAD's articles become a row for each question."""
    start = next(filter(None, map(str.lstrip, read_text(path, errors))), "")
    values: Iterable[Any] = _read_array(path, errors)
    if not start.startswith("["):
        values = _choose_array(_read_value(path, errors), path, split)
    for number, value in enumerate(values, 1):
        row, where = _check_object(value, f"{path}, row {number}")
        if "paragraphs" in row:
            yield from _squad_rows(row, where)
        else:
            yield row, where


def _read_value(path: Path, errors: str) -> Any:
    """The only value of a JSON file."""
    return next(_read_array(path, errors, is_bare=True))


def _read_array(path: Path, errors: str, *, is_bare: bool = False) -> Iterator[Any]:
    """The values of a JSON array, one after the other: no more than one of them has to be in memory.

    is_bare: the file has a single value, without the brackets of an array.
    """
    chunks, decode = read_text(path, errors), json.JSONDecoder().raw_decode
    text, position = "", 0  # what has been read, and how much of it is done
    line, column = 1, 1  # where `text` starts
    separator = _START
    if is_bare:
        chunks, column = chain("[", chunks, "]"), 0
    while True:
        try:
            match = separator.match(text, position)
            if not match:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            if match["end"]:
                if "".join([text[match.end() :], *chunks]).strip():
                    raise json.JSONDecodeError("Extra data", text, match.end())
                return
            value, stop = decode(text, match.end())
            if stop == len(text):  # a number may go on
                raise json.JSONDecodeError("Expecting ',' or ']'", text, stop)
        except json.JSONDecodeError as error:
            start = column if error.lineno == 1 else 1
            where = f"{path}, line {line + error.lineno - 1}, column {start + error.colno - 1}"
            if len(text) - position > LONGEST:
                limit = f"{LONGEST >> 20} million characters"
                raise row_error(f"a JSON value of more than {limit}", where, "write each row on a line") from None
            more = list(islice(chunks, 1 + (len(text) >> 20)))  # as much again
            if not more:
                raise HfkitError(f"not valid JSON ({where}): {error.msg}") from None
            done = text[:position]
            column = position - done.rfind("\n") if "\n" in done else column + position
            line, text, position = line + done.count("\n"), "".join([text[position:], *more]), 0
            continue
        except (ValueError, RecursionError) as error:
            raise HfkitError(f"not valid JSON ({path}, line {line}): {first_line(error)}") from None
        yield _check_surrogates(value, text[match.end() : stop], f"{path}, line {line}", errors)
        separator, position = _NEXT, stop


def _choose_array(value: Any, path: Path, split: str) -> list[Any]:
    """The rows in a JSON object such as {"data": [...]}, or the object itself as the only row."""
    if not isinstance(value, dict):
        raise HfkitError(f"no rows ({path}): write an array of objects, or an object on each line")
    arrays = [name for name, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if not arrays or value.keys() & _ROW_COLUMNS or any(isinstance(value.get(name), str) for name in _ROW_TEXTS):
        return [value]
    if len(arrays) == 1:
        return list(value[arrays[0]])
    if split not in arrays:
        raise HfkitError(f"several arrays of rows ({path}: {column_names(arrays)}): choose one with --dataset-split")
    note_once(f"{path} has {column_names(arrays)}: reading {split!r} (--dataset-split)")
    return list(value[split])


def _squad_rows(article: dict[str, Any], where: str) -> Iterator[Row]:
    """The questions of an article in SQuAD's own format."""
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers", [])
                yield {
                    "title": article.get("title"), "context": paragraph["context"], "question": question["question"],
                    "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                }, f"{where}, question {question.get('id')}"  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise HfkitError(f"paragraphs are not as in SQuAD ({where}): {first_line(error)}") from error


def read_notebook(path: Path, errors: str) -> Iterator[str]:
    """The source of each cell of a Jupyter notebook, without outputs."""
    try:
        for cell in _read_value(path, errors)["cells"]:
            if source := "".join(cell["source"]).strip():
                yield source + "\n\n"
    except (KeyError, TypeError) as error:
        raise HfkitError(f"not a Jupyter notebook ({path}): it has no cells") from error


def _check_surrogates(value: Any, text: str, where: str, errors: str) -> Any:
    """The value of a JSON `text`, its unpaired surrogates replaced or refused."""
    if "\\ud" in text or "\\uD" in text:
        decoded = json.dumps(value, ensure_ascii=False)
        if _SURROGATE.search(decoded):
            if errors == "strict":
                raise HfkitError(f"an unpaired surrogate ({where}): fix it, or --errors replace")
            return json.loads(_SURROGATE.sub("\ufffd", decoded))
    return value


def _check_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise HfkitError(f'not an object ({where}): write rows such as {{"text": ...}}')
    return row, where


def _read_table(path: Path, lines: Iterator[str], kind: str) -> Iterator[Row]:
    head = list(islice(lines, 20))
    # In a TSV a quote is a character like any other, as there is nothing that it could protect.
    text = (line + "\n" for line in chain(head, lines))
    if kind == "tsv":
        reader = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        delimiter = _find_delimiter(head)
        # A quote after a space opens a field only if the space is skipped.
        spaced = any(re.match(' +"', field) for row in csv.reader(head, delimiter=delimiter) for field in row)
        reader = csv.reader(text, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    names: list[str] = []
    start = 1  # line of the row, which may have several
    try:
        for row in reader:
            if not names:
                names = row
                if twice := [name for name in names if name and names.count(name) > 1]:
                    raise csv.Error(f"two columns are called {twice[0]!r}; rename one")
            elif any(row):  # not an empty line
                if kind == "tsv" and any(re.fullmatch(r'".*"', field) for field in row):
                    note_once(f"{path}: quotes around fields are read as text; if they are not, save it as CSV")
                if len(row) != len(names):
                    raise csv.Error(f"{len(row)} fields, the header has {len(names)}")
                yield dict(zip(names, row, strict=True)), f"{path}, line {start}"
            start = reader.line_num + 1
    except csv.Error as error:
        raise HfkitError(f"not a valid table ({path}, line {start}): {error}") from None


def _find_delimiter(lines: list[str]) -> str:
    """The delimiter that divides the first rows into equally many fields, or else the header into the most."""

    def count_fields(delimiter: str) -> tuple[int, int]:
        try:
            rows = [row for row in csv.reader((line + "\n" for line in lines), delimiter=delimiter) if any(row)]
        except csv.Error:
            return 0, 0
        widths = {len(row) for row in rows[:-1] or rows}  # the last row may go on after these lines
        header = len(rows[0]) if rows else 0
        return header if len(widths) == 1 and header > 1 else 0, header

    return max(",;\t|", key=count_fields)


def _read_columnar(path: Path, kind: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_file(path) as file:
            match kind:
                case "parquet":
                    batches = pq.ParquetFile(file).iter_batches(batch_size=_BATCH)
                case "arrow":
                    reader = pa.ipc.open_file(file)
                    batches = map(reader.get_batch, range(reader.num_record_batches))
                case _:
                    batches = pa.ipc.open_stream(file)
            for batch in batches:
                saved = json.loads((batch.schema.metadata or {}).get(b"huggingface", b"{}"))  # by `datasets`
                labels = _label_names(saved.get("info", {}).get("features", {}))
                for start in range(0, batch.num_rows, _BATCH):
                    for row in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield _name_labels(row, labels), f"{path}, row {number}"
    except (*DAMAGE, pa.ArrowException, ValueError) as error:  # ValueError: also a string that is not UTF-8
        raise HfkitError(f"cannot read the corpus ({path}, after row {number}): {first_line(error)}") from error


def _label_names(features: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """The names of the labels in each column that is a ClassLabel of `datasets`, by their numbers."""
    return {
        column: dict(enumerate(feature["names"]))
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }


def _name_labels(row: dict[str, Any], labels: dict[str, dict[int, str]]) -> dict[str, Any]:
    """A row with names for the numbers of its labels. A row that has no label has -1: it gets None."""
    return row | {column: names.get(row[column]) for column, names in labels.items() if column in row}


def read_hub_rows(name: str, options: CorpusOptions) -> Iterator[Row]:
    """Rows of a data set on the Hub. HfkitError within seconds if the Hub cannot be reached."""
    from datasets import load_dataset
    from huggingface_hub import constants

    if not constants.is_offline_mode():
        try:
            reach_hub(name)
        except HfkitError as error:
            remedy = f"go online, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 if {name} is cached"
            raise HfkitError(f"the Hub cannot be reached ({endpoint()}): {remedy}") from error
    streaming = isinstance(options, DataOptions) and options.streaming
    number = 0
    try:
        # The prefix keeps `datasets` from reading a local folder of the same name.
        url = f"hf://datasets/{name}"
        rows = load_dataset(url, options.dataset_config_name, split=options.dataset_split, streaming=streaming)
        features = getattr(rows, "features", None)
        labels = _label_names(features.to_dict() if features else {})
        for number, row in enumerate(rows, 1):
            yield _name_labels(row, labels), f"hf://{name}, row {number}"
    except Exception as error:  # the Hub's and the format's own errors, of many classes
        raise HfkitError(f"cannot read hf://{name} (after row {number}): {first_line(error)}") from error
