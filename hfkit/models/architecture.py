"""Load a model and its tokenizer: `model, tokenizer = load("gpt2")`."""

import os
from typing import Any

import torch

from hfkit.errors import HfkitError
from hfkit.models.sources import ModelFiles
from hfkit.options import ModelOptions


def context_length(config: Any) -> int | None:
    """Most positions that a model of this `config` (of transformers) can take; None without a limit."""
    limit = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding token's number.
    return limit - config.pad_token_id - 1 if limit and config.model_type in _SHIFTED else limit


_SHIFTED = ("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "mpnet",
            "longformer")  # fmt: skip
# What a class of transformers is for, by its name: everything else writes text.
_HEADS = {"SequenceClassification": "classification", "QuestionAnswering": "question-answering",
          "TokenClassification": "other", "MultipleChoice": "other", "MaskedLM": "masked",
          "PreTraining": "masked"}  # fmt: skip
_FITTING = {"text": "'hfkit generate'", "classification": "'hfkit classify'", "question-answering": "'hfkit answer'",
            "masked": "'hfkit finetune --head classification'", "other": "its own library"}  # fmt: skip


def head_of(config: Any) -> str:
    """What a model of this `config` is for: "text", "classification", "question-answering", "masked" or "other"."""
    names = " ".join(config.architectures or [])
    return next((head for name, head in _HEADS.items() if f"For{name}" in names), "text")


def check_head(name: str, config: Any, *wanted: str) -> None:
    """HfkitError, with the command that fits, if a model is for something else than is `wanted`."""
    if (head := head_of(config)) not in wanted:
        raise HfkitError(f"{name} is a {config.architectures[0]}: use {_FITTING[head]}, or choose another model")


def choose_device(options: ModelOptions, source: ModelFiles | None = None) -> torch.device:
    """The device that `options` name; "auto" is this process's GPU, then Apple's, then the CPU."""
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
    """The precision called `name`; "auto" is half precision on a GPU and float32 on a CPU.

    A CPU reads one stream's weights as slowly in bfloat16, and where it has no bfloat16 units a hundred times slower.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float16 if device.type == "mps" else torch.float32


def spread_over_devices(device: torch.device, source: ModelFiles) -> str | None:
    """Over all GPUs (accelerate's "auto") only what does not fit one: its layers run one after another."""
    if device.type != "cuda" or torch.cuda.device_count() < 2 or "LOCAL_RANK" in os.environ:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return "auto" if source.size > 0.9 * free else None


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies in bfloat16 faster than in float32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def computes_faster_in_bfloat16(device: str) -> bool:
    """Whether it computes faster in bfloat16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and has_bfloat16_units()


def check_causal(name: str, config: Any, instead: str) -> None:
    """HfkitError, with what to do `instead`, if a model has an encoder."""
    if config.is_encoder_decoder:
        raise HfkitError(f"{name} has an encoder: {instead}")
