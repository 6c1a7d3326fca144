"""`tune`: a search for good training options with Optuna; each trial is a run of `finetune`.

A trial is what `finetune` would do with its options, so the best recipe gives the best trial's score again. The study
is kept in SQLite in the folder: several processes can work on it, and one that was killed is made up for.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfkit import console, runs
from hfkit.corpora import Corpora, name_of
from hfkit.declaration import divide
from hfkit.errors import HfkitError, OptionError
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.pictures import draw_trials
from hfkit.recipes import read_value
from hfkit.storage import lock, make_writable, write_bytes, write_text
from hfkit.training import Run, finetune

BEST, STUDY, RESULT, PICTURE = "best.yaml", "study.db", "tuning.json", "tuning.png"
_LORA = {"lora_r": [4, 8, 16, 32], "lora_dropout": (0.0, 0.2)}


@dataclass(frozen=True)
class Search:
    """A finished search."""

    output_dir: str
    best: dict[str, Any]  # option -> value
    loss: float  # held-out, of the best trial
    trials: list[dict[str, Any]]  # number, state ("complete", "pruned"), loss, params
    importances: dict[str, float]
    recipe: str  # file that `finetune --config` takes
    run: Run | None = None  # with `train_best`


def tune(
    corpus: Corpora,
    *,
    model: str | ModelOptions | None = None,
    data: DataOptions | None = None,
    train: TrainOptions | None = None,
    options: TuneOptions | None = None,
    **overrides: Any,
) -> Search:
    """Search for the training options with the lowest held-out loss.

    Args:
        corpus, model, data, train: as for `finetune`; what is not searched for is as given there.
        options: what to search; every field of `TuneOptions` is a keyword, too.

    A search in a folder that holds one goes on. Raises HfkitError as `finetune` does, and where Optuna is missing.
    """
    try:
        import optuna
    except ImportError as error:
        raise HfkitError("tune needs optuna: pip install 'hfkit[tune]'") from error
    if not isinstance(model, ModelOptions):
        overrides, model = overrides | ({"model": model} if model else {}), None
    groups = ((ModelOptions, model), (DataOptions, data), (TrainOptions, train), (TuneOptions, options))
    model, data, train, options = divide(overrides, *groups)
    folder = Path(train.output_dir or Path("runs") / f"{name_of(corpus)}-tune")
    make_writable(folder)
    if train.overwrite:
        shutil.rmtree(folder)
        folder.mkdir()
    space = read_space(options.search, train)
    asked = runs.describe(corpus, model, data, replace(train, output_dir=None, overwrite=False))
    _check_same(folder / RESULT, {"space": {name: list(values) for name, values in space.items()}, "recipe": asked})
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="hfkit", storage=f"sqlite:///{folder / STUDY}", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(), pruner=optuna.pruners.MedianPruner() if options.prune else None,
    )  # fmt: skip
    started = time.monotonic()
    with _worker(folder) as name:
        while not options.timeout or time.monotonic() - started < options.timeout:
            with lock(folder, wait=True):
                trial = _next_trial(study, folder, name, space, options.n_trials)
            if trial is None:
                break
            _run_trial(study, trial, folder, corpus, model, data, train)
    return _finish(study, folder, corpus, model, data, train, options)


def read_space(search: Sequence[str] | None, train: TrainOptions) -> dict[str, Any]:
    """Option -> (low, high), or the list of its values.

    Raises:
        OptionError: there is no such training option, or it does not take such values.
    """
    space: dict[str, Any] = {}
    if not search:
        rate = train.learning_rate
        space = {
            "learning_rate": (rate / 10, rate * 10) if rate else (1e-5, 1e-3),
            "weight_decay": (0.0, 0.2),
            "warmup_steps": (0.0, 0.2),
            "per_device_train_batch_size": [2, 4, 8, 16],
            "num_train_epochs": [1.0, 2.0, 3.0, 5.0],
            "dropout": (0.0, 0.3),
        }
        space |= _LORA if train.lora else {}
        return {name: values for name, values in space.items() if not (name == "num_train_epochs" and train.max_steps)}
    for given in search:
        name, _, values = given.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        low, dots, high = values.partition("..")
        try:
            parts = (low, high) if dots else values.split(",")
            read = [read_value(part) for part in parts]
            for value in read:  # so that a bad range is told before the first trial
                replace(train, **{name: value})
        except TypeError:
            raise OptionError(f"--search is {given!r}: there is no training option {name!r}") from None
        if not values or (dots and not (all(isinstance(v, int | float) for v in read) and read[0] < read[1])):
            raise OptionError(f"--search is {given!r}: write NAME=LOW..HIGH or NAME=A,B,C")
        space[name] = tuple(read) if dots else read
    return space


def _suggest(trial: Any, name: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=low > 0 and high / low >= 20)
    return trial.suggest_float(name, low, high, log=low > 0 and high / low >= 20)


def _check_same(path: Path, asked: dict[str, Any]) -> None:
    """Write down what is searched; HfkitError if the folder holds a search for something else."""
    if not path.is_file():
        write_text(path, json.dumps(asked, indent=1))
        return
    known = json.loads(path.read_text())
    if any(known.get(name) != json.loads(json.dumps(value)) for name, value in asked.items()):
        raise HfkitError(f"{path.parent} holds a search with other settings: --overwrite, or another --output-dir")


@contextlib.contextmanager
def _worker(folder: Path) -> Iterator[str]:
    """A name for this process; while it lives its folder is locked."""
    number = 0
    while True:
        own = folder / f"worker-{number}"
        own.mkdir(exist_ok=True)
        try:
            with lock(own):
                yield own.name
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


def _next_trial(study: Any, folder: Path, worker: str, space: dict[str, Any], most: int) -> Any:
    """A trial to run, one that was interrupted before a new one; None if there are enough. Call it under the lock."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.state == TrialState.RUNNING and not _is_alive(folder, trial.user_attrs.get("worker"), worker):
            study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                study.enqueue_trial(trial.params, user_attrs={"folder": trial.user_attrs.get("folder")})
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    waiting = states.count(TrialState.WAITING)
    busy = sum(states.count(state) for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING))
    if not waiting and busy >= most:
        return None
    trial = study.ask()
    trial.set_user_attr("worker", worker)
    if not trial.user_attrs.get("folder"):
        trial.set_user_attr("folder", f"trial-{trial.number}")
    for name, values in space.items():
        _suggest(trial, name, values)
    return trial


