"""What the libraries load is the model that was saved, or one line says why not."""

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import PreTrainedModel

from hfkit.console import note, quiet_libraries
from hfkit.errors import HfkitError, first_line
from hfkit.models.sources import ModelFiles, needs_code
from hfkit.options import GenerateOptions
from hfkit.storage import check_weights

_NUMBERS = [name for name, type_ in get_type_hints(GenerateOptions).items() if type_ in (float | None, int | None)]
# Fields of generation_config.json that hold lists, and what is in them.
_ITEMS = {"stop_strings": str, "suppress_tokens": int, "begin_suppress_tokens": int, "bad_words_ids": list}
# Hold it while transformers makes a model. It replaces methods of its classes and torch's default precision for that
# time, in the whole process: two threads at once would leave the replacements in place for good.
LOADING = threading.RLock()


@contextlib.contextmanager
def calling_library(source: ModelFiles) -> Iterator[None]:
    """Load something of a model: one thread at a time, quietly, each error as one line that names the folder."""
    try:
        with LOADING, quiet_libraries():
            yield
    except (HfkitError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        hint = "pip install 'hfkit[gguf]'" if source.gguf else "install what it names"
        raise HfkitError(f"{source.name} needs a package that is missing: {_short(error)}: {hint}") from error
    except Exception as error:  # everything from KeyError to a bare Exception
        if source.config.get("auto_map") and not source.trust_remote_code:
            raise needs_code(source) from error
        where = source.folder / source.gguf if source.gguf else source.adapter or source.folder
        raise HfkitError(f"{source.name} cannot be loaded ({where}): {_short(error)}") from error


def _short(error: Exception) -> str:
    return first_line(error)[:300].rstrip(".:")


def check_files(source: ModelFiles) -> None:
    """Raise HfkitError if a weight file that hfkit wrote has changed since."""
    for folder in {source.folder, source.adapter or source.folder}:
        check_weights(folder)


def check_names(folder: Path, **names: Iterable[object]) -> None:
    """Raise HfkitError for tensors that do not fit: `check_names(folder, missing=[...], unexpected=[...])`.

    The libraries fill missing tensors with random numbers and drop the others: neither gives the model that was saved.
    """
    for what, keys in names.items():
        keys = sorted(map(str, keys))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise HfkitError(f"the weights do not fit the model ({folder}): {what} {shown}; get the model again")


def check_sizes(source: ModelFiles, config: Any) -> None:
    """Raise HfkitError for a negative size, with which transformers makes a model that fails at its first text."""
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size"):
        if isinstance(size := getattr(config, name, 1), int) and size < 1:
            raise HfkitError(f"config.json is damaged ({source.folder}): {name} is {size}; get the model again")


def check_report(source: ModelFiles, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Check the names that `from_pretrained` reports. Tensors that are left over change nothing: they are only noted.

    Left over are buffers of old versions, a pooler, the head of another task. But weights of a kind that the model has
    in other layers are layers that it should have as well.
    """
    left_over = {str(key) for key in report.get("unexpected_keys", ())}
    kinds = {re.sub(r"\d+", "*", name) for name in model.state_dict()}
    layers = {name for name in left_over if re.sub(r"\d+", "*", name) in kinds}
    check_names(source.folder, missing=report.get("missing_keys", ()), unexpected=layers,
                mismatched=report.get("mismatched_keys", ()))  # fmt: skip
    if left_over:
        example = min(left_over)
        note(f"{source.name}: {len(left_over)} of the weights' tensors are not part of the model, such as {example}")


def check_blocks(source: ModelFiles, config: Any) -> None:
    """Raise HfkitError if a .gguf file has more blocks than it says: transformers would leave the last ones out."""
    from gguf import GGUFReader

    path = source.folder / str(source.gguf)
    matches = [re.match(r"blk\.(\d+)\.", tensor.name) for tensor in GGUFReader(path).tensors]
    blocks = 1 + max((int(match[1]) for match in matches if match), default=-1)
    if blocks > config.num_hidden_layers:
        raise HfkitError(
            f"the weights do not fit the model ({path}): {blocks} blocks, but block_count is "
            f"{config.num_hidden_layers}; get the model again"
        )


def check_values(folder: Path, model: PreTrainedModel) -> None:
    """Raise HfkitError for weights that are NaN or infinite, and for settings that are no numbers.

    Weights on a GPU are not read. The settings are those of generation_config.json.
    """
    if settings := getattr(model, "generation_config", None):
        _check_settings(folder, vars(settings))
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu" or not tensor.is_floating_point():
            continue
        # A sum is one pass over memory that the first forward pass would read from the disk anyway.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise HfkitError(f"the weights hold values that are not numbers ({folder}: {name}): get the model again")


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        is_number = name in _NUMBERS or name.endswith("token_id")
        kind = _ITEMS.get(name) or (int | float if is_number else dict | list if name == "sequence_bias" else object)
        is_list = isinstance(value, list) and (name in _ITEMS or name.endswith("token_id"))
        if not all(isinstance(item, kind | None) for item in (value if is_list else [value])):
            raise HfkitError(f"generation_config.json is damaged ({folder}): {name} is {value!r}; get the model again")
