"""What a training run tells a person before it begins: what is in the corpus, and what is going to be done."""

from hfkit import console, processes
from hfkit.console import duration
from hfkit.corpus.cache import Report, corpus_lines
from hfkit.planning import Plan


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


def describe_plan(report: Report | None, plan: Plan) -> None:
    """Say on stderr what is about to be trained."""
    if processes.rank:
        return
    for line in (corpus_lines(report) if report else []) + plan_lines(plan):
        console.note(line)
    for line in plan.why:
        console.detail(line)
