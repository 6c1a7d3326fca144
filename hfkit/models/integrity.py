"""Check that what the libraries load is what was saved: weights and settings. One line says what is not."""

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
from hfkit.models.folder import ModelFiles, needs_code
from hfkit.options import GenerateOptions

# Hold it while transformers makes a model. It replaces methods of its classes and torch's default precision for that
# time, in the whole process: two threads at once would leave the replacements in place for good.
LOADING = threading.RLock()
# Settings of generation_config.json by their type. One of another type would fail only when a text is generated.
_NUMBERS = {name for name, hint in get_type_hints(GenerateOptions).items() if hint in (float | None, int | None)}


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
        where = getattr(error, "filename", None) or where  # an OSError knows better
        raise HfkitError(f"{source.name} cannot be loaded ({where}): {_short(error)}") from error


def _short(error: Exception) -> str:
    return first_line(error)[:300].rstrip(".:")


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
    kind = str if name == "stop_strings" else int if name.endswith(("token_id", "suppress_tokens")) else object
    return all(isinstance(item, kind | None) for item in (value if isinstance(value, list) else [value]))
