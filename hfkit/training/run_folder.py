"""The folder of a training run: who may write there, what was asked for, and what is left in the end.

runs/NAME/recipe.yaml     the options in effect; `--config` takes it
          run.json        what a resumed run must share: options, the corpus's fingerprint, versions, the command
          checkpoints/    while the run lasts
          ...             the model as transformers saves it, its card, report.html, loss.png; metrics.json is
                          written last
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hfkit import console, processes, storage
from hfkit.console import counted
from hfkit.corpus.files import Corpora, Corpus, find_corpus, name_of, prepared_folder, sources_of
from hfkit.declaration import Options, set_fields
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.options import DataOptions, TrainOptions
from hfkit.reporting.pages import METRICS_FILE
from hfkit.training.schedule import check_schedule

RECIPE, FACTS, CHECKPOINTS = "recipe.yaml", "run.json", "checkpoints"
# Options that do not change what is trained; and trust_remote_code, which a file must not set.
_NOT_IN_RECIPE = ("output_dir", "resume", "overwrite", "trust_remote_code")
# What transformers reports to, and the module that it needs for that.
_TRACKERS = {"azure_ml": "azureml", "flyte": "flytekit"} | {
    name: name
    for name in "clearml codecarbon comet_ml dagshub dvclive mlflow neptune swanlab tensorboard trackio wandb".split()
}
# Options that set a run's length; the second has the number of its last, falling steps.
_LENGTH = ("max_steps", "lr_scheduler_kwargs")
_STAGING = ".staging"
# The files of a checkpoint that make up the model; everything else in it is for the training alone.
_MODEL_FILES = (
    "*.safetensors *.safetensors.index.json config.json generation_config.json adapter_config.json tokenizer* "
    "special_tokens_map.json added_tokens.json vocab* merges.txt *.model *.spm *.tiktoken *.codes chat_template*"
).split()


@contextlib.contextmanager
def reserve(
    command: str, corpus: Corpora, train: TrainOptions, inputs: Iterable[str | Path], *, dry_run: bool
) -> Iterator[tuple[Path, TrainOptions]]:
    """Hold the run's folder for this process.

    Yields the folder, and `train` with what a run to be resumed decided when it began.

    inputs: what the run reads in addition to the corpus, which overwriting the folder must not delete.

    Raises:
        HfkitError: the folder is not free, a tracker is not installed, or the scheduler does not take its arguments.
    """
    check_trackers(train.report_to or [])
    check_schedule(train)
    folder = folder_for(command, corpus, train)
    with contextlib.ExitStack() as stack:
        if not dry_run and processes.rank == 0:
            check_run_folder(
                folder, resume=train.resume, overwrite=train.overwrite, inputs=[*sources_of(corpus), *inputs]
            )
            stack.enter_context(storage.lock(folder))
        processes.gather([])
        yield folder, _settle(folder, train)


def find_files(corpus: Corpora, data: DataOptions, folder: Path) -> Corpora | Corpus:
    """The files of a corpus, but for the run's own folder; the name of a folder that `prepare` made stays a name."""
    return corpus if prepared_folder(corpus) else find_corpus(corpus, data, folder)


def folder_for(command: str, corpus: Corpora, train: TrainOptions) -> Path:
    """The folder of a run or a search: as it was named, or after the corpus, with an ending for all but finetune."""
    ending = {"pretrain": "-pretrained", "tune": "-tune"}.get(command, "")
    return Path(train.output_dir or Path("runs") / f"{name_of(corpus)}{ending}")


def check_trackers(names: Iterable[str]) -> None:
    """Raise OptionError if a tracker does not exist, or its package is not installed."""
    for name in names:
        if name not in (*_TRACKERS, "all", "none"):
            raise OptionError(f"--report-to {name}: no such tracker; there are {', '.join(sorted(_TRACKERS))}")
        if name in _TRACKERS and not importlib.util.find_spec(module := _TRACKERS[name]):
            package = "'hfkit[tensorboard]'" if name == "tensorboard" else module.replace("_", "-")
            raise OptionError(f"--report-to {name} needs a package: pip install {package}")


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Raise HfkitError if a run can neither begin nor go on in `folder`.

    inputs: what the run reads, a corpus or a model: overwriting the folder must not delete it.
    """
    storage.make_writable(folder)
    begun = is_begun(folder)
    if begun and resume and not overwrite:
        return
    if begun:
        check_not_input(folder, inputs)
    storage.check_owned(folder)
    if begun and not overwrite:
        raise HfkitError(f"{folder} holds a run: --resume continues it, --overwrite starts over")


def check_not_input(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to overwrite a folder that holds one of `inputs`, which are paths or other names."""
    for name in inputs:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a path: hf://NAME, or a name on the Hub
            path = Path(name).expanduser()
            for match in [path] if path.exists() else glob.iglob(str(path), recursive=True):
                if Path(match).resolve().is_relative_to(folder.resolve()):
                    raise HfkitError(f"{folder} holds {match}, which this run reads: name another --output-dir")


