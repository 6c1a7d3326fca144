"""What `evaluate` returns, wherever the model is. Imports no torch."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from hfkit.console import counted, with_error
from hfkit.errors import HfkitError
from hfkit.inference.scores import Scores, exp, jsonable, ratio_stderr
from hfkit.reporting.templates import render


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
        values: dict[str, Any] = jsonable(
            {field.name: getattr(self, field.name) for field in fields(self) if field.repr}
        )
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


class Reader(Protocol):
    """What counted a corpus while it was read."""

    documents: int
    words: int
    bytes: list[int]  # of each passage


def sum_up(name: str, reader: Reader, scores: Scores, window: int, stride: int, dtype: str) -> Evaluation:
    """The evaluation of the model `name`, once all is scored. HfkitError if nothing was."""
    if not scores.count:
        raise HfkitError("there is nothing to score: the corpus holds no text")
    sizes = np.array(reader.bytes, float)
    scores.merge(Scores(*np.zeros((4, len(sizes)))))  # passages in which no token was a target
    nats = float(scores.nll.sum())
    return Evaluation(
        model=name,
        documents=reader.documents,
        words=reader.words,
        tokens=scores.count,
        bytes=int(sizes.sum()),
        window=window,
        stride=stride,
        dtype=dtype,
        loss=scores.loss,
        loss_stderr=scores.loss_stderr,
        perplexity=scores.perplexity,
        perplexity_stderr=scores.perplexity_stderr,
        word_perplexity=exp(nats / max(1, reader.words)),
        bits_per_byte=nats / math.log(2) / float(sizes.sum()),
        bits_per_byte_stderr=ratio_stderr(scores.nll, sizes) / math.log(2),
        token_accuracy=float(scores.top1.sum() / scores.count),
        top5_accuracy=float(scores.top5.sum() / scores.count),
        scores=scores,
        passages=sizes,
    )
