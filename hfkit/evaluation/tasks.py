"""How well a model does a task: its answers or labels against the right ones, beside baselines that know nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np

from hfkit.console import counted, progress, with_error
from hfkit.corpus.documents import read_table
from hfkit.corpus.files import Corpus
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.corpus.rows import Row, column_names
from hfkit.corpus.templates import Task, make_task, task_of
from hfkit.errors import HfkitError
from hfkit.evaluation.metrics import METRICS, find_metric, mean_figures
from hfkit.inference.answering import find_answers
from hfkit.inference.classification import calibration_error, classify_each, label_names
from hfkit.inference.generation import generate_each
from hfkit.inference.results import Classification
from hfkit.inference.scores import jsonable
from hfkit.models.architecture import head_of
from hfkit.models.loading import LanguageModel
from hfkit.options import CorpusOptions, GenerateOptions, TaskOptions
from hfkit.reporting.templates import render

T = TypeVar("T")
_PAIRS = Task("{prompt}{completion}")  # for rows without a template


@dataclass(frozen=True, repr=False)
class Assessment:
    """How well a model did a task."""

    model: str
    examples: int
    metrics: dict[str, Any]  # figures by name, with their standard errors
    baselines: dict[str, dict[str, float]]  # the same figures of guesses that need no model

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {self.format(name)}" for name in self.names)
        return f"{self.model}: {figures} ({counted(self.examples, 'example')})"

    __repr__ = __str__

    @property
    def names(self) -> list[str]:
        """The figures that are single numbers, without their errors."""
        return [name for name, value in self.metrics.items() if isinstance(value, float) and "stderr" not in name]

    def format(self, name: str, baseline: str | None = None) -> str:
        """A figure of the model, or of a baseline, with its error; empty where there is none."""
        figures = self.baselines[baseline] if baseline else self.metrics
        return with_error(figures[name], figures.get(f"{name}_stderr"), ".3g") if name in figures else ""

    def verdict(self) -> str:
        """The first figure against the best baseline's, as a sentence."""
        name = self.names[0]
        rivals = {baseline: figures[name] for baseline, figures in self.baselines.items() if name in figures}
        if name not in METRICS or not rivals:  # of a metric from the Hub, less may be better
            return f"{self.model} has {name} {self.format(name)}."
        rival = max(rivals, key=rivals.__getitem__)
        gain, error = self.metrics[name] - rivals[rival], self.metrics.get(f"{name}_stderr", 0.0)
        better = "better" if gain > 2 * error else "no better"
        return f"{self.model} is {better} than the baseline ({rival}): {name} {self.format(name)} against " + (
            f"{rivals[rival]:.3g}."
        )

    def _repr_html_(self) -> str:
        head, rows = table([self])
        return render("figures.html.jinja", head=head, rows=rows, sentence=self.verdict())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        values = {"model": self.model, "examples": self.examples, **self.metrics, "baselines": self.baselines}
        return cast(dict[str, Any], jsonable(values))


def table(assessments: Sequence[Assessment]) -> tuple[list[str], list[list[str]]]:
    """A head, and a row for each model and for each baseline, with a column for each figure."""
    first = assessments[0]
    rows = [[each.model, *(each.format(name) for name in first.names)] for each in assessments]
    rows += [[f"({name})", *(first.format(figure, name) for figure in first.names)] for name in first.baselines]
    return [counted(first.examples, "example"), *first.names], rows


def find_task(lm: LanguageModel, corpus: Corpus, options: CorpusOptions) -> Task | None:
    """The task that the rows of `corpus` are for; None if they are a text to predict.

    Raises:
        HfkitError: a template or a metric was given, and the rows lack the columns that it needs.
    """
    if corpus.has_texts and not options.metric and not options.template:
        return None
    task = make_task(options) or task_of(lm.tokenizer)
    columns = task.columns if task else _PAIRS.columns if options.metric else []
    row, _ = next(read_table(corpus, options, columns), ({}, ""))
    if task and row.keys() >= {*task.columns}:
        return replace(task, metric=tuple(options.metric or task.metric), labels=tuple(options.labels or task.labels))
    if options.metric and row.keys() >= {*_PAIRS.columns}:
        return replace(_PAIRS, metric=tuple(options.metric))
    if options.template or options.metric:
        wanted = "the template's columns" if options.template else "prompt and completion, which a metric compares,"
        raise HfkitError(f"{wanted} are not there: the rows have {column_names(row)}")
    return None


