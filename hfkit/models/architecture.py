"""What a configuration says about a model, and which device and precision suit it."""

import os
import shutil
from typing import Any, TypeVar

import psutil
import torch

from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.models.folder import ModelFiles, count_parameters
from hfkit.options import ModelOptions

Size = TypeVar("Size")
# Model types whose position ids begin after the padding token's id, which leaves fewer for a text.
_SHIFTED = ("roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert data2vec-text mpnet longformer").split()
# The purpose of a transformers class, by a part of its name. All others write text.
_HEADS = {
    "SequenceClassification": "classification",
    "QuestionAnswering": "question-answering",
    "TokenClassification": "other",
    "MultipleChoice": "other",
    "MaskedLM": "masked",
    "PreTraining": "masked",
}
_COMMANDS = {
    "text": "'hfkit generate'",
    "classification": "'hfkit classify'",
    "question-answering": "'hfkit answer'",
    "masked": "'hfkit finetune --head classification'",
    "other": "its own library",
}


def context_length(config: Any) -> int | None:
    """Most tokens that a model with this transformers `config` can take; None without a limit."""
    text_config = getattr(config, "text_config", None) or config  # of a model that reads pictures as well
    # The second is MPT's name.
    limit = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return None
    return limit - (config.pad_token_id or 0) - 1 if config.model_type in _SHIFTED else limit


def head_of(config: Any) -> str:
    """What a model is for: "text", "classification", "question-answering", "masked" or "other"."""
    names = " ".join(config.architectures or [])
    return next((head for name, head in _HEADS.items() if f"For{name}" in names), "text")


def check_head(name: str, config: Any, *heads: str) -> None:
    """Raise HfkitError, which names the right command, unless the model is for one of `heads`."""
    if (head := head_of(config)) not in heads:
        raise HfkitError(f"{name} is a {config.architectures[0]}: use {_COMMANDS[head]}, or choose another model")


def check_causal(name: str, config: Any, instead: str) -> None:
    """Raise HfkitError, with what to do `instead`, if a model has an encoder."""
    if config.is_encoder_decoder:
        raise HfkitError(f"{name} has an encoder: {instead}")


def choose_device(options: ModelOptions) -> torch.device:
    """The device that `options` name. "auto" is this process's GPU, else Apple's, else the CPU."""
    if options.device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises everything from AssertionError to ModuleNotFoundError here
        raise HfkitError(f"no device {options.device!r} on this machine: leave --device out, or say cpu") from error
    if device.type == "meta":
        raise HfkitError("device 'meta' computes nothing: leave --device out, or say cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The precision called `name`. "auto" is half precision on a GPU and float32 on a CPU.

    A CPU is no faster at generating one text in bfloat16, and a hundred times slower without bfloat16 units.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if computes_faster_in_bfloat16("cuda") else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def computes_faster_in_bfloat16(device: str) -> bool:
    """Whether "cuda", "cpu" or another device type computes faster in bfloat16 than in float32."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and has_bfloat16_units()


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies faster in bfloat16 than in float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def for_device(table: dict[str, Size], device: str) -> Size:
    """The entry of `table` for a device type; that of the CPU where it has none."""
    return table.get(device, table["cpu"])


def find_compiler() -> str | None:
    """The C++ compiler that torch would use: $CXX, c++, g++ or clang++; None if there is none."""
    names = os.environ.get("CXX", "c++"), "g++", "clang++"
    return next(filter(None, map(shutil.which, names)), None)


def choose_bits(options: ModelOptions, source: ModelFiles, device: torch.device, dtype: torch.dtype) -> str | None:
    """ "int8" or "int4", or None for whole weights. "auto" is int8 if these fill over half of the free memory."""
    if options.quantize != "auto":
        if options.quantize and device.type not in ("cpu", "cuda"):
            raise HfkitError(f"--quantize works on a CPU and with CUDA, not on {device}: add --device cpu")
        return options.quantize
    if device.type not in ("cpu", "cuda"):
        return None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    needed = count_parameters(source) * dtype.itemsize
    if 2 * needed < free:
        return None
    name = str(dtype).removeprefix("torch.")
    note(f"{source.name} needs {needed / 1e9:.1f} GB in {name}, {free / 1e9:.1f} GB are free: int8 weights instead")
    return "int8"


def spread_over_devices(device: torch.device, source: ModelFiles) -> str | None:
    """device_map "auto" if a model does not fit one GPU, else None. Layers on several GPUs run one after another."""
    if device.type != "cuda" or torch.cuda.device_count() < 2 or "LOCAL_RANK" in os.environ:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return "auto" if source.size > 0.9 * free else None
