"""A run from beginning to end: its job is trained, its result is written down."""

import contextlib
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerState

from hfkit import console, processes
from hfkit.corpus.files import Corpus
from hfkit.corpus.overlap import MOST, WORDS, index_corpus
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError, StoppedError, first_line
from hfkit.inference.generation import generate
from hfkit.inference.scores import jsonable
from hfkit.reporting.pages import PAGE, make_files
from hfkit.reporting.summaries import summarize
from hfkit.training import run_folder
from hfkit.training.checkpoints import Stop, find_newest, step_of
from hfkit.training.loop import fit, is_done
from hfkit.training.monitor import best_step, evaluations, seconds_of
from hfkit.training.plan import Job, Plan

_SAMPLES, _TOKENS = 4, 80
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    output_dir: str  # a model as transformers saves it
    metrics: dict[str, Any]  # metrics.json

    @property
    def perplexity(self) -> float | None:
        """Of the held-out part, for the model that was kept; None if nothing was held out."""
        return self.metrics.get("perplexity")


def run_job(job: Job, command: str, callbacks: Sequence[TrainerCallback], *, dry_run: bool) -> Run | None:
    """Say what a job is and, unless it is a dry run, do it: train, and leave the best state in the job's folder.

    command: what a person types for this run.

    Raises:
        StoppedError: the run was stopped; what it had done is saved.
    """
    job.plan.describe(job.dataset.report)
    return None if dry_run else _execute(replace(job, callbacks=callbacks, facts=job.facts | {"command": command}))


def _execute(job: Job) -> Run:
    if processes.rank == 0:
        if run_folder.is_begun(job.folder) and not job.plan.options.overwrite:
            run_folder.check_same_settings(job.folder, job.command, job.recipe, job.facts)
        else:
            run_folder.begin(job.folder, job.command, job.recipe, job.facts, job.keep)
    processes.gather([])
    if metrics := run_folder.read_metrics(job.folder):
        console.note(f"{job.folder} is finished: there is nothing to resume")
        run_folder.clear(job.folder)
        return Run(str(job.folder), metrics)
    with Stop() as stop:
        state = fit(job, stop)
        if state is None or (stop.asked() and not is_done(state, job.plan)):
            newest = find_newest(job.checkpoints) if processes.rank == 0 else None
            saved = f"step {step_of(newest)} of {job.plan.steps} is saved" if newest else "nothing was saved yet"
            raise StoppedError(
                f"stopped as asked: {saved} ({job.folder}), --resume goes on", stop.signal or signal.SIGTERM
            )
    return _finish(job, state)


def _finish(job: Job, state: TrainerState) -> Run:
    """Put the best state, its scores and its card into the run's folder."""
    best = best_step(state.log_history) if job.plan.options.load_best_model_at_end else None
    metrics = None
    if processes.rank == 0:
        console.note("writing samples and the report")
        if not (kept := find_newest(job.checkpoints, best)):
            raise HfkitError("a callback stopped the training before anything was saved: lower --save-steps")
        metrics = make_metrics(job, state, kept)
        pages = _optional("the card", lambda: make_files(metrics)) or {}
        run_folder.finish(job.folder, kept, pages, metrics)
        for line in _optional("the last lines", lambda: outcome_lines(metrics, job)) or []:
            console.note(line)
    return Run(str(job.folder), processes.gather([metrics])[0])


def _optional(what: str, make: Callable[[], T]) -> T | None:
    """The result of `make`, or a note: what only decorates a report must not cost a trained model."""
    try:
        return make()
    except Exception as error:  # a corpus that was moved meanwhile, a sign that no font has ...
        console.note(f"{what} will be missing from the report: {first_line(error)}")
        return None


def make_metrics(job: Job, state: TrainerState, kept: Path) -> dict[str, Any]:
    """Everything that is known of a finished run whose checkpoint `kept` is its result."""
    plan = job.plan
    # Trainer's last entry, its mean loss and its speed, counts only the steps since the last resume.
    entries = [entry for entry in state.log_history if "train_runtime" not in entry]
    # Without infinities, which the gradient of a step that float16 skips may be, and which JSON does not have.
    history = [jsonable({k: v for k, v in entry.items() if k != "units"}) for entry in entries]
    facts = json.loads((job.folder / run_folder.FACTS).read_text("utf-8"))
    task = task_of(job.tokenizer)
    seconds = seconds_of(history)
    tokens = int(plan.tokens * state.global_step / plan.steps)
    samples = _optional("samples", lambda: _draw_samples(job, kept)) or []
    copied = _optional("the share that is copied", lambda: _find_copied(job, samples)) if not task else None
    return {
        "model": job.name,
        "folder": str(job.folder),
        "from_nothing": job.command == "pretrain",
        "library": "peft" if plan.options.lora else "transformers",
        "head": job.dataset.head,
        "task": asdict(task) if task else None,
        "corpus": job.recipe["corpus"],
        "corpus_kind": job.dataset.report.kind if job.dataset.report else None,
        "step": step_of(kept),
        "steps": state.global_step,
        **_held_out_scores(history, step_of(kept), job.dataset.head),
        "parameters": plan.parameters,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "optim": plan.options.optim,
        "learning_rate": plan.options.learning_rate,
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else plan.device.type,
        "precision": plan.precision,
        "compiled": plan.compile,
        "seed": plan.options.seed,
        "versions": facts["versions"],
        "command": facts["command"],
        "prompt": job.prompt,
        "samples": samples,
        "copied": copied,
        "history": history,
    }


