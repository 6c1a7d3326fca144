"""`tune`: a search for good training options with Optuna; each trial is a run of `finetune`.

A trial is what `finetune` would do with its options, so the best recipe reproduces the best score. The study is kept
in SQLite in the folder: several processes can share it, and the trial of one that was killed is run again.
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
from hfkit.corpus.files import Corpora, name_of
from hfkit.declaration import divide
from hfkit.errors import DivergedError, HfkitError, OptionError, StoppedError
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.reporting.pages import METRICS, make_files
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
    join_search,
    next_trial,
    open_study,
    read_space,
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


@dataclass(frozen=True, kw_only=True)
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
    model: str | Path | ModelOptions | None = None,
    data: DataOptions | None = None,
    train: TrainOptions | None = None,
    options: TuneOptions | None = None,
    **overrides: Any,
) -> Search:
    """Search for the training options with the lowest held-out loss.

    Args:
        corpus, model, data, train: as for `finetune`; what is not searched stays as it is given here.
        options: what to search; every field of `TuneOptions` is a keyword, too.

    A search in a folder that holds one continues it.

    Raises:
        HfkitError: as `finetune` does, or Optuna is missing, or the folder holds another search.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise HfkitError("tune needs optuna: pip install 'hfkit[tune]'") from error
    chosen: ModelOptions
    groups = ((ModelOptions, model), (DataOptions, data), (TrainOptions, train), (TuneOptions, options))
    chosen, data, train, options = divide(overrides, *groups)
    run_folder.check_trackers(train.report_to or [])
    space = read_space(options.search, train)
    if not data.eval_file and (data.streaming or not data.eval_fraction):
        raise OptionError("nothing would be held out, so trials could not be compared: add --eval-file")
    source = find_model(chosen)
    chosen = replace(chosen, model=source.name)  # so that the search continues with it when the default changes
    folder = Path(train.output_dir or Path("runs") / f"{name_of(corpus)}-tune")
    make_writable(folder)
    inputs: list[str | Path] = [*run_folder.sources_of(corpus), *(data.eval_file or []), source.folder]
    run_folder.check_not_input(folder, [*inputs, source.adapter or source.folder])
    with lock(folder, wait=True):
        recipe = run_folder.make_recipe(corpus, chosen, data, replace(train, output_dir=None, overwrite=False))
        asked = {"space": {name: list(values) for name, values in space.items()}, "recipe": recipe}
        claim(folder, asked, overwrite=train.overwrite)
        study = open_study(folder, prune=options.prune)
    job = _Job(folder=folder, study=study, space=space, corpus=corpus, model=chosen, data=data, train=train)
    with join_search(folder) as worker:
        _run_trials(job, options, worker)
    return _finish(job, options)


def _run_trials(job: _Job, options: TuneOptions, worker: str) -> None:
    """Run trials until there are enough."""
    started = time.monotonic()
    with console.progress(options.n_trials, "trial", "searching", initial=len(finished(job.study))) as bar:
        while not options.timeout or time.monotonic() - started < options.timeout:
            with lock(job.folder, wait=True, tell=False):
                trial, busy = next_trial(job.study, job.folder, worker, job.space, options.n_trials, job.train.seed)
            if trial:
                line = _run_trial(job, trial, options.n_trials)
                if not console.state.quiet:
                    bar.write(f"hfkit: {line}", file=sys.stderr)
                bar.update(len(finished(job.study)) - bar.n)
            elif busy:  # other processes run the last trials; should one die, its trial is run here
                time.sleep(0.5)
            else:
                return


