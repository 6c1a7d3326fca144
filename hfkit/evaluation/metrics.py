"""Scores of predictions against references, as `evaluate.Metric`s that need no network.

Each is used like any of that library (`add_batch`, `compute`), and gives standard errors beside its figures.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import datasets
import evaluate
import numpy as np

from hfkit.errors import HfkitError, OptionError
from hfkit.hub import reach_hub

_RESAMPLES = 1000  # of the bootstrap
_NAMES = ("accuracy", "precision", "recall", "f1")
_MOST_LABELS = 100  # that a confusion table is made of
_TEXT, _TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))


class _Metric(evaluate.Metric):
    """References are a text each, or a list of texts any of which is right."""

    package = ""  # that it needs

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _build_data_dir(self) -> str:
        return ""  # in memory no folder is needed, and that of the library may not be writable

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """As `evaluate.Metric.compute`; of nothing every figure is NaN."""
        given = [one for one in (predictions, references) if one is not None]
        if all(not len(one) for one in given) and self.writer is None:  # the library needs one to tell their type
            return self._compute([], [])
        if len({len(one) for one in given}) > 1:
            raise ValueError(f"{len(predictions)} predictions, but {len(references)} references")
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": _TEXT, "references": _TEXTS}),
            datasets.Features({"predictions": _TEXT, "references": _TEXT}),
        ]
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description=_Metric.__doc__, features=features
        )


def _lists(references: Sequence[Any]) -> list[list[str]]:
    """All references of each row; an empty one where there is none."""
    return [[one] if isinstance(one, str) else list(one) or [""] for one in references]


class Classification(_Metric):
    """Accuracy; precision, recall and F1 as means over the classes; the same for each class; a confusion table.

    As scikit-learn has them, with 0 where a figure would be 0/0. A class is one that is predicted or referred to.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, Any]:
        right = [answers[0] for answers in _lists(references)]
        labels = sorted({*predictions, *right})
        number = {label: index for index, label in enumerate(labels)}
        pairs = np.array([[number[one] for one in ones] for ones in (right, predictions)], np.int64)
        figures = _summarize(pairs, len(labels))
        draw = np.random.default_rng(0)
        rows = pairs.shape[1]
        drawn = [_summarize(pairs[:, draw.integers(0, rows, rows)], len(labels)) for _ in range(_RESAMPLES)]
        errors = np.std(drawn, axis=0) if rows > 1 else np.full(4, np.nan)
        found = dict(zip(_NAMES, figures.tolist(), strict=True))
        found |= {f"{name}_stderr": error for name, error in zip(_NAMES, errors.tolist(), strict=True)}
        support, *rates = _rates(pairs, len(labels))
        found["classes"] = {
            label: dict(zip((*_NAMES[1:], "support"), (*map(float, of_label), int(count)), strict=True))
            for label, count, *of_label in zip(labels, support, *rates, strict=True)
        }
        if len(labels) <= _MOST_LABELS:
            places = np.bincount(pairs[0] * len(labels) + pairs[1], minlength=len(labels) ** 2)
            matrix = places.reshape(len(labels), len(labels)).tolist()
            found["confusion"] = {"labels": labels, "matrix": matrix}  # a row for each reference
        return found


def _rates(pairs: np.ndarray, labels: int) -> list[np.ndarray]:
    """Of each label how often it is right, precision, recall and F1, (labels,); pairs: (right or predicted, rows)."""
    referred, predicted, hits = (
        np.bincount(row, minlength=labels) for row in (*pairs, pairs[0, pairs[0] == pairs[1]])
    )

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.divide(above, below, out=np.zeros(labels), where=below > 0)

    return [referred, ratio(hits, predicted), ratio(hits, referred), ratio(2 * hits, predicted + referred)]


def _summarize(pairs: np.ndarray, labels: int) -> np.ndarray:
    """Accuracy, and the means of precision, recall and F1 over the labels that there are, (4,)."""
    if not pairs.size:
        return np.full(4, np.nan)
    seen = np.unique(pairs)
    return np.array([(pairs[0] == pairs[1]).mean(), *(rate[seen].mean() for rate in _rates(pairs, labels)[1:])])


class Squad(_Metric):
    """Exact match and token F1 of answers, as SQuAD defines them; an empty answer is right where there is none."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        pairs = list(zip(predictions, _lists(references), strict=True))
        exact = [max(float(normalize(guess) == normalize(answer)) for answer in right) for guess, right in pairs]
        f1 = [max(token_f1(guess, answer) for answer in right) for guess, right in pairs]
        return _mean("exact_match", exact) | _mean("f1", f1)


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and extra space."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(guess: str, answer: str) -> float:
    ours, theirs = normalize(guess).split(), normalize(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return {name: float("nan"), f"{name}_stderr": float("nan")}
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {name: float(np.mean(values)), f"{name}_stderr": error}


class Bleu(_Metric):
    """BLEU and chrF of sacrebleu, from 0 to 100; the errors are of a bootstrap over the rows."""

    package = "sacrebleu"

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        from sacrebleu.metrics import BLEU, CHRF

        if not predictions:
            return {name: float("nan") for name in ("bleu", "bleu_stderr", "chrf", "chrf_stderr")}
        texts = _lists(references)
        most = max(len(one) for one in texts)
        # A stream for each place in the lists; sacrebleu skips what is None.
        streams = [[one[place] if place < len(one) else None for one in texts] for place in range(most)]
        found = {}
        for name, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF())):  # force: without a warning
            found[name] = float(metric.corpus_score(list(predictions), streams).score)
            # Its own bootstrap fails where some of the samples have 0 (statistics.mean of float and float32).
            counts = np.array(metric._extract_corpus_statistics(list(predictions), streams))
            draw = np.random.default_rng(0)
            drawn = [
                metric._compute_score_from_stats(
                    counts[draw.integers(0, len(texts), len(texts))].sum(0).tolist()
                ).score
                for _ in range(_RESAMPLES if len(texts) > 1 else 0)
            ]
            found[f"{name}_stderr"] = float(np.std(drawn)) if drawn else float("nan")
        return found


class Rouge(_Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F measures) of rouge-score; the best of several references counts."""

    package = "rouge_score"

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        names = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(list(names))
        pairs = zip(_lists(references), predictions, strict=True)
        scores = [scorer.score_multi(answers, guess) for answers, guess in pairs]
        found: dict[str, float] = {}
        for name in names:
            found |= _mean(name, [score[name].fmeasure for score in scores])
        return found


# Every figure that can be asked for, and the metric that has it.
METRICS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("accuracy", "precision", "recall"), Classification),
    **dict.fromkeys(("exact_match", "f1"), Squad),
    **dict.fromkeys(("bleu", "chrf"), Bleu),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), Rouge),
    **{"classification": Classification, "squad": Squad, "rouge": Rouge},
}


def load_metric(name: str) -> Any:
    """The metric called `name`: one of METRICS, or of the Hub.

    Raises:
        OptionError: there is none of that name here, and the Hub cannot be reached or has none.
    """
    if name in METRICS:
        metric = METRICS[name]()
        if metric.package and not find_spec(metric.package):
            raise HfkitError(f"--metric {name} needs a package: pip install 'hfkit[metrics]'")
        return metric
    try:
        reach_hub(name)
        return evaluate.load(name)
    except (HfkitError, FileNotFoundError, ImportError, OSError) as error:
        raise OptionError(
            f"no metric {name!r} here ({', '.join(METRICS)}), and none from the Hub: {str(error).splitlines()[0]}"
        ) from error