def _held_out_scores(history: list[dict[str, Any]], step: int, head: str | None) -> dict[str, Any]:
    """Held-out scores at `step` and before the training, and the gain with its error.

    Accuracies for a head and where a task has labels, beside the accuracy of always giving the most frequent answer.
    """
    scores = {entry["step"]: entry for entry in evaluations(history)}
    before, after = scores.get(0, {}), scores.get(step, {})
    figures = {name: after.get(f"eval_{name}") for name in ("loss_stderr", "loss_gain", "loss_gain_stderr")}
    has_accuracy = head or "eval_accuracy" in after
    for name in ("loss", *(["accuracy"] if has_accuracy else []), *([] if head else ["token_accuracy", "perplexity"])):
        figures |= {f"{name}_before": before.get(f"eval_{name}"), name: after.get(f"eval_{name}")}
    if has_accuracy:
        figures["baseline"] = next((entry["baseline"] for entry in history if "baseline" in entry), None)
    return figures


def outcome_lines(metrics: dict[str, Any], job: Job) -> list[str]:
    """What the run gained, what would bring more, where its report is, and the command to type next."""
    summary, page, baseline = summarize(metrics), job.folder / PAGE, metrics.get("baseline")
    gained, advice = summary.headline[:1].lower() + summary.headline[1:], advise(metrics, job.plan)
    if metrics["loss"] is None:
        gained += ": nothing was held out"
    elif baseline:
        always = f"always answering {baseline['label']!r}"
        gained += f"; {always}: {baseline['accuracy']:.1%}"
        if (metrics["accuracy"] or 0.0) <= baseline["accuracy"]:
            advice = [f"it is not better than {always}: more rows or more epochs may help"]
    elif not metrics["head"]:
        gained += f" (in blocks of {job.block_size} tokens, as it was trained)"
    report = [f"report: {page}"] if page.is_file() else []
    return [gained, *advice, *report, f"next: {summary.command}"]


def advise(metrics: dict[str, Any], plan: Plan) -> list[str]:
    """What the held-out losses say about training longer."""
    trained = [entry for entry in evaluations(metrics["history"]) if entry["step"]]
    before, kept = metrics["loss_before"], metrics["step"]
    if not trained or before is None:
        return []
    if min(entry["eval_loss"] for entry in trained) >= before:
        rate = f"--learning-rate (it was {plan.options.learning_rate:g})"
        return [f"it only got worse: the held-out loss rose from {before:.3f}; lower {rate}, or give more text"]
    if len(trained) == 1:
        return []
    if kept < trained[-1]["step"]:
        return [f"it was best at step {kept} of {metrics['steps']}: more text would bring more, more epochs would not"]
    if kept == plan.steps and trained[-1]["eval_loss"] < trained[-2]["eval_loss"]:
        return ["the held-out loss was still falling: more epochs (--num-train-epochs) would bring more"]
    return []


def _draw_samples(job: Job, kept: Path) -> list[str]:
    """Samples of the result that continue the run's prompt; none for a head, or where the prompt does not fit."""
    if not job.prompt:
        return []
    with contextlib.suppress(HfkitError):
        samples = generate(
            job.prompt,
            model=str(kept),
            seed=job.plan.options.seed,
            num_return_sequences=_SAMPLES,
            temperature=1.0,
            max_new_tokens=min(_TOKENS, max(1, job.block_size // 2)),
            raw=True,
        )
        return [job.prompt + sample.completion for sample in samples]
    return []


def _find_copied(job: Job, samples: list[str]) -> dict[str, Any] | None:
    """How much of the samples, without their prompt, stands in the corpus."""
    if not samples or job.data.streaming or not isinstance(job.files, Corpus):  # there is no text to search
        return None
    index = index_corpus(job.files, job.data)
    copies = [index.look_up(sample.removeprefix(job.prompt or "")) for sample in samples]
    longest = max(copies, key=lambda copy: copy.words)
    return {
        "longest": longest.longest,
        "words": longest.words,
        "share": sum(copy.share for copy in copies) / len(copies),
        "is_whole": index.is_whole,
        "run": WORDS,
        "limit": MOST,
    }
