"""Write a model with its tokenizer as one GGUF file, which llama.cpp, ollama and others run.

Names and layouts are those of llama.cpp's own converter. That one knows many more models, but no package has it.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.errors import HfkitError, needing
from hfkit.models.architecture import check_head, context_length
from hfkit.models.gguf_tokenizer import add_tokenizer, tokenizer_kind
from hfkit.models.loading import LanguageModel
from hfkit.models.modelfile import sampling_of

# llama.cpp's name of what a model_type computes.
_ARCHITECTURES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Settings of config.json that llama.cpp takes for granted.
_EXPECTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
}
_BLOCK = 32  # numbers that share a scale in q8_0 and q4_0


def check_gguf(name: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise HfkitError unless a model of this configuration, called `name`, can be written as a GGUF file."""
    with needing("GGUF files need gguf", "gguf"):
        import gguf  # noqa: F401
    check_head(name, config, "text")
    if config.model_type not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise HfkitError(f"{name} is a {config.model_type}, and GGUF is written for {known}: leave --format out")
    for setting, values in _EXPECTED.items():
        if (value := getattr(config, setting, values[0])) not in values:
            raise HfkitError(f"llama.cpp cannot compute {name}, whose {setting} is {value!r}: leave --format out")
    if (scaling := _rope(config).get("rope_type", "default")) not in ("default", "linear", "llama3"):
        raise HfkitError(f"GGUF is not written for rope_type {scaling!r} ({name}): leave --format out")
    tokenizer_kind(name, tokenizer)


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _is_scaled(config: Any) -> bool:
    return bool(_rope(config).get("rope_type", "default") != "default")


def write_gguf(lm: LanguageModel, path: Path, precision: str) -> None:
    """Write a model that `check_gguf` accepts. precision: f32, f16, bf16, q8_0 or q4_0."""
    import gguf

    config: Any = lm.model.config
    architecture = _ARCHITECTURES[config.model_type]
    file: Any = gguf.GGUFWriter(path, architecture)
    file.add_name(path.stem.replace("mistral", "Mistral"))  # transformers would read "mistral" as an architecture
    file.add_file_type(gguf.LlamaFileType[f"{'ALL' if precision == 'f32' else 'MOSTLY'}_{precision.upper()}"])
    file.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(file, config, architecture)
    for setting, add in (("temperature", file.add_sampling_temp), ("top_k", file.add_sampling_top_k),
                         ("top_p", file.add_sampling_top_p), ("min_p", file.add_sampling_min_p)):  # fmt: skip
        if (value := sampling_of(lm).get(setting)) is not None:
            add(value)
    add_tokenizer(file, lm)
    kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names: Any = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {names.get_name(name, (".weight", ".bias")): tensor for name, tensor in _tensors(lm.model).items()}
    tensors |= _rope_factors(lm.model)
    kinds = {key: gguf.GGMLQuantizationType[_precision_of(key, tensor, precision)] for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[key])
        file.add_tensor_info(key, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kinds[key])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_ti_data_to_file()
    for key, tensor in tensors.items():
        file.write_tensor_data(gguf.quantize(tensor.float().contiguous().numpy(), kinds[key]))
    file.close()
    if precision.startswith("q") and (odd := [key for key, kind in kinds.items() if kind.name == "F16"]):
        note(f"{len(odd)} matrices stay in f16, as their rows are no multiple of {_BLOCK} numbers, such as {odd[0]}")


def _add_shape(file: Any, config: Any, architecture: str) -> None:
    heads = config.num_attention_heads
    file.add_context_length(context_length(config))
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(heads)
    file.add_vocab_size(config.vocab_size)
    if architecture == "gpt2":
        file.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        file.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(width)
    file.add_value_length(width)
    file.add_rope_dimension_count(width)
    file.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    if _is_scaled(config):
        file.add_string("hfkit.rope_parameters", json.dumps(_rope(config)))  # GGUF has only what follows from them
    file.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights by transformers' names, in llama.cpp's layout. Tied ones are there once."""
    config: Any = model.config
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensors[name] = tensor.T
        elif _ARCHITECTURES[config.model_type] == "llama" and re.search(r"\.[qk]_proj\.", name):
            # transformers rotates the first half of a head with the second, llama.cpp each number with the next.
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1)
            tensors[name] = halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensors


def _rope_factors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a scaled rotary embedding divides its frequencies by. Empty for a plain one."""
    config: Any = model.config
    if not _is_scaled(config):
        return {}
    scaled: Any = next(part.inv_freq for part in model.modules() if hasattr(part, "inv_freq"))
    plain = _rope(config)["rope_theta"] ** (-torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return {"rope_freqs.weight": plain / scaled}


def _precision_of(name: str, tensor: torch.Tensor, precision: str) -> str:
    """The name of what llama.cpp keeps a tensor in where most are to be in `precision`."""
    if tensor.ndim == 1 or name == "position_embd.weight":
        return "F32"
    if precision.startswith("q") and tensor.shape[-1] % _BLOCK:
        return "F16"
    precise = precision == "q4_0" and name in ("token_embd.weight", "output.weight")
    return "Q8_0" if precise else precision.upper()
