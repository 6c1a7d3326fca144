"""A search on disk: what is searched for, and the Optuna study that its processes share.

A process holds a lock for the trial that it runs. A running trial that nobody holds was interrupted: the next process
that asks for a trial gets it, and goes on with its run.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfkit.errors import HfkitError, LockedError
from hfkit.reporting.pages import SEARCH_FILE
from hfkit.reporting.summaries import ranked
from hfkit.storage import add_owned, check_owned, lock, owned, remove_owned, write_text
from hfkit.tuning.space import Space, contains, suggest

BEST, TRIALS_PICTURE, BEST_RUN = "best.yaml", "tuning.png", "best"
_STUDY, _RUNNING = "study.db", ".running"


def claim(folder: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Claim `folder` for a search with these settings, or continue the one that it holds; call it under its lock.

    Raises:
        HfkitError: it holds another search, or files that hfkit did not write.
    """
    path, settings = folder / SEARCH_FILE, json.loads(json.dumps(settings))
    known = _read_settings(path)
    if known is not None and not overwrite:
        if names := [name for name in {**known, **settings} if known.get(name) != settings.get(name)]:
            what = f"{folder} holds a search with other settings ({', '.join(names)})"
            raise HfkitError(f"{what}: --overwrite, or another --output-dir")
        return
    check_owned(folder)
    if known is None:
        add_owned(folder, [SEARCH_FILE, BEST, TRIALS_PICTURE, BEST_RUN, _STUDY, f"{_STUDY}-journal", _RUNNING])
    else:
        for place in folder.glob(f"{_RUNNING}/*"):
            with lock(place):  # LockedError where a trial is running
                pass
        write_text(path, "{}")  # from here on the folder is that of an empty search, however much is left in it
        remove_owned(folder, keep=[SEARCH_FILE])
    write_text(path, json.dumps({"settings": settings}, indent=1))


def _read_settings(path: Path) -> dict[str, Any] | None:
    """The settings of the search at `path`: None if there is no search, an empty dict if the file is damaged."""
    if not path.is_file() or path.name not in owned(path.parent):
        return None
    try:
        return {**json.loads(path.read_text("utf-8"))["settings"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


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
    optuna_study: Any
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
                trials = self.optuna_study.get_trials(deepcopy=False)
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
                    self.optuna_study.enqueue_trial(values, user_attrs=facts)
                self.optuna_study.tell(trial.number, state=TrialState.FAIL)
        return busy

    def _ask(self, begun: int) -> Any:
        """A trial with all its values. begun: trials that are done or being run."""
        import optuna

        known = {name: self.defaults.get(name) for name in self.space}
        known = {name: value for name, value in known.items() if contains(self.space[name], value)}
        live = [trial for trial in self.optuna_study.get_trials(deepcopy=False) if trial.state.name != "FAIL"]
        if not any("default" in trial.user_attrs for trial in live):
            self.optuna_study.enqueue_trial(known, user_attrs={"default": self.defaults})
        # A search draws the same values, interrupted or not, and no two of its processes draw alike.
        self.optuna_study.sampler = optuna.samplers.TPESampler(seed=(self.seed + begun) % 2**32)
        trial = self.optuna_study.ask()
        for name in known if "default" in trial.user_attrs else self.space:
            suggest(trial, name, self.space[name])
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
            for trial in filter(_is_finished, self.optuna_study.get_trials(deepcopy=False))
        ]


def _is_finished(trial: Any) -> bool:
    return trial.state.name in ("COMPLETE", "PRUNED")


def best_of(trials: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the trials that have a score."""
    return next((trial for trial in ranked(trials) if trial["loss"] is not None), None)
