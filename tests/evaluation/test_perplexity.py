"""Scores are those of a plain loop over the same windows, whatever is scored together and in what precision."""

import contextlib
import csv
import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.chats import TEMPLATES
from support.corpora import talk
from support.pages import Page
from support.shell import assert_fails, call

import hfkit
from hfkit.cli.evaluate import evaluate
from hfkit.corpus.documents import END, Piece
from hfkit.corpus.encoding import IGNORED, encode_examples
from hfkit.errors import HfkitError
from hfkit.evaluation import perplexity
from hfkit.evaluation.windows import slide
from hfkit.inference import likelihood
from hfkit.models import architecture
from hfkit.models.loading import LanguageModel
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions, ModelsOptions, ServerOptions

BOTH = pytest.mark.parametrize("name", ["gpt2", "llama"])
WORDS = ["the", "cat", "sat", "a", "mat.", "Rain,", "t", "2", "wind\n", "\n", "stone"]


def text(characters: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    found = "a"
    while len(found) < characters:
        found += " " + draw.choice(WORDS)
    return found[:characters].rstrip() + "." * (characters - len(found[:characters].rstrip()))


@pytest.fixture(scope="module")
def lms(tiny, tiny_llama) -> dict[str, LanguageModel]:
    return {"gpt2": hfkit.load(tiny), "llama": hfkit.load(tiny_llama)}


@pytest.fixture(autouse=True)
def exact(request, monkeypatch):
    """float32 alone, but where a test is about the other."""
    if "halves" not in request.fixturenames:
        monkeypatch.setattr(perplexity, "computes_faster_in_bfloat16", lambda device: False)


@pytest.fixture
def halves(monkeypatch):
    """A processor that has bfloat16 units, and one that has none: `halves(True)`."""

    def give(have: bool) -> None:
        monkeypatch.setattr(architecture, "has_bfloat16_units", lambda: have)

    return give


def save(path: Path, *documents: str) -> Path:
    path.write_text(END.join(documents))
    return path


def windows_of(count: int, window: int, stride: int) -> dict[int, tuple[int, int]]:
    """For each target 1, 2 ... of `count` tokens: first and last but one token of the window that predicts it."""
    found = {}
    for target in range(1, count):
        end = window
        while end < target:
            end += stride
        end = min(end, count - 1)
        found[target] = max(0, end - window), end
    return found


@torch.inference_mode()
def reference(lm: LanguageModel, documents: list[str], window: int, stride: int) -> dict[str, float]:
    """Token by token, each window alone, in float32."""
    nll, top1, top5, count, size, words = 0.0, 0, 0, 0, 0, 0
    for document in documents:
        ids = lm.tokenizer(document)["input_ids"]
        if ids[0] != lm.tokenizer.bos_token_id:
            ids = [lm.tokenizer.bos_token_id, *ids]
        logits = {}
        for target, (start, end) in windows_of(len(ids), window, stride).items():
            if (start, end) not in logits:
                logits[start, end] = lm.model(torch.tensor([ids[start:end]])).logits[0].double().log_softmax(-1)
            row = logits[start, end][target - 1 - start]
            nll -= row[ids[target]].item()
            order = row.argsort(descending=True).tolist()
            top1, top5 = top1 + (order[0] == ids[target]), top5 + (ids[target] in order[:5])
        count, size, words = count + len(ids) - 1, size + len(document.encode()), words + len(document.split())
    return {
        "loss": nll / count, "perplexity": math.exp(nll / count), "bits_per_byte": nll / math.log(2) / size,
        "word_perplexity": math.exp(min(709, nll / words)), "token_accuracy": top1 / count,
        "top5_accuracy": top5 / count, "tokens": count, "bytes": size, "words": words, "documents": len(documents),
    }  # fmt: skip


def agree(found: hfkit.Evaluation, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name


# windows


def passages(sizes: list[int], counted: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    """Of a document whose token ids are 100, 101 ...; a part of them counts."""
    draw = np.random.default_rng(seed)
    ids = np.arange(sum(sizes)) + 100
    labels = np.where(draw.random(len(ids)) < counted, ids, IGNORED)
    units = np.repeat(np.arange(len(sizes)) + 7, sizes)
    return np.split(np.stack([ids, labels, units]), np.cumsum(sizes)[:-1], axis=1)


@pytest.mark.parametrize("seed", range(40))
def test_slide_predicts_every_token_once(seed):
    """Every token is a target exactly once, in the window that its position decides."""
    draw = random.Random(seed)
    window = draw.randint(1, 12)
    stride = draw.choice([window, draw.randint(1, window)])
    begin, counted = draw.choice([[], [1]]), draw.choice([1.0, 0.5])
    parts = passages([draw.randint(1, 30) for _ in range(draw.randint(1, 5))], counted, seed)
    text = np.concatenate(parts, 1)
    expected = windows_of(text.shape[1] + len(begin), window, stride)
    whole = np.array([*begin, *text[0]])
    seen = []
    for item in slide(iter(parts), begin, window, stride):
        ids, targets, units = item["input_ids"], item["targets"], item["units"]
        assert 1 <= len(ids) == len(targets) == len(units) <= window and (targets != IGNORED).any()
        for place, (target, unit) in enumerate(zip(targets.tolist(), units.tolist(), strict=True)):
            if target != IGNORED:
                at = target - 100 + len(begin)  # in the whole
                start, end = expected[at]
                assert ids.tolist() == whole[start:end].tolist() and at == start + place + 1
                assert unit == text[2, target - 100]
                seen.append(target)
    first = 0 if begin else 1  # nothing predicts the first one
    assert seen == [label for label in text[1, first:].tolist() if label != IGNORED]


def test_slide_reads_only_what_it_needs():
    """Windows are cut while the text is read."""
    read = []

    def source():
        for part in passages([50] * 100):
            read.append(len(read))
            yield part

    items = slide(source(), [1], 16, 8)
    for _ in range(10):
        next(items)
    assert len(read) <= 3  # 16 + 9 * 8 tokens are of two passages
    assert sum(1 for _ in items) > 500


def test_evaluate_reads_while_it_scores(tmp_path, lms, monkeypatch):
    """Not more than some hundred windows and pieces are held at a time."""
    read, ahead = [0], []

    def records(corpus, options):
        for _ in range(3000):
            read[0] += 1
            yield Piece("the cat", True)

    def scored(model, batches):
        found, done = likelihood.Scores(), 0
        for ids, targets, units in batches:
            done += len(ids)
            ahead.append(read[0] - done)
            found.add(units[targets != IGNORED], np.ones((targets != IGNORED).sum()), np.zeros(1).repeat(len(ids) * 7))
        return found

    monkeypatch.setattr(perplexity, "read_records", records)
    monkeypatch.setattr(perplexity, "score_batches", scored)
    found = hfkit.evaluate(save(tmp_path / "a.txt", "the cat"), model=lms["gpt2"])
    assert found.documents == 3000 and found.tokens == 3000 * 7 and found.loss == 1
    assert max(ahead) < 1500


# the same as a plain loop


@BOTH
@pytest.mark.parametrize("stride", [16, 8, 5])
def test_evaluate_equals_a_plain_loop(lms, name, stride, tmp_path):
    """A text around the length of one, two or three windows scores as token by token."""
    lm = lms[name]
    for characters in (1, 14, 15, 16, 17, 24, 25, 33, 90):  # tokens, or nearly so: around one window, two, three
        documents = [text(characters)]
        found = hfkit.evaluate(save(tmp_path / "a.txt", *documents), model=lm, max_length=16, stride=stride)
        agree(found, reference(lm, documents, 16, stride))
        assert (found.window, found.stride, found.dtype, found.model) == (16, stride, "float32", lm.name)


@BOTH
def test_evaluate_of_many_documents_equals_a_plain_loop(lms, name, tmp_path):
    lm = lms[name]
    documents = [text(1 + seed**2 % 217, seed) for seed in range(40)]
    found = hfkit.evaluate(save(tmp_path / "a.txt", *documents), model=lm, stride=lm.context // 2)
    agree(found, reference(lm, documents, lm.context, lm.context // 2))
    # Each is a passage, whose scores do not depend on what else there is.
    alone = hfkit.evaluate(save(tmp_path / "b.txt", documents[7]), model=lm, stride=lm.context // 2)
    assert found.scores.nll[7] == pytest.approx(alone.scores.nll[0], rel=1e-5)
    assert found.passages[7] == len(documents[7].encode())
    assert math.isnan(alone.loss_stderr) and found.loss_stderr > 0


@BOTH
def test_evaluate_of_a_long_document_equals_a_plain_loop(lms, name, tmp_path):
    """It is read in pieces of some 4,000 characters, over whose borders the windows go."""
    lm, documents = lms[name], [text(9000), "a short one", text(12_500, 1)]
    found = hfkit.evaluate(save(tmp_path / "a.txt", *documents), model=lm)
    assert len(found.passages) > 4 and found.documents == 3
    agree(found, reference(lm, documents, lm.context, lm.context))


def test_evaluate_of_files_and_rows(lms, tmp_path):
    """Several files and rows are one corpus; empty documents do not count."""
    lm = lms["gpt2"]
    first, second = save(tmp_path / "a.txt", "the cat", "  \n ", "", "a dog"), tmp_path / "b.jsonl"
    second.write_text('{"text": "rain"}\n{"text": ""}\n{"text": "wind"}\n')
    found = hfkit.evaluate([first, second], model=lm)
    agree(found, reference(lm, ["the cat", "a dog", "rain", "wind"], 64, 64))


def test_evaluate_limits_stride_and_window(lms, tmp_path):
    """A stride above the window is the window; a window above the model's context is the context."""
    path = save(tmp_path / "a.txt", text(200))
    found = hfkit.evaluate(path, model=lms["gpt2"], max_length=1000, stride=500)
    assert (found.window, found.stride) == (64, 64)
    assert found.loss == hfkit.evaluate(path, model=lms["gpt2"]).loss
    one = hfkit.evaluate(path, model=lms["gpt2"], max_length=1)  # each token from the one before it
    agree(one, reference(lms["gpt2"], [text(200)], 1, 1))


def test_evaluate_with_a_smaller_stride_predicts_better(tmp_path):
    """A smaller stride gives each token more context."""
    path = save(tmp_path / "a.txt", (Path(__file__).parents[2] / "LICENSE").read_text()[:1500])
    short, long = (hfkit.evaluate(path, max_length=64, stride=stride).loss for stride in (64, 16))
    assert long < short


def test_evaluate_does_not_depend_on_batch_size(lms, tmp_path, monkeypatch):
    path = save(tmp_path / "a.txt", *(text(1 + seed**2 % 217, seed) for seed in range(30)))
    found = hfkit.evaluate(path, model=lms["llama"])
    for tokens, together in ((1, 3), (700, 1)):
        monkeypatch.setattr(perplexity, "_BATCH", {"cpu": tokens})
        monkeypatch.setattr(perplexity, "_SORTED", together)
        other = hfkit.evaluate(path, model=lms["llama"])
        assert other.scores.nll.tolist() == pytest.approx(found.scores.nll.tolist(), rel=1e-5)
        assert other.scores.top1.tolist() == found.scores.top1.tolist()


@pytest.mark.slow
def test_evaluate_equals_lm_evaluation_harness(tiny, lms, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=tiny, device="cpu", batch_size=1, dtype="float32", max_length=64)
    for documents in ([text(40)], [text(63)], [text(64)], [text(65)], [text(700), text(333, 1), "b"]):
        found = hfkit.evaluate(save(tmp_path / "a.txt", *documents), model=lms["gpt2"])
        requests = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in documents]
        logs = harness.loglikelihood_rolling(requests)
        by_word = [(log, len(document.split())) for log, document in zip(logs, documents, strict=True)]
        by_byte = [(log, len(document.encode())) for log, document in zip(logs, documents, strict=True)]
        assert found.word_perplexity == pytest.approx(min(weighted_perplexity(by_word), 8.2e307), rel=1e-3)
        assert 2**found.bits_per_byte == pytest.approx(weighted_perplexity(by_byte), rel=1e-3)
        assert found.bits_per_byte == pytest.approx(bits_per_byte(by_byte), rel=1e-3)


# rows with answers


@torch.inference_mode()
def answer_nll(lm: LanguageModel, ids: list[int], labels: list[bool]) -> float:
    rows = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(rows[at - 1][ids[at]].item() for at in range(1, len(ids)) if labels[at])


def test_evaluate_of_completions_scores_no_prompt(lms, tmp_path):
    """Of a prompt and its completion only the completion counts."""
    lm, encode = lms["gpt2"], lambda text: lms["gpt2"].tokenizer(text)["input_ids"]
    rows = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "", "completion": "rain über"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = hfkit.evaluate(tmp_path / "rows.jsonl", model=lm)
    prompt, first, second = encode("the cat"), [*encode(" sat"), 256], [*encode("rain über"), 256]
    nll = [
        answer_nll(lm, prompt + first, [False] * len(prompt) + [True] * len(first)),
        answer_nll(lm, [256, *second], [False] + [True] * len(second)),  # an answer to nothing begins a text
    ]
    assert found.scores.nll.tolist() == pytest.approx(nll, rel=1e-4)
    assert found.tokens == len(first) + len(second)  # the end of an answer is a part of it
    assert found.passages.tolist() == [4, 10] and (found.bytes, found.words, found.documents) == (14, 3, 2)
    assert found.bits_per_byte == pytest.approx(sum(nll) / math.log(2) / 14, rel=1e-4)


def test_evaluate_of_messages_scores_the_assistant(lms, tmp_path):
    """Of a conversation only the assistant's turns count."""
    lm = lms["gpt2"]
    turns = [("user", "hi"), ("assistant", "ho"), ("user", "the cat?"), ("assistant", "sat")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = hfkit.evaluate(tmp_path / "rows.jsonl", model=lm)
    whole = "User: hi\nAssistant: ho<|endoftext|>\nUser: the cat?\nAssistant: sat<|endoftext|>"
    ids = lm.tokenizer(whole)["input_ids"]
    plain = whole.replace("<|endoftext|>", "\x00")  # a token, and a byte in its place
    labels = [False] * len(ids)
    for answer in ("ho\x00", "sat\x00"):
        start = plain.index(answer)
        labels[start - 1 : start + len(answer)] = [True] * (len(answer) + 1)  # and the space before it
    assert found.tokens == sum(labels) and found.bytes == 5 and found.words == 2
    assert found.scores.nll.tolist() == pytest.approx([answer_nll(lm, ids, labels)], rel=1e-4)


def test_evaluate_of_an_answer_longer_than_the_window(lms, tmp_path):
    """An answer that is longer than the window is scored to its end."""
    lm, answer = lms["gpt2"], text(300)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat sat", "completion": answer}) + "\n")
    found = hfkit.evaluate(tmp_path / "rows.jsonl", model=lm)
    assert found.tokens == 301 and found.bytes == 300
    ids = [*lm.tokenizer("the cat sat" + answer)["input_ids"], 256]
    nll = 0.0
    for target, (start, end) in windows_of(len(ids), 64, 64).items():
        if target >= 11:  # of the answer
            with torch.inference_mode():
                row = lm.model(torch.tensor([ids[start:end]])).logits[0, target - 1 - start].double()
            nll -= row.log_softmax(-1)[ids[target]].item()
    assert found.scores.nll.tolist() == pytest.approx([nll], rel=1e-4)


# errors


def test_evaluation_errors_equal_a_bootstrap(lms, tmp_path):
    found = hfkit.evaluate(
        save(tmp_path / "a.txt", *(text(20 + 10 * seed, seed) for seed in range(60))), model=lms["gpt2"]
    )
    rows = np.random.default_rng(0).integers(0, 60, (4000, 60))

    def spread(below: np.ndarray) -> float:
        return float(np.std(found.scores.nll[rows].sum(1) / below[rows].sum(1)))

    assert found.loss_stderr == pytest.approx(spread(found.scores.tokens), rel=0.1)
    assert found.bits_per_byte_stderr == pytest.approx(spread(found.passages) / math.log(2), rel=0.1)
    assert found.perplexity_stderr == pytest.approx(found.perplexity * found.loss_stderr)


def test_gain_over_compares_passage_by_passage(lms, tmp_path):
    """Models with different tokenizers are compared by the bits of each passage."""
    path = save(tmp_path / "a.txt", *(text(20 + 10 * seed, seed) for seed in range(40)))
    one, other = (hfkit.evaluate(path, model=lms[name]) for name in ("gpt2", "llama"))
    assert one.tokens != other.tokens and one.bytes == other.bytes
    gain, error = one.gain_over(other)
    assert gain == pytest.approx(other.bits_per_byte - one.bits_per_byte)
    rows = np.random.default_rng(0).integers(0, 40, (4000, 40))
    saved = (other.scores.nll - one.scores.nll) / math.log(2)
    assert error == pytest.approx(np.std(saved[rows].sum(1) / one.passages[rows].sum(1)), rel=0.1)
    assert other.gain_over(one) == pytest.approx((-gain, error))
    assert one.gain_over(one) == (0, 0)
    with pytest.raises(HfkitError, match="same corpus"):
        one.gain_over(hfkit.evaluate(save(tmp_path / "b.txt", text(50)), model=lms["gpt2"]))


# precision


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("corpus") / "many.txt", *(text(200, seed) for seed in range(40)))


def test_evaluate_uses_bfloat16_where_it_is_fast(halves, capfdbinary):
    poems = Path(__file__).parents[2] / "recipes/data/poems.txt"  # words in an order that the model knows
    halves(False)
    exact = hfkit.evaluate(poems)
    assert exact.dtype == "float32"
    halves(True)
    result = call(capfdbinary, "evaluate", poems, "--json", "--verbose")
    found = json.loads(result.stdout)
    assert found["dtype"] == "bfloat16" and found["loss"] != exact.loss
    assert found["perplexity"] == pytest.approx(exact.perplexity, rel=2e-3)
    assert b"bfloat16 changes the loss of the first" in result.stderr
    asked = hfkit.evaluate(poems, model=ModelOptions(dtype="float32"))
    assert asked.dtype == "float32" and asked.scores.nll.tolist() == exact.scores.nll.tolist()
    half = hfkit.evaluate(poems, model=ModelOptions(dtype="bfloat16"))
    assert half.dtype == "bfloat16" and half.perplexity == pytest.approx(exact.perplexity, rel=1e-2)


def test_evaluate_keeps_float32_where_bfloat16_changes_the_loss(halves, many, monkeypatch):
    halves(True)
    exact = hfkit.evaluate(many, model=ModelOptions(dtype="float32"))
    monkeypatch.setattr(perplexity, "_CLOSE", 0.0)
    found = hfkit.evaluate(many)
    assert found.dtype == "float32" and found.scores.nll.tolist() == exact.scores.nll.tolist()


def test_evaluate_of_one_batch_is_in_float32(halves, tmp_path, tiny):
    halves(True)
    assert hfkit.evaluate(save(tmp_path / "a.txt", text(200)), model=tiny).dtype == "float32"


def test_evaluate_of_a_quantized_model_says_so(tiny, tmp_path):
    path = save(tmp_path / "a.txt", text(200))
    exact = hfkit.evaluate(path, model=tiny)
    for bits in ("int8", "int4"):
        found = hfkit.evaluate(path, model=ModelOptions(model=tiny, quantize=bits))
        assert found.dtype == bits and found.loss == pytest.approx(exact.loss, rel=0.1)


# at a shell


def test_write_evaluation_prints_errors_and_json(tiny, tmp_path, capfdbinary):
    path = save(tmp_path / "a.txt", *(text(200, seed) for seed in range(5)))
    found = hfkit.evaluate(path, model=tiny, stride=20)
    result = call(capfdbinary, "evaluate", path, "-m", tiny, "--stride", 20, "--json")
    assert result.returncode == 0 and result.stderr == b""
    row = json.loads(result.stdout)
    assert row == found.to_dict()
    for name in ("model", "loss", "perplexity", "perplexity_stderr", "bits_per_byte", "token_accuracy", "tokens",
                 "bytes", "documents", "window", "stride", "dtype"):  # fmt: skip
        assert name in row
    shown = call(capfdbinary, "evaluate", path, "-m", tiny, "--stride", 20).stdout.decode()
    for words in (
        f"{found.perplexity:.3f} ± {found.perplexity_stderr:.3f}",
        f"{found.bits_per_byte:.4f} ±",
        "float32",
    ):
        assert words in shown


def test_write_evaluation_explains_a_missing_error(tiny, tmp_path, capfdbinary):
    """An error that is not known is left out, and the reason is given."""
    path = save(tmp_path / "a.txt", text(50))
    row = json.loads(call(capfdbinary, "evaluate", path, "-m", tiny, "--json").stdout, parse_constant=pytest.fail)
    assert row["perplexity_stderr"] is None and row["perplexity"] > 1
    shown = call(capfdbinary, "evaluate", path, "-m", tiny).stdout.decode()
    assert "nan" not in shown
    table = call(capfdbinary, "evaluate", path, "-m", tiny, "-m", tiny).stdout.decode()
    assert "nan" not in table and "error" not in table
    for output in (shown, table):
        figures, reason = output.rstrip("\n").rsplit("\n", 1)
        assert "±" not in figures and reason.startswith("No ± is shown: the corpus is a single passage")


def test_write_evaluation_of_several_models_is_a_table(tiny, tiny_llama, tmp_path, capfdbinary):
    """A table of the models, with the bits that the later ones save."""
    path = save(tmp_path / "a.txt", *(text(200, seed) for seed in range(30)))
    line = ["evaluate", path, "-m", tiny, "-m", tiny_llama, "-m", "bundled"]
    rows = json.loads(call(capfdbinary, *line, "--json").stdout)
    assert [row["model"] for row in rows] == [tiny, tiny_llama, "bundled"]
    assert rows[0] == hfkit.evaluate(path, model=tiny).to_dict()
    result = call(capfdbinary, *line)
    assert result.returncode == 0 and result.stderr == b""
    found = [hfkit.evaluate(path, model=name) for name in (tiny, tiny_llama, "bundled")]
    table = " ".join(result.stdout.decode().split())
    for one in found:
        assert f"{one.perplexity:.2f} ± {one.perplexity_stderr:.2f}" in table
    gain, error = found[2].gain_over(found[0])
    assert gain > 2 * error and f"{gain:+.4f} ± {error:.4f}" in table and "beyond" in table
    same = call(capfdbinary, "evaluate", path, "-m", tiny, "-m", tiny).stdout.decode()
    assert "within" in same and "beyond" not in same


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("columns", [30, 50, 400])
def test_write_evaluation_cuts_no_figure_in_a_narrow_terminal(
    tiny, tiny_llama, reviews, tmp_path, monkeypatch, columns
):
    """A table that does not fit is turned: a line for each figure."""
    monkeypatch.setattr("sys.stdout", screen := Terminal())
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    path = save(tmp_path / "a.txt", *(text(200, seed) for seed in range(30)))
    models = [tiny, tiny_llama]
    print_evaluation, here, how = evaluate.__wrapped__, ServerOptions(), EvaluateOptions()
    print_evaluation(ModelsOptions(model=models), here, CorpusOptions(), how, [str(path)], json=False)
    labels = CorpusOptions(template="{text}: {label}", labels=["good", "bad"])
    print_evaluation(ModelsOptions(model=[tiny]), here, labels, how, [reviews], json=False)
    shown = screen.getvalue()
    found = [hfkit.evaluate(path, model=name) for name in models]
    assessment = hfkit.evaluate(reviews, model=tiny, template="{text}: {label}", labels=["good", "bad"])
    assert "…" not in shown and ("\nperplexity" in shown) == (columns < 400)
    for one in found:
        assert f"{one.perplexity:.2f} ± {one.perplexity_stderr:.2f}" in shown
        assert f"{one.bits_per_byte:.4f} ± {one.bits_per_byte_stderr:.4f}" in shown and one.model in shown
    for name in ("accuracy", "loss", "f1"):
        assert f"{assessment.metrics[name]:.3g} ± {assessment.metrics[f'{name}_stderr']:.3g}" in shown


@pytest.fixture
def reviews(tmp_path) -> str:
    path = tmp_path / "reviews.jsonl"
    rows = [{"text": text(20, seed), "label": "good" if seed % 3 else "bad"} for seed in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_evaluate_ends_with_a_sentence(tiny, tiny_llama, reviews, tmp_path, capfdbinary):
    def last_line(*arguments) -> str:
        return call(capfdbinary, "evaluate", *arguments).stdout.decode().splitlines()[-1]

    path = save(tmp_path / "a.txt", *(text(200, seed) for seed in range(30)))
    perplexity = hfkit.evaluate(path, model=tiny).perplexity
    assert last_line(path, "-m", tiny).startswith("On average the model is as unsure as if it chose among ")
    assert f"{perplexity:,.1f} equally likely tokens" in last_line(path, "-m", tiny)
    best = last_line(path, "-m", tiny, "-m", "bundled")
    gain, error = hfkit.evaluate(path).gain_over(hfkit.evaluate(path, model=tiny))
    assert best == f"bundled predicts the corpus best: {gain:.4f} ± {error:.4f} bits per byte fewer than {tiny}."
    assert "equally well" in last_line(path, "-m", tiny, "-m", tiny)
    labels = ["--template", "{text}: {label}", "--labels", "good", "--labels", "bad"]
    output = call(capfdbinary, "evaluate", reviews, "-m", tiny, *labels).stdout.decode()
    found = hfkit.evaluate(reviews, model=tiny, template="{text}: {label}", labels=["good", "bad"])
    gain = found.metrics["accuracy"] - found.baselines["most frequent answer"]["accuracy"]
    word = "better" if gain > 2 * found.metrics["accuracy_stderr"] else "no better"
    assert f"{tiny} is {word} than the baseline (most frequent answer): accuracy" in output.splitlines()[-1]
    counts = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith(("│ good", "│ bad"))]
    matrix = [[int(cell) for cell in row[1:]] for row in counts]
    assert matrix == found.metrics["confusion"]["matrix"] and sum(map(sum, matrix)) == 9


def test_evaluation_prints_short(tiny, reviews, tmp_path):
    """Not with its arrays, or the table of each class."""
    found = hfkit.evaluate(save(tmp_path / "a.txt", *(text(200, seed) for seed in range(30))), model=tiny)
    labels = {"template": "{text}: {label}", "labels": ["good", "bad"]}
    for one in (found, hfkit.evaluate(reviews, model=tiny, **labels)):
        assert str(one) == repr(one) and len(str(one).replace(tiny, "")) < 250 and tiny in str(one)
        assert "array" not in str(one) and "{" not in str(one)
        page = Page(one._repr_html_())  # what a notebook shows
        page.assert_alone()
        assert tiny in page.text and len(page.tables) == 1 and page.text.rstrip().endswith(".")
    assert f"perplexity {found.perplexity:.2f} ± {found.perplexity_stderr:.2f}" in str(found)


def test_write_evaluation_shows_a_name_to_the_letter(tiny, tmp_path, capfdbinary, copy, monkeypatch):
    """rich would read [red] as a colour."""
    monkeypatch.chdir(tmp_path)
    name = "./[red]m[:smile:"
    copy(tiny).rename(name)
    save(tmp_path / "a.txt", text(50))
    shown = call(capfdbinary, "evaluate", "a.txt", "-m", name, "-m", name).stdout.decode()
    assert shown.count(name) == 5  # two rows, the head of the last column, and the sentence


def test_write_evaluation_checks_all_names_first(tiny, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setattr("hfkit.evaluation.perplexity.evaluate", None)
    path = save(tmp_path / "a.txt", text(50))
    assert_fails(call(capfdbinary, "evaluate", path, "-m", tiny, "-m", tmp_path / "none"), 1, "none")


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--max-length", "0"], 2, "max-length"),
        (["--stride", "0"], 2, "stride"),
        (["--metric", "bleu"], 1, "plain text"),
        (["--template", "{a}{b}"], 1, "plain text"),
    ],
)
def test_evaluate_refuses_a_bad_option_in_one_line(tiny, tmp_path, capfdbinary, flags, code, words):
    path = save(tmp_path / "a.txt", text(50))
    assert_fails(call(capfdbinary, "evaluate", path, "-m", tiny, *flags), code, words)


def test_evaluate_refuses_what_cannot_be_scored_in_one_line(tiny, tiny_t5, tmp_path, capfdbinary, copy):
    assert_fails(call(capfdbinary, "evaluate", tmp_path / "none.txt", "-m", tiny), 1, "none.txt")
    (tmp_path / "blank.txt").write_text(" \n \n")
    assert_fails(call(capfdbinary, "evaluate", tmp_path / "blank.txt", "-m", tiny), 1, "holds no text")
    path = save(tmp_path / "a.txt", text(50))
    assert_fails(call(capfdbinary, "evaluate", path, "-m", tiny_t5), 1, "has an encoder")
    (tmp_path / "rows.jsonl").write_text('{"a": "b", "c": "d"}\n')
    assert_fails(call(capfdbinary, "evaluate", tmp_path / "rows.jsonl", "-m", tiny, "--metric", "bleu"), 1, "'a', 'c'")
    with pytest.raises(TypeError, match="did you mean 'stride'"):
        hfkit.evaluate(path, model=tiny, strid=1)


# tasks


def test_evaluate_of_pairs_uses_the_metrics_asked_for(tiny, tmp_path, capfdbinary):
    rows = [{"prompt": "the cat", "completion": "sat"}, {"prompt": "a", "completion": "a dog"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ["evaluate", tmp_path / "rows.jsonl", "-m", tiny, "--metric", "exact_match", "--metric", "chrf"]
    row = json.loads(call(capfdbinary, *line, "--json").stdout, parse_constant=pytest.fail)
    assert row["examples"] == 2 and {"exact_match", "f1", "chrf", "bleu", "chrf_stderr"} < set(row)
    expected = [
        hfkit.generate(one["prompt"], model=tiny, temperature=0, stop_strings=["\n"]).completion.strip()
        for one in rows
    ]
    hits = [guess == one["completion"] for guess, one in zip(expected, rows, strict=True)]
    assert row["exact_match"] == sum(hits) / 2
    shown = call(capfdbinary, *line).stdout.decode()
    assert "exact_match" in shown and "(most frequent answer)" in shown


def test_evaluate_of_labels_takes_f1_for_the_classes(lms, tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = [(text(20, seed), "the good" if seed % 3 else "a good") for seed in range(8)]
        csv.writer(file).writerows([("text", "label"), *rows])
    asked = {"template": "{text}: {label}", "labels": ["the good", "a good"], "metric": ["f1"]}
    found = hfkit.evaluate(tmp_path / "rows.csv", model=lms["gpt2"], **asked)
    assert found.metrics["classes"].keys() <= {"the good", "a good"} and found.metrics["f1"] < 1
    assert found.metrics["confusion"]["matrix"]


# memory


MEASURE = """
import resource, sys
import hfkit
hfkit.evaluate(sys.argv[1], model=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_evaluate_takes_constant_memory(tmp_path):
    """With a vocabulary as large as GPT-2's, of a model so narrow that it is done in minutes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from hfkit.models.sources import BUNDLED

    config = json.loads((BUNDLED / "config.json").read_text())
    config |= {"n_positions": 512, "n_embd": 8, "n_layer": 1, "n_head": 1, "dtype": "float32"}
    model = GPT2LMHeadModel(GPT2Config(**config))
    hfkit.load("bundled").tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    peaks = []
    for megabytes in (1, 20):
        path = save(tmp_path / "corpus.txt", *(text(2500, seed) for seed in range(400 * megabytes)))
        command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "model")]
        result = subprocess.run(command, capture_output=True, check=True, timeout=900)
        peaks.append(int(result.stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks


@pytest.mark.parametrize(("template", "texts"), [("phi", 2), ("r1", 1)])
def test_evaluate_scores_every_answer_once(tiny_llama, tmp_path, template, texts):
    """Answers of one conversation count once, whether the template needs a text for each of them or not."""
    lm = hfkit.load(tiny_llama)
    turns = [("user", "rain?"), ("assistant", "the cat"), ("user", "so"), ("assistant", "a mat."), ("user", "?")]
    example = talk(*turns)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(example.row))
    with patched_template(lm.tokenizer, TEMPLATES[template]):
        rows = list(encode_examples([example], lm.tokenizer))
        evaluation = hfkit.evaluate(str(path), model=lm)
    assert len(rows) == texts and max(len(row["input_ids"]) for row in rows) <= evaluation.window
    losses = [loop_losses(lm.model, row) for row in rows]
    assert evaluation.loss == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert evaluation.passages.tolist() == [len("the cat" + "a mat.")] and evaluation.documents == 1


def loop_losses(model, row) -> torch.Tensor:
    """Nats of each token that is learned, by one forward pass over the whole row."""
    ids, labels = (torch.from_numpy(row[name].astype(np.int64)) for name in ("input_ids", "labels"))
    with torch.inference_mode():
        scores = model(ids[None]).logits[0].float().log_softmax(-1)
    learned = labels[1:] != IGNORED
    return -scores[:-1][learned].gather(1, labels[1:][learned][:, None])[:, 0]


@contextlib.contextmanager
def patched_template(tokenizer, template: str):
    before, tokenizer.chat_template = tokenizer.chat_template, template
    yield
    tokenizer.chat_template = before
