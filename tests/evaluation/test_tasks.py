"""A task is scored as scikit-learn, SQuAD and sacrebleu define it, beside what one gets without a model."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from support import trials
from support.shell import assert_fails, call
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer, set_seed

import hfkit
from hfkit.corpus.templates import Task, give_task
from hfkit.evaluation.figures import Evaluation
from hfkit.evaluation.metrics import squad
from hfkit.evaluation.tasks import Assessment
from hfkit.inference.answering import Answer

pytestmark = pytest.mark.usefixtures("brisk")
LABELS = ["good", "bad", "so so"]
ASKED = {"template": "{text}={label}", "labels": LABELS}


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    """Texts with labels of unequal frequency."""
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(trials.WORDS, k=draw.randint(1, 6))),
             "label": draw.choices(LABELS, [5, 3, 2])[0]} for _ in range(60)]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("rows") / "reviews.jsonl", rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Sentences and what they are in another language, some alike."""
    rows = [{"en": en, "fr": fr} for en, fr in (("rain", "pluie"), ("light", "light"), ("the wind", "le vent"),
                                                ("stone", "pluie"), ("a river", "une rivière"))]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def head(tiny_bert, tmp_path_factory) -> str:
    """A classifier of BERT's kind with a random head that does not always say the same."""
    folder = tmp_path_factory.mktemp("models") / "head"
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **names)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    model.classifier.weight.data *= 30
    with torch.inference_mode():
        logits = model(**tokenizer(trials.WORDS, padding=True, return_tensors="pt")).logits
    model.classifier.bias.data -= logits.mean(0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def finder(tiny_bert, tmp_path_factory) -> str:
    """A model that finds answers, any."""
    folder = tmp_path_factory.mktemp("models") / "finder"
    AutoModelForQuestionAnswering.from_pretrained(tiny_bert).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return str(folder)


def strictly(text: bytes):
    """JSON without NaN or infinity."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def by_sklearn(predictions, references) -> dict[str, float]:
    figures = precision_recall_fscore_support(references, predictions, average="macro", zero_division=0)[:3]
    return {"accuracy": accuracy_score(references, predictions)} | dict(
        zip(("precision", "recall", "f1"), map(float, figures), strict=True)
    )


# labels


@pytest.mark.parametrize("kind", ["head", "tiny", "tiny_llama"])
def test_assess_labels_equals_scikit_learn(kind, request, reviews):
    folder, asked = request.getfixturevalue(kind), {} if kind == "head" else ASKED
    rows = [json.loads(line) for line in Path(reviews).read_text().splitlines()]
    right = [row["label"] for row in rows]
    guesses = hfkit.classify([row["text"] for row in rows], model=folder, **asked)
    said = [one.label for one in guesses]
    assert len(set(said)) > 1
    found = hfkit.evaluate(reviews, model=folder, **asked)
    assert isinstance(found, Assessment) and found.examples == 60 and found.model == folder
    for name, value in by_sklearn(said, right).items():
        assert found.metrics[name] == pytest.approx(value), name
        assert 0 <= found.metrics[f"{name}_stderr"] < 0.2
    majority = Counter(right).most_common(1)[0][0]
    (name,) = found.baselines
    assert name == "most frequent answer"
    for figure, value in by_sklearn([majority] * 60, right).items():
        assert found.baselines[name][figure] == pytest.approx(value), figure
    nll = [-math.log(one.probabilities[label]) for one, label in zip(guesses, right, strict=True)]
    assert found.metrics["loss"] == pytest.approx(np.mean(nll), rel=1e-3)
    assert found.metrics["loss_stderr"] == pytest.approx(np.std(nll, ddof=1) / math.sqrt(60), rel=1e-3)
    claimed = np.array([max(one.probabilities.values()) for one in guesses])
    hits = np.array([one.label == label for one, label in zip(guesses, right, strict=True)])
    bins = np.minimum((claimed * 10).astype(int), 9)
    error = sum(
        abs(claimed[bins == b].mean() - hits[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist())
    )
    assert found.metrics["calibration_error"] == pytest.approx(error, abs=1e-3)


def test_assess_labels_has_the_f1_of_classes(tiny, reviews):
    """Not SQuAD's F1, which is that of words."""
    plain, asked = (hfkit.evaluate(reviews, model=tiny, **ASKED, metric=metric) for metric in (None, ["f1"]))
    assert asked.metrics == plain.metrics and "exact_match" not in asked.metrics


def test_assess_names_an_unknown_label_and_its_place(tiny, head, tmp_path, capfdbinary):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "new"}])
    asked = ["--template", ASKED["template"], *(word for label in LABELS for word in ("--labels", label))]
    result = call(capfdbinary, "evaluate", path, "-m", tiny, *asked)
    assert_fails(result, 1, "label is 'new'", "rows.jsonl, line 2", "the labels are good, bad, so so")
    result = call(capfdbinary, "evaluate", path, "-m", head, "-q")
    assert_fails(result, 1, "label 'new' is not one of the model's: good, bad, so so")


