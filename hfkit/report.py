"""What a training run tells a person before it begins: what is in the corpus, and what is going to be done."""

from hfkit import console, processes
from hfkit.console import duration
from hfkit.data import Report
from hfkit.planning import Plan


def corpus_lines(report: Report) -> list[str]:
    """What was found in a corpus, a line each."""
    what = "documents" if report.kind == "text" else "examples"
    lines = [
        f"{report.documents:,} {what}, {report.characters:,} characters, {report.tokens:,} tokens "
        f"({report.characters / max(1, report.tokens):.2f} characters a token)",
    ]
    if report.kind in ("text", "completion", "messages"):  # the rows of a head are not looked at so closely
        shares = ", ".join(f"{name} {share:.1%}" for name, share in report.scripts.items())
        lines.append(f"scripts: {shares or 'no letters'}")
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


def describe_plan(report: Report | None, plan: Plan) -> None:
    """Say on stderr what is about to be trained."""
    if processes.rank:
        return
    for line in (corpus_lines(report) if report else []) + plan_lines(plan):
        console.note(line)
    for line in plan.why:
        console.detail(line)
