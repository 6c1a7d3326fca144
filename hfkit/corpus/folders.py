"""The files of a folder that belong to a corpus: none that are hidden, and none that hfkit wrote or a model needs."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfkit.console import note_once
from hfkit.errors import HfkitError
from hfkit.storage import LIST

_CONFIGS = ("config.json", "adapter_config.json")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_]\d.*)?", re.IGNORECASE)  # the name of a file
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")


@dataclass
class FolderFiles:
    """The files below a folder, in order, and the folders that are not read."""

    files: list[Path] = field(default_factory=list)
    splits: dict[Path, str] = field(default_factory=dict)  # of files in a DatasetDict
    skipped: list[Path] = field(default_factory=list)


def describe_output(folder: Path) -> str | None:
    """What a folder holds that is not for a corpus: "a model" or "a run"; None if it may be a corpus."""
    if any((folder / name).is_file() for name in _CONFIGS) and any(any(folder.glob(name)) for name in _WEIGHTS):
        return "a model"
    is_run = (folder / LIST).is_file() or isinstance(_read_object(folder / "run.json").get("recipe"), dict)
    return "a run" if is_run else None


def list_folder(folder: Path, exclude: Path | None = None) -> FolderFiles:
    """All files below a folder. Links to folders are followed, but each folder is read only once.

    exclude: a folder that is not read, such as the one that a run writes.

    Raises:
        HfkitError: a data set that `datasets` saved lacks a file.
    """
    found, root, outside = FolderFiles(), folder.resolve(), []
    seen = {root, exclude.resolve() if exclude else root}

    def walk(folder: Path) -> None:
        if splits := _read_object(folder / "dataset_dict.json").get("splits"):
            for split in map(str, splits):
                count = len(found.files)
                walk(folder / split)
                found.splits |= dict.fromkeys(found.files[count:], split)
            return
        if names := _read_object(folder / "state.json").get("_data_files"):
            files = [folder / str(name["filename"]) for name in names]
            if missing := [path for path in files if not path.is_file()]:
                raise HfkitError(f"the saved data set lacks a file ({missing[0]}): save it again")
            found.files += files
            return
        try:
            paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except PermissionError:
            found.skipped.append(folder)
            return
        for path in paths:
            if path.is_symlink() and path.exists() and not path.resolve().is_relative_to(root):
                outside.append(path)
            if path.is_file():
                found.files.append(path)
            elif path.is_dir() and (target := path.resolve()) not in seen:
                seen.add(target)
                if describe_output(path):
                    found.skipped.append(path)
                else:
                    walk(path)

    walk(folder)
    if outside:
        note_once(f"{folder} has links that lead out of it, which are read ({outside[0]} to {outside[0].resolve()})")
    matches = [_SPLIT.fullmatch(path.name.partition(".")[0]) for path in found.files if path not in found.splits]
    if len(names := sorted({match[1].lower() for match in matches if match})) > 1:
        note_once(f"{folder} has files called {' and '.join(names)}: all are read; to keep some out, name the others")
    return found


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if it has none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
