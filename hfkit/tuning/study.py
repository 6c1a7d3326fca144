"""What `tune` searches: options and the values that they may take."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hfkit.errors import HfkitError, OptionError
from hfkit.options import TrainOptions
from hfkit.recipes import read_value
from hfkit.storage import add_owned, check_owned, lock, owned, remove_owned, write_text

_LORA = {"lora_r": [4, 8, 16, 32], "lora_dropout": (0.0, 0.2)}
# They do not say how good a training is; the seed draws what is held out, too.
_NOT_SEARCHED = ("output_dir", "resume", "overwrite", "seed")


def read_space(search: Sequence[str] | None, train: TrainOptions) -> dict[str, Any]:
    """Option -> (low, high), or the list of its values.

    Raises:
        OptionError: there is no such training option, or it does not take such values.
    """
    if not search:
        return _default_space(train)
    space: dict[str, Any] = {}
    for given in search:
        name, _, values = given.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        space[name] = _read_values(given, name, values, train)
    if not (train.lora or "lora" in space) and (of_lora := [name for name in space if name.startswith("lora_")]):
        raise OptionError(f"--search has {of_lora[0]}, which nothing comes of without LoRA: add --lora")
    return space


def _default_space(train: TrainOptions) -> dict[str, Any]:
    rate = train.learning_rate
    space: dict[str, Any] = {
        "learning_rate": (rate / 10, rate * 10) if rate else (5e-5, 5e-3) if train.lora else (1e-5, 1e-3),
        "weight_decay": (0.0, 0.2),
        "warmup_steps": (0.0, 0.2),
        "per_device_train_batch_size": [2, 4, 8, 16],
        "num_train_epochs": [1.0, 2.0, 3.0, 5.0],
        "dropout": (0.0, 0.3),
    }
    space |= _LORA if train.lora else {}
    # What was set stays as it is; around a learning rate is searched.
    chosen = {f.name for f in fields(train) if getattr(train, f.name) != f.default} - {"learning_rate"}
    chosen |= {"num_train_epochs"} if train.max_steps else set()
    return {name: values for name, values in space.items() if name not in chosen}


def _read_values(given: str, name: str, values: str, train: TrainOptions) -> Any:
    if name not in TrainOptions.names() or name in _NOT_SEARCHED:
        why = "is not to be searched" if name in _NOT_SEARCHED else "is no training option"
        raise OptionError(f"--search is {given!r}: {name!r} {why}")
    low, dots, high = values.partition("..")
    if not dots and re.fullmatch(r"[^,]*\d-[\d.][^,]*", values):
        raise OptionError(f"--search is {given!r}: a range is written with two dots, such as {name}=1e-5..1e-3")
    read = [read_value(part) for part in ((low, high) if dots else values.split(","))]
    for value in read:  # so that a bad range is told before the first trial
        replace(train, **{name: value})
    if not values or (dots and not (all(type(value) in (int, float) for value in read) and read[0] < read[1])):
        raise OptionError(f"--search is {given!r}: write NAME=LOW..HIGH or NAME=A,B,C")
    if not dots:
        return read
    # 0..1 of a weight decay are all numbers between them; 1..5 epochs, or 0..100 steps, are whole ones.
    counts = get_type_hints(TrainOptions)[name] in (int, int | None)
    whole = type(read[0]) is type(read[1]) is int and (counts or read[1] > 1)
    return tuple(read) if whole else tuple(map(float, read))


def suggest(trial: Any, name: str, values: Any) -> Any:
    """A value for an Optuna trial."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    draw = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return draw(name, low, high, log=low > 0 and high / low >= 20)


RESULT, BEST, PICTURE, BEST_RUN = "tuning.json", "best.yaml", "tuning.png", "best"
_STUDY, _WORKERS = "study.db", ".workers"


