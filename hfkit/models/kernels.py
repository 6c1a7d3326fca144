"""Layers in the form that suits the kernels of a device. Weights, names and configuration stay what they are."""

import functools
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

_BLOCK = 256  # queries; smaller blocks save fewer scores than they cost in calls
_CAUSAL = "sdpa_causal"
_MULTIPLE = 64  # tensor cores are several times slower at matrices whose rows do not begin at a multiple of 16 bytes


def fuse_activations(model: nn.Module) -> None:
    """Let one kernel compute GPT-2's activation, for which transformers starts eight."""
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if type(child) is NewGELUActivation:
                setattr(layer, name, nn.GELU(approximate="tanh"))


def attend_in_blocks(model: Any) -> None:
    """Compute attention without a fused kernel, in blocks of queries where it is causal.

    A block leaves out the keys after its end, which the mask excludes: 3 of 8 scores in a context of 1,024 tokens.
    """
    module = sys.modules[type(model).__module__]
    plain = getattr(module, "eager_attention_forward", None)  # all models of transformers use this name
    if not plain or model.config.is_encoder_decoder:
        model.set_attn_implementation("eager")
        return

    def attend(layer: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        """query, key, value: (batch, heads, tokens, width). Returns (batch, tokens, heads, width)."""
        if not getattr(layer, "is_causal", False) or mask is None or query.shape[2] != key.shape[2]:
            return plain(layer, query, key, value, mask, **options)[0], None
        blocks = []
        for start in range(0, query.shape[2], _BLOCK):
            rows, seen = slice(start, start + _BLOCK), slice(start + _BLOCK)
            block = query[:, :, rows], key[:, :, seen], value[:, :, seen], mask[..., rows, seen]
            blocks.append(plain(layer, *block, **options)[0])
        return torch.cat(blocks, 1), None

    name = f"{module.__name__}.blocks"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)


def attend_without_mask(model: Any) -> None:
    """Tell torch's fused attention that it is causal instead of giving it a mask, in compiled code, too.

    Its fastest kernels take no mask. transformers leaves a causal mask out by itself, but not while compiling: there
    it cannot see that each row is one text. It is for batches of such rows, padded on the right at most.
    """
    if model.config._attn_implementation == "sdpa" and not model.config.is_encoder_decoder:
        AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
        AttentionMaskInterface.register(_CAUSAL, _mask_where_needed)
        model.set_attn_implementation(_CAUSAL)


def _mask_where_needed(*, q_length: int, kv_length: int, **options: Any) -> torch.Tensor | None:
    """transformers' own mask; None where each token sees all that come before it, and nothing else."""
    reach = options.get("local_size") or math.inf
    if options.get("attention_mask") is None and q_length == kv_length < reach and not options.get("use_vmap"):
        return None
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, kv_length=kv_length, **options)
    return mask


class _PaddedHead(nn.Linear):
    """A head without a bias, computed for a vocabulary of a multiple of 64 tokens while it is trained."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(hidden)
        count = len(self.weight)
        padded = functional.pad(self.weight, (0, 0, 0, -count % _MULTIPLE))
        return functional.linear(hidden, padded)[..., :count]


def prepare_training(model: Any) -> None:
    """Pad the vocabulary inside the computation, and return the loss alone where labels are given.

    The logits of a batch are larger than all weights. Where nobody asks for them, what is compiled never writes them
    in float32.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None:
        head.__class__ = _PaddedHead
    kind = type(model)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = kind.forward(self, *args, **kwargs)
        return type(output)(loss=output.loss) if self.training and output.loss is not None else output

    # A class rather than an attribute, since a copy of the model must call its own layers; a hook is not compiled.
    model.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
