"""An answer is the likeliest span of a plain forward pass, wherever in a text it is, or what a text model writes."""

import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from support import trials
from support.shell import assert_fails, call
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, set_seed

import hfkit
from hfkit.corpus.templates import Task, give_task
from hfkit.errors import HfkitError
from hfkit.inference.answering import answer, find_answers

pytestmark = pytest.mark.usefixtures("brisk")
WORDS = [*trials.WORDS, "Über,", "x1", "(who?)"]


def save_finder(folder: Path, model: str) -> str:
    """A model with a random head whose logits differ, and its tokenizer."""
    set_seed(5)
    headed = AutoModelForQuestionAnswering.from_pretrained(model)
    headed.qa_outputs.weight.data *= 30
    headed.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def random_bert(tiny_bert, tmp_path_factory) -> str:
    return save_finder(tmp_path_factory.mktemp("models") / "bert", tiny_bert)


@pytest.fixture(scope="module")
def random_gpt2(tiny, tmp_path_factory) -> str:
    """Its tokens are bytes: spaces and parts of letters."""
    return save_finder(tmp_path_factory.mktemp("models") / "gpt2", tiny)


@pytest.fixture(scope="module")
def finder(tiny_bert, tmp_path_factory) -> str:
    """A model that learned that the answer stands behind `under`, wherever that is; without it there is none."""
    folder, draw, rows = tmp_path_factory.mktemp("finder"), random.Random(1), []
    for number in range(160):
        words = draw.choices(["the", "and", "of", "falls"], k=draw.randint(4, 50))
        found = draw.choice(["rain", "stone river", "light"]) if number % 4 else ""
        if found:
            words.insert(draw.randint(0, len(words)), f"under {found}")
        rows.append({"question": "what", "context": " ".join(words), "answer": found})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = trials.SMALL | {"max_steps": 160, "eval_steps": 80, "per_device_train_batch_size": 16}
    run = hfkit.finetune(
        str(folder / "rows.jsonl"), model=tiny_bert, head="question-answering", output_dir=str(folder / "run"),
        **options | {"learning_rate": 3e-3, "optim": "adamw_torch"},
    )  # fmt: skip
    return run.output_dir


def context_of(seed: int, most: int = 12) -> str:
    draw = random.Random(seed)
    return draw.choice([" ", "  ", "\n"]).join(draw.choices(WORDS, k=draw.randint(1, most)))


