"""Load a model and its tokenizer: `model, tokenizer = load("gpt2")`."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from hfkit.console import detail
from hfkit.declaration import Options, divide
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import (
    check_head,
    choose_bits,
    choose_device,
    choose_dtype,
    context_length,
    head_of,
    spread_over_devices,
)
from hfkit.models.integrity import (
    LOADING,
    calling_library,
    check_blocks,
    check_files,
    check_names,
    check_report,
    check_sizes,
    check_values,
)
from hfkit.models.quantization import bitsandbytes_config, quantize
from hfkit.models.sources import ModelFiles, find_model
from hfkit.models.tokenizers import read_tokenizer
from hfkit.options import ModelOptions


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
        return context_length(self.model.config)

    def __repr__(self) -> str:
        size, dtype = self.model.num_parameters(), str(self.model.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}: {size:,} parameters, {dtype} on {self.model.device})"


Model = str | os.PathLike[str] | ModelOptions | LanguageModel | tuple[Any, Any] | None


def load(model: str | os.PathLike[str] | ModelOptions | None = None, **overrides: Any) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        model: "bundled", a Hub name, a folder, a .gguf file, or `ModelOptions`. Default: $HFKIT_MODEL, else "bundled".
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
    """`model` as a LanguageModel. A name is loaded once, as long as its files stay the same, by any number of threads.

    heads: what the model must be for, see `architecture.head_of`. Default: "text".
    """
    global _kept
    heads = heads or ("text",)
    if isinstance(model, tuple):
        lm = LanguageModel(*model)
        check_head(lm.name, lm.model.config, *heads)
        return lm
    options = ModelOptions.make(model)
    with LOADING:
        source = find_model(options)
        key = options, _state_of(source)
        if _kept and _kept[0] == key:
            check_head(source.name, _kept[1].model.config, *heads)
            return _kept[1]
        config = load_config(source)
        check_head(source.name, config, *heads)
        _kept = None  # memory may not hold two models
        _kept = key, load_weights(source, options, load_tokenizer(source), config)
        return _kept[1]


def _state_of(source: ModelFiles) -> list[tuple[str, int]]:
    files = [source.folder / source.gguf] if source.gguf else [*source.folder.iterdir()]
    files += source.adapter.iterdir() if source.adapter else []
    return sorted((str(file), file.stat().st_mtime_ns) for file in files)


def load_config(source: ModelFiles) -> Any:
    """The transformers configuration of a model."""
    with calling_library(source):
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **extra)
    check_sizes(source, config)
    if source.gguf and config.model_type == "gpt2":
        # transformers reads the context of a GGUF GPT-2 into n_ctx, which its model ignores.
        config.n_positions = getattr(config, "n_ctx", None) or config.n_positions
    return config


def load_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, checked. It needs neither torch nor the weights."""
    with calling_library(source):
        tokenizer = read_tokenizer(source)
    # GPT2Tokenizer is empty, without an error, where files are missing.
    if len(tokenizer) <= 1:
        raise HfkitError(
            f"the tokenizer is empty ({source.tokenizer_folder}): copy tokenizer.json of the model into it"
        )
    size = source.config.get("vocab_size")
    if isinstance(size, int) and not source.adapter:  # an adapter may bring tokens of its own
        _check_size(source, tokenizer, size)
    return tokenizer


def _check_size(source: ModelFiles, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if count > size:
        where = source.tokenizer_folder
        raise HfkitError(f"the tokenizer has {count} tokens, the model {size} ({where}): use the model's own")


def _rows_of(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def load_weights(
    source: ModelFiles, options: ModelOptions, tokenizer: PreTrainedTokenizerBase, config: Any = None
) -> LanguageModel:
    """The model of `source`, on the device and in the precision that `options` ask for.

    config: what `load_config` returned, if the caller has it already.
    """
    check_files(source)
    config = config or load_config(source)
    device = choose_device(options)
    dtype = choose_dtype(options.dtype, device)
    placement: Any = options.device_map or spread_over_devices(device, source)
    arguments: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    arguments |= _gguf_arguments(source.gguf) if source.gguf else {"use_safetensors": True}
    bits = choose_bits(options, source, device, dtype)
    if bits and device.type == "cuda":
        arguments["quantization_config"] = bitsandbytes_config(bits)
        placement = placement or {"": device}
    if placement:
        arguments["device_map"] = placement
    with calling_library(source), no_init_weights():  # a missing weight is an error: no random one is of use
        if source.gguf:
            check_blocks(source, config)
        model, report = _class_for(config).from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, **arguments
        )
    check_report(source, model, report)
    if source.adapter:
        model = _merge_adapter(model, source, source.adapter)
        _check_size(source, tokenizer, _rows_of(model))
    check_values(source.folder, model)
    model.name_or_path = source.name
    if not placement:
        model = model.to(device)
    if bits and device.type != "cuda":
        if device.type != "cpu":
            raise HfkitError(f"--quantize works on a CPU and with CUDA, not on {device}: add --device cpu")
        quantize(model, bits)
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
    check_files(source)
    config = load_config(source)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif head_of(config) != head:
        config.num_labels = 2  # where an answer begins, and where it ends
    config.pad_token_id = tokenizer.pad_token_id
    kind = AutoModelForSequenceClassification if labels else AutoModelForQuestionAnswering
    with calling_library(source):
        model, report = kind.from_pretrained(
            source.folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            trust_remote_code=source.trust_remote_code, ignore_mismatched_sizes=head_of(config) != head,
        )  # fmt: skip
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: a masked language model has none.
    missing = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    check_names(source.folder, missing=missing)
    trainable: PreTrainedModel = model.to(choose_device(options))
    return trainable


def _class_for(config: Any) -> Any:
    import transformers

    match head_of(config):
        case "classification":
            return transformers.AutoModelForSequenceClassification
        case "question-answering":
            return transformers.AutoModelForQuestionAnswering
        case "masked" | "other":
            return transformers.AutoModel
    if config.model_type == "gpt2":
        return transformers.GPT2LMHeadModel
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def _merge_adapter(model: PreTrainedModel, source: ModelFiles, folder: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise HfkitError("LoRA adapters need peft: pip install 'hfkit[lora]'") from error
    with calling_library(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft only warns of what is an error below
        with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        saved = set(shapes)
        # An adapter that was trained with new tokens has the whole embedding, with more rows than that of its base.
        embedding = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
        rows = shapes.get(f"base_model.model.{embedding}.weight", [0])[0]
        if rows > _rows_of(model):
            model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(model, folder, use_safetensors=True)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        check_names(folder, missing=wanted - saved, unexpected={name for name in saved - wanted if "lora_" in name})
        merged: PreTrainedModel = adapted.merge_and_unload()
        return merged


def _gguf_arguments(file: str) -> dict[str, Any]:
    from transformers import GgufConfig
    from transformers import modeling_gguf_pytorch_utils as reader

    reader.tqdm = lambda tensors, **_: tensors  # type: ignore[assignment, attr-defined]  # nothing else hides this progress bar
    # Without dequantize=True the model could not be saved.
    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
