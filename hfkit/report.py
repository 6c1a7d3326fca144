"""What a training run tells a person: what it is going to be, its model card, its loss as a picture."""

import math
from pathlib import Path
from typing import Any

from hfkit import console, processes
from hfkit.data import Report
from hfkit.pictures import draw_loss
from hfkit.planning import Plan


def corpus_lines(report: Report) -> list[str]:
    """What was found in a corpus, a line each."""
    what = "documents" if report.kind == "text" else "examples"
    lines = [
        f"{report.documents:,} {what}, {report.characters:,} characters, {report.tokens:,} tokens "
        f"({report.characters / max(1, report.tokens):.2f} characters a token)",
        "scripts: " + (", ".join(f"{name} {share:.1%}" for name, share in report.scripts.items()) or "no letters"),
    ]
    if report.duplicates:
        lines.append(f"{report.duplicates:,} {what} came before, to the letter: they count twice")
    if report.empty:
        lines.append(f"{report.empty:,} empty {what} are left out")
    if report.odd:
        odd = sorted(report.odd.items(), key=lambda item: -item[1])[:6]
        lines.append("odd characters: " + ", ".join(f"{name} {count:,} times" for name, count in odd))
    return lines


def plan_lines(plan: Plan) -> list[str]:
    """What a training will be and cost, a line each."""
    options = plan.options
    batch = f"{options.per_device_train_batch_size}"
    if options.gradient_accumulation_steps > 1:
        batch += f" × {options.gradient_accumulation_steps}"
    return [
        f"{plan.parameters:,} parameters, {plan.steps:,} steps of {batch} sequences, {plan.tokens:,} tokens, "
        f"{options.optim} at {options.learning_rate:g}",
        f"about {duration(plan.seconds)} and {plan.memory / 1e9:.1f} GB on this {plan.device.type}, "
        f"in {plan.precision}{', compiled' if plan.compile else ''}",
    ]


def duration(seconds: float) -> str:
    """A time as a person says it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, math.ceil(seconds))} seconds"


def describe_plan(report: Report | None, plan: Plan) -> None:
    """Say on stderr what is about to be trained."""
    if processes.rank:
        return
    for line in (corpus_lines(report) if report else []) + plan_lines(plan):
        console.note(line)
    for line in plan.why:
        console.detail(line)


def make_card(job: Any, metrics: dict[str, Any]) -> dict[str, str | bytes]:
    """README.md and loss.png of a finished run; `job` is what was trained."""
    return {"README.md": _card(job, metrics), "loss.png": draw_loss(metrics["history"])}


def _card(job: Any, metrics: dict[str, Any]) -> str:
    options, folder = job.plan.options, job.folder.name
    base = "" if job.command == "pretrain" else f"base_model: {metrics['model']}\n"
    library = "peft" if options.lora else "transformers"
    rows = [
        ("corpus", ", ".join(Path(source).name for source in metrics["corpus"])),
        ("tokens trained on", f"{metrics['tokens']:,} in {metrics['steps']:,} steps, {job.block_size} at a time"),
        ("optimizer", f"{options.optim}, peak {options.learning_rate:g}, {options.lr_scheduler_type}"),
        ("precision", f"{metrics['precision']} on {metrics['device']}, {duration(metrics['seconds'])}"),
        ("seed", str(metrics["seed"])),
    ]
    score = "Nothing was held out, so nothing was measured."
    if metrics["perplexity"] is not None:
        error = f" ± {metrics['perplexity'] * metrics['loss_stderr']:.2f}" if metrics["loss_stderr"] else ""
        score = (
            "| | before | after |\n|---|---|---|\n"
            f"| held-out perplexity | {_number(metrics['perplexity_before'])} | {metrics['perplexity']:.2f}{error} |"
            "\n\n![loss](loss.png)"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    what = "trained from nothing" if job.command == "pretrain" else f"{metrics['model']}, trained further"
    return f"""---
library_name: {library}
pipeline_tag: text-generation
{base}---

# {folder}

{what.capitalize()} with [hfkit](https://pypi.org/project/hfkit/) on the corpus below. The exact options are in
`recipe.yaml`.

| | |
|---|---|
{table}

{score}

## Use

    hfkit generate -m {job.folder} "{(metrics["history"] and job.material.prompt) or "Once"}"

## Limits

It has learned from this corpus alone what it did not know before: it repeats the corpus' errors and opinions, may give
parts of it back word for word, and states what is not true.
"""


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
