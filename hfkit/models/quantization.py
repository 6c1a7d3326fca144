"""Weights in 8 or 4 bits on a CPU: `nn.Linear` and GPT-2's `Conv1D` become integer matrices.

torch's own integer kernels do the arithmetic. They are several times faster with bfloat16 activations than with
float32, even on a processor without bfloat16 units. On a GPU bitsandbytes does this (`loading`).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfkit.errors import needing

_GROUP = 32  # input features that share a scale in 4 bits
_STEP = 32  # the 8-bit kernel reads past the end of a row unless its input features are a multiple of this
_HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))  # the processor multiplies matrices of bfloat16
_MANY_ROWS = 16 if _HAS_AMX else 48  # from here on the product with dequantized weights is faster than the kernel
_AT_ONCE = 1 << 22  # weights that are dequantized together: memory for many more would be taken anew at each call


class Int8Linear(nn.Module):
    """y = x W^T + b with W as symmetric int8 and one scale for each output feature."""

    weight: torch.Tensor  # (out_features, in_features), int8
    scale: torch.Tensor  # (out_features,), bfloat16
    center: torch.Tensor | None  # (in_features,), what `weight` leaves out of each of its rows

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, is_head: bool = False) -> None:
        """weight: (out_features, in_features), floating point; bias: (out_features,).

        is_head: multiply by the mean of the rows in float32, and by the difference from it in 8 bits. A mean logit
        that is far from 0 would be rounded with the logits: to steps of 0.5 for GPT-2, whose logits are near -100.
        """
        super().__init__()
        self.register_buffer("center", weight.float().mean(0) if is_head else None)
        weight = weight.float() - self.center if self.center is not None else weight
        # The kernel multiplies with the scale in bfloat16, so divide by the same number.
        scale = (weight.float().abs().amax(1).clamp(min=1e-12) / 127).bfloat16()
        levels = (weight.float() / scale.float()[:, None]).round().clamp(-128, 127)
        self.register_buffer("weight", levels.to(torch.int8).contiguous())
        self.register_buffer("scale", scale)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        dtype = torch.bfloat16 if _HAS_AMX else x.dtype
        if len(rows) < _MANY_ROWS and rows.shape[1] % _STEP == 0:
            # A private operator, but torch has no other 8-bit kernel for a CPU.
            y = torch._weight_int8pack_mm(rows.bfloat16().contiguous(), self.weight, self.scale)
        else:
            parts = torch.split(self.weight, max(1, _AT_ONCE // rows.shape[1]))
            y = torch.cat([rows.to(dtype) @ part.to(dtype).T for part in parts], 1) * self.scale.to(dtype)
        if self.center is not None:
            y = y + rows.float() @ self.center[:, None]
        return _finish(y, self.bias, x)


class Int4Linear(nn.Module):
    """y = x W^T + b with W in 4 bits and one scale for each output feature and 32 input features."""

    weight: torch.Tensor  # packed in the layout of torch's kernel
    scale_and_zero: torch.Tensor  # (in_features / 32, out_features, 2), bfloat16

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """weight: (out_features, in_features) that `fits`; bias: (out_features,)."""
        super().__init__()
        groups = weight.float().view(len(weight), -1, _GROUP)
        scale = (groups.abs().amax(-1) / 7).clamp(min=1e-12)
        levels = ((groups / scale[..., None]).round().clamp(-8, 7) + 8).to(torch.int32).view_as(weight)
        # Private operators again. The last dimension of scale_and_zero holds the scale and the zero point.
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.contiguous(), 1)
        # Viewed as int8, the only type to which T5 does not cast its activations.
        self.register_buffer("weight", packed.view(torch.int8))
        pairs = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1)
        self.register_buffer("scale_and_zero", pairs.bfloat16().contiguous())
        self.bias = bias

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the kernel takes a weight of this shape."""
        return weight.shape[0] % 16 == 0 and weight.shape[1] % _GROUP == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        packed = self.weight.view(torch.uint8)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, _GROUP, self.scale_and_zero)
        return _finish(y, self.bias, x)


def _finish(y: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Add the bias, and give y the precision and the leading dimensions of x."""
    y = y.to(x.dtype) if bias is None else torch.add(bias, y)  # a float32 bias makes the sum float32 in one pass
    return y.to(x.dtype).view(*x.shape[:-1], -1)


def bits_of(model: nn.Module) -> str | None:
    """The bits of the weights, "int8" or "int4", whether from here or from bitsandbytes; None for whole weights."""
    kinds = {type(layer) for layer in model.modules()}
    if Int4Linear in kinds or getattr(model, "is_loaded_in_4bit", False):
        return "int4"
    return "int8" if Int8Linear in kinds or getattr(model, "is_loaded_in_8bit", False) else None


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: str) -> None:
    """Replace every linear layer of `model` in place. Embeddings and norms keep their precision.

    bits: "int8" or "int4". The head always gets 8 bits, because its errors go straight into the probabilities; so does
    a layer whose shape the 4-bit kernel does not take.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Mamba multiplies by the weight of its dt_proj without calling the layer.
            if not isinstance(layer, nn.Linear | Conv1D) or name == "dt_proj":
                continue
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # Conv1D keeps (in, out)
            small = bits == "int4" and layer is not head and Int4Linear.fits(weight)
            weight = weight.contiguous()
            module = Int4Linear(weight, layer.bias) if small else Int8Linear(weight, layer.bias, is_head=layer is head)
            setattr(parent, name, module)


def bitsandbytes_config(bits: str) -> Any:
    """What makes transformers load a model in "int8" or "int4" on a GPU."""
    with needing("--quantize on a GPU needs bitsandbytes", "bitsandbytes"):
        import bitsandbytes  # noqa: F401
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == "int4":
        # NormalFloat: its 16 levels lie where weights do.
        settings = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_quant_type": "nf4"}
    return BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
