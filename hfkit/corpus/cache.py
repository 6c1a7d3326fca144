"""A corpus as tokens: encoded once, kept on disk by content, and found again."""

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

from hfkit.console import counted, note, progress
from hfkit.corpus.documents import Example, Piece, read_records
from hfkit.corpus.encoding import BATCH, encode_records, fingerprint, is_empty, sha256_of
from hfkit.corpus.files import PREPARED, Corpus, hash_files, is_prepared
from hfkit.errors import HfkitError, first_line
from hfkit.options import DataOptions
from hfkit.storage import add_owned, check_owned, check_regular, lock, make_names_durable, make_writable, write_text

_VERSION = 10  # of the files on disk, and of how a corpus is read
_DECIDING = ("text_column", "errors", "dataset_config_name", "dataset_split", "template", "labels")  # options
_SAMPLE = 1_000_000  # characters that are examined for their script
_SCRIPTS = {"Cjk": "Han", "Masculine": "Latin", "Feminine": "Latin", "Micro": "Greek"}  # ª, º and µ
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ue000-\uf8ff\ufeff\ufffd]")
# As `datasets` names them; `datasets.load_from_disk` reads the folder.
_DATA, _INFO, _STATE = "data-00000-of-00001.arrow", "dataset_info.json", "state.json"
_ASIDE = ".tokens"  # _DATA while it is written