class _Watch(TrainerCallback):
    """Reports each held-out loss to Optuna, and stops the trial if Optuna prunes it."""

    def __init__(self, study: Any, trial: Any, folder: Path) -> None:
        self._study, self._trial, self._folder = study, trial, folder
        self._reported: set[int] = set()

    def report(self, entry: dict[str, Any], step: int, steps: int) -> bool:
        """Report a measurement; False if the trial is to be pruned."""
        # Trials differ in their number of steps: compare them where they have done the same share of these.
        tenths = round(10 * step / steps)
        if not 0 < tenths < 10 or tenths in self._reported or "eval_loss" not in entry:
            return True
        self._reported.add(tenths)
        self._trial.report(entry["eval_loss"], tenths)
        return not self._trial.should_prune()

    def _report_or_prune(self, entry: dict[str, Any], step: int, steps: int) -> None:
        if not self.report(entry, step, steps):
            import optuna

            raise optuna.TrialPruned

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any("eval_loss" in entry for entry in state.log_history):
            raise HfkitError(
                "nothing is held out, so trials cannot be compared: raise --eval-fraction, or name another text with "
                "--eval-file"
            )
        facts = json.loads((self._folder / run_folder.FACTS).read_text("utf-8"))
        if corpus := facts.get("corpus_sha256"):
            if self._study.user_attrs.get("corpus_sha256", corpus) != corpus:
                raise HfkitError("the corpus has changed since the search began: --overwrite starts over")
            self._study.set_user_attr("corpus_sha256", corpus)
        for entry in state.log_history:  # of a trial that is resumed
            self._report_or_prune(entry, entry["step"], state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._report_or_prune(logs or {}, state.global_step, state.max_steps)


def _run_trial(job: _Job, trial: Any, limit: int) -> str:
    """Train with the values of a trial and tell the study; returns a line about it."""
    import optuna

    folder = job.folder / trial.user_attrs["folder"]
    begun = (folder / run_folder.FACTS).is_file()
    train = replace(job.train, **trial.params, output_dir=str(folder), resume=begun, overwrite=False)
    watch = _Watch(job.study, trial, folder)
    quiet, console.state.quiet = console.state.quiet, True
    score = "pruned"
    try:
        run = finetune(job.corpus, model=job.model, data=job.data, train=train, callbacks=[watch])
        metrics = run.metrics if run else {}
        loss = metrics["loss"]
        if loss is None:
            raise DivergedError("the held-out loss is not finite")
        for entry in metrics["history"]:  # a resumed trial that was already trained has reported nothing yet
            watch.report(entry, entry["step"], metrics["steps"])
        job.study.tell(trial, loss)
        score = f"held-out loss {loss:.4f}"
    except (optuna.TrialPruned, DivergedError) as end:
        if isinstance(end, DivergedError):
            score = "diverged"
            trial.set_user_attr(score, True)
        job.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except StoppedError as stop:
        done = f"{len(finished(job.study))} of {limit} trials are done ({job.folder})"
        raise StoppedError(f"stopped as asked: {done}, the same command goes on", stop.exit_code - 128) from None
    finally:
        console.state.quiet = quiet
    with lock(job.folder, wait=True, tell=False):
        _clear(job)
    values = ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.params.items()
    )
    return f"trial {trial.number}: {score}, {values}"


def _clear(job: _Job) -> None:
    """Keep the weights of the best trial only: those of all would fill the disk."""
    trials = finished(job.study)
    best = best_of(trials)
    for trial in trials:
        folder = job.folder / trial["folder"]
        if trial is not best:
            _drop_weights(folder)
        if trial["loss"] is None:
            shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)


def _drop_weights(folder: Path) -> None:
    """Delete the weights of a trial, once its card no longer says how to load them."""
    weights = [folder / name for name in owned(folder) if name.endswith(".safetensors")]
    if any(path.is_file() for path in weights) and (metrics := run_folder.read_metrics(folder)):
        for name, content in make_files(metrics | {"has_weights": False}).items():
            write_bytes(folder / name, content if isinstance(content, bytes) else content.encode())
        write_text(folder / METRICS, json.dumps(metrics | {"has_weights": False}, indent=1))
    for path in weights:
        path.unlink(missing_ok=True)


def _finish(job: _Job, options: TuneOptions) -> Search:
    """Write the table, the picture and the best recipe; train with it, if that was asked for."""
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
        recipe = (folder / best["folder"] / run_folder.RECIPE).read_text("utf-8")
        write_text(folder / BEST, recipe.replace(run_folder.RECIPE, BEST, 1))
        if options.train_best:
            run = _train_best(job, folder / best["folder"])
    return Search(
        output_dir=str(folder), best=best["params"], loss=best["loss"], trials=trials, importances=importances,
        recipe=str(folder / BEST), run=run,
    )  # fmt: skip


def _train_best(job: _Job, trial: Path) -> Run | None:
    """Train a run of its own with all the options of a trial; resume it if it was begun."""
    target = job.folder / BEST_RUN
    recipe = _recipe_of(trial)
    resume = _recipe_of(target) == recipe
    settings = {name: value for name, value in recipe.items() if name in TrainOptions.names()}
    train = TrainOptions(**settings, output_dir=str(target), resume=resume, overwrite=not resume)
    return finetune(job.corpus, model=job.model, data=job.data, train=train)


def _recipe_of(run: Path) -> dict[str, Any]:
    """The options in effect of a run; none if it was not begun, or cannot be read."""
    try:
        return dict(json.loads((run / run_folder.FACTS).read_text("utf-8"))["recipe"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _importances(study: Any, count: int) -> dict[str, float]:
    """The share of the scores' variance that each option explains; empty where trials are few."""
    import optuna

    if count < 4:
        return {}
    try:
        with console.quiet_libraries():
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # others need many more trials
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        return {name: float(share) for name, share in shares.items()}
    except (ValueError, RuntimeError, ImportError):  # all scores are alike, or scikit-learn is missing
        return {}
