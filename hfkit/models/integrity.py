"""Check that what the libraries load is what was saved: weights, tokenizer, settings. One line says what is not."""

import contextlib
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfkit.console import note, quiet_libraries
from hfkit.errors import HfkitError, first_line
from hfkit.models.folder import ModelFiles, code_error, read_json
from hfkit.models.gguf_import import unpack_tokenizer
from hfkit.models.wordpiece import make_causal
from hfkit.options import GenerateOptions

# A lock to hold while transformers makes a model. Meanwhile transformers replaces methods of its classes and torch's
# default precision in the whole process: two threads at once would leave the replacements in place for good.
LOADING_LOCK = threading.RLock()
# A text on which kinds of tokenizers differ: case, spaces, digits, accents, unknown signs.
_PROBE = "Hello, World! It's 2024:  the CAT's\n\n\tdéjà-vu 你好 <|endoftext|>"
# Settings of generation_config.json by their type. One of another type would fail only when a text is generated.
_NUMBERS = {name for name, hint in get_type_hints(GenerateOptions).items() if hint in (float | None, int | None)}
_NUMBERS |= {"min_length", "encoder_no_repeat_ngram_size", "prefill_chunk_size"}
_LISTS = "suppress_tokens begin_suppress_tokens sequence_bias bad_words_ids exponential_decay_length_penalty".split()


