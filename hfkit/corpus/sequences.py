"""Rows of tokens as the sequences that a model is trained on, the batches they come in, and what is held out."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.corpus.cache import Prepared, Report, encode_corpus, load_prepared
from hfkit.corpus.chat import set_template
from hfkit.corpus.documents import Corpora, Corpus, Example, find_corpus, is_prepared, read_records
from hfkit.corpus.encoding import IGNORED, fingerprint
from hfkit.corpus.splitting import hold_out, hold_out_texts
from hfkit.corpus.streams import Stream
from hfkit.errors import HfkitError
from hfkit.options import DataOptions

Item = dict[str, np.ndarray]  # input_ids and labels, (length,) each
LabelledItem = dict[str, Any]  # lists of token ids, and a number for each label or place
_PROMPT, _ROOM = 12, 40  # tokens of a prompt that is taken from a text; characters that it takes at most
_START = re.compile(r"\n\s*|[.!?…]['\"”’»)]*\s+|[。！？][”’」』）]*")  # a line or sentence has ended before it
_NOTHING = "there is nothing to train on: the corpus is empty, or no example fits --block-size"


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

    @property
    def begins_inside(self) -> bool:
        """Whether the first token is not the first one of its document."""
        documents, row = self._dataset.data.column("document"), int(self._rows[0])
        return bool(self._starts[0]) or (row > 0 and documents[row] == documents[row - 1])

    def __len__(self) -> int:
        return -(-self.tokens // self._size)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = index * self._size, (index + 1) * self._size
        first, last = np.searchsorted(self._ends, [start, stop - 1], "right")
        spans = [array[first : last + 1] for array in (self._rows, self._starts, self._stops)]
        ids = np.concatenate([_cell(self._dataset, "input_ids", row)[a:b] for row, a, b in zip(*spans, strict=True)])
        skipped = start - (int(self._ends[first - 1]) if first else 0)
        ids = ids[skipped : skipped + self._size].astype(np.int64)
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
        return {name: _cell(self._dataset, name, row).astype(np.int64) for name in ("input_ids", "labels")}


def _cell(dataset: datasets.Dataset, column: str, row: np.integer) -> np.ndarray:
    """A list of a column as an array. `dataset[row]` takes ten times as long."""
    return cast(np.ndarray, dataset.data.column(column)[int(row)].values.to_numpy())


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, (rows,)."""
    return cast(np.ndarray, pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64))


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
    """Items to a batch padded on the right, where a causal model does not look. Padding is not learned."""

    pad: int  # token id
    shape: tuple[int, int] | None = None  # rows and tokens of every batch, so that a compiled model sees one shape

    def __call__(self, items: list[Item]) -> dict[str, torch.Tensor]:
        fills = {"input_ids": self.pad, "labels": IGNORED}
        return {name: pad_rows([item[name] for item in items], fill, shape=self.shape) for name, fill in fills.items()}


@dataclass(frozen=True)
class HeadCollator:
    """Items to a batch padded on the right, with its attention mask."""

    pad: int  # token id

    def __call__(self, items: list[LabelledItem]) -> dict[str, torch.Tensor]:
        batch = {"attention_mask": pad_rows([[1] * len(item["input_ids"]) for item in items], 0)}
        for name, example in items[0].items():
            values = [item[name] for item in items]
            fill = self.pad if name == "input_ids" else 0
            batch[name] = pad_rows(values, fill) if isinstance(example, list) else torch.tensor(values)
        return batch


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
    def fingerprint(self) -> dict[str, str]:
        if not self.report:
            return {}
        return {"corpus_sha256": self.report.fingerprint, "tokenizer_sha256": self.report.tokenizer}


