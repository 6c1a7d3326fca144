"""`evaluate` wherever the model is: documents are cut into windows, whose scores are summed up. Imports no torch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import numpy as np

from hfkit.console import counted, with_error
from hfkit.corpus.documents import Piece
from hfkit.corpus.encoding import IGNORED, number_documents
from hfkit.errors import HfkitError
from hfkit.inference.scores import Scores, exp, jsonable, ratio_stderr
from hfkit.reporting.pages import render

Item = dict[str, np.ndarray]  # input_ids, targets, and units (the passage that each target belongs to); (length,) each


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well a model predicted a corpus. Every field but the last two is a figure of `to_dict` and `--json`."""

    model: str
    documents: int
    words: int  # separated by white space
    tokens: int
    bytes: int
    window: int
    stride: int
    dtype: str
    loss: float  # nats per token
    loss_stderr: float
    perplexity: float
    perplexity_stderr: float
    word_perplexity: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    token_accuracy: float  # share of the tokens that the model thought the likeliest
    top5_accuracy: float  # share of the tokens that were among the model's five likeliest
    scores: Scores = field(repr=False)  # of each passage
    passages: np.ndarray = field(repr=False)  # bytes of each passage, (passages,)

    def __str__(self) -> str:
        perplexity = with_error(self.perplexity, self.perplexity_stderr, ".2f")
        bits = with_error(self.bits_per_byte, self.bits_per_byte_stderr, ".4f")
        return (
            f"{self.model}: perplexity {perplexity}, {bits} bits per byte, token accuracy {self.token_accuracy:.1%} "
            f"({counted(self.documents, 'document')}, {counted(self.tokens, 'token')})"
        )

    __repr__ = __str__

    def describe(self) -> dict[str, str]:
        """Every figure with its name, to be read."""
        return {
            "model": self.model,
            "perplexity": with_error(self.perplexity, self.perplexity_stderr, ".3f"),
            "loss": with_error(self.loss, self.loss_stderr, ".4f") + " nats per token",
            "bits per byte": with_error(self.bits_per_byte, self.bits_per_byte_stderr, ".4f"),
            "token accuracy": f"{self.token_accuracy:.2%} (in the five likeliest: {self.top5_accuracy:.2%})",
            "corpus": ", ".join(
                counted(getattr(self, f"{noun}s"), noun) for noun in ("document", "token", "word", "byte")
            ),
            "how": f"windows of {counted(self.window, 'token')}, {self.stride:,} new in each, in {self.dtype}",
        }

    def verdict(self) -> str:
        """The perplexity in words."""
        choice = f"it chose among {self.perplexity:,.1f} equally likely tokens"
        return f"On average the model is as unsure as if {choice}; lower is better."

    def _repr_html_(self) -> str:
        return render("figures.html.jinja", head=(), rows=list(self.describe().items()), sentence=self.verdict())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; None where a figure is not known."""
        values: dict[str, Any] = jsonable({each.name: getattr(self, each.name) for each in fields(self) if each.repr})
        return values

    def gain_over(self, other: "Evaluation") -> tuple[float, float]:
        """Bits per byte saved compared with `other` on the same corpus, and the standard error of that.

        Raises:
            HfkitError: `other` evaluated another corpus.
        """
        if not np.array_equal(self.passages, other.passages):
            raise HfkitError("only evaluations of the same corpus can be compared")
        saved = (other.scores.nll - self.scores.nll) / math.log(2)
        return float(saved.sum() / self.bytes), ratio_stderr(saved, self.passages)


class WindowReader:
    """Cuts a corpus into windows, counts what it reads, and sums up the scores."""

    def __init__(self, window: int, stride: int, bar: Any) -> None:
        """bar: shows how many bytes are read."""
        self.window, self.stride, self.bar = window, min(stride, window), bar
        self.documents, self.words = 0, 0
        self.bytes: list[int] = []  # of each passage

    def counted(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces that hold text, each counted as a passage."""
        for _, _, piece in number_documents(pieces):
            self.count([piece.text])
            self.bar.update(self.bytes[-1])
            yield piece

    def count(self, texts: list[str]) -> None:
        """Count a passage."""
        self.words += sum(len(text.split()) for text in texts)
        self.bytes.append(sum(len(text.encode()) for text in texts))

    def cut(self, rows: Iterable[tuple[int, Sequence[int]]], begin: list[int]) -> Iterator[Item]:
        """Windows of all documents. rows: of each passage the number of its document, and its token ids."""
        for number, passages in groupby(enumerate(rows), key=lambda row: row[1][0]):
            self.documents = number + 1
            yield from self.slide((make_passage(ids, ids, unit) for unit, (_, ids) in passages), begin)

    def slide(self, passages: Iterable[np.ndarray], begin: list[int]) -> Iterator[Item]:
        """Cut one document, which comes in passages, (3, tokens) each, into windows; the token ids `begin` precede it.

        Every token that counts is a target exactly once: all tokens of the first window, then `stride` new ones in
        each. The last window reaches back to be full.
        """
        text = make_passage(begin, [IGNORED] * len(begin), 0)
        offset = 0  # the document's position of text[:, 0]
        done = 0  # the position of the last token that was a target

        def cut(end: int) -> Iterator[Item]:
            start = max(0, end - self.window)
            _, labels, units = text[:, start + 1 - offset : end + 1 - offset]
            targets = np.where(np.arange(start + 1, end + 1) > done, labels, IGNORED)
            if (targets != IGNORED).any():
                yield {"input_ids": text[0, start - offset : end - offset], "targets": targets, "units": units}

        for passage in passages:
            keep = max(0, done - self.window - offset)
            offset += keep
            text = np.concatenate([text[:, keep:], passage], 1)
            while offset + text.shape[1] - 1 >= (end := done + self.stride if done else self.window):
                yield from cut(end)
                done = end
        if offset + text.shape[1] - 1 > done:
            yield from cut(offset + text.shape[1] - 1)

    def sum_up(self, model: str, scores: Scores, dtype: str) -> Evaluation:
        """The evaluation, once all is scored. HfkitError if nothing was."""
        if not scores.count:
            raise HfkitError("there is nothing to score: the corpus holds no text")
        sizes = np.array(self.bytes, float)
        scores.merge(Scores(*np.zeros((4, len(sizes)))))  # passages in which no token was a target
        nats = float(scores.nll.sum())
        return Evaluation(
            model=model,
            documents=self.documents,
            words=self.words,
            tokens=scores.count,
            bytes=int(sizes.sum()),
            window=self.window,
            stride=self.stride,
            dtype=dtype,
            loss=scores.loss,
            loss_stderr=scores.loss_stderr,
            perplexity=scores.perplexity,
            perplexity_stderr=scores.perplexity_stderr,
            word_perplexity=exp(nats / max(1, self.words)),
            bits_per_byte=nats / math.log(2) / float(sizes.sum()),
            bits_per_byte_stderr=ratio_stderr(scores.nll, sizes) / math.log(2),
            token_accuracy=float(scores.top1.sum() / scores.count),
            top5_accuracy=float(scores.top5.sum() / scores.count),
            scores=scores,
            passages=sizes,
        )


def make_passage(ids: Sequence[int], labels: Sequence[int], unit: int) -> np.ndarray:
    """Token ids, labels (IGNORED where a token does not count) and the passage's number, (3, tokens)."""
    return np.stack([ids, labels, np.full(len(ids), unit)]).astype(np.int64)
