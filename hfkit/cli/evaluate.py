"""`hfkit evaluate` at a shell: one model's scores, or several models in one table."""

from __future__ import annotations

from dataclasses import fields
from json import dumps
from math import isfinite
from typing import TYPE_CHECKING

from hfkit import console
from hfkit.cli.flags import CorpusArgument, Json, flags
from hfkit.corpus.documents import find_corpus
from hfkit.models.sources import find_model
from hfkit.options import CorpusOptions, EvaluateOptions, ManyModelsOptions, ModelOptions

if TYPE_CHECKING:
    from hfkit.evaluation.perplexity import Evaluation
    from hfkit.evaluation.tasks import Assessment


@flags
def evaluate(
    corpus: CorpusArgument, model: ManyModelsOptions, read: CorpusOptions, options: EvaluateOptions, json: Json = False
) -> None:
    """Measure how well models predict a corpus: perplexity, bits per byte, accuracy, each with its error."""
    find_corpus(corpus)  # report a wrong path before torch is imported
    write_evaluation(corpus, model, read, options, json=json)


def write_evaluation(
    corpus: list[str], models: ManyModelsOptions, read: CorpusOptions, options: EvaluateOptions, *, json: bool
) -> None:
    """Evaluate every model on the corpus and print what came of it."""
    from hfkit.evaluation.perplexity import Evaluation, evaluate
    from hfkit.evaluation.tasks import Assessment

    given = {f.name: getattr(models, f.name) for f in fields(ModelOptions)}
    chosen = [ModelOptions(**given | {"model": name}) for name in models.model or [None]]
    find_corpus(corpus)
    for one in chosen:
        find_model(one)  # a name that is wrong is told before the first model is asked
    found = [evaluate(corpus, model=one, read=read, options=options) for one in chosen]
    if json:
        rows = [one.to_dict() for one in found]
        console.write(dumps(rows if len(rows) > 1 else rows[0], ensure_ascii=False) + "\n")
        return
    texts = [one for one in found if isinstance(one, Evaluation)]
    if len(texts) == 1:
        console.write("".join(f"{name:<16} {value}\n" for name, value in _readable(texts[0]).items()))
    elif texts:
        _write_table(texts)
    if tasks := [one for one in found if isinstance(one, Assessment)]:
        _write_assessments(tasks)


def _with_error(value: float, error: float | None, form: str) -> str:
    """A figure and its error in this format; one that is not known is left out."""
    known = error is not None and isfinite(error)
    return f"{value:{form}} ± {error:{form}}" if known else f"{value:{form}}"


def _readable(one: Evaluation) -> dict[str, str]:
    return {
        "model": one.model,
        "perplexity": _with_error(one.perplexity, one.perplexity_stderr, ".3f"),
        "loss": _with_error(one.loss, one.loss_stderr, ".4f") + " nats a token",
        "bits per byte": _with_error(one.bits_per_byte, one.bits_per_byte_stderr, ".4f"),
        "token accuracy": f"{one.token_accuracy:.2%} (among the five likeliest: {one.top5_accuracy:.2%})",
        "corpus": f"{one.documents:,} documents, {one.tokens:,} tokens, {one.words:,} words, {one.bytes:,} bytes",
        "how": f"windows of {one.window:,} tokens, {one.stride:,} new in each, in {one.dtype}",
    }


def _write_table(found: list[Evaluation]) -> None:
    names = ("model", "perplexity", "bits per byte", "top 1", "top 5", "dtype", f"bits saved over {found[0].model}")
    rows = [
        (
            one.model,
            _with_error(one.perplexity, one.perplexity_stderr, ".2f"),
            _with_error(one.bits_per_byte, one.bits_per_byte_stderr, ".4f"),
            f"{one.token_accuracy:.1%}",
            f"{one.top5_accuracy:.1%}",
            one.dtype,
            _difference(one, found[0]) if one is not found[0] else "",
        )
        for one in found
    ]
    console.write_table(names, rows)


def _difference(one: Evaluation, base: Evaluation) -> str:
    gain, error = one.gain_over(base)
    sure = "beyond the error" if abs(gain) > 2 * error else "within the error"
    return _with_error(gain, error, "+.4f").replace("± +", "± ") + (f", {sure}" if isfinite(error) else "")


def _write_assessments(found: list[Assessment]) -> None:
    """A row for each model and for each baseline, a column for each figure."""
    names = [name for name, value in found[0].metrics.items() if isinstance(value, float) and "stderr" not in name]
    rows = [(one.model, one.metrics) for one in found]
    rows += [(f"({name})", figures) for name, figures in found[0].baselines.items()]
    cells = [
        (
            label,
            *(
                _with_error(v, figures.get(f"{name}_stderr"), ".3g") if (v := figures.get(name)) is not None else ""
                for name in names
            ),
        )
        for label, figures in rows
    ]
    console.write_table((f"{found[0].examples:,} examples", *names), cells)
