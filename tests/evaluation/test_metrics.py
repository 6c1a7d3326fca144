"""Metrics say what the libraries say that define them, of any texts, without a network."""

import random
import socket
import string
import subprocess
import sys

import datasets
import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from support.shell import assert_fails, call

from hfkit.errors import HfkitError, OptionError
from hfkit.evaluation.metrics import METRICS, bleu, classification, find_metric, normalize, rouge, squad, token_f1

SEEDS = range(8)
WORDS = [
    "the",
    "a",
    "an",
    "cat",
    "Cat!",
    "dog.",
    "rain",
    "(rain)",
    "2",
    "2.5",
    "über",
    "雨",
    "don't",
    "—",
    "",
    "x" * 30,
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError("a test without network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def sentence(draw: random.Random, words: int = 12) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(0, words)))


def changed(draw: random.Random, text: str) -> str:
    """The same with some words others, or away."""
    words = [draw.choice(WORDS) if draw.random() < 0.3 else word for word in text.split()]
    return " ".join(word for word in words if draw.random() < 0.8)


def close(a, b) -> bool:
    return a == pytest.approx(b, rel=0, abs=1e-12, nan_ok=True)


# labels


def by_sklearn(predictions, references) -> dict[str, float]:
    figures = precision_recall_fscore_support(references, predictions, average="macro", zero_division=0)
    return {"accuracy": accuracy_score(references, predictions)} | dict(
        zip(("precision", "recall", "f1"), figures, strict=False)
    )


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("seed", SEEDS)
def test_classification_equals_scikit_learn(seed):
    """Labels are scored as scikit-learn scores them."""
    draw = random.Random(seed)
    known = draw.sample(WORDS, draw.randint(1, 6))
    said = known + draw.choice([[], ["never right"]])
    references = draw.choices(known, k=draw.randint(1, 60))
    predictions = [right if draw.random() < 0.5 else draw.choice(said) for right in references]
    found = classification(predictions, references)
    for name, value in by_sklearn(predictions, references).items():
        assert close(found[name], value), name
    labels = found["confusion"]["labels"]
    assert labels == sorted({*predictions, *references})
    assert found["confusion"]["matrix"] == confusion_matrix(references, predictions, labels=labels).tolist()
    each = precision_recall_fscore_support(references, predictions, labels=labels, zero_division=0)
    for label, *figures in zip(labels, *each, strict=True):
        assert close(list(found["classes"][label].values()), [float(figure) for figure in figures]), label


@pytest.mark.parametrize(
    ("predictions", "references"),
    [(["a"], ["a"]), (["a"], ["b"]), (["a", "a"], ["a", "a"]), (["c", "c"], ["a", "b"]), (["", "b"], ["b", ""])],
)
def test_classification_of_few_and_unknown_labels(predictions, references):
    """Few labels, and labels that are never right, are scored as scikit-learn scores them."""
    found = classification(predictions, references)
    for name, value in by_sklearn(predictions, references).items():
        assert close(found[name], value), name


def test_classification_errors_match_other_samples():
    """The standard errors are the spread of the figures over fresh samples."""
    draw = np.random.default_rng(0)
    names = np.array(["a", "b", "c"])

    def sample():
        right = draw.integers(0, 3, 150)
        said = np.where(draw.random(150) < 0.6, right, draw.integers(0, 3, 150))
        return classification(names[said].tolist(), names[right].tolist())

    found = [sample() for _ in range(60)]
    for name in ("accuracy", "precision", "recall", "f1"):
        spread = np.std([one[name] for one in found])
        assert np.mean([one[f"{name}_stderr"] for one in found]) == pytest.approx(spread, rel=0.3), name
    assert found[0]["accuracy_stderr"] == pytest.approx(
        np.sqrt(found[0]["accuracy"] * (1 - found[0]["accuracy"]) / 150), rel=0.1
    )


def test_classification_of_many_labels_has_no_confusion_table():
    """Answers that are all different make no table of thousands of columns, and no loop over them."""
    texts = [str(number) for number in range(3000)]
    found = classification(texts, texts[::-1])
    assert found["accuracy"] == 0 and len(found["classes"]) == 3000 and "confusion" not in found


# answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat.", "cat"),
        ("a cat, an ant; THE end!", "cat ant end"),
        ("Another theme", "another theme"),
        ("it's", "its"),
        ("u.s.a", "usa"),
        ("the", ""),
        ("", ""),
        ("  \n\t", ""),
        ("雨。", "雨。"),
        (string.punctuation, ""),
    ],
)
def test_normalize_equals_squad(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("guess", "answer", "f1"),
    [
        ("the cat", "Cat!", 1),
        ("black cat", "cat", 2 / 3),
        ("cat cat", "cat", 2 / 3),
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("cat", "dog", 0),
        ("", "", 1),
        ("the", "", 1),  # nothing is left of either
        ("cat", "", 0),
        ("", "cat", 0),
    ],
)
def test_token_f1_equals_squad(guess, answer, f1):
    assert close(token_f1(guess, answer), f1)


def test_squad_takes_the_best_answer():
    """The best of several answers counts; where there is none, an empty guess is right."""
    answers = [["cat", "a black cat"], ["dog"], [], [""], [], ["dog", "cat"]]
    found = squad(["black cat", "cat", "", "", "cat", "the dog"], answers)
    assert close(found["exact_match"], 4 / 6) and close(found["f1"], 4 / 6)
    scores = [1, 0, 1, 1, 0, 1]
    assert close(found["f1_stderr"], np.std(scores, ddof=1) / np.sqrt(6))


# texts