@contextlib.contextmanager
def calling_library(source: ModelFiles) -> Iterator[None]:
    """Load something of a model: one thread at a time, quietly, each error as one line that names the folder."""
    try:
        with LOADING_LOCK, quiet_libraries():
            _check_type(source)
            yield
    except (HfkitError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        hint = "pip install 'hfkit[gguf]'" if source.gguf else "install what it names"
        raise HfkitError(f"{source.name} needs a package that is missing: {_short(error)}: {hint}") from error
    except Exception as error:  # everything from KeyError to a bare Exception
        if source.config.get("auto_map") and not source.trust_remote_code:
            raise code_error(source) from error
        where = source.path if source.gguf else source.adapter or source.folder
        raise HfkitError(f"{source.name} cannot be loaded ({where}): {_short(error)}") from error


def _short(error: Exception) -> str:
    return first_line(error)[:300].rstrip(".:")


def read_tokenizer(source: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved. transformers would pick its class by the type of the model instead.

    GPT-2's is a `GPT2Tokenizer`, unless tokenizer.json, config.json or tokenizer_config.json says otherwise.
    """
    folder, options = source.tokenizer_folder, {"trust_remote_code": source.trust_remote_code}
    if source.gguf and folder == source.folder:
        with tempfile.TemporaryDirectory() as place:
            if unpacked := unpack_tokenizer(source, Path(place)):
                return read_tokenizer(unpacked)
        return transformers.AutoTokenizer.from_pretrained(folder, gguf_file=source.gguf, **options)
    file = folder / "tokenizer_config.json"
    settings = read_json(file, source.name) if file.is_file() else {}
    declared = settings.get("tokenizer_class") or source.config.get("tokenizer_class")
    kind: Any = transformers.AutoTokenizer
    if source.config.get("model_type") == "gpt2" and declared in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        names = {path.name for path in folder.iterdir()}
        if declared is None and "vocab.txt" in names and not names & {"tokenizer.json", "vocab.json"}:
            note(f"{source.name}: vocab.txt is read as the vocabulary of a BertTokenizer, as nothing says what it is")
            kind = transformers.BertTokenizer
        else:
            kind = transformers.GPT2Tokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(folder, **options)
    if source.config.get("model_type") == "gpt2" and isinstance(tokenizer, transformers.BertTokenizer):
        tokenizer = make_causal(tokenizer)
    # GPT2Tokenizer rebuilds a byte-level BPE from the vocabulary, whatever else tokenizer.json says.
    is_set = settings.get("add_prefix_space") or settings.get("add_bos_token")  # these change what the file says
    if isinstance(tokenizer, transformers.GPT2Tokenizer) and not is_set and _differs(tokenizer, folder):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.is_fast:
        _clear_limits(tokenizer.backend_tokenizer)
    return tokenizer


def _clear_limits(backend: Tokenizer) -> None:
    """Turn off truncation and padding now: the first call would, and would fail if another thread encodes."""
    backend.no_truncation()
    backend.no_padding()


def _differs(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether a tokenizer gives other tokens than the tokenizer.json that it was made from."""
    if not (file := folder / "tokenizer.json").is_file():
        return False
    _clear_limits(backend := Tokenizer.from_file(str(file)))
    return bool(backend.encode(_PROBE).ids != tokenizer(_PROBE)["input_ids"])


def check_vocabulary(source: ModelFiles, tokenizer: PreTrainedTokenizerBase, size: Any) -> None:
    """Raise HfkitError if a tokenizer has a token for which a model of this vocabulary `size` has no embedding."""
    count = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if isinstance(size, int) and count > size:
        where = source.tokenizer_folder
        raise HfkitError(f"the tokenizer has {count} tokens, the model {size} ({where}): use the model's own")


def _check_type(source: ModelFiles) -> None:
    """Raise HfkitError for a model_type that transformers does not know. A model with code of its own may have any."""
    kind = source.config.get("model_type")
    if source.gguf or source.config.get("auto_map") or (isinstance(kind, str) and kind in transformers.CONFIG_MAPPING):
        return
    close = get_close_matches(str(kind), transformers.CONFIG_MAPPING.keys(), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "correct it, or install a transformers that knows it"
    what = f"unknown model_type {kind!r}" if "model_type" in source.config else "no model_type"
    raise HfkitError(f"{what} ({source.folder / 'config.json'}): {hint}")


def check_sizes(source: ModelFiles, config: Any) -> None:
    """Raise HfkitError for a negative size, with which transformers makes a model that fails at its first text."""
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
        if isinstance(size := getattr(config, name, 1), int) and size < 1:
            raise HfkitError(f"config.json is damaged ({source.folder}): {name} is {size}; get the model again")


def check_family(source: ModelFiles, config: Any) -> None:
    """Raise HfkitError where the model_type is not that of the architectures."""
    base: Any = transformers.MODEL_MAPPING.get(type(config), None)
    for name in config.architectures or []:
        saved = getattr(transformers, name, None)
        # Families that name their weights alike, such as Llama and Mistral, can load each other's.
        if base and saved and getattr(base, "base_model_prefix", "") != saved.base_model_prefix:
            what = f"model_type is {config.model_type!r}, but architectures has {name}"
            raise HfkitError(f"{what} ({source.folder / 'config.json'}): correct the wrong one")


def check_names(folder: Path, **names: Iterable[object]) -> None:
    """Raise HfkitError for tensors that do not fit: `check_names(folder, missing=[...], unexpected=[...])`.

    The libraries fill missing tensors with random numbers and drop the others: neither gives the model that was saved.
    """
    for what, keys in names.items():
        keys = sorted(map(str, keys))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise HfkitError(f"the weights do not fit the model ({folder}): {what} {shown}; get the model again")


def check_report(source: ModelFiles, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Check the names that `from_pretrained` reports. Tensors that are left over change nothing: they are only noted.

    Left over are buffers of old versions, a pooler, the head of another task. But weights of a kind that the model has
    in other layers are layers that it should have as well.
    """
    left_over = {str(key) for key in report["unexpected_keys"]}
    kinds = {re.sub(r"\d+", "*", name) for name in model.state_dict()}
    layers = {name for name in left_over if re.sub(r"\d+", "*", name) in kinds}
    missing, mismatched = report["missing_keys"], report["mismatched_keys"]
    check_names(source.folder, missing=missing, unexpected=layers, mismatched=mismatched)
    if left_over:
        example = min(left_over)
        note(f"{source.name}: {len(left_over)} of the weights' tensors are not part of the model, such as {example}")


def check_values(folder: Path, model: PreTrainedModel) -> None:
    """Raise HfkitError for weights that are NaN or infinite, and for settings with which no text can be generated.

    Weights on a GPU are not read. The settings are those of generation_config.json.
    """
    settings = getattr(model, "generation_config", None)
    for name, value in (vars(settings) if settings else {}).items():
        if not _fits(name, value):
            raise HfkitError(f"generation_config.json is damaged ({folder}): {name} is {value!r}; get the model again")
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu" or not tensor.is_floating_point():
            continue
        # A sum is one pass over memory that the first forward pass would read from the disk anyway.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise HfkitError(f"the weights hold values that are not numbers ({folder}: {name}): get the model again")


def _fits(name: str, value: Any) -> bool:
    """Whether a setting of generation_config.json has a type that it may have."""
    if name in _NUMBERS:
        return isinstance(value, int | float | None)
    if name in _LISTS and not isinstance(value, list | tuple | dict | None):
        return False
    kinds = {"stop_strings": str, "bad_words_ids": list}
    kind = kinds.get(name) or (int if name.endswith(("token_id", "suppress_tokens")) else object)
    return all(isinstance(item, kind | None) for item in (value if isinstance(value, list) else [value]))
