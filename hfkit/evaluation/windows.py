"""Windows over the documents of a corpus: what is predicted from what. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from hfkit.corpus.documents import Example, Piece
from hfkit.corpus.encoding import IGNORED, encode_documents, encode_examples, first_tokens, number_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = dict[str, np.ndarray]  # input_ids, targets and units, (length,) each


class WindowReader:
    """Cuts a corpus into windows, and counts what it reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, stride: int, bar: Any) -> None:
        self._tokenizer, self._window, self._stride, self._bar = tokenizer, window, stride, bar
        begin = first_tokens(tokenizer)
        # What stands before the first token, unless the tokenizer writes it itself.
        self._begin = [] if tokenizer("a")["input_ids"][:1] == begin else begin
        self.documents, self.words = 0, 0
        self.bytes: list[int] = []  # of each passage

    def windows(self, records: Iterator[Piece | Example]) -> Iterator[Item]:
        """`input_ids`, `targets`, and `units` (the passage that each target belongs to); (length,) each."""
        first = next(records, None)
        records = chain([first] if first else [], records)
        if isinstance(first, Example):
            yield from self._answers(records)
            return
        rows = enumerate(encode_documents(self._counted(records), self._tokenizer, close=False))
        for number, passages in groupby(rows, key=lambda row: row[1]["document"]):
            self.documents = number + 1
            texts = (_passage(row["input_ids"], row["input_ids"], unit) for unit, row in passages)
            yield from slide(texts, self._begin, self._window, self._stride)

    def _counted(self, pieces: Iterable[Any]) -> Iterator[Piece]:
        for _, _, piece in number_documents(pieces):
            self._count([piece.text])
            self._bar.update(self.bytes[-1])
            yield piece

    def _answers(self, examples: Iterable[Any]) -> Iterator[Item]:
        for unit, example in enumerate(examples):
            rows = list(encode_examples([example], self._tokenizer))  # several where each answer has its own text
            self.documents += 1
            self._count(example.answers)
            self._bar.update(sum(row["bytes"] for row in rows))
            for row in rows:
                text = _passage(row["input_ids"], row["labels"], unit)
                has_no_prompt = len(text[0]) and text[1, 0] != IGNORED
                yield from slide([text], self._begin if has_no_prompt else [], self._window, self._stride)

    def _count(self, texts: list[str]) -> None:
        self.words += sum(len(text.split()) for text in texts)
        self.bytes.append(sum(len(text.encode()) for text in texts))


def _passage(ids: np.ndarray, labels: np.ndarray, unit: int) -> np.ndarray:
    """Token ids, labels (IGNORED where a token does not count) and the passage's number, (3, tokens)."""
    return np.stack([ids, labels, np.full(len(ids), unit)]).astype(np.int64)


def slide(passages: Iterable[np.ndarray], begin: list[int], window: int, stride: int) -> Iterator[Item]:
    """Cut one document, which comes in passages, (3, tokens) each, into windows; the token ids `begin` precede it.

    Every token that counts is a target exactly once: all tokens of the first window, then `stride` new ones in each.
    The last window reaches back to be full.
    """
    text = _passage(np.array(begin, np.int64), np.full(len(begin), IGNORED), 0)
    offset = 0  # the document's position of text[:, 0]
    done = 0  # the position of the last token that was a target

    def cut(end: int) -> Iterator[Item]:
        start = max(0, end - window)
        _, labels, units = text[:, start + 1 - offset : end + 1 - offset]
        targets = np.where(np.arange(start + 1, end + 1) > done, labels, IGNORED)
        if (targets != IGNORED).any():
            yield {"input_ids": text[0, start - offset : end - offset], "targets": targets, "units": units}

    for passage in passages:
        keep = max(0, done - window - offset)
        offset += keep
        text = np.concatenate([text[:, keep:], passage], 1)
        while offset + text.shape[1] - 1 >= (end := done + stride if done else window):
            yield from cut(end)
            done = end
    if offset + text.shape[1] - 1 > done:
        yield from cut(offset + text.shape[1] - 1)
