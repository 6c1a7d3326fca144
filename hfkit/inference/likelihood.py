"""What a model says of the tokens that came: negative log-likelihood, accuracy, and their errors."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hfkit.corpus.encoding import IGNORED

_AT_ONCE = {False: 1 << 22, True: 1 << 28}  # logits that are looked at together: on a CPU, what its caches nearly hold


def _none() -> np.ndarray:
    return np.zeros(0)


@dataclass
class Scores:
    """Sums over the tokens of each unit of a text (a sequence, a passage); all arrays: (units,)."""

    nll: np.ndarray = field(default_factory=_none)  # nats
    tokens: np.ndarray = field(default_factory=_none)
    top1: np.ndarray = field(default_factory=_none)  # tokens that were the likeliest
    top5: np.ndarray = field(default_factory=_none)  # tokens among the five likeliest

    def add(self, units: np.ndarray, nll: np.ndarray, rank: np.ndarray) -> None:
        """Add tokens. All arrays: (tokens,); units: number of the unit of each; rank: 0 for the likeliest."""
        weights = (nll, None, rank == 0, rank < 5)
        self.merge(Scores(*(np.bincount(units, weight).astype(float) for weight in weights)))

    def merge(self, other: "Scores") -> None:
        """Add what `other` has of the same units."""
        size = max(len(self.nll), len(other.nll))
        for name, values in vars(other).items():
            own = getattr(self, name)
            setattr(self, name, np.pad(own, (0, size - len(own))) + np.pad(values, (0, size - len(values))))

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
        """Standard error of `loss`, the units being a sample."""
        return ratio_stderr(self.nll, self.tokens)

    @property
    def perplexity(self) -> float:
        return exp(self.loss)

    @property
    def perplexity_stderr(self) -> float:
        return self.perplexity * self.loss_stderr


def exp(loss: float) -> float:
    """e to the `loss`; the largest float where it is more."""
    return math.exp(min(loss, 709.0))


def ratio_stderr(above: np.ndarray, below: np.ndarray) -> float:
    """Standard error of sum(above) / sum(below) over sampled units, to first order; NaN for fewer than two."""
    units = np.count_nonzero(below)
    if units < 2:
        return math.nan
    residuals = above - below * (above.sum() / below.sum())
    return float(np.sqrt((residuals**2).sum() * units / (units - 1)) / below.sum())


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood in nats, and rank, of the tokens that came; 0 where they do not count.

    Args:
        logits: (rows, length, vocabulary).
        targets: (rows, length); the token that came after each position, or IGNORED.

    Returns:
        Two tensors (rows, length).
    """
    flat, goals = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = max(1, _AT_ONCE[logits.is_cuda] // flat.shape[1])
    nll, rank = [], []
    for some, goal in zip(flat.split(rows), goals.split(rows), strict=True):
        some = some.float()
        own = some.gather(-1, goal.clamp(min=0)[:, None])
        # Several times as fast as logsumexp on a CPU; 0 where they do not count.
        nll.append(torch.nn.functional.cross_entropy(some, goal, reduction="none", ignore_index=IGNORED))
        rank.append((some > own).sum(-1, dtype=torch.int32) * (goal != IGNORED))
    return torch.cat(nll).view_as(targets), torch.cat(rank).view_as(targets)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """`targets` from labels as transformers has them, (rows, length): those of the tokens themselves."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


@torch.inference_mode()
def score_batches(model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor, np.ndarray]]) -> Scores:
    """Score batches of input ids, targets and the unit of each target, all (rows, length); logits go with a batch."""
    found = Scores()
    for ids, targets, units in batches:
        nll, rank = score(model(input_ids=ids.to(model.device), use_cache=False).logits, targets.to(model.device))
        counts = (targets != IGNORED).numpy()
        found.add(units[counts], nll.double().cpu().numpy()[counts], rank.cpu().numpy()[counts])
    return found


@contextlib.contextmanager
def precise_head(model: Any) -> Iterator[None]:
    """Compute logits in float32, whatever the rest is in: GPT-2's are near -100, where bfloat16 has steps of 0.5."""
    head = model.get_output_embeddings()
    if head is None or hasattr(head, "_hf_hook"):  # its weights may be elsewhere until accelerate brings them
        yield
        return
    before = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            if not head.weight.is_floating_point():  # quantised: it knows its scale itself
                return before(hidden.float())
            bias = None if head.bias is None else head.bias.float()
            return _linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
    try:
        yield
    finally:
        head.forward = before


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's `linear`. MKL, which does it in torch, takes twice as long on AMD's processors as oneDNN."""
    if hidden.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        # A private operator, which may go: the one that torch.compile puts in.
        product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if product and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return product(hidden, weight, bias, "none", [], "")
    return torch.nn.functional.linear(hidden, weight, bias)


def jsonable(value: Any) -> Any:
    """`value` as JSON can say it: Python's numbers for numpy's, None for what is not finite."""
    if isinstance(value, dict):
        return {name: jsonable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@torch.inference_mode()
def score_items(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> Scores:
    """Loss and accuracy, each item a unit and a token: of its label, or of the two places of its answer."""
    found = Scores()
    for batch in batches:
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if "labels" in batch:
            pairs = [(output.logits, batch["labels"])]
        else:
            pairs = [(output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])]
            padding = batch["attention_mask"] == 0  # no answer is there, in whichever batch it is looked for
            pairs = [(logits.float().cpu().masked_fill(padding, -torch.inf), target) for logits, target in pairs]
        nll, right = 0.0, True
        for logits, target in pairs:
            logits = logits.float().cpu()
            nll = nll - logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)
            right = right & (logits.argmax(-1) == target)
        count = len(batch["input_ids"])
        part = Scores()
        part.add(np.arange(count), nll.double().numpy() / len(pairs), (~right).numpy().astype(int))
        found.join(part)
    return found