def by_hand(folder: str, question: str, context: str) -> tuple[dict[tuple[int, int], float], float]:
    """Scores of all spans of up to 30 tokens by their characters, and that of no answer: by windows, in loops."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=64, stride=16, return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )  # fmt: skip
    spans, nothing = {}, math.inf
    for window, ids in enumerate(encoded["input_ids"]):
        inputs = {"input_ids": torch.tensor([ids])}
        if "token_type_ids" in encoded:
            inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"][window]])
        with torch.inference_mode():
            output = model(**inputs)
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        nothing = min(nothing, start[0] + end[0])
        own = [at for at, part in enumerate(encoded.sequence_ids(window)) if part == 1]
        for first in own:
            for last in own:
                if first <= last < first + 30:
                    places = encoded["offset_mapping"][window]
                    key = places[first][0], places[last][1]
                    spans[key] = max(spans.get(key, -math.inf), start[first] + end[last])
    return spans, nothing


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", ["random_bert", "random_gpt2"])
@pytest.mark.parametrize("most", [6, 70])
def test_answer_is_the_likeliest_span(family, most, seed, request):
    """An answer is the likeliest of all spans, or none where that is likelier."""
    folder, context = request.getfixturevalue(family), context_of(seed, most)
    spans, nothing = by_hand(folder, "what?", context)
    (first, last), best = max(spans.items(), key=lambda item: item[1])
    total = torch.tensor([nothing, *spans.values()], dtype=torch.float64).logsumexp(0).item()
    found = answer("what?", context, model=folder, no_answer_threshold=1e9)
    assert found.answer == context[first:last].strip() == context[found.start : found.end]
    assert first <= found.start <= found.end <= last
    assert found.score == pytest.approx(math.exp(best - total), rel=1e-4)
    margin = nothing - best  # what `no answer` is better by
    for threshold, given in ((margin + 0.01, True), (margin - 0.01, False)):
        one = answer("what?", context, model=folder, no_answer_threshold=threshold)
        assert (one.start is not None) == given
        if given:
            assert one == found
        else:
            assert (one.answer, one.start, one.end) == ("", None, None) and str(one) == ""
            assert one.score == pytest.approx(math.exp(nothing - total), rel=1e-4)


def test_seeds_reach_several_windows(random_bert, random_gpt2):
    """What is tested above is about windows, too, and answers differ."""
    for folder in (random_bert, random_gpt2):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lengths = [len(tokenizer("what?", context_of(seed, 70))["input_ids"]) for seed in range(8)]
        assert sum(length > 64 for length in lengths) > 3
        answers = {answer("what?", context_of(s, 70), model=folder, no_answer_threshold=1e9).answer for s in range(8)}
        assert len(answers) > 5


@pytest.mark.parametrize("family", ["random_bert", "random_gpt2"])
def test_find_answers_equal_alone(family, request, monkeypatch):
    """Many questions get what each gets alone, in their order."""
    lm = hfkit.load(request.getfixturevalue(family))
    pairs = [(f"what {seed}?", context_of(seed, 40)) for seed in range(20)]
    alone = [answer(*pair, model=lm) for pair in pairs]
    for size in (16, 3, 1):
        monkeypatch.setattr("hfkit.inference.answering._BATCH", size)
        for one, other in zip(alone, find_answers(lm, iter(pairs), 0.0), strict=True):
            assert vars(other) == vars(one) | {"score": pytest.approx(one.score, rel=1e-4)}
    assert len({one.answer for one in alone}) > 5


@pytest.mark.parametrize("seed", range(6))
def test_answer_anywhere_in_a_long_text(seed, finder):
    """An answer is found wherever in a long text it is."""
    draw = random.Random(seed)
    words = draw.choices(["the", "and", "of", "falls"], k=400)
    at = draw.randrange(400)
    words.insert(at, "under stone river")
    context = " ".join(words)
    long = answer("what", context, model=finder)
    assert str(long) == "stone river"
    assert (long.start, long.end) == (place := context.index("stone"), place + len("stone river"))
    short = answer("what", " ".join(words[max(0, at - 10) : at + 10]), model=finder)
    assert str(short) == str(long)
    words.pop(at)
    nothing = answer("what", " ".join(words), model=finder)
    assert (str(nothing), nothing.start) == ("", None)
    assert answer("what", " ".join(words), model=finder, no_answer_threshold=1e9).answer  # the best guess


def test_answer_empty_context(random_bert):
    """A context without any token has no answer."""
    (found,) = find_answers(hfkit.load(random_bert), [("what?", "  ")], 0.0)
    assert (found.answer, found.score, found.start) == ("", pytest.approx(1), None)


def test_answer_not_finite(random_bert):
    """Values that are not numbers are one sentence."""
    lm = hfkit.load(random_bert)
    lm.model.qa_outputs.bias.data[:] = torch.nan
    with pytest.raises(HfkitError, match="not numbers: try --dtype float32"):
        answer("what?", "rain", model=lm)


def test_answer_refuses_empty_texts(random_bert, random_gpt2):
    """A question or a text that is missing, or does not fit, is one sentence."""
    for question, context in (("", "rain"), ("what?", " \n"), (" ", " ")):
        with pytest.raises(HfkitError, match="give a question, and a text"):
            answer(question, context, model=random_bert)
    for folder in (random_bert, random_gpt2):
        with pytest.raises(HfkitError, match="the question is too long for 64 tokens"):
            answer("rain " * 70, "light", model=folder)
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        answer("what?", "rain", model=random_bert, temprature=1)


# models that write


def carrying(folder: Path, model: str, template: str) -> str:
    """A model whose folder carries a template."""
    lm = hfkit.load(model)
    give_task(lm.tokenizer, Task(template))
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", [None, "{question} {context}:{answer};", "ask {question}={answer}w"])
def test_answer_by_a_text_model(template, tiny, tmp_path):
    """A text model writes its answer after a template."""
    folder = carrying(tmp_path, tiny, template) if template else tiny
    task = Task(template or "{context}\n\nQuestion: {question}\nAnswer: {answer}")
    prompt = task.prompt({"question": "who?", "context": "rain"})
    plain = hfkit.generate(prompt, model=folder, temperature=0, max_new_tokens=9, stop_strings=[task.end], raw=True)
    found = answer("who?", "rain", model=folder, max_new_tokens=9)
    assert found.answer == plain.completion.strip() and found.score == pytest.approx(math.exp(plain.logprob))
    assert (found.start, found.end, found.question, found.model) == (None, None, "who?", folder)


def test_answer_other_task(tiny, tmp_path):
    """A text model that learned another task is refused."""
    with pytest.raises(HfkitError, match="learned another task, from en: use 'hfkit generate'"):
        answer("who?", "rain", model=carrying(tmp_path, tiny, "{en}={fr}"))


def test_answer_text_too_long(tiny):
    """A text that does not fit a text model is one sentence."""
    with pytest.raises(HfkitError, match="do not fit .* takes 64"):
        answer("who?", "rain " * 20, model=tiny)


# at a shell


@pytest.fixture
def shell(capfdbinary, monkeypatch):
    """`hfkit answer` with these arguments and this on stdin."""

    def ask(*arguments, stdin: bytes = b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return call(capfdbinary, "answer", *arguments)

    return ask


def test_answer_at_a_shell(finder, tmp_path, shell):
    """A question is answered from a file or a pipe."""
    text = "the falls of the under stone river and of"
    path = tmp_path / "text.txt"
    path.write_text(text)
    for arguments, stdin in ((["--context", path], b""), (["--context", "-"], text.encode()), ([], text.encode())):
        result = shell("what", "-m", finder, *arguments, stdin=stdin)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"stone river\n", b"")
    record = json.loads(shell("what", "-m", finder, "--json", stdin=text.encode()).stdout)
    assert list(record) == ["answer", "score", "start", "end", "question", "model"]
    assert record["answer"] == text[record["start"] : record["end"]] == "stone river" and 0.5 < record["score"] <= 1
    told = shell("what", "-m", finder, "-v", stdin=text.encode()).stderr.decode()
    assert f"characters {record['start']} to {record['end']}" in told


def test_answer_threshold_of_a_writer(tiny, shell):
    """A model that writes its answer has no threshold."""
    line = f"--no-answer-threshold is for a model that points at an answer: {tiny} writes it"
    assert_fails(shell("what", "-m", tiny, "--no-answer-threshold", "5", stdin=b"a text"), 2, line)


def test_answer_none_at_a_shell(finder, shell):
    """Without an answer the exit code is 1 and stderr says why."""
    text = b"the falls of the and of"
    assert_fails(shell("what", "-m", finder, stdin=text), 1, "does not answer that", "--no-answer-threshold")
    result = shell("what", "-m", finder, "--json", stdin=text)
    record = json.loads(result.stdout)
    assert result.returncode == 0 and (record["answer"], record["start"]) == ("", None)
    result = shell("what", "-m", finder, "--no-answer-threshold", "1000", stdin=text)
    assert result.returncode == 0 and result.stdout.strip() in text


def test_answer_errors_at_a_shell(random_bert, tiny, tmp_path, shell):
    """What is wrong is one line."""
    (tmp_path / "latin").write_bytes(b"the rain \xff falls")
    (tmp_path / "empty").touch()
    for context, code, words in (
        ("nowhere", 1, ["cannot read the input (nowhere)", "No such file"]),
        (tmp_path, 1, ["cannot read the input", "directory"]),
        (tmp_path / "latin", 1, ["UTF-8"]),
        (tmp_path / "empty", 1, ["give a question, and a text"]),
    ):
        assert_fails(shell("what?", "-m", random_bert, "--context", context), code, *words)
    assert_fails(shell(" ", "-m", random_bert, stdin=b"rain"), 1, "give a question")
    assert_fails(shell("what?", "-m", random_bert, stdin=b"rain \xff"), 2, "stdin is not UTF-8")
    assert_fails(shell("what?", "-m", tmp_path / "none", stdin=b"rain"), 1, "none")
    assert_fails(shell("what?", "-m", tiny, stdin=b"rain " * 20), 1, "do not fit")
