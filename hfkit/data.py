"""A corpus as tokens: encoded once, kept on disk by content, cut into the sequences that a model is trained on."""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.console import progress
from hfkit.corpora import PREPARED, Corpus, Example, Piece, read_records
from hfkit.errors import HfkitError
from hfkit.options import DataOptions
from hfkit.scoring import IGNORED

# For conversations with a tokenizer that has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
_VERSION = 1  # of what is kept on disk
_BATCH = 512  # pieces that are encoded together
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ue000-\uf8ff\ufffd]")


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
    longest: int = 0  # tokens of the longest example
    scripts: dict[str, float] = field(default_factory=dict)  # share of the letters
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
    the options that matter.

    Raises:
        HfkitError: the corpus cannot be read, has nothing in it, or mixes documents and examples.
    """
    report = Report(tokenizer=fingerprint(tokenizer))
    read = (corpus.fingerprint(), options.text_column, options.errors, options.dataset_config_name)
    report.fingerprint = _hash(repr((*read, options.dataset_split)))
    target = folder or (
        Path(datasets.config.HF_DATASETS_CACHE) / "hfkit" / _hash(f"{report.fingerprint}{report.tokenizer}{_VERSION}")
    )
    if not folder and (target / PREPARED).is_file() and not corpus.hub:
        return load_prepared(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    features = {"input_ids": datasets.List(datasets.Value("int32")), "document": datasets.Value("int64")}
    features["bytes"] = datasets.Value("int64")
    records = read_records(corpus, options)
    first = next(records, None)
    if isinstance(first, Example):
        report.kind = "messages" if "messages" in first.row else "completion"
        features["labels"] = datasets.List(datasets.Value("int32"))
    try:
        datasets.disable_progress_bars()
        with progress(corpus.size, "B", f"tokenizing {corpus.files[0].name if corpus.files else ''}") as bar:
            rows = datasets.Dataset.from_generator(
                lambda: _encode(chain([first] if first else [], records), tokenizer, report, bar),
                features=datasets.Features(features),
                cache_dir=str(staging / "raw"),
                fingerprint=_hash(report.fingerprint),  # else datasets would pickle the generator to name it
            )
        if not report.tokens:
            raise HfkitError("the corpus holds no text: there is nothing to learn")
        rows.save_to_disk(staging / "whole")
        (staging / "whole" / PREPARED).write_text(json.dumps(asdict(report), indent=1))
        if target.exists():  # an empty folder, or another process was faster
            shutil.rmtree(target)
        os.replace(staging / "whole", target)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ if isinstance(error.__cause__, HfkitError) else error  # noqa: B904
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Prepared(datasets.load_from_disk(str(target)), report, target)


def load_prepared(folder: Path) -> Prepared:
    """What `hfkit prepare` left in `folder`."""
    try:
        report = Report(**json.loads((folder / PREPARED).read_text()))
        return Prepared(datasets.load_from_disk(str(folder)), report, folder, cached=True)
    except (OSError, ValueError, TypeError) as error:
        raise HfkitError(f"the prepared corpus cannot be read ({folder}): {error}; prepare it again") from error


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return _hash(f"{vocabulary}{tokenizer.chat_template}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _encode(
    records: Iterator[Piece | Example], tokenizer: PreTrainedTokenizerBase, report: Report, bar: Any
) -> Iterator[dict[str, Any]]:
    """Rows of token ids; what was seen goes into `report`."""
    encode = encode_documents if report.kind == "text" else encode_examples
    wanted = Piece if report.kind == "text" else Example

    def watched() -> Iterator[Any]:
        seen: set[int] = set()
        document, blank = 0, True
        for record in records:
            if not isinstance(record, wanted):
                raise HfkitError("the corpus mixes documents and examples: train on one kind at a time")
            text = record.text if wanted is Piece else "\n".join(_texts(record.row))
            _count(report, text)
            bar.update(len(text))
            document, blank = hash((document, text)), blank and not text.strip()
            if wanted is Example or record.last:
                report.empty += blank
                report.duplicates += document in seen and not blank
                seen.add(document)
                document, blank = 0, True
            yield record

    for row in encode(watched(), tokenizer):
        report.documents = row["document"] + 1
        report.tokens += len(row["input_ids"])
        report.longest = max(report.longest, len(row["input_ids"]))
        yield row
    letters = Counter(report.scripts)
    report.scripts = {name: count / letters.total() for name, count in letters.most_common(4)}


def _count(report: Report, text: str) -> None:
    report.characters += len(text)
    report.bytes += len(text.encode("utf-8", "replace"))
    for character in _ODD.findall(text):
        name = f"U+{ord(character):04X}"
        report.odd[name] = report.odd.get(name, 0) + 1
    for character in text[:: max(1, len(text) // 20)]:  # a sample: names are slow to look up
        if character.isalpha():
            script = unicodedata.name(character, "?").split()[0].capitalize()
            report.scripts[script] = report.scripts.get(script, 0) + 1


def _texts(row: dict[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"], row["completion"]]


def number_documents(pieces: Iterable[Piece]) -> Iterator[tuple[int, bool, Piece]]:
    """Each piece with the number of its document and whether it begins it; empty documents are left out."""
    document, first = 0, True
    for piece in pieces:
        if first and piece.last and not piece.text.strip():
            continue
        yield document, first, piece
        document, first = document + piece.last, piece.last


def encode_documents(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, close: bool = True
) -> Iterator[dict[str, Any]]:
    """Token ids of each piece; a document begins as the tokenizer begins a text, and ends with EOS if it is closed."""
    begin = [i for i in tokenizer("a")["input_ids"][:1] if i in tokenizer.all_special_ids]
    end = [tokenizer.eos_token_id] if close and tokenizer.eos_token_id is not None else []
    numbered = number_documents(pieces)
    while batch := list(islice(numbered, _BATCH)):
        texts = [piece.text for *_, piece in batch]
        for (document, first, piece), ids in zip(batch, _ids(tokenizer, texts), strict=True):
            ids = (begin if first else []) + ids + (end if piece.last else [])
            yield {"input_ids": np.array(ids, np.int32), "document": document, "bytes": len(piece.text.encode())}


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    # What tokenizer(texts) does, without the offsets and masks that nobody needs here; on all cores.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = tokenizer.backend_tokenizer
    backend.no_truncation(), backend.no_padding()
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


def encode_examples(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Token ids of each example, with the labels IGNORED outside of its answers."""
    for document, (row, where) in enumerate(examples):
        if "messages" in row:
            ids, labels = _encode_chat(row["messages"], tokenizer, where)
        else:
            prompt = tokenizer(row["prompt"], verbose=False)["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False, verbose=False)["input_ids"]
            answer += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        size = sum(len(text.encode()) for text in _texts(row))
        arrays = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
        yield {**arrays, "document": document, "bytes": size}


def _encode_chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """A conversation in the tokenizer's chat template; labels are what the assistant says."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE

    def render(turns: list[Any], **kwargs: Any) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        except Exception as error:  # whatever a template raises
            raise HfkitError(f"the chat template does not take this conversation ({where}): {error}") from error

    text, spans = render(messages), []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(messages[:turn], add_generation_prompt=True), render(messages[: turn + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise HfkitError(f"the chat template changes earlier turns ({where}): give prompt and completion")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [i if learned else IGNORED for i, learned in zip(ids, inside, strict=True)]
