"""How well a model predicts a text: negative log-likelihood, perplexity, accuracy, and their errors."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from hfkit.sequences import IGNORED


@dataclass
class Tally:
    """Sums over the predicted tokens of sequences; the last three are for the standard error."""

    nll: float = 0.0  # nats
    tokens: int = 0
    top1: int = 0  # tokens that were the likeliest
    top5: int = 0  # tokens among the five likeliest
    sequences: int = 0
    nll_squared: float = 0.0
    tokens_squared: float = 0.0
    nll_tokens: float = 0.0

    def add(self, nll: torch.Tensor, tokens: torch.Tensor, top1: torch.Tensor, top5: torch.Tensor) -> None:
        """Add sequences. All tensors: (sequences,)."""
        nll, tokens = nll.double(), tokens.double()
        sums = (nll, tokens, top1, top5, torch.ones_like(nll), nll * nll, tokens * tokens, nll * tokens)
        self.merge(Tally(*(column.sum().item() for column in sums)))

    def merge(self, other: "Tally") -> None:
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens if self.tokens else math.nan

    @property
    def loss_stderr(self) -> float:
        """Standard error of `loss` with the sequences as a sample: that of a ratio of two sums."""
        if self.sequences < 2:
            return math.nan
        loss = self.loss
        squares = self.nll_squared - 2 * loss * self.nll_tokens + loss * loss * self.tokens_squared
        return math.sqrt(max(0.0, squares) * self.sequences / (self.sequences - 1)) / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def perplexity_stderr(self) -> float:
        return self.perplexity * self.loss_stderr


def score(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a model said of the tokens that came.

    Args:
        logits: (rows, length, vocabulary); position t predicts token t + 1.
        labels: (rows, length), IGNORED where a token does not count.

    Returns:
        Negative log-likelihood in nats, rank of the token (0: the likeliest), and whether it counts; each
        (rows, length - 1).
    """
    targets = labels[:, 1:]
    counts = targets != IGNORED
    targets = targets.clamp(min=0)
    logits = logits[:, :-1].float()
    own = logits.gather(-1, targets[..., None])
    nll = logits.logsumexp(-1) - own.squeeze(-1)
    return nll * counts, (logits > own).sum(-1), counts


@torch.no_grad()
def tally(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> Tally:
    """Score every batch of `input_ids` and `labels`, (rows, length) each; logits are let go batch by batch."""
    total, device = Tally(), model.device
    for batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        nll, rank, counts = score(model(**batch, use_cache=False).logits, labels)
        total.add(nll.double().sum(1), counts.sum(1), ((rank == 0) & counts).sum(1), ((rank < 5) & counts).sum(1))
    return total
