"""Rows of tokens as the sequences that a model is trained on, and the batches they come in."""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.corpus.cache import Prepared, Report, encode_corpus, load_prepared
from hfkit.corpus.documents import Corpora, Corpus, find_corpus, is_prepared, read_records
from hfkit.corpus.encoding import IGNORED, encode_records, fingerprint, set_template
from hfkit.errors import HfkitError
from hfkit.options import DataOptions

Item = dict[str, np.ndarray]
_WINDOW = 256  # sequences that a stream is shuffled within
_NOTHING = "there is nothing to train on: the corpus is empty, or no example fits --block-size"


class Blocks(torch.utils.data.Dataset):
    """Rows of tokens one after another, cut into blocks; the last one is shorter, and no token is lost."""

    def __init__(self, dataset: datasets.Dataset, rows: np.ndarray, block_size: int) -> None:
        """rows: which of them, in which order."""
        self._dataset, self._rows, self._size = dataset, rows, block_size
        self._ends = np.cumsum(lengths(dataset)[rows])

    @property
    def tokens(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return -(-self.tokens // self._size)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = index * self._size, (index + 1) * self._size
        first, last = np.searchsorted(self._ends, [start, stop - 1], "right")
        ids = np.concatenate([_values(self._dataset, "input_ids", row) for row in self._rows[first : last + 1]])
        skipped = start - (int(self._ends[first - 1]) if first else 0)
        ids = ids[skipped : skipped + self._size].astype(np.int64)
        return {"input_ids": ids, "labels": ids}


class Examples(torch.utils.data.Dataset):
    """Rows with labels of their own."""

    def __init__(self, dataset: datasets.Dataset, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows
        self.tokens = int(lengths(dataset)[rows].sum())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        row = self._rows[index]
        return {name: _values(self._dataset, name, row).astype(np.int64) for name in ("input_ids", "labels")}


def _values(dataset: datasets.Dataset, column: str, row: np.integer) -> np.ndarray:
    """A cell; dataset[row] takes ten times as long."""
    return dataset.data.column(column)[int(row)].values.to_numpy()


class Stream(torch.utils.data.IterableDataset):
    """Sequences of a corpus that is read anew for each epoch, shuffled by `seed` within a window."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, options: DataOptions, block_size: int, seed: int
    ) -> None:
        self._corpus, self._tokenizer, self._options = corpus, tokenizer, options
        self._size, self._seed, self._epoch = block_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[Item]:
        items, worker = self.read(), torch.utils.data.get_worker_info()
        if worker:  # each process of a DataLoader reads all and keeps its share
            items = islice(items, worker.id, None, worker.num_workers)
        draw, window = random.Random(f"{self._seed}-{self._epoch}"), []  # noqa: S311, no secret
        for item in items:
            window.append(item)
            if len(window) > _WINDOW:
                at = draw.randrange(len(window))
                window[at], window[-1] = window[-1], window[at]
                yield window.pop()
        draw.shuffle(window)
        yield from window

    def read(self) -> Iterator[Item]:
        """Blocks of texts, or examples that fit, in the order of the corpus."""
        rest = np.zeros(0, np.int32)
        for row in encode_records(read_records(self._corpus, self._options), self._tokenizer):
            if "labels" in row:
                if len(row["labels"]) <= self._size:
                    yield {name: row[name] for name in ("input_ids", "labels")}
                continue
            rest = np.concatenate([rest, row["input_ids"]])
            while len(rest) >= self._size:
                yield {"input_ids": rest[: self._size], "labels": rest[: self._size]}
                rest = rest[self._size :]
        if len(rest):
            yield {"input_ids": rest, "labels": rest}


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, (rows,)."""
    return pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64)


def hold_out(documents: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to hold out: whole documents, drawn by `seed`; single rows where documents are few.

    documents: number of each row's document, (rows,). sizes: bytes of each row, (rows,). About `fraction` of the bytes
    are held out, at most a megabyte; at least one document, but none where there are too few.
    """
    units = documents if len(documents) and documents[-1] >= 19 else np.arange(len(documents))
    bulk = np.bincount(units, sizes)
    if fraction == 0 or len(bulk) < 4:
        return np.arange(len(units)), np.zeros(0, np.int64)
    wanted = min(fraction * bulk.sum(), 1e6)
    order = np.random.default_rng(seed).permutation(len(bulk))
    order = order[bulk[order] <= max(wanted, np.median(bulk))]  # a large document may be most of the corpus
    count = 1 + int(np.abs(np.cumsum(bulk[order]) - wanted).argmin())
    held = np.isin(units, order[: min(count, len(bulk) // 2)])
    return np.flatnonzero(~held), np.flatnonzero(held)


def group(items: Iterable[Item], tokens: int) -> Iterator[list[Item]]:
    """Items in their order, as many together as have at most `tokens` when they are padded to the longest."""
    batch: list[Item] = []
    longest = 0
    for item in items:
        longest = max(longest, len(item["input_ids"]))
        if batch and (len(batch) + 1) * longest > tokens:
            yield batch
            batch, longest = [], len(item["input_ids"])
        batch.append(item)
    if batch:
        yield batch


@dataclass(frozen=True)
class Collator:
    """Items to a batch of tensors, padded on the right (a causal model does not look there) and not learned."""

    pad: int  # token id
    shape: tuple[int, int] | None = None  # rows and tokens of every batch, so that a compiled model sees one shape

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        shape = self.shape or (len(items), longest)
        batch = {"input_ids": torch.full(shape, self.pad), "labels": torch.full(shape, IGNORED)}
        for number, item in enumerate(items):
            for name, tensor in batch.items():
                tensor[number, : len(item[name])] = torch.from_numpy(item[name].astype(np.int64))
        return batch


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on, and what it is measured on."""

    train_set: Any  # a torch Dataset
    held_out: Any  # likewise; empty where nothing is held out
    sequences: int  # in an epoch; 0 if a stream's are not known
    length: float  # tokens of one, on average
    report: Report | None  # None for a stream
    prompt: str | None = None  # to sample from
    head: str | None = None  # of a model that does not write text: see `heads`
    labels: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> dict[str, str]:
        return (
            {"corpus_sha256": self.report.fingerprint, "tokenizer_sha256": self.report.tokenizer}
            if self.report
            else {}
        )


def gather_training_data(
    corpus: Corpora, tokenizer: PreTrainedTokenizerBase, data: DataOptions, block_size: int, seed: int
) -> TrainingData:
    """Tokenize a corpus, or find it tokenized, and set a part of it aside.

    Raises:
        HfkitError: there is nothing to train on.
    """
    held = cut_sequences(_encode(data.eval_file, tokenizer, data), block_size) if data.eval_file else None
    if data.streaming:
        stream = Stream(find_corpus(corpus), tokenizer, data, block_size, seed)
        if not next(stream.read(), None):
            raise HfkitError(_NOTHING)
        return TrainingData(stream, held or [], 0, block_size, None, _prompt(held or [], tokenizer))
    prepared = _encode(corpus, tokenizer, data)
    if held is not None:
        train_set, held_out = cut_sequences(prepared, block_size), held
    else:
        columns = [prepared.dataset.data.column(name).to_numpy() for name in ("document", "bytes")]
        rows = hold_out(*columns, data.eval_fraction, seed)
        train_set, held_out = (cut_sequences(prepared, block_size, part) for part in rows)
        if not len(held_out):
            note("nothing is held out: the corpus is too small, or --eval-fraction is 0")
    if not len(train_set):
        raise HfkitError(_NOTHING)
    prompt = _prompt(held_out or train_set, tokenizer)
    length = train_set.tokens / len(train_set)
    return TrainingData(train_set, held_out, len(train_set), length, prepared.report, prompt)


def _encode(corpus: Corpora, tokenizer: PreTrainedTokenizerBase, data: DataOptions) -> Prepared:
    sources = [corpus] if isinstance(corpus, str | Path) else corpus
    if len(sources) == 1 and is_prepared(folder := Path(sources[0]).expanduser()):
        prepared = load_prepared(folder)
        if prepared.report.tokenizer != fingerprint(tokenizer):
            raise HfkitError(f"{folder} was prepared for another tokenizer: prepare it with this -m")
    else:
        prepared = encode_corpus(find_corpus(corpus), tokenizer, data)
    if prepared.report.kind == "messages":
        set_template(tokenizer)
    return prepared


def cut_sequences(prepared: Prepared, block_size: int, rows: np.ndarray | None = None) -> "Blocks | Examples":
    """All rows of a corpus, or these, as sequences of at most `block_size` tokens."""
    rows = np.arange(len(prepared.dataset)) if rows is None else rows
    if prepared.report.kind == "text":
        return Blocks(prepared.dataset, rows, block_size)
    fit = rows[lengths(prepared.dataset)[rows] <= block_size]
    if len(fit) < len(rows):
        note(f"{len(rows) - len(fit)} of {len(rows)} examples are longer than {block_size} tokens: left out")
    return Examples(prepared.dataset, fit)


def _prompt(sequences: Any, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where a sample begins: some words of a text, the question of an example."""
    if not len(sequences):
        return None
    ids, labels = (sequences[0][name] for name in ("input_ids", "labels"))
    if known := int((labels == IGNORED).argmin()):  # tokens before the answer
        return tokenizer.decode(ids[:known].tolist())
    ids = ids[:12].tolist()
    if tokenizer.eos_token_id in ids[1:]:  # of the first document alone
        ids = ids[: ids.index(tokenizer.eos_token_id, 1)]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip().rstrip("\ufffd")
    return text.rpartition(" ")[0] or text or None


LabelledItem = dict[str, Any]


@dataclass(frozen=True)
class HeadCollator:
    """Items to a padded batch with its attention mask."""

    pad: int  # token id

    def __call__(self, items: list[LabelledItem]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)
        batch: dict[str, Any] = {
            "attention_mask": [[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items]
        }
        for name in items[0]:
            values = [item[name] for item in items]
            fill = self.pad if name == "input_ids" else 0
            batch[name] = [v + [fill] * (longest - len(v)) for v in values] if isinstance(values[0], list) else values
        return {name: torch.tensor(values) for name, values in batch.items()}


class Endless(torch.utils.data.IterableDataset):
    """A stream, pass after pass: to Trainer it is one epoch, so that a resumed run finds its place in any of them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        item: Any = True
        for epoch in itertools.count():
            self._stream.set_epoch(epoch)
            for item in self._stream:
                yield item
            if item is True:  # the share of this process is empty
                return
