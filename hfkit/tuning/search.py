"""`tune`: a search for good training options with Optuna; each trial is a run of `finetune`.

A trial is what `finetune` would do with its options, so the best recipe reproduces the best score. The study is kept
in SQLite in the folder: several processes can share it, and the trial of one that was killed is run again.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hfkit import console
from hfkit.corpus.files import Corpora, sources_of
from hfkit.declaration import divide
from hfkit.errors import DivergedError, HfkitError, OptionError, StoppedError, needing
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions, TuneOptions
from hfkit.reporting.pages import METRICS_FILE, SEARCH_FILE, make_files
from hfkit.reporting.pictures import plot_trials, to_png
from hfkit.reporting.summaries import show_figure, show_value
from hfkit.storage import lock, make_writable, owned, publish, write_bytes, write_text
from hfkit.training import run_folder
from hfkit.training.finetuning import finetune, make_job
from hfkit.training.monitor import find_right_answers
from hfkit.training.plan import Job
from hfkit.training.runs import Run
from hfkit.training.schedule import check_schedule
from hfkit.tuning.space import default_space, read_space
from hfkit.tuning.study import BEST, BEST_RUN, TRIALS_PICTURE, SharedStudy, best_of, claim, open_study


@dataclass(frozen=True)
class Search:
    """A finished search."""

    output_dir: str
    best: dict[str, Any]  # option -> value
    loss: float  # held-out, of the best trial
    accuracy: float | None  # likewise; None where no answer is right or wrong
    # number, state ("complete", "pruned", "diverged"), loss, accuracy, params, folder, default (`finetune`'s options?)
    trials: list[dict[str, Any]]
    importances: dict[str, float]
    recipe: str  # file that `finetune --config` takes
    run: Run | None = None  # with `train_best`


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
    with needing("tune needs optuna", "tune"):
        import optuna  # noqa: F401
    chosen: ModelOptions
    groups = ((ModelOptions, model), (DataOptions, data), (TrainOptions, train), (TuneOptions, options))
    chosen, data, train, options = divide(overrides, *groups)
    run_folder.check_trackers(train.report_to or [])
    space = read_space(options.search or [], train)
    for name in space.get("lr_scheduler_type", [train.lr_scheduler_type]):
        check_schedule(replace(train, lr_scheduler_type=name))
    if not data.eval_file and (data.streaming or not data.eval_fraction):
        raise OptionError("nothing would be held out, so trials could not be compared: add --eval-file")
    source = find_model(chosen)
    chosen = replace(chosen, model=source.name)  # so that the search continues with it when the default changes
    folder = run_folder.folder_for("tune", corpus, train)
    make_writable(folder)
    inputs = [*sources_of(corpus), *(data.eval_file or []), source.folder, source.adapter or source.folder]
    run_folder.check_not_input(folder, inputs)
    overwrite, train = train.overwrite, replace(train, output_dir=None, resume=False, overwrite=False)
    job = make_job(corpus, chosen, data, train, folder)
    decided, figure = job.plan.options, _figure_of(job)
    train = replace(train, early_stopping_patience=decided.early_stopping_patience)
    space = space or default_space(train, decided)
    settings = run_folder.make_recipe(corpus, chosen, data, train) | job.dataset.fingerprint | {"compared by": figure}
    with lock(folder, wait=True):
        claim(folder, settings | {f"search {name}": values for name, values in space.items()}, overwrite=overwrite)
        study = SharedStudy(
            folder=folder,
            optuna_study=open_study(folder, figure=figure, prune=options.prune),
            figure=figure,
            space=space,
            defaults={name: value for name in space if (value := getattr(decided, name)) is not None},
            seed=train.seed,
        )
    _run_trials(study, options, train, partial(finetune, corpus, model=chosen, data=data))
    return _finish(study, options)


def _figure_of(job: Job) -> str:
    """By what the states of a run are compared, and so the trials of a search: accuracy or loss."""
    dataset = job.dataset
    if not len(dataset.held_out):
        way_out = "raise --eval-fraction, or name another text with --eval-file"
        raise HfkitError(f"nothing is held out, so trials cannot be compared: {way_out}")
    has_answers = dataset.head or find_right_answers(dataset, dataset.held_out, job.tokenizer, job.block_size)
    return "accuracy" if has_answers else "loss"


def _run_trials(study: SharedStudy, options: TuneOptions, train: TrainOptions, run: Callable[..., Run | None]) -> None:
    """Run trials until there are enough. run: `finetune` with all but its training options and callbacks."""
    started = time.monotonic()
    with console.progress(options.n_trials, "trial", "searching", initial=len(study.finished())) as bar:
        while not options.timeout or time.monotonic() - started < options.timeout:
            with study.take_trial(options.n_trials) as (trial, busy):
                if trial:
                    line = _run_trial(study, trial, train, run, options.n_trials)
                    if not console.state.quiet:
                        bar.write(f"hfkit: {line}", file=sys.stderr)
                    bar.update(len(study.finished()) - bar.n)
                elif not busy:
                    return
            if not trial:  # other processes run the last trials; should one die, its trial is run here
                time.sleep(0.5)


class _Watch(TrainerCallback):
    """Reports each held-out score to Optuna, and stops the trial if Optuna prunes it."""

    def __init__(self, trial: Any, figure: str) -> None:
        self._trial, self._name = trial, f"eval_{figure}"
        self._reported: set[int] = set()

    def report(self, entry: dict[str, Any], step: int, steps: int) -> bool:
        """Report a measurement; True if the trial is to be pruned."""
        # Trials differ in their number of steps: compare them where they have done the same share of these.
        tenths = round(10 * step / steps)
        if not 0 < tenths < 10 or tenths in self._reported or self._name not in entry:
            return False
        self._reported.add(tenths)
        self._trial.report(entry[self._name], tenths)
        return bool(self._trial.should_prune())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for entry in state.log_history:  # of a trial that is resumed
            self._report_or_end(entry, entry["step"], state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._report_or_end(logs or {}, state.global_step, state)

    def _report_or_end(self, entry: dict[str, Any], step: int, state: Any) -> None:
        if self.report(entry, step, state.max_steps):
            import optuna

            raise optuna.TrialPruned


def _run_trial(study: SharedStudy, trial: Any, train: TrainOptions, run: Callable[..., Run | None], limit: int) -> str:
    """Train with the values of a trial and tell the study; returns a line about it."""
    import optuna

    folder = study.folder / trial.user_attrs["folder"]
    begun = (folder / run_folder.FACTS).is_file()
    watch = _Watch(trial, study.figure)
    quiet, console.state.quiet = console.state.quiet, True
    score = "pruned"
    try:
        train = replace(train, **trial.params, output_dir=str(folder), resume=begun)
        result = run(train=train, callbacks=[watch])
        metrics = result.metrics if result else {}
        if metrics["loss"] is None or metrics[study.figure] is None:
            raise DivergedError("the held-out loss is not finite")
        for entry in metrics["history"]:  # a resumed trial that was already trained has reported nothing yet
            watch.report(entry, entry["step"], metrics["steps"])
        scores = {name: metrics[name] for name in dict.fromkeys((study.figure, "loss"))}
        for name, value in scores.items():
            trial.set_user_attr(name, value)
        score = "held-out " + ", ".join(f"{name} {show_figure(value, name)}" for name, value in scores.items())
        study.optuna_study.tell(trial, metrics[study.figure])
    except (optuna.TrialPruned, DivergedError) as end:
        if isinstance(end, DivergedError):
            score = "diverged"
            trial.set_user_attr(score, True)
        study.optuna_study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except StoppedError as stop:
        done = f"{len(study.finished())} of {limit} trials are done ({study.folder})"
        raise StoppedError(f"stopped as asked: {done}, the same command goes on", stop.exit_code - 128) from None
    finally:
        console.state.quiet = quiet
    with lock(study.folder, wait=True, tell=False):
        _clear(study)
    params = trial.user_attrs.get("default", trial.params)
    values = [f"{name} {show_value(value)}" for name, value in params.items()]
    kind = " (the defaults)" if "default" in trial.user_attrs else ""
    return f"trial {trial.number}{kind}: {', '.join([score, *values])}"


def _clear(study: SharedStudy) -> None:
    """Keep the weights of the best trial only: those of all would fill the disk."""
    trials = study.finished()
    best = best_of(trials)
    for trial in trials:
        folder = study.folder / trial["folder"]
        if trial is not best:
            _drop_weights(folder)
        if trial["loss"] is None:
            shutil.rmtree(folder / run_folder.CHECKPOINTS, ignore_errors=True)


def _drop_weights(folder: Path) -> None:
    """Delete the weights of a trial, once its card no longer says how to load them."""
    weights = [folder / name for name in owned(folder) if name.endswith(".safetensors")]
    if any(path.is_file() for path in weights) and (metrics := run_folder.read_metrics(folder)):
        _write_report(folder, metrics | {"has_weights": False})
    for path in weights:
        path.unlink(missing_ok=True)


def _write_report(folder: Path, metrics: dict[str, Any]) -> None:
    for name, content in make_files(metrics).items():
        write_bytes(folder / name, content if isinstance(content, bytes) else content.encode())
    write_text(folder / METRICS_FILE, json.dumps(metrics, indent=1))


def _finish(study: SharedStudy, options: TuneOptions) -> Search:
    """Write the table, the picture and the best recipe; copy the best run, if that was asked for."""
    folder, run = study.folder, None
    with lock(folder, wait=True):
        _clear(study)
        trials = study.finished()
        best = best_of(trials)
        if not best:
            raise HfkitError(f"no trial was finished ({folder}): a longer --timeout or --overwrite with other ranges")
        importances = _importances(study)
        scores = {"best": best["params"], "loss": best["loss"], "accuracy": best["accuracy"]}
        result = {**scores, "trials": trials, "importances": importances}
        known = json.loads((folder / SEARCH_FILE).read_text("utf-8"))
        write_text(folder / SEARCH_FILE, json.dumps(known | result, indent=1))
        write_bytes(folder / TRIALS_PICTURE, to_png(plot_trials(trials, importances)))
        recipe = (folder / best["folder"] / run_folder.RECIPE).read_text("utf-8")
        write_text(folder / BEST, recipe.replace(run_folder.RECIPE, BEST, 1))
        if options.train_best:
            run = _copy_run(folder / best["folder"], folder / BEST_RUN)
    return Search(output_dir=str(folder), **result, recipe=str(folder / BEST), run=run)


def _copy_run(trial: Path, target: Path) -> Run:
    """The run of a trial as a run of its own. Training it again would give the same, bit by bit."""
    facts = target / run_folder.FACTS
    is_there = facts.is_file() and facts.read_bytes() == (trial / run_folder.FACTS).read_bytes()
    if not (is_there and (target / METRICS_FILE).is_file()):
        staging = target.with_name(f".{target.name}")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(trial, staging)
        _write_report(staging, (run_folder.read_metrics(trial) or {}) | {"folder": str(target)})
        publish(staging, target)
    return Run(str(target), run_folder.read_metrics(target) or {})


def _importances(study: SharedStudy) -> dict[str, float]:
    """The share of the scores' variance that each option explains; empty where trials are few."""
    import optuna

    names = list(study.space)
    trials = study.optuna_study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if sum(set(names) <= set(trial.params) for trial in trials) < 4:
        return {}
    try:
        with console.quiet_libraries():
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)  # others need many more trials
            shares = optuna.importance.get_param_importances(study.optuna_study, evaluator=evaluator, params=names)
        return {name: float(share) for name, share in shares.items()}
    except (ValueError, RuntimeError, ImportError):  # all scores are alike, or scikit-learn is missing
        return {}
