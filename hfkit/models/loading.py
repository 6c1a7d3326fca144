"""Load a model and its tokenizer: `model, tokenizer = load("gpt2")`."""

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    GPT2Tokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hfkit.console import detail, quiet_libraries
from hfkit.errors import HfkitError
from hfkit.models.architecture import (
    check_head,
    choose_device,
    choose_dtype,
    context_length,
    head_of,
    spread_over_devices,
)
from hfkit.models.sources import ModelFiles, find_model
from hfkit.options import ModelOptions


class LanguageModel(NamedTuple):
    """A model, in eval mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.model.name_or_path

    @property
    def context(self) -> int | None:
        """Most tokens of prompt and continuation together; None where the model sets no limit."""
        return context_length(self.model.config)

    def __repr__(self) -> str:
        size, dtype = self.model.num_parameters(), str(self.model.dtype).removeprefix("torch.")
        return f"LanguageModel({self.name!r}: {size:,} parameters, {dtype} on {self.model.device})"


def load(model: str | ModelOptions | None = None, **overrides: Any) -> LanguageModel:
    """Load a model and its tokenizer.

    Args:
        model: "bundled", a Hub name, a folder, a .gguf file; or `ModelOptions`. Default: $HFKIT_MODEL, else "bundled".
        overrides: fields of `ModelOptions`, e.g. `dtype="bfloat16"`, `device="cuda:1"`, `quantize="int8"`.

    Returns:
        `(model, tokenizer)`. GPT-2 is a `GPT2LMHeadModel` with a `GPT2Tokenizer`; other models come from
        `AutoModelForCausalLM` or, where they have an encoder, `AutoModelForSeq2SeqLM`; one with a head for labels or
        for answers from the class that has it.

    Raises:
        HfkitError: the model cannot be found, is damaged or unsafe.
    """
    if not isinstance(model, ModelOptions):
        overrides |= {"model": model}
        model = None
    options = ModelOptions.make(model, overrides)
    source = find_model(options)
    tokenizer = load_tokenizer(source)
    return load_weights(source, options, tokenizer)


def load_config(source: ModelFiles) -> Any:
    """The `PreTrainedConfig` of a model."""
    with _errors(source), quiet_libraries():
        extra = {"gguf_file": source.gguf} if source.gguf else {}
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **extra)
    if source.gguf and config.model_type == "gpt2":
        # transformers reads the length of a GGUF GPT-2 into n_ctx, which its model does not look at
        config.n_positions = getattr(config, "n_ctx", None) or config.n_positions
    return config


def load_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, checked; needs neither torch nor the weights."""
    from transformers import AutoTokenizer

    if source.gguf:
        loader, extra = AutoTokenizer, {"gguf_file": source.gguf}
    else:
        loader, extra = (GPT2Tokenizer if source.config.get("model_type") == "gpt2" else AutoTokenizer), {}
    with _errors(source), quiet_libraries():
        tokenizer = loader.from_pretrained(source.folder, trust_remote_code=source.trust_remote_code, **extra)
    # GPT2Tokenizer gives an empty tokenizer, and no error, where files are missing.
    if len(tokenizer) <= 1:
        raise HfkitError(f"the tokenizer is empty ({source.folder}): copy tokenizer.json of the model into it")
    size = source.config.get("vocab_size")
    if isinstance(size, int) and len(tokenizer) > size:
        raise HfkitError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {size} ({source.folder}): use the model's own"
        )
    return tokenizer


