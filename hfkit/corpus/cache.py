"""A corpus as tokens: encoded once, kept on disk by content, found again."""

import json
import os
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from hfkit.console import progress
from hfkit.corpus.documents import PREPARED, Corpus, Example, Piece, is_prepared, read_records
from hfkit.corpus.encoding import BATCH, encode_records, fingerprint, is_empty, sha256_of, texts_of
from hfkit.errors import HfkitError, first_line
from hfkit.options import DataOptions
from hfkit.storage import add_owned, check_owned, lock, make_names_durable, make_writable, write_text

_VERSION = 5  # of what is kept on disk
_SAMPLE = 1_000_000  # characters that are looked at for their script
_SCRIPTS = {"Cjk": "Han", "Masculine": "Latin", "Feminine": "Latin", "Micro": "Greek"}  # ª, º and µ
_DATA = "data-00000-of-00001.arrow"  # as `datasets` names it
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ue000-\uf8ff\ufeff\ufffd]")


@dataclass
class Report:
    """What was found in a corpus."""

    kind: str = "text"  # or completion, messages: rows whose answer alone is learned
    documents: int = 0
    duplicates: int = 0  # documents that came before, to the letter
    empty: int = 0  # documents that were left out
    characters: int = 0
    bytes: int = 0  # as UTF-8
    tokens: int = 0
    longest: int = 0  # tokens of the longest row
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters, in a sample
    odd: dict[str, int] = field(default_factory=dict)  # control characters and the like
    fingerprint: str = ""  # of the corpus and how it was read
    tokenizer: str = ""  # fingerprint


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens, a row for each piece of a document or each example."""

    dataset: datasets.Dataset  # input_ids, labels (of examples), document, bytes
    report: Report
    folder: Path
    cached: bool = False  # it had been prepared before


def encode_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, options: DataOptions, folder: Path | None = None
) -> Prepared:
    """Tokenize `corpus`, or find it tokenized; into `folder`, else into the cache of `datasets`.

    Memory does not grow with the corpus. What is kept is found again by the contents of the files, the tokenizer and
    the options that matter. Of several processes that want the same, one makes it and the others wait for that.

    Raises:
        HfkitError: the corpus cannot be read or has nothing in it, or `folder` holds another one.
    """
    read = (options.text_column, options.errors, options.dataset_config_name, options.dataset_split)
    read += (options.template, options.labels)
    content = sha256_of(repr((corpus.fingerprint(), *read, _VERSION)))
    report = Report(fingerprint=content, tokenizer=fingerprint(tokenizer))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "hfkit"
    target = folder or cache / sha256_of(report.fingerprint + report.tokenizer)
    try:
        make_writable(target)
    except HfkitError as error:
        if folder:
            raise
        raise HfkitError(f"cannot write to the cache ({target.parent}): set HF_DATASETS_CACHE") from error
    with lock(target, wait=True):
        if is_prepared(target) and (folder or not corpus.hub):  # on the Hub it may be another one by now
            try:
                found = load_prepared(target)
            except HfkitError:
                found = None  # damaged: make it anew
            if found and (found.report.fingerprint, found.report.tokenizer) == (report.fingerprint, report.tokenizer):
                return found
            if found:
                raise HfkitError(f"{folder} holds another corpus, or this for another model: name a new folder")
        check_owned(target)
        with progress(corpus.size, "B", f"tokenizing {corpus.files[0].name if corpus.files else ''}") as bar:
            records = _measure_records(read_records(corpus, options), report, corpus.size, bar)
            _write(target, encode_records(records, tokenizer), report, 1 + max(tokenizer.get_vocab().values()))
        return Prepared(datasets.load_from_disk(str(target)), report, target)


def load_prepared(folder: Path) -> Prepared:
    """What `hfkit prepare` left in `folder`."""
    try:
        report = Report(**json.loads((folder / PREPARED).read_text("utf-8")))
        return Prepared(datasets.load_from_disk(str(folder)), report, folder, cached=True)
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = first_line(error)
        raise HfkitError(f"the prepared corpus cannot be read ({folder}): {reason}; prepare it again") from error


def _measure_records(
    records: Iterable[Piece | Example], report: Report, size: int, bar: Any
) -> Iterator[Piece | Example]:
    """The records as they come; what is seen of them is in `report` when all have come."""
    stride = 1 + (size or 100 * _SAMPLE) // _SAMPLE
    seen, sample, odd = array("q"), Counter(), Counter()
    document, skip = 0, 0
    for record in records:
        if isinstance(record, Example) and report.kind != "messages":
            report.kind = "messages" if "messages" in record.row else "completion"
        texts = [record.text] if isinstance(record, Piece) else texts_of(record.row)
        for text in texts:
            report.characters += len(text)
            report.bytes += len(text.encode())
            odd.update(_ODD.findall(text))
            sample.update(text[skip::stride])
            skip = (skip - len(text)) % stride
            bar.update(len(text))
        if isinstance(record, Piece) and is_empty(record, first=not document):
            report.empty += 1
        else:
            document = hash((document, *texts))
            if isinstance(record, Example) or record.last:
                seen.append(document)
                document = 0
        yield record
    report.duplicates = len(seen) - len(np.unique(seen))
    report.odd = {f"U+{ord(character):04X}": count for character, count in odd.most_common()}
    scripts: Counter[str] = Counter()
    for character in filter(str.isalpha, sample):
        script = unicodedata.name(character, "?").split()[0].capitalize()
        scripts[_SCRIPTS.get(script, script)] += sample[character]
    report.scripts = {script: count / scripts.total() for script, count in scripts.most_common(4)}


def _write(target: Path, rows: Iterator[dict[str, Any]], report: Report, vocabulary: int) -> None:
    """Rows of tokens as `datasets` keeps them; PREPARED comes last: with it they are whole."""
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    if not (first := next(batches, None)):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    number, ids = datasets.Value("int64"), datasets.Value("uint16" if vocabulary <= 1 << 16 else "int32")
    types = {"input_ids": datasets.List(ids), "labels": datasets.List(datasets.Value("int32"))}
    features = datasets.Features({name: types.get(name, number) for name in first[0]})
    schema, aside = features.arrow_schema, target / ".tokens"
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in chain([first], batches):
                lengths = [len(row["input_ids"]) for row in batch]
                report.documents = batch[-1]["document"] + 1
                report.tokens += sum(lengths)
                report.longest = max(report.longest, *lengths)
                columns = [_column([row[part.name] for row in batch], part.type) for part in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        add_owned(target, names := (PREPARED, _DATA, "dataset_info.json", "state.json", ".tokens"))
        for name in (PREPARED, _DATA):
            (target / name).unlink(missing_ok=True)
        _save_one(first[0], features, target)
        os.replace(aside, target / _DATA)
    except OSError as error:
        raise HfkitError(f"cannot write the tokens ({target}): {first_line(error)}; make room there") from error
    finally:
        aside.unlink(missing_ok=True)
    make_names_durable(target, names)
    write_text(target / PREPARED, json.dumps(asdict(report), indent=1))


def _column(values: list[Any], type_: pa.DataType) -> pa.Array:
    if not pa.types.is_list(type_):
        return pa.array(values, type_)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(values), type_.value_type))


def _save_one(row: dict[str, Any], features: datasets.Features, folder: Path) -> None:
    """A data set of one row: all that `datasets` keeps beside the rows is the same for any number of them."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_list([row], features).save_to_disk(str(folder))
    finally:
        if shown:
            datasets.enable_progress_bars()


def corpus_lines(report: Report) -> list[str]:
    """What was found in a corpus, a line each."""
    what = "documents" if report.kind == "text" else "examples"
    lines = [
        f"{report.documents:,} {what}, {report.characters:,} characters, {report.tokens:,} tokens "
        f"({report.characters / max(1, report.tokens):.2f} characters a token)",
    ]
    if report.kind in ("text", "completion", "messages"):  # the rows of a head are not looked at so closely
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report.scripts.items())
        lines.append(f"scripts: {shares or 'no letters'}")
    if report.duplicates:
        lines.append(f"{report.duplicates:,} {what} came before, to the letter: they count twice")
    if report.empty:
        lines.append(f"{report.empty:,} empty {what} are left out")
    if report.odd:
        odd = sorted(report.odd.items(), key=lambda item: -item[1])[:6]
        lines.append("odd characters: " + ", ".join(f"{name} {count:,} times" for name, count in odd))
    return lines
