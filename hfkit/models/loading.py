"""Load a model and its tokenizer: `model, tokenizer = load("gpt2")`."""

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from hfkit.console import detail
from hfkit.declaration import Options, divide
from hfkit.errors import HfkitError, OptionError, needing
from hfkit.models import architecture, gguf_import, integrity
from hfkit.models.folder import ModelFiles
from hfkit.models.integrity import LOADING_LOCK, calling_library
from hfkit.models.kernels import fuse_activations
from hfkit.models.quantization import bitsandbytes_config, quantize
from hfkit.models.sources import find_model
from hfkit.models.wordpiece import correct_ends
from hfkit.options import ModelOptions
from hfkit.storage import check_weights

Module = TypeVar("Module", bound=torch.nn.Module)
# The class of a model that does not write text, by what it is for: see `head_of`.
HEADS: dict[str, Any] = {
    "classification": transformers.AutoModelForSequenceClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked": transformers.AutoModel,
    "other": transformers.AutoModel,
}


class LanguageModel(NamedTuple):
    """A model, in eval mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """The name that the user gave."""
        return str(self.model.name_or_path)

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and continuation together; None where the model sets no limit."""
        return architecture.context_length(self.model.config)

    def __repr__(self) -> str:
        size, dtype = self.model.num_parameters(), str(self.model.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}: {size:,} parameters, {dtype} on {self.model.device})"


Model = str | os.PathLike[str] | ModelOptions | LanguageModel | tuple[Any, Any] | None


def load(model: str | os.PathLike[str] | ModelOptions | None = None, **overrides: Any) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        model: "bundled", a Hub name, a folder, a .gguf file, a TensorFlow checkpoint, or `ModelOptions`. Default:
            $HFKIT_MODEL, else "bundled".
        overrides: fields of `ModelOptions`, e.g. `dtype="bfloat16"`, `device="cuda:1"`, `quantize="int8"`.

    Returns:
        `(model, tokenizer)`. GPT-2 is a `GPT2LMHeadModel` with a `GPT2Tokenizer`. Other models come from
        `AutoModelForCausalLM`, from `AutoModelForSeq2SeqLM` if they have an encoder, or from the class of their head.

    Raises:
        HfkitError: the model cannot be found, is damaged or unsafe.
    """
    options = ModelOptions.make(model, overrides)
    source = find_model(options)
    return load_weights(source, options, load_tokenizer(source))


def split_options(model: Model, overrides: Mapping[str, Any], *groups: tuple[type[Options], Any]) -> list[Any]:
    """For a call that takes `model=` and keywords: the model with its own ones, then the options of each group.

    `model, options = split_options(model, overrides, (GenerateOptions, options))` makes `dtype="bfloat16"` a keyword.

    Raises:
        OptionError: such a keyword comes with a model that is loaded already.
    """
    if not isinstance(model, tuple):
        return divide(overrides, (ModelOptions, model), *groups)
    known = {name for group, _ in groups for name in group.names()}
    if late := [name for name in overrides if name in {*ModelOptions.names()} - known]:
        raise OptionError(f"{late[0]} is for loading, and the model is loaded: leave it out, or give the model's name")
    return [model, *divide(overrides, *groups)]


_kept: tuple[Any, LanguageModel] | None = None  # the model that `loaded` loaded last, and what it was loaded from


def loaded(model: Model, *heads: str) -> LanguageModel:
    """`model` as a LanguageModel in eval mode.

    A name is loaded once, as long as its files stay the same, by any number of threads. Of a model in train mode the
    result is a copy, so that its training goes on undisturbed.

    heads: what the model must be for, see `architecture.head_of`. Default: "text".
    """
    global _kept
    heads = heads or ("text",)
    if isinstance(model, tuple):
        if len(model) != 2 or not isinstance(model[0], torch.nn.Module) or isinstance(model[1], torch.nn.Module):
            given = ", ".join(type(part).__name__ for part in model)
            raise TypeError(f"a loaded model is (model, tokenizer), not ({given})")
        lm = LanguageModel(*model)
        architecture.check_head(lm.name, lm.model.config, *heads)
        return LanguageModel(share_weights(lm.model).train(False), lm.tokenizer) if lm.model.training else lm
    options = ModelOptions.make(model)
    with LOADING_LOCK:
        source = find_model(options)
        key = options, _state_of(source)
        if _kept and _kept[0] == key:
            architecture.check_head(source.name, _kept[1].model.config, *heads)
            return _kept[1]
        config = load_config(source)
        architecture.check_head(source.name, config, *heads)
        _kept = None  # memory may not hold two models
        _kept = key, load_weights(source, options, load_tokenizer(source), config)
        return _kept[1]


def share_weights(model: Module) -> Module:
    """A copy with modules and configs of its own, and the same parameters and buffers. It takes milliseconds.

    A model may serve several threads at once, so no call changes it. A call that needs another attention, another head
    or eval mode changes a copy instead.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _state_of(source: ModelFiles) -> list[tuple[str, int]]:
    files = [source.path] if source.gguf else [*source.folder.iterdir()]
    files += source.adapter.iterdir() if source.adapter else []
    return sorted((str(file), file.stat().st_mtime_ns) for file in files)


