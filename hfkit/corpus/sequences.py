"""The sequences that a model is trained on: blocks of texts, examples, or a stream of both; and their batches."""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.corpus.cache import Prepared
from hfkit.corpus.documents import read_records
from hfkit.corpus.encoding import IGNORED, encode_records
from hfkit.corpus.files import Corpus
from hfkit.options import DataOptions

Item = dict[str, np.ndarray]  # input_ids and labels, (length,) each
LabelledItem = dict[str, Any]  # lists of token ids, and a number for each label or place
_WINDOW = 256  # sequences among which a stream is shuffled


class Blocks(Dataset[Item]):
    """Rows of tokens, joined and cut into blocks. The last block is shorter, so that no token is lost."""

    def __init__(
        self,
        dataset: datasets.Dataset,
        rows: np.ndarray,
        block_size: int,
        starts: np.ndarray | None = None,
        stops: np.ndarray | None = None,
    ) -> None:
        """rows: which rows of `dataset`, in their order. starts, stops: which tokens of each; all without these."""
        self._dataset, self._rows, self._size = dataset, rows, block_size
        self._starts = np.zeros(len(rows), np.int64) if starts is None else starts
        self._stops = lengths(dataset)[rows] if stops is None else stops
        self._ends = np.cumsum(self._stops - self._starts)  # of each row, in the joined tokens

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
        spans = [array[first : last + 1] for array in (self._rows, self._starts, self._stops)]
        parts = [cell(self._dataset, "input_ids", row)[a:b] for row, a, b in zip(*spans, strict=True)]
        skipped = start - (int(self._ends[first - 1]) if first else 0)
        ids = np.concatenate(parts)[skipped : skipped + self._size].astype(np.int64)
        return {"input_ids": ids, "labels": ids}


class Examples(Dataset[Item]):
    """Rows that have labels: a sequence each."""

    def __init__(self, dataset: datasets.Dataset, rows: np.ndarray) -> None:
        self._dataset, self._rows = dataset, rows
        self.tokens = int(lengths(dataset)[rows].sum())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        row = self._rows[index]
        return {name: cell(self._dataset, name, row).astype(np.int64) for name in ("input_ids", "labels")}


def cell(dataset: datasets.Dataset, column: str, row: np.integer) -> np.ndarray:
    """A list of a column as an array. `dataset[row]` takes ten times as long."""
    return cast(np.ndarray, dataset.data.column(column)[int(row)].values.to_numpy())


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, (rows,)."""
    return cast(np.ndarray, pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64))


class Stream(IterableDataset[Item]):
    """Sequences of a corpus that is read again for each pass, without end.

    To Trainer it is a single epoch, so that a resumed run finds its place in any pass.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, options: DataOptions, block_size: int, seed: int
    ) -> None:
        self.corpus, self._tokenizer, self._options = corpus, tokenizer, options
        self._size, self._seed = block_size, seed

    def __iter__(self) -> Iterator[Item]:
        for number in itertools.count():
            items = self.read_shuffled(number)
            if not (first := next(items, None)):  # this worker's share of the corpus is empty
                return
            yield first
            yield from items

    def read_shuffled(self, number: int) -> Iterator[Item]:
        """Pass `number` over the corpus: this worker's share, shuffled among neighbours by the seed and the number."""
        items, worker = self.read(), torch.utils.data.get_worker_info()
        if worker:  # each worker of a DataLoader reads everything and keeps its share
            items = islice(items, worker.id, None, worker.num_workers)
        draw = random.Random(f"{self._seed}-{number}")  # noqa: S311, not a secret
        window: list[Item] = []
        for item in items:
            window.append(item)
            if len(window) > _WINDOW:
                place = draw.randrange(len(window))
                window[place], window[-1] = window[-1], window[place]
                yield window.pop()
        draw.shuffle(window)
        yield from window

    def read(self) -> Iterator[Item]:
        """Blocks of texts, or examples that fit, in the order of the corpus."""
        rest = np.zeros(0, np.int32)
        for row in encode_records(read_records(self.corpus, self._options), self._tokenizer):
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


def cut_sequences(prepared: Prepared, block_size: int) -> Blocks | Examples:
    """A corpus as sequences of at most `block_size` tokens."""
    if prepared.report.kind == "text":
        return Blocks(prepared.dataset, np.arange(len(prepared.dataset)), block_size)
    return Examples(prepared.dataset, rows_that_fit(prepared, block_size))


def rows_that_fit(prepared: Prepared, block_size: int) -> np.ndarray:
    """Rows of at most `block_size` tokens."""
    fits = lengths(prepared.dataset) <= block_size
    if not fits.all():
        note(f"examples of more than {block_size} tokens are left out: {(~fits).sum()} of {len(fits)}")
    return np.flatnonzero(fits)


def group(items: Iterable[Item], tokens: int) -> Iterator[list[Item]]:
    """Batches of items in their order, each of at most `tokens` once it is padded to its longest item."""
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


def pad_rows(
    rows: Sequence[Any], fill: int, *, shape: tuple[int, int] | None = None, left: bool = False
) -> torch.Tensor:
    """Rows of numbers as one int64 tensor, (rows, length of the longest) or of a larger `shape`.

    fill: what stands where a row has nothing: after it, or before it if `left`.
    """
    count, width = shape or (len(rows), max(map(len, rows)))
    padded = torch.full((count, width), fill)
    for line, row in zip(padded, rows, strict=False):
        line[width - len(row) if left else 0 :][: len(row)] = torch.as_tensor(np.asarray(row, np.int64))
    return padded


@dataclass(frozen=True)
class Collator:
    """Items to a batch padded on the right. Padding is not learned, and a causal model does not look there."""

    pad: int  # token id
    shape: tuple[int, int] | None = None  # rows and tokens of every batch, so that a compiled model sees one shape
    has_mask: bool = False  # for a model that looks in both directions

    def __call__(self, items: Sequence[Item | LabelledItem]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        if self.has_mask:
            batch["attention_mask"] = pad_rows([[1] * len(item["input_ids"]) for item in items], 0)
        fills = {"input_ids": self.pad, "labels": IGNORED}
        for name, example in items[0].items():
            values = [item[name] for item in items]
            is_number = isinstance(example, int)
            batch[name] = (
                torch.tensor(values) if is_number else pad_rows(values, fills.get(name, 0), shape=self.shape)
            )
        return batch


def show_examples(sequences: Blocks | Examples, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first sequences as the model sees them, as text; what is learned stands between ⟦ and ⟧."""
    return [_show(sequences[number], tokenizer) for number in range(min(count, len(sequences)))]


def _show(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    ids, learned = item["input_ids"].tolist(), item["labels"] != IGNORED
    parts: list[str] = []
    start = 0
    for number, border in enumerate([*np.flatnonzero(np.diff(learned, prepend=False)), len(ids)]):
        # Beginnings are decoded, not parts: some tokenizers drop the space that a text begins with.
        stop = len(tokenizer.decode(ids[:border]))
        part = tokenizer.decode(ids)[start:stop]
        parts.append(f"⟦{part}⟧" if number % 2 else str(part))
        start = stop
    return "".join(parts)
