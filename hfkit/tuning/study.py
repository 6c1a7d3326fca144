"""A search on disk: what is searched for, in which ranges, and the Optuna study that its processes share.

A process holds a lock for the trial that it runs. A running trial that nobody holds was interrupted: the next process
that asks for a trial gets it, and goes on with its run.
"""

import contextlib
import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from hfkit.errors import HfkitError, LockedError, OptionError
from hfkit.options import TrainOptions
from hfkit.storage import add_owned, check_owned, lock, owned, remove_owned, write_text

RESULT, BEST, PICTURE, BEST_RUN = "tuning.json", "best.yaml", "tuning.png", "best"
_STUDY, _RUNNING = "study.db", ".running"
# They say nothing about how good a training is; the seed also chooses what is held out.
_NOT_SEARCHED = {"output_dir", "resume", "overwrite", "seed"}

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
    if name not in {*TrainOptions.names()} - _NOT_SEARCHED:
        raise OptionError(f"--search is {text!r}: {name!r} is not a training option that can be searched")
    low, dots, high = values.partition("..")
    if not dots and re.fullmatch(r"[^,]*\d-[\d.][^,]*", values):
        raise OptionError(f"--search is {text!r}: a range is written with two dots, such as {name}=1e-5..1e-3")
    parts = (low, high) if dots else values.split(",") if values else []
    parsed = [TrainOptions.read_value(name, part.strip()) for part in parts]
    for value in parsed:  # report a bad value before the first trial
        replace(train, **{name: value})
    if not parsed or (dots and not (all(type(value) in (int, float) for value in parsed) and parsed[0] < parsed[1])):
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


def _suggest(trial: Any, name: str, values: Any) -> Any:
    """Have an Optuna trial choose a value."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    choose = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return choose(name, low, high, log=low > 0 and high / low >= 20)


def _contains(values: Any, value: Any) -> bool:
    """Whether a trial may choose `value` among these values."""
    return value in values if isinstance(values, list) else value is not None and values[0] <= value <= values[1]


def claim(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Make `folder` that of a search with these settings, unless it is already; call it under the folder's lock.

    Raises:
        HfkitError: it holds another search, or files that hfkit did not write.
    """
    path, settings, known = folder / RESULT, json.loads(json.dumps(settings)), None
    if path.is_file() and RESULT in owned(folder):
        known = json.loads(path.read_text("utf-8")).get("settings", {})
    if known is not None and not overwrite:
        if names := [name for name in {**known, **settings} if known.get(name) != settings.get(name)]:
            what = f"{folder} holds a search with other settings ({', '.join(names)})"
            raise HfkitError(f"{what}: --overwrite, or another --output-dir")
        return
    check_owned(folder)
    if known is None:
        add_owned(folder, [RESULT, BEST, PICTURE, BEST_RUN, _STUDY, f"{_STUDY}-journal", _RUNNING])
    else:
        for place in folder.glob(f"{_RUNNING}/*"):
            with lock(place):  # LockedError where a trial is running
                pass
        write_text(path, "{}")  # from here on the folder is that of an empty search, however much is left in it
        remove_owned(folder, keep=[RESULT])
    write_text(path, json.dumps({"settings": settings}, indent=1))


