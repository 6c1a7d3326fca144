"""Weights in 8 or 4 bits on a CPU: `nn.Linear` and GPT-2's `Conv1D` become integer matrices.

torch's own integer kernels do the arithmetic. They take bfloat16 activations, and are several times faster with them
than with float32 ones even where the processor has no bfloat16 units. On a GPU bitsandbytes does this (`models`).
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_GROUP = 32  # input features that share a scale, in 4 bits
_STEP = 32  # input features that the 8-bit kernel takes at a time; it reads past the end of a row that has others
_MANY_ROWS = 48  # from so many rows on a dequantised matrix product is faster than the integer kernel


class Int8Linear(nn.Module):
    """y = x W^T + b with W as symmetric int8, one scale for each output feature."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: (out_features, in_features), floating point; bias: (out_features,)."""
        super().__init__()
        # The kernel takes the scale in bfloat16, so the weights are divided by what it will multiply them with.
        scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        levels = (weight.float() / scale.float()[:, None]).round().clamp(-128, 127)
        self.register_buffer("weight", levels.to(torch.int8).contiguous())
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) < _MANY_ROWS and rows.shape[1] % _STEP == 0:
            # A private operator, but the only 8-bit CPU kernel that torch has; torchao calls it, too.
            y = torch._weight_int8pack_mm(rows.bfloat16().contiguous(), self.weight, self.scale)
        else:
            y = (rows @ self.weight.to(x.dtype).T) * self.scale.to(x.dtype)
        return _finish(y, self.bias, x)


class Int4Linear(nn.Module):
    """y = x W^T + b with W in 4 bits, one scale for each output feature and 32 input features."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: (out_features, in_features), both as `fits` wants them; bias: (out_features,)."""
        super().__init__()
        groups = weight.float().view(len(weight), -1, _GROUP)
        scale = (groups.abs().amax(-1) / 7).clamp(min=1e-12)
        levels = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.int32).view_as(weight)
        # Private operators again; the last dimension of the second holds scale and zero point.
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)
        # Called int8, because T5 casts what it multiplies to the type of the weight unless it is that.
        self.register_buffer("weight", packed.view(torch.int8))
        pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
        self.register_buffer("scale_and_zero", pairs.bfloat16().contiguous())
        self.bias = bias

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        return weight.shape[0] % 16 == 0 and weight.shape[1] % _GROUP == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        packed = self.weight.view(torch.uint8)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, _GROUP, self.scale_and_zero)
        return _finish(y, self.bias, x)


def _finish(y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Add the bias, and give y the precision and the leading dimensions of x."""
    y = y.to(x.dtype) if bias is None else torch.add(bias, y)  # a float32 bias makes the sum float32 in one go
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def bits_of(model: nn.Module) -> str | None:
    """ "int8" or "int4" where the weights are in 8 or 4 bits, here or by bitsandbytes; else None."""
    kinds = {type(layer) for layer in model.modules()}
    if Int4Linear in kinds or getattr(model, "is_loaded_in_4bit", False):
        return "int4"
    return "int8" if Int8Linear in kinds or getattr(model, "is_loaded_in_8bit", False) else None


@torch.no_grad()
def quantize(model: nn.Module, bits: str) -> None:
    """Replace every linear layer of `model` in place; embeddings and norms keep their precision.

    bits: "int8" or "int4". The head (and, in 4 bits, a layer of a shape that the kernel lacks) gets 8 bits: an error
    there goes straight into the probabilities.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Mamba multiplies by the weight of its dt_proj without calling the layer.
            if not isinstance(layer, nn.Linear | Conv1D) or name == "dt_proj":
                continue
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # Conv1D keeps (in, out)
            small = bits == "int4" and layer is not head and Int4Linear.fits(weight)
            setattr(parent, name, (Int4Linear if small else Int8Linear)(weight.contiguous(), layer.bias))