def test_assess_one_row(head, tmp_path, capfdbinary):
    """One row has figures, but no errors."""
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "rain", "label": "bad"}])
    found = strictly(call(capfdbinary, "evaluate", path, "-m", head, "--json").stdout)
    assert found["examples"] == 1 and found["accuracy"] in (0, 1)
    assert found["accuracy_stderr"] is found["loss_stderr"] is None  # of one row nothing is known


# answers


def test_assess_answers_are_those_of_generate(tiny, pairs):
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    task = Task("{en}: {fr};")
    prompts = [task.prompt(row) for row in rows]
    said = hfkit.generate(prompts, model=tiny, temperature=0, stop_strings=[";"], raw=True)
    said, right = [one.completion.strip() for one in said], [row["fr"] for row in rows]
    found = hfkit.evaluate(pairs, model=tiny, template="{en}: {fr};", metric=["exact_match", "chrf", "bleu"])
    assert found.metrics["chrf"] == pytest.approx(CHRF().corpus_score(said, [right]).score)
    assert found.metrics["bleu"] == pytest.approx(BLEU(force=True).corpus_score(said, [right]).score)
    assert found.metrics["exact_match"] == squad(said, right)["exact_match"]
    assert {f"{name}_stderr" for name in ("exact_match", "f1", "chrf", "bleu")} <= found.metrics.keys()


def test_assess_baselines(tiny, pairs):
    """The baselines are the copied input and the most frequent answer."""
    rows = [json.loads(line) for line in Path(pairs).read_text().splitlines()]
    sources, right = [row["en"] for row in rows], [row["fr"] for row in rows]
    found = hfkit.evaluate(pairs, model=tiny, template="{en}: {fr};", metric=["chrf", "exact_match"])
    assert list(found.baselines) == ["most frequent answer", "copying"]
    frequent, copied = found.baselines.values()
    assert frequent["exact_match"] == 2 / 5 and copied["exact_match"] == 1 / 5
    assert copied["chrf"] == pytest.approx(CHRF().corpus_score(sources, [right]).score)
    assert frequent["chrf"] == pytest.approx(CHRF().corpus_score(["pluie"] * 5, [right]).score)
    assert copied["exact_match_stderr"] == pytest.approx(np.std([0, 1, 0, 0, 0], ddof=1) / math.sqrt(5))


def test_assess_of_several_inputs_has_no_copying_baseline(tiny, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"a": "x", "b": "y", "c": "x"}] * 2)
    assert list(hfkit.evaluate(path, model=tiny, template="{a}{b}:{c}").baselines) == ["most frequent answer"]


# (what a model says, the right answers, exact match, F1), as SQuAD defines them
SQUAD = [
    ("The Rain", ["rain"], 1, 1),
    ("rain!", ["the rain."], 1, 1),
    ("an  old   stone", ["old stone"], 1, 1),
    ("stone", ["old stone"], 0, 2 / 3),
    ("the old old stone", ["old stone wall"], 0, 2 * (2 / 3) * (2 / 3) / (4 / 3)),
    ("light", ["rain", "the light", "light of day"], 1, 1),
    ("light of day", ["rain", "light"], 0, 0.5),
    ("rain", [], 0, 0),
    ("", [], 1, 1),
    ("", ["rain"], 0, 0),
    ("The", [], 1, 1),
    ("wind", ["rain"], 0, 0),
]


