"""`hfkit evaluate` at a shell: one model's scores, or several models in one table, and what they say in a sentence."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from hfkit import console
from hfkit.cli.flags import CORPUS, JSON, flags
from hfkit.console import with_error
from hfkit.corpus.files import find_corpus
from hfkit.models.sources import find_model
from hfkit.options import CorpusOptions, EvaluateOptions, ModelsOptions, ServerOptions

if TYPE_CHECKING:
    from hfkit.evaluation.figures import Evaluation
    from hfkit.evaluation.tasks import Assessment

_MAX_LABELS = 10  # a confusion table of more is in --json only


@flags
def evaluate(
    model: ModelsOptions,
    server: ServerOptions,
    read: CorpusOptions,
    options: EvaluateOptions,
    corpus: list[str] = CORPUS,
    json: bool = JSON,
) -> None:
    """Measure how well models predict a corpus.

    It prints perplexity, bits per byte and accuracy, each with its error; for a corpus with labels or answers, how
    many are right.

    Examples:
        hfkit evaluate held-out.txt
        hfkit evaluate held-out.txt -m bundled -m runs/corpus
    """
    sources = find_corpus(corpus, read)
    results: list[Evaluation | Assessment]
    if server.server:
        from hfkit.evaluation.remote import evaluate_on
        from hfkit.inference.remote import Server

        results = [evaluate_on(Server(server, choice), sources, read, options) for choice in model.each()]
    else:
        for choice in model.each():
            find_model(choice)  # a wrong name is an error before torch is imported
        from hfkit.evaluation import perplexity

        results = [perplexity.evaluate(sources, model=choice, read=read, options=options) for choice in model.each()]
    if json:
        rows = [result.to_dict() for result in results]
        console.write_json(rows if len(rows) > 1 else rows[0])
        return
    from hfkit.evaluation.figures import Evaluation

    if evaluations := [result for result in results if isinstance(result, Evaluation)]:
        _write_evaluations(evaluations)
    if assessments := [result for result in results if not isinstance(result, Evaluation)]:
        _write_assessments(assessments)


def _write_evaluations(evaluations: list[Evaluation]) -> None:
    first, *others = evaluations
    if others:
        head = ("model", "perplexity", "bits per byte", "top 1", "top 5", "dtype", f"bits saved over {first.model}")
        console.write_table(head, [_row(evaluation, first) for evaluation in evaluations], wraps=False)
        console.write(_compare(evaluations) + "\n")
    else:
        console.write("".join(f"{name:<16} {value}\n" for name, value in first.describe().items()))
        console.write(first.verdict() + "\n")
    if not isfinite(first.loss_stderr):
        console.write("No ± is shown: the corpus is a single passage, and a spread takes two documents or more.\n")


def _row(evaluation: Evaluation, first: Evaluation) -> tuple[str, ...]:
    return (
        evaluation.model,
        with_error(evaluation.perplexity, evaluation.perplexity_stderr, ".2f"),
        with_error(evaluation.bits_per_byte, evaluation.bits_per_byte_stderr, ".4f"),
        f"{evaluation.token_accuracy:.1%}",
        f"{evaluation.top5_accuracy:.1%}",
        evaluation.dtype,
        _gain(evaluation, first) if evaluation is not first else "",
    )


def _gain(evaluation: Evaluation, other: Evaluation) -> str:
    gain, error = evaluation.gain_over(other)
    verdict = "beyond the error" if abs(gain) > 2 * error else "within the error"
    return with_error(gain, error, "+.4f") + (f", {verdict}" if isfinite(error) else "")


def _compare(evaluations: list[Evaluation]) -> str:
    """Which model predicts best, compared with the second best."""
    best, second, *_ = sorted(evaluations, key=lambda evaluation: evaluation.bits_per_byte)
    gain, error = best.gain_over(second)
    if isfinite(error) and gain <= 2 * error:
        return f"{best.model} and {second.model} predict the corpus equally well, as far as this corpus can tell."
    by = with_error(gain, error, ".4f")
    return f"{best.model} predicts the corpus best: {by} bits per byte fewer than {second.model}."


def _write_assessments(assessments: list[Assessment]) -> None:
    """A row for each model and each baseline, a column for each figure; then which answers were taken for which."""
    from hfkit.evaluation.tasks import table

    console.write_table(*table(assessments), wraps=False)
    for assessment in assessments:
        confusion = assessment.metrics.get("confusion")
        if confusion and len(confusion["labels"]) <= _MAX_LABELS:
            counts = [
                (label, *(f"{count:,}" for count in row))
                for label, row in zip(confusion["labels"], confusion["matrix"], strict=True)
            ]
            head = ("right ↓  answered →", *confusion["labels"])
            title = assessment.model if len(assessments) > 1 else None
            console.write_table(head, counts, wraps=False, title=title)
        console.write(assessment.verdict() + "\n")
