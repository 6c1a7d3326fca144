"""What a model is trained on, and what is held out: chosen by content, so that no copy of it is trained on."""

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.corpus.cache import Prepared, Report, encode_corpus, load_prepared
from hfkit.corpus.documents import Example, read_records
from hfkit.corpus.encoding import IGNORED, fingerprint
from hfkit.corpus.files import Corpora, Corpus, find_corpus, prepared_folder
from hfkit.corpus.sequences import Stream, TokenDataset, cut_sequences, lengths, read_cell, rows_that_fit
from hfkit.corpus.templates import set_template
from hfkit.errors import HfkitError
from hfkit.options import DataOptions

_NOTHING = "there is nothing to train on: the corpus is empty, or no example fits --block-size"
_MOST = 1e6  # bytes that are held out: more would not make a measurement better
_LEAST = 100  # bytes: less would not be worth a measurement
_DRAWS = 64
_PROMPT, _ROOM = 12, 40  # tokens of a prompt that is taken from a text; characters that it takes at most
_START = re.compile(r"\n\s*|[.!?…]['\"”’»)]*\s+|[。！？][”’」』）]*")  # a line or sentence has ended before it


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on, and what it is measured on."""

    train_set: Any  # a torch Dataset
    held_out: Any  # likewise; empty where nothing is held out
    sequences: int  # in an epoch; 0 if a stream's are not known
    length: float  # tokens of a sequence, on average
    report: Report | None  # None for a stream
    prompt: str | None = None  # to sample from
    head: str | None = None  # of a model that does not write text: see `labelled`
    labels: tuple[str, ...] = ()

    @property
    def is_joined(self) -> bool:
        """Whether sequences are cut from joined texts, all at one length. Examples have lengths of their own."""
        return not self.head and getattr(self.train_set, "is_joined", True)  # a stream's are

    @property
    def fingerprint(self) -> dict[str, str]:
        if not self.report:
            return {}
        return {"corpus_sha256": self.report.fingerprint, "tokenizer_sha256": self.report.tokenizer}


def gather_training_data(
    corpus: Corpora | Corpus, tokenizer: PreTrainedTokenizerBase, data: DataOptions, block_size: int, seed: int
) -> TrainingData:
    """Tokenize a corpus, or find its tokens, and hold a part of it out. HfkitError if there is nothing to train on."""
    held_out: Any = []
    if data.eval_file:
        held_out = cut_sequences(_encode(data.eval_file, tokenizer, replace(data, exclude=None)), block_size)
    if data.streaming:
        stream = Stream(find_corpus(corpus, data), tokenizer, data, block_size, seed)
        if not next(stream.read(), None):
            raise HfkitError(_NOTHING)
        first = next(read_records(stream.corpus, data))
        if isinstance(first, Example) and "messages" in first.row:
            set_template(tokenizer)
        return TrainingData(stream, held_out, 0, block_size, None, _prompt(held_out, tokenizer))
    prepared = _encode(corpus, tokenizer, data)
    if data.eval_file:
        train_set = cut_sequences(prepared, block_size)
    else:
        train_set, held_out = _split(prepared, tokenizer, data.eval_fraction, block_size, seed)
        if not len(held_out):
            note("nothing is held out: the corpus is too small, or --eval-fraction is 0")
    if not len(train_set):
        raise HfkitError(_NOTHING)
    prompt, length = _prompt(held_out or train_set, tokenizer), train_set.tokens / len(train_set)
    return TrainingData(train_set, held_out, len(train_set), length, prepared.report, prompt)


def _encode(corpus: Corpora | Corpus, tokenizer: PreTrainedTokenizerBase, data: DataOptions) -> Prepared:
    """`corpus` as tokens. A tokenizer that encodes conversations gets a chat template, if it has none."""
    if folder := prepared_folder(corpus):
        prepared = load_prepared(folder)
        if prepared.report.tokenizer != fingerprint(tokenizer):
            raise HfkitError(f"{folder} was prepared for another tokenizer: prepare it with this -m")
    else:
        prepared = encode_corpus(find_corpus(corpus, data), tokenizer, data)
    if prepared.report.kind == "messages":
        set_template(tokenizer)
    return prepared


def _split(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, fraction: float, block_size: int, seed: int
) -> tuple[TokenDataset, TokenDataset]:
    """A corpus as sequences to train on and sequences to measure on."""
    dataset = prepared.dataset
    documents, contents, sizes = (dataset.data.column(name).to_numpy() for name in ("document", "content", "bytes"))
    if prepared.report.kind != "text":
        fit = rows_that_fit(prepared, block_size)
        kept, held = hold_out(contents[fit], sizes[fit], fraction, seed)
        return TokenDataset(dataset, fit[kept], block_size), TokenDataset(dataset, fit[held], block_size)
    shares = hold_out_texts(documents, contents, sizes, fraction, seed)
    stops = np.round(lengths(dataset) * (1 - shares)).astype(np.int64)  # of what is trained on
    for row in np.flatnonzero((shares > 0) & (shares < 1)):
        stops[row] = _next_word(read_cell(dataset, "input_ids", row), int(stops[row]), tokenizer)
    kept, held = np.flatnonzero(shares < 1), np.flatnonzero(shares > 0)
    train_set = TokenDataset(dataset, kept, block_size, stops=stops[kept])
    return train_set, TokenDataset(dataset, held, block_size, starts=stops[held])


def _next_word(ids: np.ndarray, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the next word begins, from `start` on; `start` itself in a script without spaces."""
    tokens = tokenizer.convert_ids_to_tokens(ids[start : start + 16].tolist())
    return next((start + place for place, token in enumerate(tokens) if token.startswith(("▁", "Ġ", "Ċ", " "))), start)


