"""What the libraries load is the model that was saved, or one line says why not."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hfkit.console import quiet_libraries
from hfkit.errors import HfkitError, first_line
from hfkit.models.sources import ModelFiles


@contextlib.contextmanager
def calling_library(source: ModelFiles) -> Iterator[None]:
    """Turn what a library raises over a model's files into one line that names the folder; keep it quiet."""
    try:
        with quiet_libraries():
            yield
    except (HfkitError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        hint = "pip install 'hfkit[gguf]'" if source.gguf else "install what it names"
        raise HfkitError(f"{source.name} needs a package that is missing: {_short(error)}: {hint}") from error
    except Exception as error:  # everything from KeyError to a bare Exception
        where = source.folder / source.gguf if source.gguf else source.adapter or source.folder
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


def check_numbers(folder: Path, model: PreTrainedModel) -> None:
    """Raise HfkitError if a weight is NaN or infinite. Weights on a GPU are not read."""
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu" or not tensor.is_floating_point():
            continue
        # A sum is one pass over memory that the first forward pass would read from the disk anyway.
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise HfkitError(f"the weights hold values that are not numbers ({folder}: {name}): get the model again")