def load_config(source: ModelFiles) -> Any:
    """The transformers configuration of a model."""
    with calling_library(source):
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **extra)
        if source.gguf:
            gguf_import.complete_config(source, config)
    integrity.check_sizes(source, config)
    return config


def load_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, checked. It needs neither torch nor the weights."""
    with calling_library(source):
        tokenizer = integrity.read_tokenizer(source)
    # GPT2Tokenizer is empty, without an error, where files are missing.
    if len(tokenizer) <= 1:
        where = source.tokenizer_folder
        raise HfkitError(f"the tokenizer is empty ({where}): copy tokenizer.json of the model into it")
    if not source.adapter:  # which may bring tokens of its own
        integrity.check_vocabulary(source, tokenizer, source.config.get("vocab_size"))
    return tokenizer


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that the model knows: rows of its embedding."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def load_weights(
    source: ModelFiles, options: ModelOptions, tokenizer: PreTrainedTokenizerBase, config: Any = None
) -> LanguageModel:
    """The model of `source`, on the device and in the precision that `options` ask for.

    config: what `load_config` returned, if the caller has it already.
    """
    config = config or load_config(source)
    device = architecture.choose_device(options)
    dtype = architecture.choose_dtype(options.dtype, device)
    bits = architecture.choose_bits(options, source, device, dtype)
    placement: Any = options.device_map or architecture.spread_over_devices(device, source)
    arguments: dict[str, Any] = {"dtype": dtype}
    if source.gguf:
        arguments |= gguf_import.loading_arguments(source)
    if bits and device.type == "cuda":
        arguments["quantization_config"] = bitsandbytes_config(bits)
        placement = placement or {"": device}
    if placement:
        arguments["device_map"] = placement
    with calling_library(source), no_init_weights():  # what is missing is an error, so no random number is of any use
        model, report = _read_model(source, _class_for(source, config), config, **arguments)
    integrity.check_report(source, model, report)
    if source.gguf:
        gguf_import.complete_settings(source, model.generation_config)
    if source.adapter:
        model = _merge_adapter(model, source, source.adapter)
        integrity.check_vocabulary(source, tokenizer, vocabulary_size(model))
    correct_ends(model, tokenizer, vocabulary_size(model))
    integrity.check_values(source.folder, model)
    model.name_or_path = source.name
    if not placement:
        model = model.to(device)
    if bits and device.type == "cpu":
        quantize(model, bits)
    if device.type == "cuda":
        fuse_activations(model)
    precision = bits or str(dtype).removeprefix("torch.")
    detail(f"{source.name}: {model.num_parameters():,} parameters, {precision} on {placement or device}")
    return LanguageModel(model.eval(), tokenizer)


def load_with_head(
    source: ModelFiles, options: ModelOptions, tokenizer: PreTrainedTokenizerBase, head: str, labels: Sequence[str]
) -> PreTrainedModel:
    """The model of `source` in float32, with its own head or a new one, to be trained.

    head: "classification", with these labels, or "question-answering".

    Raises:
        HfkitError: more than the head is missing.
    """
    config = load_config(source)
    is_new = architecture.head_of(config) != head
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif is_new:
        config.num_labels = 2  # where an answer begins, and where it ends
    config.pad_token_id = tokenizer.pad_token_id
    model, report = _read_model(source, HEADS[head], config, dtype=torch.float32, ignore_mismatched_sizes=is_new)
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: a masked language model has none.
    missing = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    integrity.check_names(source.folder, missing=missing)
    trainable: PreTrainedModel = model.to(architecture.choose_device(options))
    return trainable


def _read_model(source: ModelFiles, kind: Any, config: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model of `source` as a transformers class, and the names that `from_pretrained` reports."""
    for folder in {source.folder, source.adapter or source.folder}:
        check_weights(folder)
    with calling_library(source):
        integrity.check_family(source, config)
        model, report = kind.from_pretrained(
            source.folder,
            config=config,
            use_safetensors=None if source.gguf else True,
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
            **arguments,
        )
    return model, report


def _class_for(source: ModelFiles, config: Any) -> Any:
    if kind := HEADS.get(architecture.head_of(config)):
        return kind
    if config.model_type == "gpt2":
        return transformers.GPT2LMHeadModel
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if type(config) in transformers.MODEL_MAPPING and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HfkitError(f"{source.name} is a {config.model_type}, which does not write text: choose another model")
    return transformers.AutoModelForCausalLM


def _merge_adapter(model: PreTrainedModel, source: ModelFiles, folder: Path) -> PreTrainedModel:
    with needing("LoRA adapters need peft", "lora"):
        from peft import PeftModel, get_peft_model_state_dict
    with calling_library(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft only warns of what is an error below
        with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        # An adapter that was trained with new tokens has the whole embedding, with more rows than that of its base.
        embedding = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
        rows = shapes.get(f"base_model.model.{embedding}.weight", [0])[0]
        if rows > vocabulary_size(model):
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, folder, use_safetensors=True)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        unexpected = {name for name in shapes.keys() - wanted if "lora_" in name}
        integrity.check_names(folder, missing=wanted - shapes.keys(), unexpected=unexpected)
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged
