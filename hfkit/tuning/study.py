"""A search on disk: the ranges that its trials draw from, and the study that its processes share."""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hfkit.errors import HfkitError, LockedError, OptionError
from hfkit.options import TrainOptions
from hfkit.recipes import read_value
from hfkit.reporting.summaries import merit
from hfkit.storage import add_owned, check_owned, lock, owned, remove_owned, write_text

# They say nothing about how good a training is; the seed also chooses what is held out.
_NOT_SEARCHED = ("output_dir", "resume", "overwrite", "seed")
RESULT, BEST, PICTURE, BEST_RUN = "tuning.json", "best.yaml", "tuning.png", "best"
_STUDY, _WORKERS = "study.db", ".workers"

Space = dict[str, Any]  # option -> (low, high), or the list of its values


def read_space(search: Sequence[str], train: TrainOptions) -> Space:
    """What the `search` options say to search.

    Raises:
        OptionError: there is no such training option, or it does not take such values.
    """
    space: Space = {}
    for text in search:
        name, _, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        space[name] = _read_values(text, name, values, train)
    for name in space:
        if name.startswith("lora_") and not (train.lora or "lora" in space):
            raise OptionError(f"--search has {name}, which has no effect without LoRA: add --lora")
    return space


def _read_values(text: str, name: str, values: str, train: TrainOptions) -> Any:
    if name not in TrainOptions.names() or name in _NOT_SEARCHED:
        why = "cannot be searched" if name in _NOT_SEARCHED else "is not a training option"
        raise OptionError(f"--search is {text!r}: {name!r} {why}")
    low, dots, high = values.partition("..")
    if not dots and re.fullmatch(r"[^,]*\d-[\d.][^,]*", values):
        raise OptionError(f"--search is {text!r}: a range is written with two dots, such as {name}=1e-5..1e-3")
    parsed = [read_value(part) for part in ((low, high) if dots else values.split(","))]
    for value in parsed:  # report a bad value before the first trial
        replace(train, **{name: value})
    if not values or (dots and not (all(type(value) in (int, float) for value in parsed) and parsed[0] < parsed[1])):
        raise OptionError(f"--search is {text!r}: write NAME=LOW..HIGH or NAME=A,B,C")
    if not dots:
        return parsed
    # 0..1 of a weight decay means all numbers in between; 1..5 epochs and 0..100 steps are whole numbers.
    counts = get_type_hints(TrainOptions)[name] in (int, int | None)
    whole = type(parsed[0]) is type(parsed[1]) is int and (counts or parsed[1] > 1)
    return tuple(parsed) if whole else tuple(map(float, parsed))


def default_space(train: TrainOptions, plan: TrainOptions) -> Space:
    """What to search without a `search` option: values around those that `finetune` would take.

    train: the user's options; one that is set stays as it is, but for the learning rate.
    plan: the same options, with everything decided that they leave open.
    """
    rate, batch, epochs = plan.learning_rate or 0.0, plan.per_device_train_batch_size, plan.num_train_epochs
    space: Space = {
        "learning_rate": (rate / 10, rate * 10),
        "weight_decay": (0.0, 0.2),
        "warmup_steps": (0.0, 0.2),
        "per_device_train_batch_size": sorted({2, 4, 8, 16, batch}),
        "num_train_epochs": sorted({max(1.0, float(round((epochs or 3) * share / 3))) for share in (1, 2, 3, 5)}),
        "dropout": (0.0, 0.3),
    }
    space |= {"lora_r": [4, 8, 16, 32], "lora_dropout": (0.0, 0.2)} if train.lora else {}
    chosen = {f.name for f in fields(train) if getattr(train, f.name) != f.default} - {"learning_rate"}
    chosen |= {"num_train_epochs"} if train.max_steps else set()
    return {name: values for name, values in space.items() if name not in chosen}


def suggest(trial: Any, name: str, values: Any) -> Any:
    """Have an Optuna trial choose a value."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    choose = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return choose(name, low, high, log=low > 0 and high / low >= 20)


def claim(folder: Path, asked: dict[str, dict[str, Any]], *, overwrite: bool) -> None:
    """Make `folder` that of a search for what is asked, unless it is already; call it under the lock.

    Raises:
        HfkitError: it holds another search, or files that hfkit did not write.
    """
    path = folder / RESULT
    known = _read_search(path)
    if known is not None and not overwrite:
        asked = json.loads(json.dumps(asked))
        for part, settings in asked.items():
            before = known.get(part, {})
            if names := [name for name in {**before, **settings} if before.get(name) != settings.get(name)]:
                raise HfkitError(
                    f"{folder} holds a search with other settings ({', '.join(names)}): --overwrite, or another "
                    "--output-dir"
                )
        return
    check_owned(folder)
    if known is None:
        add_owned(folder, [RESULT, BEST, PICTURE, BEST_RUN, _STUDY, f"{_STUDY}-journal", _WORKERS])
    else:
        for worker in folder.glob(f"{_WORKERS}/*"):
            with lock(worker):  # LockedError where it is at work
                pass
        write_text(path, "{}")  # from here on the folder is that of an empty search, however much is left in it
        remove_owned(folder, keep=[RESULT])
    write_text(path, json.dumps(asked, indent=1))


def _read_search(path: Path) -> dict[str, Any] | None:
    """What a search wrote down, nothing if that is damaged; None where there is no search."""
    if not path.is_file() or path.name not in owned(path.parent):
        return None
    try:
        known = json.loads(path.read_text("utf-8"))
        return {**known} if all(isinstance(known.get(name, {}), dict) for name in ("space", "recipe")) else {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


@contextlib.contextmanager
def join_search(folder: Path) -> Iterator[str]:
    """Yield a name for this process among those of the search; its folder is locked while the process lives."""
    number = 0
    while True:
        worker = folder / _WORKERS / str(number)
        worker.mkdir(parents=True, exist_ok=True)
        try:
            with lock(worker):
                yield str(worker.relative_to(folder))
                return
        except LockedError:
            number += 1


def _is_alive(folder: Path, worker: str | None, own: str) -> bool:
    # Without a name it died before it could write one; under our own name it was our predecessor.
    if worker is None or worker == own:
        return False
    try:
        with lock(folder / worker):
            return False
    except LockedError:
        return True


def open_study(folder: Path, *, figure: str, prune: bool) -> Any:
    """The study in `folder`, a new one if there is none; call it under the lock. figure: "accuracy" or "loss"."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner()

    def connect() -> sqlite3.Connection:  # a URL would not do: a folder's name may have a ? in it
        return sqlite3.connect(folder / _STUDY, timeout=120, check_same_thread=False)

    storage = optuna.storages.RDBStorage(f"sqlite:///{_STUDY}", engine_kwargs={"creator": connect})
    return optuna.create_study(
        study_name="hfkit",
        storage=storage,
        load_if_exists=True,
        pruner=pruner,
        direction="maximize" if figure == "accuracy" else "minimize",
    )


def next_trial(
    study: Any, folder: Path, worker: str, space: Space, limit: int, seed: int, defaults: dict[str, Any]
) -> tuple[Any, int]:
    """Take a trial, one that was interrupted before a new one; call it under the lock.

    The first trial has the `defaults`, option -> value; Optuna is told those of them that the space contains.

    Returns:
        The trial, or None if `limit` are done or being run; and how many other processes are running.
    """
    import optuna

    # Count from one snapshot. A trial that finishes between two reads would be counted twice, and two trials would
    # share a seed.
    trials = study.get_trials(deepcopy=False)
    waiting = [trial.user_attrs for trial in trials if trial.state.name == "WAITING"]
    done = [trial.user_attrs for trial in trials if _is_finished(trial)]
    busy = []
    for trial in trials:
        if trial.state.name != "RUNNING":
            continue
        if _is_alive(folder, trial.user_attrs.get("worker"), worker):
            busy.append(trial.user_attrs)
            continue
        # Enqueue again first, then mark the old trial as failed. A process that dies in between leaves two entries;
        # their folder identifies them as one.
        values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        facts = {name: value for name, value in trial.user_attrs.items() if name in ("folder", "default")}
        if "folder" in facts and facts["folder"] not in [known.get("folder") for known in waiting]:
            study.enqueue_trial(values, user_attrs=facts)
            waiting.append(facts)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    begun = len(done) + len(busy)
    if begun >= limit:
        return None, len(busy)
    if not any("default" in facts for facts in [*waiting, *done, *busy]):
        known = {name: defaults[name] for name, values in space.items() if _contains(values, defaults.get(name))}
        study.enqueue_trial(known, user_attrs={"default": defaults})
    # A search draws the same values, interrupted or not, and no two of its processes draw alike.
    study.sampler = optuna.samplers.TPESampler(seed=(seed + begun) % 2**32)
    trial = study.ask()
    trial.set_user_attr("worker", worker)
    is_default = "default" in trial.user_attrs
    for name, values in space.items():
        if not is_default or _contains(values, defaults.get(name)):
            suggest(trial, name, values)
    if not trial.user_attrs.get("folder"):
        add_owned(folder, [f"trial-{trial.number}"])
        trial.set_user_attr("folder", f"trial-{trial.number}")
    return trial, len(busy)


def _contains(values: Any, value: Any) -> bool:
    return value in values if isinstance(values, list) else value is not None and values[0] <= value <= values[1]


def _is_finished(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def finished(study: Any) -> list[dict[str, Any]]:
    """The finished trials as `Search` has them; a pruned one has no scores, since Optuna's is that of half a run."""
    rows = []
    for trial in filter(_is_finished, study.get_trials(deepcopy=False)):
        facts = trial.user_attrs
        row = {
            "number": trial.number,
            "state": "diverged" if "diverged" in facts else trial.state.name.lower(),
            "loss": facts.get("loss"),
            "accuracy": facts.get("accuracy"),
            "params": facts.get("default") or trial.params,
            "folder": facts["folder"],
            "default": "default" in facts,
        }
        rows.append(row)
    return rows


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any] | None:
    scored = [trial for trial in trials if trial["loss"] is not None]
    return min(scored, key=lambda trial: merit(trial["accuracy"], trial["loss"]), default=None)
