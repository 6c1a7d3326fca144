"""The sequences that a model is trained on: blocks of texts, examples, or a stream of both; and their batches."""

import itertools
import random
import re
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


class TokenDataset(Dataset[Item]):
    """Rows of tokens as sequences: texts joined and cut into blocks, or each example as it is.

    The last block is shorter, so that no token is lost.
    """

    def __init__(
        self, dataset: datasets.Dataset, rows: np.ndarray, block_size: int, starts: Any = 0, stops: Any = None
    ) -> None:
        """rows: which rows of `dataset`, in their order. starts, stops: which tokens of each; all without these."""
        self._dataset, self._rows = dataset, rows
        self._starts = np.broadcast_to(starts, len(rows))
        self._stops = lengths(dataset)[rows] if stops is None else stops
        self._row_ends = np.cumsum(self._stops - self._starts)  # in the joined tokens
        self.tokens = int(self._row_ends[-1]) if len(rows) else 0
        self.is_joined = "labels" not in dataset.column_names
        blocks = np.arange(0, self.tokens, block_size) + block_size
        self._ends = blocks.clip(max=self.tokens) if self.is_joined else self._row_ends

    @property
    def begins_inside(self) -> bool:
        """Whether the first token is not the first one of its document."""
        documents, row = self._dataset.data.column("document"), int(self._rows[0])
        return bool(self._starts[0]) or (row > 0 and documents[row] == documents[row - 1])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._ends[index - 1] if index else 0, self._ends[index]
        first, last = np.searchsorted(self._row_ends, [start, stop - 1], "right")
        skipped = start - (self._row_ends[first - 1] if first else 0)
        spans = [array[first : last + 1] for array in (self._rows, self._starts, self._stops)]

        def join(column: str) -> np.ndarray:
            parts = [read_cell(self._dataset, column, row)[a:b] for row, a, b in zip(*spans, strict=True)]
            return np.concatenate(parts)[skipped : skipped + stop - start].astype(np.int64)

        ids = join("input_ids")
        return {"input_ids": ids, "labels": ids if self.is_joined else join("labels")}


def read_cell(dataset: datasets.Dataset, column: str, row: np.integer) -> np.ndarray:
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


def cut_sequences(prepared: Prepared, block_size: int) -> TokenDataset:
    """A corpus as sequences of at most `block_size` tokens."""
    return TokenDataset(prepared.dataset, rows_that_fit(prepared, block_size), block_size)


def rows_that_fit(prepared: Prepared, block_size: int) -> np.ndarray:
    """All rows of texts, and the rows of examples that have at most `block_size` tokens."""
    fits = (lengths(prepared.dataset) <= block_size) | (prepared.report.kind == "text")
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
        columns: dict[str, list[Any]] = {name: [item[name] for item in items] for name in items[0]}
        if self.has_mask:
            columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        fills = {"input_ids": self.pad, "labels": IGNORED}
        return {
            name: torch.tensor(values)
            if isinstance(values[0], int)
            else pad_rows(values, fills.get(name, 0), shape=self.shape)
            for name, values in columns.items()
        }


def show_examples(sequences: TokenDataset, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The first sequences as the model sees them, as text; what is learned stands between ⟦ and ⟧."""
    return [_show(sequences[number], tokenizer) for number in range(min(count, len(sequences)))]


def cut_example(shown: str) -> str:
    """The first turns of an example from `show_examples`, and of long ones the beginning and the end."""
    turns = "".join(re.findall("[^⟧]+⟧?", shown)[:3])
    short = re.sub("[^⟦⟧]{300,}", lambda match: f"{match[0][:160]} … {match[0][-80:]}", turns)
    return short if turns == shown else f"{short} …"


def _show(item: Item, tokenizer: PreTrainedTokenizerBase) -> str:
    ids, learned = item["input_ids"].tolist(), item["labels"] != IGNORED
    text, shown, start = cast(str, tokenizer.decode(ids)), "", 0
    for number, border in enumerate([*np.flatnonzero(np.diff(learned, prepend=False)), len(ids)]):
        # Beginnings are decoded, not parts: some tokenizers drop the space that a text begins with.
        stop = len(tokenizer.decode(ids[:border]))
        shown += f"⟦{text[start:stop]}⟧" if number % 2 else text[start:stop]
        start = stop
    return shown
