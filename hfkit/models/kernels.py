"""Layers in the form that suits a GPU's kernels. Weights, names and configuration stay what they are."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import NewGELUActivation

_MULTIPLE = 64  # tensor cores are several times slower at matrices whose rows do not begin at a multiple of 16 bytes


def fuse_activations(model: nn.Module) -> None:
    """Let one kernel compute GPT-2's activation, for which transformers starts eight."""
    for layer in list(model.modules()):
        for name, child in layer.named_children():
            if type(child) is NewGELUActivation:
                setattr(layer, name, nn.GELU(approximate="tanh"))


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