def load_weights(source: ModelFiles, options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """The model of `source`, placed and in the precision that `options` ask for."""
    config = load_config(source)
    device = choose_device(options, source)
    dtype = choose_dtype(options.dtype, device)
    placement = options.device_map or spread_over_devices(device, source)
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    if source.gguf:
        from transformers import GgufConfig
        from transformers import modeling_gguf_pytorch_utils as reader

        reader.tqdm = lambda tensors, **_: tensors  # a bar that nothing else turns off
        arguments["gguf_file"] = source.gguf
        arguments["quantization_config"] = GgufConfig(dequantize=True)  # without this it could not be saved
        del arguments["use_safetensors"]
    if options.quantize and device.type == "cuda":
        arguments["quantization_config"] = _bitsandbytes(options.quantize)
        placement = placement or {"": device}
    if placement:
        arguments["device_map"] = placement
    with _errors(source), quiet_libraries():
        model, report = _class_for(config).from_pretrained(
            source.folder, trust_remote_code=source.trust_remote_code, **arguments
        )
    _check_names(source.folder, report)
    if source.adapter:
        model = _merge_adapter(model, source)
    _check_numbers(source, model)
    model.name_or_path = source.name
    if not placement:
        model = model.to(device)
    if options.quantize and device.type != "cuda":
        if device.type != "cpu":
            raise HfkitError(f"--quantize works on a CPU and with CUDA, not on {device}: add --device cpu")
        from hfkit.models.quantization import quantize

        quantize(model, options.quantize)
    precision = options.quantize or str(dtype).removeprefix("torch.")
    detail(f"{source.name}: {model.num_parameters():,} parameters, {precision} on {placement or device}")
    return LanguageModel(model.eval(), tokenizer)


def load_with_head(
    source: ModelFiles, options: ModelOptions, tokenizer: PreTrainedTokenizerBase, head: str, labels: Sequence[str]
) -> PreTrainedModel:
    """The model of `source`, in float32, with a head of its own or a new one, to be trained.

    head: "classification", with these labels, or "question-answering". HfkitError if more than the head is missing.
    """
    config = load_config(source)
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    elif head_of(config) != head:
        config.num_labels = 2  # where an answer begins, and where it ends
    config.pad_token_id = tokenizer.pad_token_id
    kind = AutoModelForSequenceClassification if labels else AutoModelForQuestionAnswering
    with _errors(source), quiet_libraries():
        model, report = kind.from_pretrained(
            source.folder, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            trust_remote_code=source.trust_remote_code, ignore_mismatched_sizes=head_of(config) != head,
        )  # fmt: skip
    body = f"{model.base_model_prefix}."
    # A pooler belongs to the head: a masked language model has none.
    missing = [key for key in report["missing_keys"] if key.startswith(body) and ".pooler." not in key]
    _check_names(source.folder, {"missing_keys": missing})
    return model.to(choose_device(options, source))


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


def _check_names(folder: Path, report: dict[str, Any]) -> None:
    """The libraries fill what is missing with random numbers and drop what is left over: neither is the model."""
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key) for key in report.get(f"{what}_keys", ()))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise HfkitError(f"the weights do not fit the model ({folder}): {what} {shown}; get the model again")


def _check_numbers(source: ModelFiles, model: PreTrainedModel) -> None:
    for name, tensor in model.named_parameters():
        # A sum is one pass over the memory that the first forward would have read in anyway.
        if (
            tensor.device.type == "cpu"
            and tensor.is_floating_point()
            and not tensor.sum(dtype=torch.float32).isfinite()
        ):
            raise HfkitError(
                f"the weights hold values that are not numbers ({source.folder}: {name}): get the model again"
            )


def _merge_adapter(model: PreTrainedModel, source: ModelFiles) -> PreTrainedModel:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise HfkitError("LoRA adapters need peft: pip install 'hfkit[lora]'") from error
    with _errors(source), quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft only warns of what is an error below
        adapted = PeftModel.from_pretrained(model, source.adapter, use_safetensors=True)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with safe_open(source.adapter / "adapter_model.safetensors", framework="np") as file:
            found = set(file.keys())
        extra = {name for name in found - wanted if "lora_" in name}
        _check_names(source.adapter, {"missing_keys": wanted - found, "unexpected_keys": extra})
        return adapted.merge_and_unload()


def _bitsandbytes(bits: str) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise HfkitError("--quantize on a GPU needs bitsandbytes: pip install 'hfkit[bitsandbytes]'") from error
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


@contextlib.contextmanager
def _errors(source: ModelFiles) -> Iterator[None]:
    """Whatever a library raises over a model's files becomes one sentence that names the folder."""
    try:
        yield
    except (HfkitError, KeyboardInterrupt, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        extra = "gguf" if source.gguf else None
        hint = f"pip install 'hfkit[{extra}]'" if extra else "install what it names"
        raise HfkitError(f"{source.name} needs a package that is missing: {_first_sentence(error)}: {hint}") from error
    except Exception as error:  # the libraries raise everything from KeyError to a bare Exception here
        where = source.folder / source.gguf if source.gguf else source.adapter or source.folder
        raise HfkitError(f"{source.name} cannot be loaded ({where}): {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".:")


Model = str | ModelOptions | LanguageModel | tuple[Any, Any] | None


def loaded(model: Model, *heads: str) -> LanguageModel:
    """`model` as a LanguageModel, loaded if it is a name; once, as long as its files stay the same.

    heads: what it must be for, see `models.head_of`; by default for text.
    """
    heads = heads or ("text",)
    if isinstance(model, tuple):
        lm = LanguageModel(*model)
        check_head(lm.name, lm.model.config, *heads)
        return lm
    options = model if isinstance(model, ModelOptions) else ModelOptions(model=model)
    source = find_model(options)
    check_head(source.name, load_config(source), *heads)
    files = [source.folder / source.gguf] if source.gguf else [*source.folder.iterdir()]
    files += source.adapter.iterdir() if source.adapter else []
    return _load(options, tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files)))


@functools.lru_cache(maxsize=1)
def _load(options: ModelOptions, files: tuple[tuple[str, int], ...]) -> LanguageModel:
    return load(options)
