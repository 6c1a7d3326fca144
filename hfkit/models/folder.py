"""What is in the folder of a saved model: its JSON files, its weights and its tokenizer."""

import json
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "source.spm", "sentencepiece.bpe.model"),
)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the model called `name`."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise HfkitError(f"no {path.name} ({path.parent}): {name} is not a saved model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"{path.name} cannot be read ({path}): {error}; get the model again") from error
    if not isinstance(value, dict):
        raise HfkitError(f"{path.name} is not a JSON object ({path}): get the model again")
    return value


def has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def weight_files(folder: Path, name: str) -> list[str]:
    """Names of the weight files that transformers would read, whether they exist or not."""
    index = folder / INDEX
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index, name).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise HfkitError(f"{INDEX} has no weight_map ({folder}): get the model again")
    return sorted(set(weight_map.values()))


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` leads into `folder`. Files of the Hub's cache are links to models--NAME/blobs."""
    snapshots = [place for place in (folder.absolute(), folder.resolve()) if place.parent.name == "snapshots"]
    blobs = [(place.parent.parent / "blobs").resolve() for place in snapshots]  # may be a link to another disk
    return any(path.resolve().is_relative_to(place) for place in (folder.resolve(), *blobs))


def check_header(path: Path) -> None:
    """Let safetensors' parser check lengths, offsets and shapes against the file, without reading the data."""
    from safetensors import SafetensorError, safe_open

    try:
        path.open("rb").close()
    except OSError as error:
        raise HfkitError(f"the weights cannot be read ({path}): {error.strerror}; ask their owner") from error
    try:
        with safe_open(path, framework="np") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise HfkitError(f"the weights are damaged ({path}): {error}; get the model again") from error