def assess(lm: LanguageModel, corpus: Corpus, options: CorpusOptions, task: Task | None) -> Assessment:
    """Let a model answer or label every row of `corpus`, and score that.

    Args:
        task: required for a model that writes text; a model with another head has its own task.

    Raises:
        HfkitError: a row lacks what the task needs, or there are no rows.
    """
    head, metrics = head_of(lm.model.config), options.metric or ()
    if head == "question-answering":
        questions = question_rows(corpus, options)
        answers = find_answers(lm, [(row.question, row.context) for row in questions], 0.0)
        guesses = [answer.answer for answer in _with_progress(answers, len(questions))]
        return _measure(lm, guesses, [row.answers or [""] for row in questions], metrics or ("squad",))
    if head == "classification":
        pairs = classification_rows(corpus, options)
        known = label_names(lm.model)
        if unknown := {label for _, label in pairs} - set(known):
            raise HfkitError(f"label {sorted(unknown)[0]!r} is not one of the model's: {', '.join(known)}")
        texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
        return _measure_labels(lm, texts, labels, TaskOptions(), metrics)
    assert task is not None  # noqa: S101, a model that writes text comes here with a task only
    rows = list(read_table(corpus, options, task.columns))
    for row, where in rows:
        task.example(row, where)  # raises where a field is missing
    right = [str(row[task.answer]).strip() for row, _ in rows]
    if task.labels:
        labelling = TaskOptions(template=task.template, labels=list(task.labels))
        return _measure_labels(lm, [row for row, _ in rows], right, labelling, task.metric)
    guesses = list(_with_progress(_write_answers(lm, rows, task), len(rows)))
    baselines = {}
    if len(task.inputs) == 1:  # of several inputs there is none to copy
        baselines["copying"] = [str(row[task.inputs[0]]).strip() for row, _ in rows]
    return _measure(lm, guesses, right, task.metric or ("squad",), baselines)


def _with_progress(results: Iterable[T], rows: int) -> Iterator[T]:
    with progress(rows, "row", "evaluating") as bar:
        for result in results:
            yield result
            bar.update()


def _write_answers(lm: LanguageModel, table: Sequence[Row], task: Task) -> Iterator[str]:
    """The likeliest answer to each row."""
    options = GenerateOptions(temperature=0, stop_strings=[task.end], raw=True)
    prompts = enumerate(task.prompt(row, where) for row, where in table)
    for number, generations in generate_each(prompts, model=lm, options=options):
        if isinstance(generations, HfkitError):
            raise type(generations)(f"{table[number][1]}: {generations}") from generations
        yield generations[0].completion.strip()


def _measure_labels(
    lm: LanguageModel, texts: Sequence[Any], right: Sequence[str], options: TaskOptions, metrics: Sequence[str]
) -> Assessment:
    """Label the texts; measure the labels and how far their probabilities can be trusted."""
    results: list[Classification] = []
    for result in _with_progress(classify_each(texts, lm, options), len(texts)):
        if isinstance(result, HfkitError):
            raise type(result)(f"row {len(results) + 1}: {result}") from result
        results.append(result)
    labels = [result.label for result in results]
    # By "f1" a user who has labels means that of the classes, not SQuAD's F1 of words.
    names = ["classification" if name == "f1" else name for name in metrics or ("accuracy",)]
    assessment = _measure(lm, labels, right, names)
    pairs = list(zip(results, right, strict=True))
    nll = [-float(np.log(max(result.probabilities.get(label, 0.0), 1e-300))) for result, label in pairs]
    confidence = [result.probabilities[result.label] for result in results]
    hits = [result.label == label for result, label in pairs]
    figures = mean_figures("loss", nll) | {"calibration_error": calibration_error(confidence, hits)}
    return replace(assessment, metrics={**assessment.metrics, **figures})


def _measure(
    lm: LanguageModel,
    guesses: Sequence[str],
    right: Sequence[str | Sequence[str]],
    names: Sequence[str],
    baselines: dict[str, list[str]] | None = None,
) -> Assessment:
    """Metrics of the guesses, of always guessing the most frequent answer, and of what `baselines` guess."""
    if not right:
        raise HfkitError("there is nothing to score: the corpus holds no rows")
    first = [answers if isinstance(answers, str) else answers[0] for answers in right]
    frequent, _ = Counter(first).most_common(1)[0]
    metrics = list(dict.fromkeys(map(find_metric, names)))

    def compute(predictions: Sequence[str]) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for metric in metrics:
            figures |= metric(predictions, right)
        return figures

    others = {"most frequent answer": [frequent] * len(right), **(baselines or {})}
    figures = {
        name: {key: value for key, value in compute(predictions).items() if isinstance(value, float)}
        for name, predictions in others.items()
    }
    return Assessment(model=lm.name, examples=len(right), metrics=compute(guesses), baselines=figures)
