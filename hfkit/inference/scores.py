"""Sums of negative log-likelihoods and accuracies, and their standard errors. Imports no torch."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass
class Scores:
    """Sums over the tokens of each unit of a text (a sequence, a passage); all arrays: (units,)."""

    nll: np.ndarray = field(default_factory=_none)  # nats
    tokens: np.ndarray = field(default_factory=_none)
    top1: np.ndarray = field(default_factory=_none)  # tokens that the model found likeliest
    top5: np.ndarray = field(default_factory=_none)  # tokens among its five likeliest

    def add(self, units: np.ndarray, nll: np.ndarray, rank: np.ndarray) -> None:
        """Add tokens. All arrays: (tokens,); units: number of the unit of each; rank: 0 for the likeliest."""
        weights = (nll, None, rank == 0, rank < 5)
        self.merge(Scores(*(np.bincount(units, weight).astype(float) for weight in weights)))

    def merge(self, other: "Scores") -> None:
        """Add the sums that `other` has of the same units."""
        size = max(len(self.nll), len(other.nll))
        for name, values in vars(other).items():
            sums = getattr(self, name)
            setattr(self, name, np.pad(sums, (0, size - len(sums))) + np.pad(values, (0, size - len(values))))

    def join(self, other: "Scores") -> None:
        """Append the units of `other`."""
        for name, values in vars(other).items():
            setattr(self, name, np.concatenate([getattr(self, name), values]))

    @property
    def count(self) -> int:
        """Tokens in all."""
        return int(self.tokens.sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nll.sum() / self.count) if self.count else math.nan

    @property
    def loss_stderr(self) -> float:
        """Standard error of `loss`, with the units as a sample."""
        return ratio_stderr(self.nll, self.tokens)

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def perplexity_stderr(self) -> float:
        return self.perplexity * self.loss_stderr


def exp(loss: float) -> float:
    """e to the power of `loss`, capped at the largest float."""
    return math.exp(min(loss, 709.0))


def ratio_stderr(above: np.ndarray, below: np.ndarray) -> float:
    """Standard error of sum(above) / sum(below) over sampled units, to first order; NaN for fewer than two."""
    units = np.count_nonzero(below)
    if units < 2:
        return math.nan
    residuals = above - below * (above.sum() / below.sum())
    return float(np.sqrt((residuals**2).sum() * units / (units - 1)) / below.sum())


def jsonable(value: Any) -> Any:
    """`value` in JSON's types: Python's numbers for numpy's, None for what is not finite."""
    if isinstance(value, dict):
        return {name: jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
