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
from hfkit.corpus.documents import Corpora, name_of
from hfkit.declaration import divide
from hfkit.errors import DivergedError, HfkitError, OptionError, StoppedError
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.reporting.pages import METRICS, make_files
from hfkit.reporting.pictures import draw_trials
from hfkit.storage import lock, make_writable, owned, write_bytes, write_text
from hfkit.training import run_folder
from hfkit.training.accuracy import find_answers
from hfkit.training.finetuning import finetune, make_job
from hfkit.training.plan import Job
from hfkit.training.runs import Run
from hfkit.tuning.study import (
    BEST,
    BEST_RUN,
    PICTURE,
    RESULT,
    Space,
    best_of,
    claim,
    default_space,
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
    accuracy: float | None  # likewise; None where answers are not right or wrong
    # number, state ("complete", "pruned", "diverged"), loss, accuracy, params, folder, default (options were used)
    trials: list[dict[str, Any]]
    importances: dict[str, float]
    recipe: str  # file that `finetune --config` takes
    run: Run | None = None  # with `train_best`


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the trials share."""

    folder: Path
    study: Any
    space: Space
    defaults: dict[str, Any]  # option of the space -> what `finetune` would take
    figure: str  # what trials are compared by: accuracy or loss
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
    """Search for the training options with the best held-out score: that by which a run keeps its best state.

    This is the accuracy where a model chooses among labels or has a head, else the loss. The first trial is what
    `finetune` would do, so that the search says what it gained.

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
    space = read_space(options.search or [], train)
    if not data.eval_file and (data.streaming or not data.eval_fraction):
        raise OptionError("nothing would be held out, so trials could not be compared: add --eval-file")
    source = find_model(chosen)
    chosen = replace(chosen, model=source.name)  # so that the search continues with it when the default changes
    folder = Path(train.output_dir or Path("runs") / f"{name_of(corpus)}-tune")
    make_writable(folder)
    inputs: list[str | Path] = [*run_folder.sources_of(corpus), *(data.eval_file or []), source.folder]
    run_folder.check_not_input(folder, [*inputs, source.adapter or source.folder])
    overwrite, train = train.overwrite, replace(train, output_dir=None, resume=False, overwrite=False)
    plain = make_job(corpus, chosen, data, train, folder)
    decided = plain.plan.options
    train = replace(train, early_stopping_patience=decided.early_stopping_patience)
    space = space or default_space(train, decided)
    figure = _figure_of(plain)
    recipe = run_folder.make_recipe(corpus, chosen, data, train) | plain.dataset.fingerprint | {"figure": figure}
    with lock(folder, wait=True):
        claim(folder, {"space": {n: list(v) for n, v in space.items()}, "recipe": recipe}, overwrite=overwrite)
        study = open_study(folder, figure=figure, prune=options.prune)
    job = _Job(
        folder=folder,
        study=study,
        space=space,
        defaults={name: value for name in space if (value := getattr(decided, name)) is not None},
        figure=figure,
        corpus=corpus,
        model=chosen,
        data=data,
        train=train,
    )
    with join_search(folder) as worker:
        _run_trials(job, options, worker)
    return _finish(job, options)


def _figure_of(job: Job) -> str:
    """By what the states of a run are compared, and so the trials of a search."""
    dataset = job.dataset
    if not len(dataset.held_out):
        raise HfkitError(
            "nothing is held out, so trials cannot be compared: raise --eval-fraction, or name another text with "
            "--eval-file"
        )
    has_answers = dataset.head or find_answers(dataset, dataset.held_out, job.tokenizer, job.block_size)
    return "accuracy" if has_answers else "loss"


def _run_trials(job: _Job, options: TuneOptions, worker: str) -> None:
    """Run trials until there are enough."""
    started = time.monotonic()
    with console.progress(options.n_trials, "trial", "searching", initial=len(finished(job.study))) as bar:
        while not options.timeout or time.monotonic() - started < options.timeout:
            with lock(job.folder, wait=True, tell=False):
                trial, busy = next_trial(
                    job.study, job.folder, worker, job.space, options.n_trials, job.train.seed, job.defaults
                )
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
    """Reports each held-out score to Optuna, and stops the trial if Optuna prunes it."""

    def __init__(self, trial: Any, figure: str) -> None:
        self._trial, self._name = trial, f"eval_{figure}"
        self._reported: set[int] = set()

    def report(self, entry: dict[str, Any], step: int, steps: int) -> bool:
        """Report a measurement; False if the trial is to be pruned."""
        # Trials differ in their number of steps: compare them where they have done the same share of these.
        tenths = round(10 * step / steps)
        if not 0 < tenths < 10 or tenths in self._reported or self._name not in entry:
            return True
        self._reported.add(tenths)
        self._trial.report(entry[self._name], tenths)
        return not self._trial.should_prune()

    def _report_or_prune(self, entry: dict[str, Any], step: int, steps: int) -> None:
        if not self.report(entry, step, steps):
            import optuna

            raise optuna.TrialPruned

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:  # of a trial that is resumed
            self._report_or_prune(entry, entry["step"], state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._report_or_prune(logs or {}, state.global_step, state.max_steps)


def _run_trial(job: _Job, trial: Any, limit: int) -> str:
    """Train with the values of a trial and tell the study; returns a line about it."""
    import optuna

    folder = job.folder / trial.user_attrs["folder"]
    begun = (folder / run_folder.FACTS).is_file()
    train = replace(job.train, **trial.params, output_dir=str(folder), resume=begun)
    watch = _Watch(trial, job.figure)
    quiet, console.state.quiet = console.state.quiet, True
    score = "pruned"
    try:
        run = finetune(job.corpus, model=job.model, data=job.data, train=train, callbacks=[watch])
        metrics = run.metrics if run else {}
        if metrics["loss"] is None or metrics[job.figure] is None:
            raise DivergedError("the held-out loss is not finite")
        for entry in metrics["history"]:  # a resumed trial that was already trained has reported nothing yet
            watch.report(entry, entry["step"], metrics["steps"])
        trial.set_user_attr("loss", metrics["loss"])
        score = f"held-out loss {metrics['loss']:.4f}"
        if job.figure == "accuracy":
            trial.set_user_attr("accuracy", metrics["accuracy"])
            score = f"held-out accuracy {metrics['accuracy']:.1%}, loss {metrics['loss']:.4f}"
        job.study.tell(trial, metrics[job.figure])
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
    params = trial.user_attrs.get("default") or trial.params
    values = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    ]
    kind = " (the defaults)" if "default" in trial.user_attrs else ""
    return f"trial {trial.number}{kind}: {', '.join([score, *values])}"


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
        importances = _importances(job)
        scores = {"best": best["params"], "loss": best["loss"], "accuracy": best["accuracy"]}
        found = {**scores, "trials": trials, "importances": importances}
        known = json.loads((folder / RESULT).read_text("utf-8"))
        write_text(folder / RESULT, json.dumps(known | found, indent=1))
        write_bytes(folder / PICTURE, draw_trials(trials, importances))
        recipe = (folder / best["folder"] / run_folder.RECIPE).read_text("utf-8")
        write_text(folder / BEST, recipe.replace(run_folder.RECIPE, BEST, 1))
        if options.train_best:
            run = _train_best(job, folder / best["folder"])
    return Search(output_dir=str(folder), **found, recipe=str(folder / BEST), run=run)


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


def _importances(job: _Job) -> dict[str, float]:
    """The share of the scores' variance that each option explains; empty where trials are few."""
    import optuna

    scored = [trial for trial in job.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if sum(set(job.space) <= set(trial.params) for trial in scored) < 4:
        return {}
    try:
        with console.quiet_libraries():
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # others need many more trials
            shares = optuna.importance.get_param_importances(job.study, evaluator=evaluator, params=list(job.space))
        return {name: float(share) for name, share in shares.items()}
    except (ValueError, RuntimeError, ImportError):  # all scores are alike, or scikit-learn is missing
        return {}