def claim(folder: Path, asked: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` that of a search for what is asked, unless it is; call it under the lock."""
    path = folder / RESULT
    known = _read_search(path)
    if known is None or overwrite:
        check_owned(folder)
    if known is not None and overwrite:
        for own in folder.glob(f"{_WORKERS}/*"):
            with lock(own):  # HfkitError where it is at work
                pass
        write_text(path, "{}")  # from here on it is the search for nothing, however much of it is left
        remove_owned(folder, keep=[RESULT])
    elif known is not None:
        asked = json.loads(json.dumps(asked))
        if differing := [name for name in asked if known.get(name) != asked[name]]:
            old, new = (values.get(differing[0], {}) for values in (known, asked))
            names = ", ".join(name for name in {**old, **new} if old.get(name) != new.get(name))
            raise HfkitError(
                f"{folder} holds a search with other settings ({names}): --overwrite, or another --output-dir"
            )
        return
    else:
        add_owned(folder, [RESULT, BEST, PICTURE, BEST_RUN, _STUDY, f"{_STUDY}-journal", _WORKERS])
    write_text(path, json.dumps(asked, indent=1))


def _read_search(path: Path) -> dict[str, Any] | None:
    """What a search wrote down; None where there is none."""
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and path.name in owned(path.parent) else None


@contextlib.contextmanager
def work(folder: Path) -> Iterator[str]:
    """A name for this process; while it lives its folder is locked."""
    number = 0
    while True:
        own = folder / _WORKERS / str(number)
        own.mkdir(parents=True, exist_ok=True)
        try:
            with lock(own):
                yield str(own.relative_to(folder))
                return
        except HfkitError as error:
            if "in use" not in str(error):
                raise
            number += 1


def _is_alive(folder: Path, worker: str | None, own: str) -> bool:
    if worker is None or worker == own:  # died before it could say who it was; what was ours died with our forerunner
        return False
    try:
        with lock(folder / worker):
            return False
    except HfkitError:
        return True


def open_study(folder: Path, *, prune: bool) -> Any:
    """The study in `folder`, a new one if there is none; call it under the lock."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()

    def connect() -> sqlite3.Connection:  # not by a URL, since a folder's name may have a ? in it
        return sqlite3.connect(folder / _STUDY, timeout=120, check_same_thread=False)

    storage = optuna.storages.RDBStorage(f"sqlite:///{_STUDY}", engine_kwargs={"creator": connect})
    return optuna.create_study(study_name="hfkit", storage=storage, load_if_exists=True, pruner=pruner)


def next_trial(study: Any, folder: Path, worker: str, space: dict[str, Any], most: int, seed: int) -> tuple[Any, int]:
    """A trial to run, one that was interrupted before a new one, or None if there are enough; and how many are run.

    Call it under the lock.
    """
    import optuna
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    waiting = [trial.user_attrs.get("folder") for trial in trials if trial.state == TrialState.WAITING]
    # All of one reading: another process may finish a trial meanwhile, and counted twice it would skip a seed, which
    # the trial after this one has as well.
    busy, done = 0, sum(_is_finished(trial) for trial in trials)
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        if _is_alive(folder, trial.user_attrs.get("worker"), worker):
            busy += 1
            continue
        # Asked for again before it is given up: killed in between, it is there twice, and is known by its folder.
        values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        own = trial.user_attrs.get("folder")
        if own and own not in waiting:
            study.enqueue_trial(values, user_attrs={"folder": own})
        study.tell(trial.number, state=TrialState.FAIL)
    begun = done + busy
    if begun >= most:
        return None, busy
    # The same search draws the same values, interrupted or not; no two of its processes do.
    study.sampler = optuna.samplers.TPESampler(seed=(seed + begun) % 2**32)
    trial = study.ask()
    trial.set_user_attr("worker", worker)
    for name, values in space.items():
        suggest(trial, name, values)
    if not trial.user_attrs.get("folder"):
        add_owned(folder, [f"trial-{trial.number}"])
        trial.set_user_attr("folder", f"trial-{trial.number}")
    return trial, busy


def _is_finished(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def finished(study: Any) -> list[dict[str, Any]]:
    """The trials as `Search` has them. What Optuna takes for the loss of a pruned one is that of half a run."""
    return [
        {"number": t.number, "state": "diverged" if t.user_attrs.get("diverged") else t.state.name.lower(),
         "loss": t.value if t.state.name == "COMPLETE" else None, "params": t.params, "folder": t.user_attrs["folder"]}
        for t in study.get_trials(deepcopy=False) if _is_finished(t)
    ]  # fmt: skip


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any] | None:
    return min((t for t in trials if t["loss"] is not None), key=lambda trial: trial["loss"], default=None)