def gather_training_data(
    corpus: Corpora | Corpus, tokenizer: PreTrainedTokenizerBase, data: DataOptions, block_size: int, seed: int
) -> TrainingData:
    """Tokenize a corpus, or find its tokens, and hold a part of it out.

    Raises:
        HfkitError: there is nothing to train on.
    """
    held = cut_sequences(_encode(data.eval_file, tokenizer, data), block_size) if data.eval_file else None
    if data.streaming:
        stream = Stream(find_corpus(corpus), tokenizer, data, block_size, seed)
        if not next(stream.read(), None):
            raise HfkitError(_NOTHING)
        first = next(read_records(stream.corpus, data))
        if isinstance(first, Example) and "messages" in first.row:
            set_template(tokenizer)
        return TrainingData(stream, held or [], 0, block_size, None, _prompt(held or [], tokenizer))
    prepared = _encode(corpus, tokenizer, data)
    if held is not None:
        train_set, held_out = cut_sequences(prepared, block_size), held
    else:
        train_set, held_out = _split(prepared, tokenizer, data.eval_fraction, block_size, seed)
        if not len(held_out):
            note("nothing is held out: the corpus is too small, or --eval-fraction is 0")
    if not len(train_set):
        raise HfkitError(_NOTHING)
    return TrainingData(
        train_set=train_set,
        held_out=held_out,
        sequences=len(train_set),
        length=train_set.tokens / len(train_set),
        report=prepared.report,
        prompt=_prompt(held_out or train_set, tokenizer),
    )


def _encode(corpus: Corpora | Corpus, tokenizer: PreTrainedTokenizerBase, data: DataOptions) -> Prepared:
    """`corpus` as tokens. A tokenizer that encodes conversations gets a chat template, if it has none."""
    sources = [] if isinstance(corpus, Corpus) else [corpus] if isinstance(corpus, str | Path) else corpus
    if len(sources) == 1 and is_prepared(folder := Path(sources[0]).expanduser()):
        prepared = load_prepared(folder)
        if prepared.report.tokenizer != fingerprint(tokenizer):
            raise HfkitError(f"{folder} was prepared for another tokenizer: prepare it with this -m")
    else:
        prepared = encode_corpus(find_corpus(corpus), tokenizer, data)
    if prepared.report.kind == "messages":
        set_template(tokenizer)
    return prepared


def cut_sequences(prepared: Prepared, block_size: int) -> Blocks | Examples:
    """A corpus as sequences of at most `block_size` tokens."""
    if prepared.report.kind == "text":
        return Blocks(prepared.dataset, np.arange(len(prepared.dataset)), block_size)
    return Examples(prepared.dataset, _rows_that_fit(prepared, block_size))


def _rows_that_fit(prepared: Prepared, block_size: int) -> np.ndarray:
    fits = lengths(prepared.dataset) <= block_size
    if not fits.all():
        note(f"{(~fits).sum()} of {len(fits)} examples are longer than {block_size} tokens: left out")
    return np.flatnonzero(fits)


def _split(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, fraction: float, block_size: int, seed: int
) -> tuple[Any, Any]:
    """A corpus as sequences to train on and sequences to measure on."""
    dataset = prepared.dataset
    documents, contents, sizes = (dataset.data.column(name).to_numpy() for name in ("document", "content", "bytes"))
    if prepared.report.kind != "text":
        fit = _rows_that_fit(prepared, block_size)
        kept, held = hold_out(contents[fit], sizes[fit], fraction, seed)
        return Examples(dataset, fit[kept]), Examples(dataset, fit[held])
    shares = hold_out_texts(documents, contents, sizes, fraction, seed)
    stops = np.round(lengths(dataset) * (1 - shares)).astype(np.int64)  # of what is trained on
    for row in np.flatnonzero((shares > 0) & (shares < 1)):
        stops[row] = _next_word(_cell(dataset, "input_ids", row), int(stops[row]), tokenizer)
    kept, held = np.flatnonzero(shares < 1), np.flatnonzero(shares > 0)
    return (
        Blocks(dataset, kept, block_size, stops=stops[kept]),
        Blocks(dataset, held, block_size, starts=stops[held]),
    )


def _next_word(ids: np.ndarray, start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where the next word begins, from `start` on; `start` itself in a script without spaces."""
    tokens = tokenizer.convert_ids_to_tokens(ids[start : start + 16].tolist())
    return next((start + place for place, token in enumerate(tokens) if token.startswith(("▁", "Ġ", "Ċ", " "))), start)


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
    if isinstance(sequences, Blocks) and sequences.begins_inside:
        text = cast(str, tokenizer.decode(ids))
        starts = [match.end() for match in _START.finditer(text) if not text[match.end() : match.end() + 1].islower()]
        start = next((start for start in starts if start < len(text) - _ROOM), 0)
        ids = tokenizer(text[start:], add_special_tokens=False)["input_ids"] if start else ids
    text = cast(str, tokenizer.decode(ids[:_PROMPT], skip_special_tokens=True)).strip().rstrip("\ufffd")
    return text.rpartition(" ")[0] or text or None
