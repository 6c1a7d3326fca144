"""`hfkit evaluate` at a shell: one model's scores, or several models in one table."""

from dataclasses import fields
from json import dumps

from hfkit import console
from hfkit.assessment import Assessment
from hfkit.corpora import find_corpus
from hfkit.evaluation import Evaluation, evaluate
from hfkit.options import CorpusOptions, EvaluateOptions, ManyModelsOptions, ModelOptions
from hfkit.sources import find


def write(
    corpus: list[str], models: ManyModelsOptions, read: CorpusOptions, options: EvaluateOptions, *, json: bool
) -> None:
    """Evaluate every model on the corpus and print what came of it."""
    given = {f.name: getattr(models, f.name) for f in fields(ModelOptions)}
    chosen = [ModelOptions(**given | {"model": name}) for name in models.model or [None]]
    find_corpus(corpus)
    for one in chosen:
        find(one)  # a name that is wrong is told before the first model is asked
    found = [evaluate(corpus, model=one, read=read, options=options) for one in chosen]
    if json:
        rows = [one.to_dict() for one in found]
        console.write(dumps(rows if models.model and len(rows) > 1 else rows[0]) + "\n")
    elif any(isinstance(one, Assessment) for one in found):
        _write_assessments([one for one in found if isinstance(one, Assessment)])
    elif len(found) == 1:
        console.write("".join(f"{name:<16} {value}\n" for name, value in _readable(found[0]).items()))
    else:
        _write_table(found)


def _readable(one: Evaluation) -> dict[str, str]:
    return {
        "model": one.model,
        "perplexity": f"{one.perplexity:.3f} ± {one.perplexity_stderr:.3f}",
        "loss": f"{one.loss:.4f} ± {one.loss_stderr:.4f} nats a token",
        "bits per byte": f"{one.bits_per_byte:.4f} ± {one.bits_per_byte_stderr:.4f}",
        "token accuracy": f"{one.token_accuracy:.2%} (among the five likeliest: {one.top5_accuracy:.2%})",
        "corpus": f"{one.documents:,} documents, {one.tokens:,} tokens, {one.words:,} words, {one.bytes:,} bytes",
        "how": f"windows of {one.window:,} tokens, {one.stride:,} new in each, in {one.dtype}",
    }


def _write_table(found: list[Evaluation]) -> None:
    from rich.table import Table

    names = ("model", "perplexity", "bits per byte", "top 1", "top 5", f"bits saved over {found[0].model}")
    table = Table(*(console.printable(name) for name in names))
    for one in found:
        table.add_row(
            console.printable(one.model),
            f"{one.perplexity:.2f} ± {one.perplexity_stderr:.2f}",
            f"{one.bits_per_byte:.4f} ± {one.bits_per_byte_stderr:.4f}",
            f"{one.token_accuracy:.1%}",
            f"{one.top5_accuracy:.1%}",
            "" if one is found[0] else _difference(one, found[0]),
        )
    console.write_table(table)


def _difference(one: Evaluation, base: Evaluation) -> str:
    gain, error = one.gain_over(base)
    sure = "beyond the error" if abs(gain) > 2 * error else "within the error"
    return f"{gain:+.4f} ± {error:.4f}, {sure}"


def _write_assessments(found: list[Assessment]) -> None:
    """A row for each model and for each baseline, a column for each figure."""
    from rich.table import Table

    names = [name for name, value in found[0].metrics.items() if isinstance(value, float) and "stderr" not in name]
    rows = [(one.model, one.metrics) for one in found]
    rows += [(f"({name})", figures) for name, figures in found[0].baselines.items()]
    table = Table(f"{found[0].examples:,} examples", *names)
    for label, figures in rows:
        cells = (_with_error(figures.get(name), figures.get(f"{name}_stderr")) for name in names)
        table.add_row(console.printable(label), *cells)
    console.write_table(table)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
