"""The folder of a training run: who may write there, what was asked for, what is left in the end.

runs/NAME/recipe.yaml     the options in effect; --config takes it
          run.json        what the recipe does not say: the corpus' fingerprint, versions, the command
          checkpoints/    while it lasts
          ...             the model as transformers saves it, its card, loss.png; metrics.json comes last
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hfkit.corpora import Corpora, find_corpus, is_prepared, name_of
from hfkit.errors import HfkitError
from hfkit.options import TrainOptions
from hfkit.recipes import read_values
from hfkit.storage import lock, make_durable, make_writable, sync_folder, write_text

RECIPE, FACTS, METRICS, CHECKPOINTS = "recipe.yaml", "run.json", "metrics.json", "checkpoints"
_NOT_ASKED = ("output_dir", "resume", "overwrite")  # do not change what is trained
_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "trainer_state", "scaler", "manifest", "README")


def check_request(corpus: Sequence[str], train: TrainOptions, *, dry_run: bool) -> None:
    """What can be checked of a request in no time: that there is a corpus, and that the folder is free."""
    if not is_prepared(Path(corpus[0])):
        find_corpus(corpus)
    if not dry_run:
        folder = folder_for(corpus, train)
        check(folder, resume=train.resume, overwrite=train.overwrite)
        with lock(folder):
            pass


def folder_for(corpus: Corpora, train: TrainOptions) -> Path:
    return Path(train.output_dir or Path("runs") / name_of(corpus))


def check(folder: Path, *, resume: bool, overwrite: bool) -> str:
    """What `folder` holds: "new", "begun" or "finished"; before anything heavy is done.

    Raises:
        HfkitError: it cannot be written, or holds a run that is neither to be resumed nor to be overwritten.
    """
    make_writable(folder)
    begun = (folder / FACTS).is_file()
    if not begun and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise HfkitError(f"{folder} holds something that is no run: name another --output-dir")
    if begun and not (resume or overwrite):
        raise HfkitError(f"{folder} holds a run: --resume goes on with it, --overwrite begins anew")
    if not begun or overwrite:
        return "new"
    return "finished" if (folder / METRICS).is_file() else "begun"


def describe(corpus: Corpora, *groups: Any) -> dict[str, Any]:
    """A recipe: the corpus and every option that has a value, by name."""
    sources = [corpus] if isinstance(corpus, str | Path) else list(corpus)
    recipe: dict[str, Any] = {"corpus": [_absolute(str(source)) for source in sources]}
    for group in groups:
        values = {f.name: getattr(group, f.name) for f in fields(group) if f.name not in _NOT_ASKED}
        recipe |= {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}
    return recipe


def _absolute(source: str) -> str:
    return source if source.startswith("hf://") else os.path.abspath(os.path.expanduser(source))


def begin(folder: Path, command: str, recipe: dict[str, Any], facts: dict[str, Any], keep: Callable[[], Any]) -> None:
    """Write what was asked for, and what `keep` writes, into a folder that is new, or is to be as new."""
    for path in folder.iterdir():
        if path.name != ".lock":
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / CHECKPOINTS).mkdir()
    keep()
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    write_text(folder / RECIPE, f"# hfkit {command} --config {RECIPE} -o ANOTHER-FOLDER\n{text}")
    packages = ("hfkit", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    facts = facts | {
        "command": shlex.join(["hfkit", *sys.argv[1:]]),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1))  # last: with it the folder is a run


def compare(folder: Path, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
    """HfkitError if the run in `folder` was begun with something else."""
    begun = read_values(folder / RECIPE, {*recipe, *_recipe_keys(folder)}) | _read(folder / FACTS)
    asked = recipe | facts
    names = [name for name in asked if begun.get(name) != asked[name]]
    names += [name for name in begun if name not in asked and name not in ("command", "versions")]
    if names:
        shown = ", ".join(f"{name} was {_short(begun.get(name))}, is {_short(asked.get(name))}" for name in names[:8])
        raise HfkitError(f"{folder} was begun with other settings ({shown}): use those, or --overwrite begins anew")


def _recipe_keys(folder: Path) -> list[str]:
    return list(yaml.safe_load((folder / RECIPE).read_text("utf-8")))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HfkitError(f"{path} cannot be read: {error}; --overwrite begins anew") from error


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a finished run."""
    return _read(folder / METRICS)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def finish(folder: Path, checkpoint: Path, extra: dict[str, str | bytes], metrics: dict[str, Any]) -> None:
    """Put the model of a checkpoint and `extra` files into the run's folder, each whole; drop the checkpoints."""
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for path in checkpoint.iterdir():
        if not path.name.startswith(_OF_TRAINING):
            shutil.copy(path, staging / path.name)
    for name, content in extra.items():
        (staging / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    make_durable(staging)
    for path in staging.iterdir():
        os.replace(path, folder / path.name)
    sync_folder(folder)
    write_text(folder / METRICS, json.dumps(metrics, indent=1))  # last: with it the run is finished
    shutil.rmtree(staging)
    shutil.rmtree(folder / CHECKPOINTS)
