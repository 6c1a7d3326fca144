"""Metrics of predictions against references: plain functions that need no network.

Each takes one predicted text per row and, for each row, a reference: a text, or a list of texts any of which is right.
It returns its figures by name, with the standard error of `name` under `name_stderr`. Where a figure is undefined (no
rows, or the error of a single row) it is NaN.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.hub import reach_hub

Metric = Callable[[Sequence[str], Sequence[str | Sequence[str]]], dict[str, Any]]

_RESAMPLES = 1000  # of the bootstrap
_AVERAGES = ("accuracy", "precision", "recall", "f1")
_MAX_LABELS = 100  # a confusion table of more labels would not be read


def _reference_lists(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """All right texts of each row; an empty text where a row has none. ValueError if the numbers of rows differ."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {len(references)} references")
    return [[reference] if isinstance(reference, str) else list(reference) or [""] for reference in references]


def classification(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 averaged over the classes; the same for each class; a confusion table.

    The figures are scikit-learn's: macro averages, with 0 where a figure would be 0/0. The classes are all labels that
    are predicted or right in some row.
    """
    right = [texts[0] for texts in _reference_lists(predictions, references)]
    labels = sorted({*predictions, *right})
    index = {label: number for number, label in enumerate(labels)}
    pairs = np.array([[index[label] for label in column] for column in (right, predictions)], np.int64)
    rows = pairs.shape[1]
    random = np.random.default_rng(0)
    resampled = [_average(pairs[:, random.integers(0, rows, rows)], len(labels)) for _ in range(_RESAMPLES)]
    errors = np.std(resampled, axis=0) if rows > 1 else np.full(4, np.nan)
    figures: dict[str, Any] = dict(zip(_AVERAGES, _average(pairs, len(labels)).tolist(), strict=True))
    figures |= {f"{name}_stderr": error for name, error in zip(_AVERAGES, errors.tolist(), strict=True)}
    support, precision, recall, f1 = (column.tolist() for column in _rates(pairs, len(labels)))
    figures["classes"] = {
        label: {"precision": precision[i], "recall": recall[i], "f1": f1[i], "support": support[i]}
        for i, label in enumerate(labels)
    }
    if len(labels) <= _MAX_LABELS:
        counts = np.bincount(pairs[0] * len(labels) + pairs[1], minlength=len(labels) ** 2)
        # One row for each right label, one column for each predicted one.
        figures["confusion"] = {"labels": labels, "matrix": counts.reshape(len(labels), len(labels)).tolist()}
    return figures


def _rates(pairs: np.ndarray, labels: int) -> list[np.ndarray]:
    """Support, precision, recall and F1 of each label, each (labels,).

    pairs: (2, rows), the numbers of the right and of the predicted labels.
    """
    right, predicted, hits = (
        np.bincount(column, minlength=labels) for column in (*pairs, pairs[0, pairs[0] == pairs[1]])
    )

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        rate: np.ndarray = above / np.maximum(below, 1)  # 0/0 is 0
        return rate

    return [right, ratio(hits, predicted), ratio(hits, right), ratio(2 * hits, predicted + right)]


def _average(pairs: np.ndarray, labels: int) -> np.ndarray:
    """Accuracy, and precision, recall and F1 averaged over the labels that occur in `pairs`, (4,)."""
    if not pairs.size:
        return np.full(4, np.nan)
    occurring = np.unique(pairs)
    averages = [rate[occurring].mean() for rate in _rates(pairs, labels)[1:]]
    return np.array([(pairs[0] == pairs[1]).mean(), *averages])


def squad(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """Exact match and token F1 of answers, as SQuAD defines them; an empty answer is right where there is none."""
    pairs = list(zip(predictions, _reference_lists(predictions, references), strict=True))
    exact = [max(float(normalize(guess) == normalize(answer)) for answer in answers) for guess, answers in pairs]
    f1 = [max(token_f1(guess, answer) for answer in answers) for guess, answers in pairs]
    return mean_figures("exact_match", exact) | mean_figures("f1", f1)


def normalize(answer: str) -> str:
    """`answer` in lower case, without punctuation, articles and extra spaces."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(guess: str, answer: str) -> float:
    """F1 of the words that two normalized answers have in common."""
    guessed, right = normalize(guess).split(), normalize(answer).split()
    if not guessed or not right:
        return float(guessed == right)
    common = sum((Counter(guessed) & Counter(right)).values())
    return 2 * common / (len(guessed) + len(right))


def mean_figures(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per row, and its standard error."""
    mean = float(np.mean(values)) if len(values) else float("nan")
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {name: mean, f"{name}_stderr": error}


def bleu(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """BLEU and chrF of sacrebleu, from 0 to 100; their errors are a bootstrap's over the rows."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    rows = _reference_lists(predictions, references)
    if not rows:
        return mean_figures("bleu", []) | mean_figures("chrf", [])
    # sacrebleu wants one stream of texts for each place in the lists, and skips what is None.
    depth = max(len(texts) for texts in rows)
    streams: Any = [[texts[place] if place < len(texts) else None for texts in rows] for place in range(depth)]
    figures = {}
    for name, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF())):  # force silences a warning
        figures[name] = float(metric.corpus_score(list(predictions), streams).score)
        # sacrebleu's own bootstrap fails where a resample scores 0: statistics.mean cannot mix float and float32.
        counts = np.array(metric._extract_corpus_statistics(list(predictions), streams))
        random = np.random.default_rng(0)
        resampled = [
            metric._compute_score_from_stats(counts[random.integers(0, len(rows), len(rows))].sum(0).tolist()).score
            for _ in range(_RESAMPLES if len(rows) > 1 else 0)
        ]
        figures[f"{name}_stderr"] = float(np.std(resampled)) if resampled else float("nan")
    return figures


def rouge(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F measures) of rouge-score; of several references the best one counts."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    pairs = zip(_reference_lists(predictions, references), predictions, strict=True)
    rows = [scorer.score_multi(answers, guess) for answers, guess in pairs]
    figures: dict[str, Any] = {}
    for name in names:
        figures |= mean_figures(name, [row[name].fmeasure for row in rows])
    return figures


# Every figure that can be asked for, and the metric that returns it.
METRICS: dict[str, Metric] = {
    **dict.fromkeys(("accuracy", "precision", "recall", "classification"), classification),
    **dict.fromkeys(("exact_match", "f1", "squad"), squad),
    **dict.fromkeys(("bleu", "chrf"), bleu),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rouge"), rouge),
}
_PACKAGES = {bleu: "sacrebleu", rouge: "rouge_score"}


def find_metric(name: str) -> Metric:
    """The metric called `name`: one of METRICS, or one from the Hub.

    Raises:
        HfkitError: the package that the metric needs is not installed.
        OptionError: METRICS has no such name, and the Hub has none or cannot be reached.
    """
    if metric := METRICS.get(name):
        if metric in _PACKAGES and not find_spec(_PACKAGES[metric]):
            raise HfkitError(f"--metric {name} needs a package: pip install 'hfkit[metrics]'")
        return metric
    try:
        reach_hub(name)
        import evaluate

        loaded = evaluate.load(name)
    except (HfkitError, FileNotFoundError, ImportError, OSError) as error:
        raise OptionError(
            f"no metric {name!r} here ({', '.join(METRICS)}), and none from the Hub: {first_line(error)}"
        ) from error
    return lambda predictions, references: loaded.compute(predictions=predictions, references=references)