def test_assess_questions_equals_squad(finder, tmp_path, monkeypatch, capfdbinary):
    rows = [{"question": f"{number}?", "context": "rain", "answers": {"text": right, "answer_start": [0] * len(right)}}
            for number, (_, right, _, _) in enumerate(SQUAD)]  # fmt: skip
    path, asked = write_rows(tmp_path / "rows.jsonl", rows), []

    def say(lm, given, threshold):
        for question, context in given:
            asked.append((question, context))
            yield Answer(SQUAD[int(question[:-1])][0], 1.0, 0, 0, question, lm.name)

    monkeypatch.setattr("hfkit.evaluation.tasks.find_answers", say)
    found = strictly(call(capfdbinary, "evaluate", path, "-m", finder, "--json").stdout)
    exact, f1 = ([case[place] for case in SQUAD] for place in (2, 3))
    assert asked == [(row["question"], "rain") for row in rows]
    for name, values in (("exact_match", exact), ("f1", f1)):
        assert found[name] == pytest.approx(np.mean(values)), name
        assert found[f"{name}_stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(SQUAD)))
    (baseline,) = found["baselines"].values()
    assert baseline["exact_match"] == 6 / 12  # "rain" comes first in most rows, and is right in these


def test_assess_answers_in_a_column_equals_squad(tiny, tmp_path, monkeypatch):
    cases = [case for case in SQUAD if len(case[1]) == 1 and case[0]]
    rows = [{"q": str(number), "a": right[0]} for number, (_, right, _, _) in enumerate(cases)]

    def say(prompts, model, options):
        assert options.temperature == 0 and options.stop_strings == ["\n"]
        for number, prompt in prompts:
            assert prompt == f"Q {number}:"
            yield number, [hfkit.Generation(prompt, f" {cases[number][0]} ", "stop", 1, 0.0, None, "m")]

    monkeypatch.setattr("hfkit.evaluation.tasks.generate_each", say)
    found = hfkit.evaluate(write_rows(tmp_path / "rows.jsonl", rows), model=tiny, template="Q {q}: {a}")
    assert found.metrics["exact_match"] == pytest.approx(np.mean([case[2] for case in cases]))
    assert found.metrics["f1"] == pytest.approx(np.mean([case[3] for case in cases]))


def test_assess_questions_asks_each_one(finder, tmp_path):
    rows = [{"question": "what", "context": f"the {word} falls", "answer": word} for word in trials.WORDS]
    found = hfkit.evaluate(write_rows(tmp_path / "rows.jsonl", rows), model=finder)
    said = [hfkit.answer("what", row["context"], model=finder).answer for row in rows]
    expected = squad(said, trials.WORDS)
    assert found.metrics == pytest.approx(expected) and found.examples == len(rows)


# which task it is


def carrying(folder: Path, model: str, task: Task) -> str:
    lm = hfkit.load(model)
    give_task(lm.tokenizer, task)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_find_task_prefers_what_is_asked_for(tiny, reviews, pairs, tmp_path):
    """A model brings its task; a template or a metric that is given wins."""
    folder = carrying(tmp_path / "m", tiny, Task(ASKED["template"], tuple(LABELS), ("accuracy",)))
    assert hfkit.evaluate(reviews, model=folder).metrics == hfkit.evaluate(reviews, model=tiny, **ASKED).metrics
    found = hfkit.evaluate(pairs, model=folder, template="{en}: {fr};")
    assert set(found.metrics) == {"exact_match", "exact_match_stderr", "f1", "f1_stderr"}
    folder = carrying(tmp_path / "n", tiny, Task("{en}: {fr};", metric=("chrf",)))
    assert set(hfkit.evaluate(pairs, model=folder).metrics) == {"bleu", "bleu_stderr", "chrf", "chrf_stderr"}
    assert "exact_match" in hfkit.evaluate(pairs, model=folder, metric=["exact_match"]).metrics


def test_find_task_leaves_texts_and_other_rows(tiny, corpus, tmp_path):
    """A model with a task still predicts texts, and rows without the task's columns."""
    folder = carrying(tmp_path / "m", tiny, Task("{en}: {fr};"))
    assert isinstance(hfkit.evaluate(corpus, model=folder), Evaluation)
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "the rain falls"}])
    assert isinstance(hfkit.evaluate(path, model=folder), Evaluation)


