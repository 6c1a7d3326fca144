"""A corpus that is too large to keep as tokens: read again for each pass."""

import itertools
import random
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from hfkit.corpus.documents import Corpus, read_records
from hfkit.corpus.encoding import encode_records
from hfkit.options import DataOptions

Item = dict[str, np.ndarray]  # input_ids and labels, (length,) each
_WINDOW = 256  # sequences among which a stream is shuffled


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
