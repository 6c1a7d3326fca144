"""Copies of a model that share its weights.

A model may serve several threads at once, so no call changes it. A call that needs another attention, another head or
eval mode changes a copy instead; only the modules are copied, which takes milliseconds.
"""

import copy
from itertools import chain
from typing import TypeVar

import torch

from hfkit.models.loading import LanguageModel

Module = TypeVar("Module", bound=torch.nn.Module)


def share_weights(model: Module) -> Module:
    """A copy with modules and configs of its own, and the same parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def in_eval_mode(lm: LanguageModel) -> LanguageModel:
    """`lm` without dropout: a copy where the model is in train mode, so that its training goes on undisturbed."""
    return LanguageModel(share_weights(lm.model).train(False), lm.tokenizer) if lm.model.training else lm


def precise_head(model: Module) -> Module:
    """A copy that computes logits in float32, whatever the precision of the rest.

    GPT-2's logits are near -100, where bfloat16 has steps of 0.5.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or hasattr(head, "_hf_hook"):  # accelerate brings this head's weights only while it runs
        return model
    model = share_weights(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    plain_forward = head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            if not head.weight.is_floating_point():  # a quantized head applies its scale itself
                return plain_forward(hidden.float())  # type: ignore[no-any-return]
            bias = None if head.bias is None else head.bias.float()
            return _linear(hidden.float(), head.weight.float(), bias)

    head.forward = forward
    return model


def _linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's `linear`. On AMD's processors MKL, which torch uses for it, takes twice as long as oneDNN."""
    if hidden.device.type == "cpu" and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():  # type: ignore[no-untyped-call]
        # A private operator, which torch.compile uses. It may disappear.
        product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if product and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return product(hidden, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return torch.nn.functional.linear(hidden, weight, bias)
