"""Scores of predictions against references, as `evaluate.Metric`s that need no network.

Each is used like any of that library (`add_batch`, `compute`), and gives standard errors beside its figures.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hfkit.errors import HfkitError, OptionError
from hfkit.sources import reach_hub

_RESAMPLES = 1000  # of the bootstrap
_TEXT, _TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))


class _Metric(evaluate.Metric):
    """References are a text each, or a list of texts any of which is right."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """As `evaluate.Metric.compute`; of nothing every figure is NaN."""
        if predictions is not None and not len(predictions):  # the library cannot tell what nothing is made of
            return self._compute([], [])
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        features = [
            datasets.Features({"predictions": _TEXT, "references": _TEXTS}),
            datasets.Features({"predictions": _TEXT, "references": _TEXT}),
        ]
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description=_Metric.__doc__, features=features
        )


class Classification(_Metric):
    """Accuracy; precision, recall and F1 as means over the classes; the same for each class; a confusion table.

    As scikit-learn has them, with 0 where a figure would be 0/0. A class is one that is predicted or referred to.
    """

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, Any]:
        references = [one if isinstance(one, str) else one[0] for one in references]
        labels = sorted({*predictions, *references})
        number = {label: index for index, label in enumerate(labels)}
        pairs = np.array(
            [[number[a], number[b]] for a, b in zip(references, predictions, strict=True)], np.int64
        ).reshape(-1, 2)
        table = _confusion(pairs, len(labels))
        precision, recall, f1 = _rates(table)
        classes = {
            label: {"precision": p, "recall": r, "f1": f, "support": int(row.sum())}
            for label, p, r, f, row in zip(labels, precision, recall, f1, table, strict=True)
        }

        def summary(confusion: np.ndarray) -> np.ndarray:
            seen = (confusion.sum(0) + confusion.sum(1)) > 0
            means = [rate[seen].mean() if seen.any() else np.nan for rate in _rates(confusion)]
            return np.array([np.trace(confusion) / max(1, confusion.sum()) if seen.any() else np.nan, *means])

        figures = summary(table)
        draw = np.random.default_rng(0)
        drawn = [
            summary(_confusion(pairs[draw.integers(0, len(pairs), len(pairs))], len(labels)))
            for _ in range(_RESAMPLES if len(pairs) > 1 else 0)
        ]
        errors = np.std(drawn, axis=0) if drawn else np.full(4, np.nan)
        names = ("accuracy", "precision", "recall", "f1")
        found = dict(zip(names, figures.tolist(), strict=True))
        found |= {f"{name}_stderr": error for name, error in zip(names, errors.tolist(), strict=True)}
        return {**found, "classes": classes, "confusion": {"labels": labels, "matrix": table.tolist()}}


def _confusion(pairs: np.ndarray, classes: int) -> np.ndarray:
    """Counts of (reference, prediction), (classes, classes)."""
    return np.bincount(pairs[:, 0] * classes + pairs[:, 1], minlength=classes * classes).reshape(classes, classes)


def _rates(confusion: np.ndarray) -> tuple[list[float], ...]:
    """Precision, recall and F1 of each class."""
    hits, predicted, referred = np.diag(confusion), confusion.sum(0), confusion.sum(1)

    def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        return np.divide(above, below, out=np.zeros(len(hits)), where=below > 0)

    return ratio(hits, predicted), ratio(hits, referred), ratio(2 * hits, predicted + referred)  # type: ignore[return-value]


class Squad(_Metric):
    """Exact match and token F1 of answers, as SQuAD defines them; an empty answer is right where there is none."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        answers = [[one] if isinstance(one, str) else list(one) or [""] for one in references]
        pairs = list(zip(predictions, answers, strict=True))
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
    """BLEU and chrF of sacrebleu, from 0 to 100; the errors are from its bootstrap."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ImportError as error:
            raise HfkitError("BLEU and chrF need sacrebleu: pip install 'hfkit[metrics]'") from error
        if not predictions:
            return {name: float("nan") for name in ("bleu", "bleu_stderr", "chrf", "chrf_stderr")}
        texts = [[one] if isinstance(one, str) else list(one) for one in references]
        most = max(len(one) for one in texts)
        # A stream for each place in the lists; sacrebleu skips what is None.
        streams = [[one[place] if place < len(one) else None for one in texts] for place in range(most)]
        found = {}
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            score = metric.corpus_score(list(predictions), streams, n_bootstrap=_RESAMPLES)
            found[name] = score.score
            told = json.loads(score.format(12, is_json=True, signature=str(metric.get_signature())))
            found[f"{name}_stderr"] = told.get("confidence_var", 0.0) / 1.96  # half of its interval of 95 %
        return found


class Rouge(_Metric):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F measures) of rouge-score; the best of several references counts."""

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise HfkitError("ROUGE needs rouge-score: pip install 'hfkit[metrics]'") from error
        names = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(list(names))
        answers = [[one] if isinstance(one, str) else list(one) for one in references]
        scores = [scorer.score_multi(a, guess) for guess, a in zip(predictions, answers, strict=True)]
        found: dict[str, float] = {}
        for name in names:
            found |= _mean(name, [score[name].fmeasure for score in scores])
        return found


# Every figure that can be asked for, and the metric that has it.
METRICS: dict[str, Callable[[], evaluate.Metric]] = {
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
        return METRICS[name]()
    try:
        reach_hub(name)
        return evaluate.load(name)
    except (HfkitError, FileNotFoundError, ImportError, OSError) as error:
        raise OptionError(
            f"no metric {name!r} here ({', '.join(METRICS)}), and none from the Hub: {str(error).splitlines()[0]}"
        ) from error
