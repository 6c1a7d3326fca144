"""How likely a model finds the tokens of a text: negative log-likelihood and rank of each."""

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch

from hfkit.corpus.encoding import IGNORED
from hfkit.inference.scores import Scores
from hfkit.models.loading import Module, share_weights

_LOGITS_AT_ONCE = {False: 1 << 22, True: 1 << 28}  # by is_cuda; on a CPU, about what its caches hold


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood in nats, and rank, of each token that follows; 0 where it is IGNORED.

    Args:
        logits: (rows, length, vocabulary).
        targets: (rows, length); the token that follows each position, or IGNORED.

    Returns:
        Two tensors (rows, length).
    """
    flat, goals = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = max(1, _LOGITS_AT_ONCE[logits.is_cuda] // flat.shape[1])
    nll, rank = [], []
    for part, goal in zip(torch.split(flat, rows), torch.split(goals, rows), strict=True):
        values = part.float()
        # On a CPU cross_entropy is several times as fast as logsumexp. It gives 0 where a target is IGNORED.
        nll.append(torch.nn.functional.cross_entropy(values, goal, reduction="none", ignore_index=IGNORED))
        target = values.gather(-1, goal.clamp(min=0)[:, None])
        rank.append((values > target).sum(-1, dtype=torch.int32) * (goal != IGNORED))
    return torch.cat(nll).view_as(targets), torch.cat(rank).view_as(targets)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """Targets, (rows, length), from labels of the same shape, which transformers keeps at the tokens themselves."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


@torch.inference_mode()
def score_batches(model: Any, batches: Iterable[tuple[torch.Tensor, torch.Tensor, np.ndarray]]) -> Scores:
    """Score batches of input ids, targets and the unit of each target, all (rows, length).

    Only one batch's logits are in memory at a time.
    """
    scores = Scores()
    for ids, targets, units in batches:
        nll, rank = score(model(input_ids=ids.to(model.device), use_cache=False).logits, targets.to(model.device))
        counts = (targets != IGNORED).numpy()
        scores.add(units[counts], nll.double().cpu().numpy()[counts], rank.cpu().numpy()[counts])
    return scores


@torch.inference_mode()
def score_items(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> Scores:
    """Loss and accuracy of a model with a head; each item is a unit of one token.

    That token is its label, or stands for the first and last place of its answer.
    """
    scores = Scores()
    for batch in batches:
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if "labels" in batch:
            pairs = [(output.logits.float().cpu(), batch["labels"])]
        else:
            places = [(output.start_logits, batch["start_positions"]), (output.end_logits, batch["end_positions"])]
            padding = batch["attention_mask"] == 0  # no answer is there, in whichever batch the item is
            pairs = [(logits.float().cpu().masked_fill(padding, -torch.inf), target) for logits, target in places]
        losses = [torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs]
        nll = torch.stack(losses).double().mean(0).numpy()
        is_right = torch.stack([logits.argmax(-1) == target for logits, target in pairs]).all(0).numpy().astype(float)
        scores.join(Scores(nll, np.ones(len(nll)), is_right, np.ones(len(nll))))
    return scores


def precise_head(model: Module) -> Module:
    """A copy that computes logits in float32, whatever the precision of the rest.

    GPT-2's logits are near -100, where bfloat16 has steps of 0.5.
    """
    original: Any = model
    head = original.get_output_embeddings()
    if head is None or hasattr(head, "_hf_hook"):  # accelerate brings this head's weights only while it runs
        return model
    copy: Any = share_weights(model)
    head = copy.get_output_embeddings()
    plain_forward = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            if not head.weight.is_floating_point():  # a quantized head applies its scale itself
                return cast(torch.Tensor, plain_forward(hidden.float()))
            bias = None if head.bias is None else head.bias.float()
            return _linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
    return cast(Module, copy)


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's `linear`. On AMD's processors MKL, which torch uses for it, takes twice as long as oneDNN."""
    if hidden.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():  # type: ignore[no-untyped-call]
        # A private operator, which torch.compile uses. It may disappear.
        product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if product and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return cast(torch.Tensor, product(hidden, weight, bias, "none", [], ""))
    return torch.nn.functional.linear(hidden, weight, bias)
