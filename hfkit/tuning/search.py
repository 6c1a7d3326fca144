"""`tune`: a search for good training options with Optuna; each trial is a run of `finetune`.

A trial is what `finetune` would do with its options, so the best recipe gives the best trial's score again. The study
is kept in SQLite in the folder: several processes can work on it, and one that was killed is made up for.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfkit import console
from hfkit.corpus.documents import Corpora, name_of
from hfkit.declaration import divide
from hfkit.errors import DivergedError, HfkitError, OptionError, StoppedError
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.reporting.pictures import draw_trials
from hfkit.storage import lock, make_writable, owned, write_bytes, write_text
from hfkit.training import run_folder
from hfkit.training.finetuning import finetune
from hfkit.training.runs import Run
from hfkit.tuning.study import (
    BEST,
    BEST_RUN,
    PICTURE,
    RESULT,
    best_of,
    claim,
    finished,
    next_trial,
    open_study,
    read_space,
    work,
)


@dataclass(frozen=True)
class Search:
    """A finished search."""

    output_dir: str
    best: dict[str, Any]  # option -> value
    loss: float  # held-out, of the best trial
    trials: list[dict[str, Any]]  # number, state ("complete", "pruned", "diverged"), loss, params, folder
    importances: dict[str, float]
    recipe: str  # file that `finetune --config` takes
    run: Run | None = None  # with `train_best`


@dataclass(frozen=True)
class _Job:
    """What the trials share."""

    folder: Path
    study: Any
    space: dict[str, Any]
    corpus: Corpora
    model: ModelOptions
    data: DataOptions
    train: TrainOptions


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
        import optuna  # noqa: F401
    except ImportError as error:
        raise HfkitError("tune needs optuna: pip install 'hfkit[tune]'") from error
    if not isinstance(model, ModelOptions):
        overrides, model = overrides | ({"model": model} if model else {}), None
    groups = ((ModelOptions, model), (DataOptions, data), (TrainOptions, train), (TuneOptions, options))
    model, data, train, options = divide(overrides, *groups)
    space = read_space(options.search, train)
    if not data.eval_file and (data.streaming or not data.eval_fraction):
        raise OptionError("nothing would be held out, so trials could not be compared: add --eval-file")
    source = find_model(model)
    model = replace(model, model=source.name)  # whatever the default will be when it goes on
    folder = Path(train.output_dir or Path("runs") / f"{name_of(corpus)}-tune")
    make_writable(folder)
    inputs = [*run_folder.sources_of(corpus), *run_folder.sources_of(data.eval_file or []), source.folder]
    run_folder.check_not_input(folder, [*inputs, source.adapter or source.folder])
    with lock(folder, wait=True):
        asked = run_folder.make_recipe(corpus, model, data, replace(train, output_dir=None, overwrite=False))
        wanted = {"space": {name: list(values) for name, values in space.items()}, "recipe": asked}
        claim(folder, wanted, overwrite=train.overwrite)
        study = open_study(folder, prune=options.prune)
    job = _Job(folder, study, space, corpus, model, data, train)
    with work(folder) as name:
        _search(job, options, name)
    return _finish(job, options)


def _search(job: _Job, options: TuneOptions, worker: str) -> None:
    """Run trials until there are enough."""
    started = time.monotonic()
    bar = console.progress(options.n_trials, "trial", "searching", initial=len(finished(job.study)))
    with bar:
        while not options.timeout or time.monotonic() - started < options.timeout:
            with lock(job.folder, wait=True, tell=False):
                trial, busy = next_trial(job.study, job.folder, worker, job.space, options.n_trials, job.train.seed)
            if trial:
                said = _run_trial(job, trial, options.n_trials)
                if not console.state.quiet:
                    bar.write(f"hfkit: {said}", file=sys.stderr)
                bar.update(len(finished(job.study)) - bar.n)
            elif busy:  # others are at it; should one of them die, its trial is done here
                time.sleep(0.5)
            else:
                return


class _Watch(TrainerCallback):
    """Tell Optuna each held-out loss, and stop where it says so; see that all trials learn from the same corpus."""

    def __init__(self, study: Any, trial: Any, folder: Path) -> None:
        self.study, self.trial, self.folder = study, trial, folder
        self._told: set[int] = set()

    def report(self, entry: dict[str, Any], step: int, steps: int) -> bool:
        """Tell what was measured; whether it is worth to go on."""
        # Trials differ in their steps: they are compared where they have done the same share of them.
        done = round(10 * step / steps)
        if not 0 < done < 10 or done in self._told or "eval_loss" not in entry:
            return True
        self._told.add(done)
        self.trial.report(entry["eval_loss"], done)
        return not self.trial.should_prune()

    def _go_on_or_prune(self, entry: dict[str, Any], step: int, steps: int) -> None:
        if not self.report(entry, step, steps):
            import optuna

            raise optuna.TrialPruned

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        facts = json.loads((self.folder / run_folder.FACTS).read_text("utf-8"))
        if found := facts.get("corpus_sha256"):
            if self.study.user_attrs.get("corpus_sha256", found) != found:
                raise HfkitError("the corpus is not what it was when the search began: --overwrite begins anew")
            self.study.set_user_attr("corpus_sha256", found)
        for entry in state.log_history:  # of a trial that goes on
            self._go_on_or_prune(entry, entry["step"], state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._go_on_or_prune(logs or {}, state.global_step, state.max_steps)


def _run_trial(job: _Job, trial: Any, most: int) -> str:
    """Train with the values of a trial, and tell the study; a line about it."""
    import optuna

    own = job.folder / trial.user_attrs["folder"]
    begun = (own / run_folder.FACTS).is_file()
    options = replace(job.train, **trial.params, output_dir=str(own), resume=begun, overwrite=False)
    watch = _Watch(job.study, trial, own)
    quiet, console.state.quiet = console.state.quiet, True
    score = "pruned"
    try:
        run = finetune(job.corpus, model=job.model, data=job.data, train=options, callbacks=[watch])
        loss = run.metrics["loss"] if run else None
        if loss is None and run.metrics["loss_before"] is None:
            raise HfkitError("nothing is held out, so trials cannot be compared: raise --eval-fraction")
        if loss is None:
            raise DivergedError("the held-out loss is no number")
        for entry in run.metrics["history"]:  # had it only to be finished, nothing was told yet
            watch.report(entry, entry["step"], run.metrics["steps"])
        job.study.tell(trial, loss)
        score = f"held-out loss {loss:.4f}"
    except (optuna.TrialPruned, DivergedError) as end:
        if isinstance(end, DivergedError):
            score = "diverged"
            trial.set_user_attr(score, True)
        job.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except StoppedError as stop:
        done = f"{len(finished(job.study))} of {most} trials are done ({job.folder})"
        raise StoppedError(f"stopped as asked: {done}, the same command goes on", stop.exit_code - 128) from None
    finally:
        console.state.quiet = quiet
    with lock(job.folder, wait=True, tell=False):
        _clear(job)
    values = ", ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
    return f"trial {trial.number}: {score}, {values}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _clear(job: _Job) -> None:
    """Of all trials but the best only recipe and scores stay: a model each would fill the disk."""
    trials = finished(job.study)
    best = best_of(trials)
    for trial in trials:
        if trial is not best:
            folder = job.folder / trial["folder"]
            for name in owned(folder):
                if name.endswith(".safetensors"):
                    (folder / name).unlink(missing_ok=True)
        if trial["loss"] is None:
            shutil.rmtree(job.folder / trial["folder"] / run_folder.CHECKPOINTS, ignore_errors=True)


def _finish(job: _Job, options: TuneOptions) -> Search:
    """The table, the picture and the best recipe; and the best run, if it was asked for."""
    folder, run = job.folder, None
    with lock(folder, wait=True):
        _clear(job)
        trials = finished(job.study)
        best = best_of(trials)
        if not best:
            raise HfkitError(f"no trial was finished ({folder}): a longer --timeout or --overwrite with other ranges")
        importances = _importances(job.study, sum(trial["loss"] is not None for trial in trials))
        known = json.loads((folder / RESULT).read_text("utf-8"))
        known |= {"best": best["params"], "loss": best["loss"], "trials": trials, "importances": importances}
        write_text(folder / RESULT, json.dumps(known, indent=1))
        write_bytes(folder / PICTURE, draw_trials(trials, importances))
        recipe = (folder / best["folder"] / run_folder.RECIPE).read_text("utf-8").replace(run_folder.RECIPE, BEST, 1)
        write_text(folder / BEST, recipe)
        if options.train_best:
            run = _train_best(job, folder / best["folder"])
    return Search(str(folder), best["params"], best["loss"], trials, importances, str(folder / BEST), run)


def _train_best(job: _Job, trial: Path) -> Run | None:
    """A run of its own with all that was in effect in a trial; it goes on if it was begun."""
    target = job.folder / BEST_RUN
    recipe, begun = (
        json.loads(path.read_text("utf-8"))["recipe"] if path.is_file() else None
        for path in (trial / run_folder.FACTS, target / run_folder.FACTS)
    )
    settings = {name: value for name, value in recipe.items() if name in TrainOptions.names()}
    chosen = TrainOptions(**settings, output_dir=str(target), resume=begun == recipe, overwrite=begun != recipe)
    return finetune(job.corpus, model=job.model, data=job.data, train=chosen)


def _importances(study: Any, count: int) -> dict[str, float]:
    """How much of the scores' variance each option explains; nothing where trials are few."""
    import optuna

    if count < 4:
        return {}
    try:
        with console.quiet_libraries():
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # others need many more trials
            worth = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {name: float(share) for name, share in worth.items()}
    except (ValueError, RuntimeError, ImportError):  # all scores alike, or its own dependency is missing
        return {}