def test_find_task_of_pairs_needs_a_metric(tiny, tmp_path):
    """Prompts and completions are a task only where a metric is named."""
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "rain:", "completion": " a"}, {"prompt": "a:", "completion": "a"}]
    )
    assert isinstance(hfkit.evaluate(path, model=tiny), Evaluation)
    found = hfkit.evaluate(path, model=tiny, metric=["f1"])
    assert isinstance(found, Assessment) and found.baselines["most frequent answer"]["exact_match"] == 1


# bad input, and how it is shown


def test_assess_refuses_in_one_line(tiny, head, finder, corpus, reviews, pairs, tmp_path, capfdbinary):
    nothing = tmp_path / "nothing.csv"
    nothing.write_text("text,label\n")
    long = write_rows(tmp_path / "long.jsonl", [{"en": "a", "fr": "b"}, {"en": "w" * 80, "fr": "b"}])
    labelled = write_rows(tmp_path / "labelled.jsonl", [{"text": "w" * 70, "label": "good"}])
    labels = ["--template", ASKED["template"], *(word for label in LABELS for word in ("--labels", label))]
    for arguments, code, words in (
        ([pairs, "-m", head], 1, ["no column 'label'", "'en', 'fr'", "--label-column"]),
        ([pairs, "-m", finder], 1, ["must have question, context and answer", "line 1"]),
        ([corpus, "-m", head], 1, ["plain text", "rows (CSV", "with named columns"]),
        ([corpus, "-m", tiny, "--template", "{a}{b}"], 1, ["plain text"]),
        ([reviews, "-m", tiny, "--template", "{en}{fr}"], 1, ["template's columns are not there", "'text', 'label'"]),
        ([pairs, "-m", tiny, "--metric", "chrf"], 1, ["prompt and completion", "'en', 'fr'"]),
        ([nothing, "-m", head], 1, ["there is nothing to score"]),
        ([long, "-m", tiny, "--template", "{en}:{fr}"], 1, ["long.jsonl, line 2: 81 tokens", "takes 64"]),
        ([labelled, "-m", tiny, *labels], 1, ["row 1: 71 tokens of text", "takes 64"]),
        ([pairs, "-m", tiny, "--template", "{en}:{fr}", "--metric", "blue"], 2, ["no metric 'blue'"]),
    ):  # fmt: skip
        assert_fails(call(capfdbinary, "evaluate", *arguments), code, *words)


def test_write_assessments_shows_errors_and_baselines(head, reviews, capfdbinary):
    result = call(capfdbinary, "evaluate", reviews, "-m", head, "-q")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0 and result.stderr == b""
    found = hfkit.evaluate(reviews, model=head)
    assert "60 examples" in result.stdout.decode() and any("(most frequent" in line for line in lines)
    assert f"{found.metrics['accuracy']:.3g} ± {found.metrics['accuracy_stderr']:.3g}" in result.stdout.decode()
    assert f"{found.metrics['calibration_error']:.3g}" in result.stdout.decode()


def test_write_assessments_as_json(head, reviews, capfdbinary):
    """The usual names, and numbers only."""
    one = strictly(call(capfdbinary, "evaluate", reviews, "-m", head, "--json").stdout)
    assert {"model", "examples", "accuracy", "precision", "recall", "f1", "accuracy_stderr", "loss", "loss_stderr",
            "calibration_error", "classes", "confusion", "baselines"} <= set(one)  # fmt: skip
    assert one == json.loads(json.dumps(hfkit.evaluate(reviews, model=head).to_dict()))
    several = strictly(call(capfdbinary, "evaluate", reviews, "-m", head, "-m", head, "--json").stdout)
    assert several == [one, one]
