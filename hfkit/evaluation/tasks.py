"""How well a model does a task: its answers or labels against the right ones, beside baselines that know nothing."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from hfkit.console import progress
from hfkit.corpus.documents import Corpora, find_corpus, read_table
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.corpus.rows import Row
from hfkit.corpus.templates import Task, make_task, task_of
from hfkit.errors import HfkitError
from hfkit.evaluation.metrics import load_metric
from hfkit.inference.answering import find_answers
from hfkit.inference.classification import calibration_error, classify_each, label_names
from hfkit.inference.generation import generate_each
from hfkit.inference.likelihood import jsonable
from hfkit.models.architecture import head_of
from hfkit.models.loading import LanguageModel
from hfkit.options import CorpusOptions, GenerateOptions, TaskOptions

_PAIRS = Task("{prompt}{completion}")  # rows that have no template
_NOTHING = "there is nothing to score: the corpus holds no rows"


@dataclass(frozen=True)
class Assessment:
    """Scores of a model at a task."""

    model: str
    examples: int
    metrics: dict[str, Any]  # figures, their standard errors beside them
    baselines: dict[str, dict[str, float]]  # what one gets without a model

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        figures = {**self.metrics, "baselines": self.baselines}
        return jsonable({"model": self.model, "examples": self.examples, **figures})


def find_task(lm: LanguageModel, corpus: Corpora, options: CorpusOptions) -> Task | None:
    """The task that the rows of `corpus` are for; None if they are a text to be predicted."""
    found = find_corpus(corpus)
    if "text" in found.kinds and not options.metric and not options.template:  # those are for rows: say so below
        return None
    task = make_task(options) or task_of(lm.tokenizer)
    row, _ = next(read_table(found, options), ({}, ""))
    if task and {*task.inputs, task.answer} <= set(row):
        return replace(task, metric=tuple(options.metric or task.metric), labels=tuple(options.labels or task.labels))
    if options.metric and {"prompt", "completion"} <= set(row):
        return replace(_PAIRS, metric=tuple(options.metric))
    if options.template or options.metric:
        wanted = "the template's columns" if options.template else "prompt and completion, which a metric compares,"
        raise HfkitError(f"{wanted} are not there: the rows have {', '.join(map(repr, row))}")
    return None


def assess(lm: LanguageModel, corpus: Corpora, options: CorpusOptions, task: Task | None) -> Assessment:
    """Let a model answer every row of `corpus`, and score that.

    Args:
        task: of a model that writes text; a head is its own task.

    Raises:
        HfkitError: the rows are not as the task wants them.
    """
    head = head_of(lm.model.config)
    if head == "question-answering":
        rows = question_rows(corpus, options)
        found = find_answers(lm, [(row.question, row.context) for row in rows], 0.0)
        guesses = [one.answer for one in _watched(found, len(rows))]
        return _score(lm, guesses, [row.answers or [""] for row in rows], options.metric or ("squad",), {})
    if head == "classification":
        pairs = classification_rows(corpus, options)
        _check_labels({label for _, label in pairs}, label_names(lm.model))
        texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
        return _label(lm, texts, labels, TaskOptions(), options.metric or ())
    assert task is not None  # noqa: S101, the caller has found it
    table = [(row, where) for row, where in read_table(find_corpus(corpus), options)]
    right = [task.example(row, where) and str(row[task.answer]).strip() for row, where in table]
    if task.labels:
        asked = TaskOptions(template=task.template, labels=list(task.labels))
        return _label(lm, [row for row, _ in table], right, asked, task.metric)
    guesses = list(_watched(_write(lm, table, task), len(table)))
    copied = {"copying": [str(row[task.inputs[-1]]).strip() for row, _ in table]} if len(task.inputs) == 1 else {}
    return _score(lm, guesses, right, task.metric or ("squad",), copied)


def _check_labels(found: set[str], known: Sequence[str]) -> None:
    if unknown := found - set(known):
        raise HfkitError(f"label {sorted(unknown)[0]!r} is none of the model's: {', '.join(known)}")


def _watched(found: Iterable[Any], rows: int) -> Iterator[Any]:
    """What is found, with a bar that shows how much of it is."""
    with progress(rows, "row", "evaluating") as bar:
        for one in found:
            yield one
            bar.update()


def _write(lm: LanguageModel, table: Sequence[Row], task: Task) -> Iterator[str]:
    """The likeliest answer of each row."""
    options = GenerateOptions(temperature=0, stop_strings=[task.end], raw=True)
    prompts = enumerate(task.prompt(row, where) for row, where in table)
    for number, found in generate_each(prompts, model=lm, options=options):
        if isinstance(found, HfkitError):
            raise type(found)(f"{table[number][1]}: {found}") from found
        yield found[0].completion.strip()


def _label(
    lm: LanguageModel, texts: Sequence[Any], right: Sequence[str], options: TaskOptions, metric: Sequence[str]
) -> Assessment:
    if not texts:
        raise HfkitError(_NOTHING)
    found = []
    for one in _watched(classify_each(texts, lm, options), len(texts)):
        if isinstance(one, HfkitError):
            raise type(one)(f"row {len(found) + 1}: {one}") from one
        found.append(one)
    # The F1 of labels is not that of the words in them.
    names = ["classification" if name == "f1" else name for name in metric or ("accuracy",)]
    result = _score(lm, [one.label for one in found], right, names, {})
    claimed = [one.probabilities[one.label] for one in found]
    hits = [one.label == label for one, label in zip(found, right, strict=True)]
    nll = [-np.log(max(one.probabilities.get(label, 0.0), 1e-300)) for one, label in zip(found, right, strict=True)]
    error = float(np.std(nll, ddof=1) / np.sqrt(len(nll))) if len(nll) > 1 else math.nan
    figures = {
        "loss": float(np.mean(nll)),
        "loss_stderr": error,
        "calibration_error": calibration_error(claimed, hits),
    }
    return replace(result, metrics={**result.metrics, **figures})


def _score(
    lm: LanguageModel, guesses: Sequence[str], right: Sequence[Any], names: Sequence[str], others: dict[str, list[str]]
) -> Assessment:
    """Metrics of the guesses, and of guessing the most frequent answer and whatever `others` guess."""
    if not right:
        raise HfkitError(_NOTHING)
    singles = [one if isinstance(one, str) else one[0] for one in right]
    others = {"most frequent answer": [Counter(singles).most_common(1)[0][0]] * len(right), **others}

    def compute(predictions: Sequence[str]) -> dict[str, Any]:
        metrics = {type(metric): metric for metric in map(load_metric, names)}
        results = [
            metric.compute(predictions=list(predictions), references=list(right)) for metric in metrics.values()
        ]
        return dict(chain.from_iterable(result.items() for result in results))

    baselines = {
        name: {key: value for key, value in compute(predictions).items() if isinstance(value, float)}
        for name, predictions in others.items()
    }
    return Assessment(lm.name, len(right), compute(guesses), baselines)