def _prompt(sequences: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A prompt to sample from: the first words of a text, or the question of an example."""
    if not len(sequences):
        return None
    ids, labels = (sequences[0][name].tolist() for name in ("input_ids", "labels"))
    if labels[0] == IGNORED:
        known = next(place for place, label in enumerate(labels) if label != IGNORED)
        return cast(str, tokenizer.decode(ids[:known]))
    if tokenizer.eos_token_id in ids[1:]:  # keep to the first document
        ids = ids[: ids.index(tokenizer.eos_token_id, 1)]
    if sequences.begins_inside:
        text = cast(str, tokenizer.decode(ids))
        starts = [match.end() for match in _START.finditer(text) if not text[match.end() : match.end() + 1].islower()]
        start = next((start for start in starts if start < len(text) - _ROOM), 0)
        ids = tokenizer(text[start:], add_special_tokens=False)["input_ids"] if start else ids
    text = cast(str, tokenizer.decode(ids[:_PROMPT], skip_special_tokens=True)).strip().rstrip("\ufffd")
    return text.rpartition(" ")[0] or text or None


def hold_out(units: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose rows to train on and rows to hold out.

    About `fraction` of the units is held out, chosen by `seed` so that they are about that fraction of the bytes, too;
    at least one unit and at most a megabyte. Nothing is held out of fewer than four units.

    Args:
        units: (rows,) rows with the same number stay together, such as copies.
        sizes: (rows,) bytes.
    """
    units = np.unique(units, return_inverse=True)[1]
    bulk = np.bincount(units, sizes)
    wanted = min(fraction * sizes.sum(), _MOST)
    if not wanted or len(bulk) < 4:
        return np.arange(len(units)), np.zeros(0, np.int64)
    count = max(1, min(round(len(bulk) * wanted / sizes.sum()), len(bulk) // 2))
    draw = np.random.default_rng(seed)
    chosen, best = np.zeros(0, np.int64), np.inf
    for _ in range(_DRAWS):
        drawn = draw.choice(len(bulk), count, replace=False)
        excess = bulk[drawn].sum() - wanted
        error = max(-excess, 2 * excess)  # too much is worse than too little
        if error < best:
            chosen, best = drawn, error
        if best <= wanted / 4:
            break
    held = np.isin(units, chosen)
    return np.flatnonzero(~held), np.flatnonzero(held)


def hold_out_texts(
    documents: np.ndarray, contents: np.ndarray, sizes: np.ndarray, fraction: float, seed: int
) -> np.ndarray:
    """Choose what to hold out of texts: whole documents; where documents are few, the end of the largest one.

    Args:
        documents: (rows,) number of the document that each row is a piece of, in order.
        contents: (rows,) `content_of` each row.
        sizes: (rows,) bytes.

    Returns:
        (rows,) which share of each row is held out, at its end: 0 where all of it is trained on, 1 where nothing is.
    """
    shares = np.zeros(len(documents))
    wanted = min(fraction * sizes.sum(), _MOST)
    if wanted < _LEAST:
        return shares
    starts = np.flatnonzero(np.diff(documents, prepend=-1))  # the first row of each document
    units = _number_copies(contents, starts)
    bulk = np.bincount(units, sizes)
    if len(bulk) * wanted >= sizes.sum():  # at least one whole document
        shares[hold_out(units, sizes, fraction, seed)[1]] = 1
        return shares
    largest = np.argmax(bulk / np.bincount(units[starts]))
    copies = documents[starts][units[starts] == largest]
    each = min(wanted, bulk[largest] / 2) / len(copies)
    for copy in copies:
        rows = np.flatnonzero(documents == copy)
        after = sizes[rows][::-1].cumsum()[::-1] - sizes[rows]  # bytes of the document after each row
        shares[rows] = ((each - after) / sizes[rows]).clip(0, 1)
    return shares


def _number_copies(contents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(rows,) the same number for all rows of a document, which begin at `starts`, and of its copies."""
    counts = np.diff(starts, append=len(contents))
    places = np.arange(len(contents)) - np.repeat(starts, counts)
    # Odd factors keep the order of the rows in the sum. 64-bit arithmetic wraps around.
    wholes = np.add.reduceat(contents.astype(np.uint64) * (2 * places + 1).astype(np.uint64), starts)
    return np.repeat(np.unique(wholes, return_inverse=True)[1], counts)