class _Pruning(TrainerCallback):
    """Tell Optuna each held-out loss, and stop where it says so."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def _report(self, entry: dict[str, Any], step: int) -> None:
        if step and "eval_loss" in entry:
            self.trial.report(entry["eval_loss"], step)
            if self.trial.should_prune():
                import optuna

                raise optuna.TrialPruned

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:  # of a trial that goes on
            self._report(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._report(logs or {}, state.global_step)


def _run_trial(
    study: Any, trial: Any, folder: Path, corpus: Corpora, model: ModelOptions, data: DataOptions, train: TrainOptions
) -> None:
    import optuna

    own = folder / trial.user_attrs["folder"]
    begun = (own / runs.FACTS).is_file()
    options = replace(train, **trial.params, output_dir=str(own), resume=begun, overwrite=False)
    quiet, console.state.quiet = console.state.quiet, True
    try:
        run = finetune(corpus, model=model, data=data, train=options, callbacks=[_Pruning(trial)])
        loss = run.metrics["loss"] if run else None
        if loss is None:
            raise HfkitError("nothing is held out, so there is nothing to compare: raise --eval-fraction")
        study.tell(trial, loss)
    except optuna.TrialPruned:
        loss = None
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        shutil.rmtree(own / runs.CHECKPOINTS, ignore_errors=True)
    finally:
        console.state.quiet = quiet
    _keep_best_weights(study, folder)
    values = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
    score = "pruned" if loss is None else f"held-out loss {loss:.4f}"
    console.note(f"trial {trial.number}: {score}, {values}")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finished(study: Any) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _keep_best_weights(study: Any, folder: Path) -> None:
    """Of all trials but the best only recipe and scores stay: a model each would fill the disk."""
    scored = [trial for trial in _finished(study) if trial.value is not None]
    best = min(scored, key=lambda trial: trial.value, default=None)
    for trial in _finished(study):
        if trial is not best:
            for weights in (folder / trial.user_attrs["folder"]).glob("*.safetensors"):
                weights.unlink()


def _finish(
    study: Any, folder: Path, corpus: Corpora, model: ModelOptions, data: DataOptions, train: TrainOptions,
    options: TuneOptions,
) -> Search:  # fmt: skip
    """The table, the picture and the best recipe; and the best run, if it was asked for."""
    trials = [
        {"number": t.number, "state": t.state.name.lower(), "loss": t.value, "params": t.params,
         "folder": t.user_attrs["folder"]}
        for t in _finished(study)
    ]  # fmt: skip
    scored = [trial for trial in trials if trial["loss"] is not None]
    if not scored:
        raise HfkitError(f"no trial was finished ({folder}): raise --timeout, the search goes on where it stopped")
    best = min(scored, key=lambda trial: trial["loss"])
    importances = _importances(study, len(scored))
    known = json.loads((folder / RESULT).read_text())
    known |= {"best": best["params"], "loss": best["loss"], "trials": trials, "importances": importances}
    write_text(folder / RESULT, json.dumps(known, indent=1))
    write_bytes(folder / PICTURE, draw_trials(trials, importances))
    recipe = (folder / best["folder"] / runs.RECIPE).read_text("utf-8").replace(runs.RECIPE, BEST, 1)
    write_text(folder / BEST, recipe)
    run = None
    if options.train_best:
        chosen = replace(train, **best["params"], output_dir=str(folder / "best"), overwrite=True, resume=False)
        run = finetune(corpus, model=model, data=data, train=chosen)
    return Search(str(folder), best["params"], best["loss"], trials, importances, str(folder / BEST), run)


def _importances(study: Any, count: int) -> dict[str, float]:
    """How much of the scores' variance each option explains; nothing where trials are few."""
    import optuna

    if count < 4:
        return {}
    try:
        return {name: float(v) for name, v in optuna.importance.get_param_importances(study).items()}
    except (ValueError, RuntimeError, ImportError):  # all scores alike, or its own dependency is missing
        return {}