def texts(seed: int, *, several: bool) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    references = [[sentence(draw) for _ in range(draw.randint(1, 3) if several else 1)] for _ in range(12)]
    return [draw.choice(["", sentence(draw), changed(draw, draw.choice(ones))]) for ones in references], references


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_bleu_and_chrf_equal_sacrebleu(seed, several):
    predictions, references = texts(seed, several=several)
    found = bleu(predictions, references)
    # Its own way to say that there are fewer references here: None in a stream.
    streams = [[ones[place] if place < len(ones) else None for ones in references] for place in range(3)]
    streams = [stream for stream in streams if any(one is not None for one in stream)]
    assert close(found["bleu"], BLEU().corpus_score(predictions, streams).score)
    assert close(found["chrf"], CHRF().corpus_score(predictions, streams).score)
    assert found["bleu"] > 0 and found["chrf"] > 0
    if not several:
        assert found == bleu(predictions, [one for (one,) in references])


def test_bleu_errors_match_other_samples():
    """The standard errors are the spread of the figures over fresh samples."""
    draw = random.Random(0)

    def sample():
        references = [sentence(draw, 20) for _ in range(40)]
        return bleu([changed(draw, text) for text in references], references)

    found = [sample() for _ in range(30)]
    for name in ("bleu", "chrf"):
        spread = np.std([one[name] for one in found])
        assert np.mean([one[f"{name}_stderr"] for one in found]) == pytest.approx(spread, rel=0.4), name


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_rouge_equals_rouge_score(seed, several):
    predictions, references = texts(seed, several=several)
    found = rouge(predictions, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name])
        best = [
            max(scorer.score(answer, guess)[name].fmeasure for answer in answers)
            for answers, guess in zip(references, predictions, strict=True)
        ]
        assert close(found[name], sum(best) / len(best)) and found[name] > 0
        assert close(found[f"{name}_stderr"], np.std(best, ddof=1) / np.sqrt(len(best)))


# any metric


ALL = [classification, squad, bleu, rouge]
GUESSES, ANSWERS = ["the cat", "rain falls", "a dog", "rain falls"], ["the cat", "rain", "dog", "rain falls"]


@pytest.mark.parametrize("metric", ALL)
def test_metric_takes_texts_lists_of_texts_and_arrays(metric):
    lists = metric(GUESSES, [[answer] for answer in ANSWERS])
    assert lists == metric(GUESSES, ANSWERS) == metric(np.array(GUESSES), np.array(ANSWERS))


@pytest.mark.parametrize("metric", ALL)
def test_metric_of_nothing_and_of_one_row(metric):
    """Without rows every figure is NaN; with one row its error is."""
    nothing = metric([], [])
    figures = {name: value for name, value in nothing.items() if isinstance(value, float)}
    assert figures and np.isnan(list(figures.values())).all()
    single = metric(GUESSES[:1], ANSWERS[:1])
    assert {name: np.isnan(single[name]) for name in figures} == {name: "stderr" in name for name in figures}
    with pytest.raises(ValueError, match="1 predictions, but 0 references"):
        metric(["a"], [])
    with pytest.raises(ValueError):
        metric(["a", "b"], ["a"])


@pytest.mark.parametrize("metric", ALL)
def test_metric_of_empty_texts(metric):
    """A row without a reference, or an empty prediction, scores 0."""
    found = metric(["", "cat"], [["cat", "dog"], []])
    assert all(value == 0 for name, value in found.items() if isinstance(value, float) and "stderr" not in name)


def test_metric_is_reproducible():
    for metric in ALL:
        assert len({str(metric(GUESSES, ANSWERS)) for _ in range(2)}) == 1


@pytest.mark.slow
def test_no_import_of_the_evaluate_library_without_a_metric_of_the_hub():
    """It costs a second at every start, and only a metric of the Hub needs it."""
    script = "import sys, hfkit.evaluation.perplexity as p; p.find_metric('chrf'); print('evaluate' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# by name


def test_find_metric_knows_every_name():
    for name in METRICS:
        figures = find_metric(name)(GUESSES, ANSWERS)
        assert name in figures or name in ("classification", "squad", "rouge")


def test_find_metric_refuses_an_unknown_name_before_loading(tmp_path, capfdbinary, monkeypatch):
    """An unknown metric fails before a model is looked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setattr("hfkit.evaluation.perplexity.loaded", None)
    result = call(capfdbinary, "evaluate", tmp_path / "rows.jsonl", "--metric", "blue")
    assert_fails(result, 2, "no metric 'blue' here", "bleu", "none from the Hub")


def test_find_metric_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("hfkit.evaluation.metrics.find_spec", lambda name: None)
    for name in ("bleu", "rouge1"):
        with pytest.raises(HfkitError, match=r"pip install 'hfkit\[metrics\]'"):
            find_metric(name)
    find_metric("f1")


class FromTheHub(evaluate.Metric):
    """How many characters were written."""

    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"characters": np.int64(sum(map(len, predictions)))}


def test_find_metric_loads_other_names_from_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("evaluate.load", lambda name: asked.append(name) or FromTheHub(cache_dir=tmp_path))
    monkeypatch.setattr("hfkit.evaluation.metrics.reach_hub", asked.append)
    assert find_metric("owner/characters")(["ab", "c"], ["", ""]) == {"characters": 3}
    assert asked == ["owner/characters"] * 2

    def fail(name):
        raise FileNotFoundError("Couldn't find a module script\nat all")

    monkeypatch.setattr("evaluate.load", fail)
    with pytest.raises(OptionError, match="find a module script$"):
        find_metric("owner/characters")