def is_begun(folder: Path) -> bool:
    """Whether `folder` holds a run with something to lose."""
    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        is_run = isinstance(facts["recipe"], dict) and "hfkit" in facts["versions"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        is_run = False
    return is_run and ((folder / METRICS_FILE).is_file() or any((folder / CHECKPOINTS).glob("checkpoint-*")))


def _settle(folder: Path, train: TrainOptions) -> TrainOptions:
    """`train` with what the run to be resumed decided when it began."""
    if train.overwrite or not (train.resume and is_begun(folder)):
        return train
    decided = _read_json(folder / FACTS)["recipe"]
    left_open = [name for name in train.names() if getattr(train, name) is None]
    return replace(train, **{name: decided[name] for name in left_open if name in decided})


def make_recipe(corpus: Corpora, *groups: Any) -> dict[str, Any]:
    """The corpus and every option that has a value, by name; paths are absolute, so it holds in any folder."""
    recipe: dict[str, Any] = {"corpus": _absolute(corpus)}
    for group in groups:
        recipe |= {name: value for name, value in set_fields(group).items() if name not in _NOT_IN_RECIPE}
    for name, value in recipe.items():
        if name == "eval_file":
            recipe[name] = _absolute(value)
        elif name in ("model", "fsdp_config", "deepspeed") and value != "bundled" and os.path.exists(value):
            recipe[name] = os.path.abspath(value)
    return recipe


def _absolute(corpus: Corpora) -> list[str]:
    return [s if s.startswith("hf://") else os.path.abspath(os.path.expanduser(s)) for s in sources_of(corpus)]


def command_line(command: str, corpus: Corpora, *groups: Options) -> str:
    """What a person types for a run with these options: those that are not the default."""
    words = ["hfkit", command, *sources_of(corpus)]
    for group in groups:
        for option in fields(group):
            value, flag = getattr(group, option.name), option.name.replace("_", "-")
            if value == option.default or option.name in ("resume", "overwrite"):
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, list) else [value]
                words += [word for item in values for word in (f"--{flag}", str(item))]
    return shlex.join(words)


def begin(
    folder: Path, command: str, recipe: dict[str, Any], facts: dict[str, Any], keep: Callable[[Path], Any]
) -> None:
    """Write down what was asked for, and what `keep` writes, in a folder that is new or to be overwritten."""
    if is_begun(folder):
        (folder / METRICS_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    storage.add_owned(folder, (FACTS, RECIPE, METRICS_FILE, CHECKPOINTS, _STAGING, "tensorboard"))
    packages = ("hfkit", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    versions = {package: importlib.metadata.version(package) for package in packages}
    # From here on the folder belongs to this run; what an older run left in it may be deleted.
    storage.write_text(folder / FACTS, json.dumps(facts | {"recipe": recipe, "versions": versions}, indent=1))
    storage.remove_owned(folder, keep=[FACTS])
    (folder / CHECKPOINTS).mkdir()
    keep(folder)
    _write_recipe(folder, command, recipe)
    storage.make_durable(folder / CHECKPOINTS)


def _write_recipe(folder: Path, command: str, recipe: dict[str, Any]) -> None:
    # Values in JSON are YAML in which a text cannot be taken for a number.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in recipe.items()]
    storage.write_text(folder / RECIPE, f"# hfkit {command} --config {RECIPE} -o ANOTHER-FOLDER\n{''.join(lines)}")


def check_same_settings(folder: Path, command: str, recipe: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise HfkitError if the run in `folder` was begun with other settings.

    A schedule that only falls at its end may get another length until then: nothing that was trained so far depends
    on it.
    """
    record = _read_json(folder / FACTS)
    facts = {name: value for name, value in facts.items() if name in record}  # old versions recorded fewer
    begun, asked = record["recipe"] | record, recipe | facts
    names = [name for name in {**asked, **begun} if name not in ("command", "versions", "recipe")]
    names = [name for name in names if begun.get(name) != asked.get(name)]
    if {"model_bytes", "model_sha256"} & {*names} and begun.get("model") == asked.get("model"):
        raise HfkitError(
            f"{asked['model']} has changed since {folder} was begun on it: --overwrite starts over on the new one"
        )
    shown = ", ".join(f"{name} was {begun.get(name)!s:.60}, is {asked.get(name)!s:.60}" for name in names[:8])
    if {*names} - {*(_LENGTH if recipe["lr_scheduler_type"] == "warmup_stable_decay" else ())}:
        raise HfkitError(
            f"{folder} was begun with other settings ({shown}): --config {folder / RECIPE} has those, "
            "or --overwrite starts over"
        )
    if names and (metrics := read_metrics(folder)):
        raise HfkitError(
            f"{folder} ended at {counted(metrics['steps'], 'step')} ({shown}): a finished run cannot get another "
            f"length; -m {folder} with another -o goes on from its model, --overwrite starts over"
        )
    if names:
        console.note(f"the run gets another length: {shown}")
        storage.write_text(folder / FACTS, json.dumps(record | {"recipe": recipe}, indent=1))
        _write_recipe(folder, command, recipe)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
        if not content or not isinstance(content, dict):
            raise ValueError("it is not what hfkit writes")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"{path} cannot be read: {first_line(error)}; --overwrite starts over") from error


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """`metrics.json`; None unless the run is finished."""
    return _read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else None


def finish(folder: Path, checkpoint: Path, extra: dict[str, str | bytes], metrics: dict[str, Any]) -> None:
    """Put the model of a checkpoint and `extra` files into the run's folder, each whole; drop the checkpoints."""
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    model = [
        path
        for path in checkpoint.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _MODEL_FILES)
    ]
    storage.check_space(folder, sum(path.stat().st_size for path in model))
    for path in model:
        shutil.copy(path, staging)
    for name, content in extra.items():
        (staging / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    storage.make_durable(staging)
    storage.add_owned(folder, [path.name for path in staging.iterdir()], weights=staging)
    for path in staging.iterdir():
        os.replace(path, folder / path.name)
    storage.sync_folder(folder)
    storage.write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1))  # last: with it the run is finished
    clear(folder)


def clear(folder: Path) -> None:
    """Remove what a finished run no longer needs."""
    for name in (_STAGING, CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    storage.remove_temporary(folder)