def open_study(folder: Path, *, figure: str, prune: bool) -> Any:
    """Optuna's study in `folder`, a new one if there is none; call it under the lock. figure: accuracy or loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def connect() -> sqlite3.Connection:  # a URL would not do: a folder's name may have a ? in it
        return sqlite3.connect(folder / _STUDY, timeout=120, check_same_thread=False)

    return optuna.create_study(
        study_name="hfkit",
        storage=optuna.storages.RDBStorage(f"sqlite:///{_STUDY}", engine_kwargs={"creator": connect}),
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner() if prune else optuna.pruners.NopPruner(),
        direction="maximize" if figure == "accuracy" else "minimize",
    )


@dataclass(frozen=True, kw_only=True)
class SharedStudy:
    """The study of a search, and what its trials choose from."""

    folder: Path
    optuna: Any  # the study
    figure: str  # what trials are compared by: accuracy or loss
    space: Space
    defaults: dict[str, Any]  # option of the space -> what `finetune` would take
    seed: int

    @contextlib.contextmanager
    def take_trial(self, limit: int) -> Iterator[tuple[Any, int]]:
        """Hold a trial: one that was interrupted before a new one, and the defaults before all others.

        Yields the trial, or None if `limit` are done or being run; and how many other processes are running.
        """
        with contextlib.ExitStack() as stack:
            with lock(self.folder, wait=True, tell=False):
                # Count from one snapshot. A trial that finishes between two reads would be counted twice, and two
                # trials would share a seed.
                trials = self.optuna.get_trials(deepcopy=False)
                busy = self._requeue_interrupted(trials)
                begun = busy + sum(map(_is_finished, trials))
                trial = self._ask(begun) if begun < limit else None
                if trial:
                    stack.enter_context(lock(self._place_of(trial)))
            yield trial, busy

    def _requeue_interrupted(self, trials: list[Any]) -> int:
        """Give the trials of processes that died to the next ones that ask; returns how many others are running."""
        from optuna.trial import TrialState

        busy = 0
        queued = [trial.user_attrs.get("folder") for trial in trials if trial.state == TrialState.WAITING]
        for trial in trials:
            if trial.state == TrialState.RUNNING and self._is_held(trial):
                busy += 1
            elif trial.state == TrialState.RUNNING:
                # Enqueue again first, then mark the old trial as failed. A process that dies in between leaves two
                # entries; their folder identifies them as one.
                facts = {name: trial.user_attrs[name] for name in ("folder", "default") if name in trial.user_attrs}
                if "folder" in facts and facts["folder"] not in queued:
                    values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
                    self.optuna.enqueue_trial(values, user_attrs=facts)
                self.optuna.tell(trial.number, state=TrialState.FAIL)
        return busy

    def _ask(self, begun: int) -> Any:
        """A trial with all its values. begun: trials that are done or being run."""
        import optuna

        known = {name: self.defaults.get(name) for name in self.space}
        known = {name: value for name, value in known.items() if _contains(self.space[name], value)}
        live = [trial for trial in self.optuna.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
        if not any("default" in trial.user_attrs for trial in live):
            self.optuna.enqueue_trial(known, user_attrs={"default": self.defaults})
        # A search draws the same values, interrupted or not, and no two of its processes draw alike.
        self.optuna.sampler = optuna.samplers.TPESampler(seed=(self.seed + begun) % 2**32)
        trial = self.optuna.ask()
        for name in known if "default" in trial.user_attrs else self.space:
            _suggest(trial, name, self.space[name])
        if "folder" not in trial.user_attrs:
            add_owned(self.folder, [f"trial-{trial.number}"])
            trial.set_user_attr("folder", f"trial-{trial.number}")
        return trial

    def _place_of(self, trial: Any) -> Path:
        """The folder whose lock says that somebody runs the trial."""
        place = self.folder / _RUNNING / str(trial.number)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def _is_held(self, trial: Any) -> bool:
        try:
            with lock(self._place_of(trial)):
                return False
        except LockedError:
            return True

    def finished(self) -> list[dict[str, Any]]:
        """The finished trials as `Search` has them. A pruned one has no score: Optuna's is that of half a run."""
        return [
            {
                "number": trial.number,
                "state": "diverged" if "diverged" in trial.user_attrs else trial.state.name.lower(),
                "loss": trial.user_attrs.get("loss"),
                "accuracy": trial.user_attrs.get("accuracy"),
                "params": trial.user_attrs.get("default", trial.params),
                "folder": trial.user_attrs["folder"],
                "default": "default" in trial.user_attrs,
            }
            for trial in filter(_is_finished, self.optuna.get_trials(deepcopy=False))
        ]


def _is_finished(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")