@dataclass
class Report:
    """What is in a corpus."""

    kind: str = "text"  # or completion, messages: rows whose answer alone is learned
    documents: int = 0
    duplicates: int = 0  # documents that are equal to an earlier one
    empty: int = 0  # documents without text, which are left out
    characters: int = 0
    bytes: int = 0  # as UTF-8
    tokens: int = 0
    longest: int = 0  # tokens of the longest row
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters, in a sample
    odd: dict[str, int] = field(default_factory=dict)  # counts of control characters and the like, by code point
    fingerprint: str = ""  # of the corpus and how it was read
    tokenizer: str = ""  # fingerprint


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens, a row for each piece of a document or each example."""

    dataset: datasets.Dataset  # input_ids, labels (of examples), document, content, bytes
    report: Report
    folder: Path
    cached: bool = False  # it was found, not made


def encode_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, options: DataOptions, folder: Path | None = None
) -> Prepared:
    """Tokenize `corpus` into `folder`, or into the cache of `datasets`; or find it there.

    Memory does not grow with the corpus. Tokens are found again by the contents of the files, the tokenizer and the
    options that matter. Of several processes that want the same tokens, one makes them and the others wait.

    Raises:
        HfkitError: the corpus cannot be read or is empty, or `folder` holds another one.
    """
    content = sha256_of(repr((corpus.fingerprint(), [getattr(options, name) for name in _DECIDING], _VERSION)))
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
        if is_prepared(target) and (folder or corpus.is_local):  # a data set on the Hub may have changed since
            try:
                prepared = load_prepared(target)
            except HfkitError:
                note(f"the tokens are damaged ({target}): making them anew")
            else:
                if (prepared.report.fingerprint, prepared.report.tokenizer) == (report.fingerprint, report.tokenizer):
                    return prepared
                raise HfkitError(f"{folder} holds another corpus, or this for another model: name a new folder")
        check_owned(target)
        with progress(corpus.size, "B", f"tokenizing {corpus.files[0].name if corpus.files else ''}") as bar:
            records = _measure_records(read_records(corpus, options), report, corpus.size, bar)
            _write_rows(target, encode_records(records, tokenizer), report, 1 + max(tokenizer.get_vocab().values()))
        return Prepared(datasets.load_from_disk(str(target)), report, target)


def load_prepared(folder: Path) -> Prepared:
    """Load the tokens that `hfkit prepare` wrote to `folder`. HfkitError if they are damaged."""
    try:
        content = json.loads((folder / PREPARED).read_text("utf-8"))
        digest, report = content.pop("sha256", None), Report(**content)
        if _digest(folder, report) != digest:  # a flipped bit ends the process, or is trained on
            raise ValueError("it is not what was written")
        return Prepared(datasets.load_from_disk(str(folder)), report, folder, cached=True)
    except (OSError, ValueError, TypeError, LookupError) as error:
        reason = f"the prepared corpus cannot be read ({folder}): {first_line(error)}"
        raise HfkitError(f"{reason}; prepare it again") from error


def _digest(folder: Path, report: Report) -> str:
    """SHA-256 of everything that is kept in `folder`."""
    return hash_files([folder / name for name in (_DATA, _INFO, _STATE)], report)


def _measure_records(
    records: Iterable[Piece | Example], report: Report, size: int, bar: Any
) -> Iterator[Piece | Example]:
    """Pass the records on; `report` is complete when all have passed. size: bytes of the corpus, if it is known."""
    stride = 1 + (size or 100 * _SAMPLE) // _SAMPLE
    sample: Counter[str] = Counter()
    odd: Counter[str] = Counter()
    seen = array("q")  # a hash of each document
    document, skip = 0, 0  # hash of the document so far; characters until the next one of the sample
    for record in records:
        if isinstance(record, Example) and report.kind != "messages":
            report.kind = "messages" if "messages" in record.row else "completion"
        texts = record.texts
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
    report.scripts = _scripts_of(sample)


def _scripts_of(characters: Counter[str]) -> dict[str, float]:
    """The four most frequent scripts of the letters among `characters`, and their shares."""
    scripts: Counter[str] = Counter()
    for character in filter(str.isalpha, characters):
        script = unicodedata.name(character, "?").split()[0].capitalize()
        scripts[_SCRIPTS.get(script, script)] += characters[character]
    return {script: count / scripts.total() for script, count in scripts.most_common(4)}


def _write_rows(target: Path, rows: Iterator[dict[str, Any]], report: Report, vocabulary: int) -> None:
    """Write rows of tokens to `target` as `datasets` keeps them. PREPARED is written last: with it they are complete.

    vocabulary: how many different tokens there can be.
    """
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    if not (first := next(batches, None)):
        raise HfkitError("the corpus holds no text: there is nothing to learn")
    number, token = datasets.Value("int64"), datasets.Value("uint16" if vocabulary <= 1 << 16 else "int32")
    types = {"input_ids": datasets.List(token), "labels": datasets.List(datasets.Value("int32"))}
    features = datasets.Features({name: types.get(name, number) for name in first[0]})
    schema, aside = features.arrow_schema, target / _ASIDE
    names = (PREPARED, _DATA, _INFO, _STATE)
    check_regular(aside, links=False)
    try:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in chain([first], batches):
                lengths = [len(row["input_ids"]) for row in batch]
                report.documents = batch[-1]["document"] + 1
                report.tokens += sum(lengths)
                report.longest = max(report.longest, *lengths)
                columns = [_make_column([row[part.name] for row in batch], part.type) for part in schema]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        add_owned(target, (*names, _ASIDE))
        (target / PREPARED).unlink(missing_ok=True)
        os.replace(aside, target / _DATA)
        datasets.DatasetInfo(features=features).write_to_directory(str(target))
    except OSError as error:
        raise HfkitError(f"cannot write the tokens ({target}): {first_line(error)}; make room there") from error
    finally:
        aside.unlink(missing_ok=True)
    unused = dict.fromkeys(("_split", "_format_type", "_format_columns"))
    state: dict[str, Any] = {"_data_files": [{"filename": _DATA}], "_fingerprint": report.fingerprint[:16], **unused}
    state |= {"_format_kwargs": {}, "_output_all_columns": False}
    write_text(target / _STATE, json.dumps(state))
    make_names_durable(target, names)
    write_text(target / PREPARED, json.dumps(asdict(report) | {"sha256": _digest(target, report)}, indent=1))


def _make_column(values: list[Any], type_: pa.DataType) -> pa.Array:
    if not pa.types.is_list(type_):
        return pa.array(values, type_)
    ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pa.ListArray.from_arrays(ends, pa.array(np.concatenate(values), type_.value_type))


def corpus_lines(report: Report) -> list[str]:
    """What is in a corpus, for people; a line each."""
    noun = "document" if report.kind == "text" else "example"
    sizes = [(report.documents, noun), (report.characters, "character"), (report.tokens, "token")]
    ratio = report.characters / max(1, report.tokens)
    lines = [f"{', '.join(counted(*size) for size in sizes)} ({ratio:.2f} characters a token)"]
    # Compare with bytes, too: short answers have many tokens of the chat template, but only characters of several
    # bytes can be spelled byte by byte.
    if min(report.tokens, report.bytes) > 1.5 * report.characters:
        recipe = ", as the recipe pretrain-chinese does" if "Han" in report.scripts else ""
        lines.append(
            f"{report.tokens / report.characters:.1f} tokens a character: the tokenizer spells this text byte by "
            f"byte; 'hfkit pretrain' makes a vocabulary for it (--vocab-size){recipe}"
        )
    if report.kind in ("text", "completion", "messages"):  # rows for a head are not examined
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report.scripts.items())
        lines.append(f"scripts: {shares or 'no letters'}")
    if report.duplicates:
        lines.append(f"copies of earlier ones, which count twice: {counted(report.duplicates, noun)}")
    if report.empty:
        lines.append(f"empty and left out: {counted(report.empty, noun)}")
    if report.odd:
        odd = list(report.odd.items())[:6]  # the most frequent ones
        lines.append("odd characters: " + ", ".join(f"{name} {counted(count, 'time')}" for name, count in odd))
    return lines
