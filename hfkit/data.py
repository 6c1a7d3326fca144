"""A corpus as tokens: encoded once, kept on disk by content, found again."""

import hashlib
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

from hfkit.console import note, progress
from hfkit.corpora import PREPARED, Corpus, Example, Piece, is_prepared, read_records
from hfkit.errors import HfkitError, first_line
from hfkit.options import DataOptions
from hfkit.scoring import IGNORED
from hfkit.storage import add_owned, check_owned, lock, make_names_durable, make_writable, write_text

# For conversations with a tokenizer that has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
_VERSION = 4  # of what is kept on disk
_BATCH = 512  # pieces that are encoded together
_SAMPLE = 1_000_000  # characters that are looked at for their script
_SCRIPTS = {"Cjk": "Han", "Masculine": "Latin", "Feminine": "Latin", "Micro": "Greek"}  # ª, º and µ
_DATA = "data-00000-of-00001.arrow"  # as `datasets` names it
_PROCESS = os.getpid()
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
    if corpus.left_out:
        note(f"{corpus.left_out} files are empty or no text: left out")
    read = (options.text_column, options.errors, options.dataset_config_name, options.dataset_split)
    read += (options.template, options.labels)
    report = Report(fingerprint=_hash(repr((corpus.fingerprint(), *read, _VERSION))), tokenizer=fingerprint(tokenizer))
    target = folder or Path(datasets.config.HF_DATASETS_CACHE) / "hfkit" / _hash(report.fingerprint + report.tokenizer)
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
            records = _watch(read_records(corpus, options), report, corpus.size, bar)
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


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    vocabulary = (
        _backend(tokenizer).to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return _hash(f"{vocabulary}{tokenizer.chat_template or CHAT_TEMPLATE}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _watch(records: Iterable[Piece | Example], report: Report, size: int, bar: Any) -> Iterator[Piece | Example]:
    """The records as they come; what is seen of them is in `report` when all have come."""
    stride = 1 + (size or 100 * _SAMPLE) // _SAMPLE
    seen, sample, odd = array("q"), Counter(), Counter()
    document, skip = 0, 0
    for record in records:
        if isinstance(record, Example) and report.kind != "messages":
            report.kind = "messages" if "messages" in record.row else "completion"
        texts = [record.text] if isinstance(record, Piece) else _texts(record.row)
        for text in texts:
            report.characters += len(text)
            report.bytes += len(text.encode())
            odd.update(_ODD.findall(text))
            sample.update(text[skip::stride])
            skip = (skip - len(text)) % stride
            bar.update(len(text))
        if isinstance(record, Piece) and _is_empty(record, first=not document):
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


def _texts(row: dict[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"], row["completion"]]


def _write(target: Path, rows: Iterator[dict[str, Any]], report: Report, vocabulary: int) -> None:
    """Rows of tokens as `datasets` keeps them; PREPARED comes last: with it they are whole."""
    batches = iter(lambda: list(islice(rows, _BATCH)), [])
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


def encode_records(records: Iterator[Piece | Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """`encode_documents` or `encode_examples`, whichever these records are for."""
    first = next(records, None)
    encode: Any = encode_examples if isinstance(first, Example) else encode_documents
    return encode(chain([first] if first else [], records), tokenizer)


def number_documents(pieces: Iterable[Piece]) -> Iterator[tuple[int, bool, Piece]]:
    """Each piece with the number of its document and whether it begins it; empty documents are left out."""
    document, first = 0, True
    for piece in pieces:
        if _is_empty(piece, first):
            continue
        yield document, first, piece
        document, first = document + piece.last, piece.last


def _is_empty(piece: Piece, first: bool) -> bool:
    return first and piece.last and not piece.text.strip()


def encode_documents(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, close: bool = True
) -> Iterator[dict[str, Any]]:
    """Token ids of each piece; a document begins as the tokenizer begins a text, and ends with EOS if it is closed."""
    begin, end = _frame(tokenizer)
    space = _space(tokenizer)
    numbered = number_documents(pieces)
    while batch := list(islice(numbered, _BATCH)):
        texts = [piece.text if first or not space else piece.text.removeprefix(" ") for _, first, piece in batch]
        for (document, first, piece), text, ids in zip(batch, texts, _ids(tokenizer, texts), strict=True):
            if not first and text == piece.text and ids[:1] == space:
                ids = ids[1:]
            ids = (begin if first else []) + ids + (end if piece.last and close else [])
            yield {"input_ids": np.array(ids, np.int32), "document": document, "bytes": len(piece.text.encode())}


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer begins a text with, and the token that ends one."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    begin = whole[: whole.index(bare[0])] if bare else []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _space(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The token of a space, if the tokenizer writes one before each text: within a document it is one too many."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return [tokenizer.convert_tokens_to_ids("▁")] if first and first[0].startswith("▁") else None


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer`, without what an earlier call may have left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """What tokenizer(texts) gives, without the offsets and masks that nobody needs here; on all cores."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    # Its threads do not live on in a process that was forked off, such as a DataLoader's: that would wait for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if os.getpid() == _PROCESS else "false"
    try:
        encodings = _backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def encode_answers(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that follow a prompt, without the space that some tokenizers write before any text."""
    space = _space(tokenizer)
    rows = zip(texts, _ids(tokenizer, [text.removeprefix(" ") if space else text for text in texts]), strict=True)
    return [ids[ids[:1] == space and text[:1] != " " :] for text, ids in rows]


def encode_examples(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Token ids of each example, with the labels IGNORED outside of its answers."""
    begin, end = _frame(tokenizer)
    for document, (row, where) in enumerate(examples):
        if "messages" in row:
            ids, labels = _encode_chat(row["messages"], tokenizer, where)
        else:
            prompt = begin + _ids(tokenizer, [row["prompt"]])[0]
            answer = encode_answers([row["completion"]], tokenizer)[0] + end
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        size = sum(len(text.encode()) for text in _texts(row))
        arrays = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
        yield {**arrays, "document": document, "bytes": size}


def set_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the CHAT_TEMPLATE if it has none, so that it is saved with the model that learns it."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE


def _encode_chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """A conversation in the tokenizer's chat template; labels are what the assistant says."""
    set_template(tokenizer)
    if not tokenizer.is_fast:
        raise HfkitError(f"this tokenizer does not say where its tokens stand ({where}): give prompt and completion")

    def render(turns: list[Any], **kwargs: Any) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        except Exception as error:  # whatever a template raises
            raise HfkitError(
                f"the chat template does not take this conversation ({where}): {first_line(error)}"
            ) from error

    text, spans = render(messages), []
    prompt = render(messages, add_generation_prompt=True).removeprefix(text).lstrip()
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            after = render(messages[: turn + 1])
            before = after.partition(prompt)[0] + prompt
            if turn:  # of no turns there is nothing to render
                before = render(messages[:turn], add_generation_prompt=True)
            if not (after.startswith(before) and text.startswith(after)):
                raise HfkitError(f"the chat template changes earlier turns ({where}): give prompt and completion")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token with the space before an answer is the first of the answer, whichever part of it counts the space.
    inside = [any(a < stop and start < b for a, b in spans) for start, stop in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [i if learned else IGNORED for i, learned in zip(ids, inside, strict=True)]
