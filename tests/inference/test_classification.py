"""Labels are as likely as a plain forward pass says; models with a head give what plain transformers gives."""

import io
import json
import random
from pathlib import Path

import pytest
import torch
from support import trials
from support.shell import assert_fails, call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    set_seed,
)

import hfkit
from hfkit.corpus.templates import Task
from hfkit.errors import HfkitError, OptionError
from hfkit.inference.classification import calibration_error, classify, label_scores, labelling_task
from hfkit.models.loading import LanguageModel
from hfkit.options import TaskOptions

pytestmark = pytest.mark.usefixtures("brisk")
ZERO_SHOT = "{text}\nThis is about: {label}"
LABELS = ["a", "very long", "the rain", "the river", "th, he", "of"]
FAMILIES = pytest.mark.parametrize("family", ["tiny", "tiny_llama"])


def plain_scores(folder: str, prompt: str, answers: list[str]) -> list[float]:
    """Sums of the tokens' log-probabilities, text by text, in a forward pass over the whole."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start, found = len(tokenizer(prompt)["input_ids"]), []
    for answer in answers:
        ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
        with torch.inference_mode():
            logs = model(ids).logits[0].log_softmax(-1)
        found.append(sum(logs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1])))
    return found


def plain_shares(scores: list[float], labels: list[str]) -> dict[str, float]:
    return dict(zip(labels, torch.tensor(scores, dtype=torch.float64).softmax(-1).tolist(), strict=True))


def texts(count: int, longest: int = 4) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(trials.WORDS, k=draw.randint(1, longest))) for _ in range(count)]


# the likelihood of labels


@FAMILIES
def test_label_scores_equal_a_plain_pass(family, request):
    """A label is as likely as its tokens in a plain forward pass."""
    folder = request.getfixturevalue(family)
    lm, prompts = hfkit.load(folder), [f"{text}:" for text in ["rain", *texts(5), "wind and the light of a river"]]
    labels = [lm.tokenizer(f":{answer}", add_special_tokens=False)["input_ids"] for answer in ("", " a", " the rain")]
    start = len(labels[0])
    rows = [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    found = label_scores(lm, rows, [ids[start:] for ids in labels[1:]]).tolist()
    for prompt, scores in zip(prompts, found, strict=True):
        assert scores == pytest.approx(plain_scores(folder, prompt, [" a", " the rain"]), rel=1e-5, abs=1e-5)
    assert len({round(score, 3) for scores in found for score in scores}) == 2 * len(prompts)


@FAMILIES
@pytest.mark.parametrize("template", [ZERO_SHOT, "{text}={label}", "{text}: {label}.\n", "Q {text}  {label} END"])
def test_classify_probabilities(family, template, request):
    """Probabilities are shares of the likelihoods of the answers."""
    folder = request.getfixturevalue(family)
    task, text = Task(template), "a wind"
    options = {} if template == ZERO_SHOT else {"template": template.replace("\n", "\\n")}
    found = classify(text, model=folder, labels=LABELS, **options)
    answers = [task.complete(label).removesuffix(task.end) for label in LABELS]
    expected = plain_shares(plain_scores(folder, task.fill(text), answers), LABELS)
    assert found.probabilities == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert list(found.probabilities) == sorted(LABELS, key=lambda label: -found.probabilities[label])
    assert str(found) == found.label == max(expected, key=expected.get) and found.text == text


@FAMILIES
def test_classify_labels_of_one_token(family, request):
    """Labels of one token need one forward pass only."""
    folder = request.getfixturevalue(family)
    found = classify("wind", model=folder, labels=["a", "b"], template="{text}={label}")
    expected = plain_shares(plain_scores(folder, "wind=", ["a", "b"]), ["a", "b"])
    assert found.probabilities == pytest.approx(expected, rel=1e-4)


@FAMILIES
def test_classify_nested_labels(family, request):
    """Where one label is the beginning of another, the end counts, too.

    Else the longer of them could never be the likelier one.
    """
    folder, labels = request.getfixturevalue(family), ["the", "the river", "rain"]
    found = classify("wind", model=folder, labels=labels, template="{text}: {label}.")
    expected = plain_shares(plain_scores(folder, "wind:", [" the.", " the river.", " rain."]), labels)
    assert found.probabilities == pytest.approx(expected, rel=1e-4)


@FAMILIES
def test_classify_equals_alone(family, request, monkeypatch):
    """Many texts get what each gets alone, in their order."""
    lm, many = hfkit.load(request.getfixturevalue(family)), texts(30)
    alone = [classify(text, model=lm, labels=LABELS) for text in many]
    for window, tokens in ((128, 16_384), (7, 600), (1, 1)):
        monkeypatch.setattr("hfkit.inference.classification._WINDOW", window)
        monkeypatch.setattr("hfkit.inference.classification._TOKENS", {"cpu": tokens})
        monkeypatch.setattr("hfkit.inference.classification._SCORED", {"cpu": tokens // 4})
        together = classify(many, model=lm, labels=LABELS)
        for one, other in zip(alone, together, strict=True):
            assert one.text == other.text
            assert other.probabilities == pytest.approx(one.probabilities, rel=1e-4, abs=1e-7)
            assert sum(other.probabilities.values()) == pytest.approx(1)
    shares = {round(one.probabilities["a"], 5) for one in alone}
    assert len(shares) > 20  # so that an exchange would be seen


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba", "jamba"])
@pytest.mark.parametrize("labels", [["a", "b"], LABELS])
def test_label_scores_need_no_cache_of_keys_and_values(kind, labels, tiny):
    """Mamba's state cannot be repeated for each label, openai-gpt keeps nothing, Jamba has layers of both kinds."""
    shape = {"vocab_size": 257, "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 256}
    set_seed(2)
    if kind == "openai-gpt":
        model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(n_positions=64, n_embd=32, n_layer=2, n_head=2, **shape))
    elif kind == "mamba":
        model = MambaForCausalLM(MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2, **shape))
    else:
        model = JambaForCausalLM(JambaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            attn_layer_period=2, attn_layer_offset=1, expert_layer_period=9, expert_layer_offset=8, num_experts=1,
            num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
            max_position_embeddings=64, **shape))  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 3
    lm, many = LanguageModel(model.eval(), AutoTokenizer.from_pretrained(tiny)), ["rain", *texts(6), "a longer text"]
    task = Task(ZERO_SHOT)
    for text, result in zip(many, classify(many, model=lm, labels=labels), strict=True):
        scores = []
        for label in labels:
            prompt, whole = (
                lm.tokenizer(part)["input_ids"] for part in (task.fill(text), f"{task.fill(text)} {label}")
            )
            with torch.inference_mode():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logs[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        assert result.probabilities == pytest.approx(plain_shares(scores, labels), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantize_mamba(tiny, tmp_path, bits):
    """A quantized Mamba writes text and labels it.

    It multiplies by the weight of one of its layers without calling the layer.
    """
    config = MambaConfig(vocab_size=257, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=256)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    lm = hfkit.load(str(tmp_path), quantize=bits)
    assert hfkit.generate("a", model=lm, max_new_tokens=4, seed=1).tokens > 0
    assert len(classify("a", model=lm, labels=["rain", "wind"]).probabilities) == 2


def test_classify_context(tiny):
    """A text fits with its label up to the last token of the context, and not beyond."""
    labels, template = ["ab", "abcd", "x"], "{text}:{label}."  # with the end of a label 5 tokens of 64
    found = classify("w" * 58, model=tiny, labels=labels, template=template)
    expected = plain_shares(plain_scores(tiny, "w" * 58 + ":", ["ab.", "abcd.", "x."]), labels)
    assert found.probabilities == pytest.approx(expected, rel=1e-4)
    with pytest.raises(HfkitError, match=r"^60 tokens of text and 5 of a label do not fit .* takes 64 together"):
        classify("w" * 59, model=tiny, labels=labels, template=template)
    with pytest.raises(HfkitError, match="^text 1: 60 tokens"):
        classify(["w", "w" * 59, "w"], model=tiny, labels=labels, template=template)


def test_classify_columns(tiny):
    """Rows have the columns of the template."""
    row = {"a": "rain", "b": "wind", "label": "never"}
    found = classify(row, model=tiny, labels=["x", "yy"], template="{a}/{b}={label}")
    assert found.text == "rain wind"
    assert found.probabilities == pytest.approx(
        plain_shares(plain_scores(tiny, "rain/wind=", ["x", "yy"]), ["x", "yy"]), rel=1e-4
    )
    with pytest.raises(HfkitError, match="no column 'b': there are 'a'"):
        classify({"a": "rain"}, model=tiny, labels=["x", "yy"], template="{a}/{b}={label}")
    with pytest.raises(HfkitError, match="fields a, b"):
        classify("rain", model=tiny, labels=["x", "yy"], template="{a}/{b}={label}")


@pytest.mark.parametrize("labels", [None, [], ["one"], ["a", "a"], ["a", " "], ["a", ""]])
def test_labelling_task_labels(tiny, labels):
    """Labels must be several and different."""
    with pytest.raises(OptionError, match="labels"):
        classify("rain", model=tiny, labels=labels)


@pytest.fixture(scope="module")
def learned(tiny, tmp_path_factory) -> str:
    """`tiny` after it learned that texts of rain are bad and those of light are good."""
    folder = tmp_path_factory.mktemp("learned")
    rows = [{"text": f"{word} {number}", "label": label} for number in range(30)
            for word, label in (("rain", "bad"), ("light", "good"))]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = trials.SMALL | {
        "max_steps": 60,
        "eval_steps": 60,
        "per_device_train_batch_size": 8,
        "optim": "adamw_torch",
    }
    run = hfkit.finetune(
        str(folder / "rows.jsonl"), model=tiny, template="{text} is {label}", labels=["good", "bad"],
        output_dir=str(folder / "run"), **options | {"learning_rate": 0.01, "lr_scheduler_type": "constant"},
    )  # fmt: skip
    return run.output_dir


def test_labelling_task_of_the_model(learned):
    """A model that learned labels needs none."""
    found = classify(["rain 40", "light 50"], model=learned)
    assert [one.label for one in found] == ["bad", "good"] and all(
        max(one.probabilities.values()) > 0.9 for one in found
    )
    expected = plain_shares(plain_scores(learned, "rain 40 is", [" good", " bad"]), ["good", "bad"])
    assert found[0].probabilities == pytest.approx(expected, rel=1e-3, abs=1e-6)
    lm = hfkit.load(learned)
    assert labelling_task(lm, TaskOptions()).labels == ("good", "bad")
    other = labelling_task(lm, TaskOptions(labels=["fine", "poor"]))
    assert other.template == "{text} is {label}" and other.labels == ("fine", "poor")


# models with a head


def save_with_head(
    folder: Path, model: str, pad: bool = True, kind=AutoModelForSequenceClassification, **config
) -> str:
    """A model with a new head whose logits differ, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if pad and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(0)
    headed = kind.from_pretrained(model, pad_token_id=tokenizer.pad_token_id if pad else None, **config)
    for name, parameter in headed.named_parameters():
        if name.startswith(("score", "classifier", "qa_outputs")):
            parameter.data *= 30
    headed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


NAMES = {"id2label": {0: "good", 1: "bad", 2: "so so"}, "label2id": {"good": 0, "bad": 1, "so so": 2}}


@pytest.fixture(scope="module")
def headed(tiny_bert, tiny, tmp_path_factory) -> dict[str, str]:
    """Classifiers, by kind."""
    folder = tmp_path_factory.mktemp("headed")
    set_seed(0)
    roberta = RobertaConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=1, bos_token_id=256, eos_token_id=256, initializer_range=0.2, **NAMES,
    )  # fmt: skip
    RobertaForSequenceClassification(roberta).save_pretrained(folder / "roberta")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "roberta")
    return {
        "roberta": str(folder / "roberta"),
        "bert": save_with_head(folder / "bert", tiny_bert, **NAMES),
        "gpt2": save_with_head(folder / "gpt2", tiny, **NAMES),
        "gpt2 without padding": save_with_head(folder / "bare", tiny, pad=False, **NAMES),
        "several": save_with_head(folder / "several", tiny_bert, problem_type="multi_label_classification", **NAMES),
        "number": save_with_head(folder / "number", tiny_bert, num_labels=1),
        "answers": save_with_head(folder / "answers", tiny_bert, kind=AutoModelForQuestionAnswering),
    }


@pytest.mark.parametrize("kind", ["bert", "gpt2", "gpt2 without padding", "roberta", "several"])
def test_classify_with_a_head(kind, headed, capfd):
    """A head gives what plain transformers gives."""
    model = AutoModelForSequenceClassification.from_pretrained(headed[kind])
    tokenizer = AutoTokenizer.from_pretrained(headed[kind])
    many = [*texts(12), "rain " * 70]  # the last one is too long
    found = classify(many, model=headed[kind])
    for text, one in zip(many, found, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).logits[0]
        shares = logits.sigmoid() if kind == "several" else logits.softmax(-1)
        expected = dict(zip(["good", "bad", "so so"], shares.tolist(), strict=True))
        assert one.probabilities == pytest.approx(expected, abs=1e-5)
        assert one.label == model.config.id2label[int(logits.argmax())] and one.text == text
        assert classify({"text": text, "label": "?"}, model=headed[kind]).probabilities == pytest.approx(
            expected, abs=1e-5
        )
    assert len({round(one.probabilities["bad"], 3) for one in found}) > 3
    assert "1 texts have 64 tokens or more" in capfd.readouterr().err


def test_classify_empty_text(headed):
    """A head labels an empty text, too."""
    for kind in ("bert", "gpt2", "gpt2 without padding"):
        assert sum(classify("", model=headed[kind]).probabilities.values()) == pytest.approx(1)


def test_classify_head_column(headed):
    """A head needs the column 'text'."""
    with pytest.raises(HfkitError, match="labels the column 'text'"):
        classify({"review": "rain"}, model=headed["bert"])


def test_classify_not_finite(headed, tiny):
    """Values that are not numbers are one sentence."""
    for folder, options in ((headed["bert"], {}), (tiny, {"labels": ["a", "b"]})):
        lm = hfkit.load(folder)
        next(lm.model.parameters()).data[:] = torch.nan
        with pytest.raises(HfkitError, match="not numbers: try --dtype float32"):
            classify("rain", model=lm, **options)


def test_classify_head_labels(headed, capfdbinary):
    """A head has labels of its own."""
    for option in (["--labels", "a", "--labels", "b"], ["--template", "{text}: {label}"]):
        result = call(capfdbinary, "classify", "rain", "-m", headed["bert"], *option)
        assert_fails(result, 2, "has labels of its own: leave --labels and --template out")


def test_label_names_of_a_number(headed):
    """A head that gives a number is refused."""
    with pytest.raises(HfkitError, match="gives a number, not labels"):
        classify("rain", model=headed["number"])


# at a shell


def test_classify_at_a_shell(headed, capfdbinary, monkeypatch):
    """A text is labelled at a shell."""
    expected = classify("rain falls", model=headed["bert"])
    result = call(capfdbinary, "classify", "rain falls", "-m", headed["bert"])
    assert result.returncode == 0 and result.stderr == b""
    assert result.stdout.decode() == f"{expected.label}\t{expected.probabilities[expected.label]:.3f}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"rain falls\n")))
    assert call(capfdbinary, "classify", "-m", headed["bert"]).stdout == result.stdout
    found = json.loads(call(capfdbinary, "classify", "rain falls", "-m", headed["bert"], "--json").stdout)
    assert found == expected.to_dict() and list(found) == ["text", "label", "probabilities", "model"]


def test_classify_labels_at_a_shell(tiny, capfdbinary):
    """A text model is given labels at a shell."""
    labels = ["--labels", "rain", "--labels", "light"]
    result = call(capfdbinary, "classify", "a wind", "-m", tiny, *labels, "--template", r"{text}\n= {label}")
    expected = plain_shares(plain_scores(tiny, "a wind\n=", [" rain", " light"]), ["rain", "light"])
    best = max(expected, key=expected.get)
    assert result.stdout.decode() == f"{best}\t{expected[best]:.3f}\n" and result.stderr == b""


def test_classify_file_with_faults(headed, tiny, tmp_path, capfdbinary):
    """Lines that cannot be read do not stop the others."""
    path = tmp_path / "texts.txt"
    path.write_bytes(b"rain\n\nlight \xff\nthe wind falls\n" + b"w" * 60 + b"\nriver\n")
    result = call(capfdbinary, "classify", "-m", headed["bert"], "--input", path, "--json")
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [
        "rain",
        "the wind falls",
        "w" * 60,
        "river",
    ]
    errors = result.stderr.decode().splitlines()
    assert result.returncode == 1 and len(errors) == 3
    assert "line 2: empty" in errors[0] and "line 3: not UTF-8" in errors[1]
    assert errors[2].startswith("hfkit: error: 2 texts could not be labelled")
    result = call(capfdbinary, "classify", "-m", tiny, "-i", path, "--labels", "a", "--labels", "b")
    assert len(result.stdout.splitlines()) == 3  # of the short ones
    assert result.returncode == 1 and b"line 5: 75 tokens of text" in result.stderr


def test_classify_file_of_rows(headed, tiny, tmp_path, capfdbinary):
    """Rows of a file need a text; their other columns do not matter."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "rain", "label": "bad", "id": 3}, {"prompt": "light"}, {"review": "?"}, ["x"], {"text": "wind"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    for model, labels in ((headed["bert"], []), (tiny, ["--labels", "a", "--labels", "b"])):
        result = call(capfdbinary, "classify", "-m", model, "--input", path, "--json", *labels)
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert [one["text"] for one in found] == ["rain", "light", "wind"] and result.returncode == 1
        assert found[0]["probabilities"] == pytest.approx(
            classify("rain", model=model, labels=labels[1::2] or None).probabilities, rel=1e-4
        )
        told = result.stderr.decode()
        assert [f"line {number}:" in told for number in range(1, 7)] == [False, False, True, True, False, True]
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "rain"}\n')
    result = call(capfdbinary, "classify", "-m", headed["bert"], "--input", good)
    assert result.returncode == 0 and result.stderr == b"" and len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["rain"], 2, ["has no labels of its own", "--labels"]),
        (["rain", "--labels", "a"], 2, ["--labels"]),
        (["rain", "--labels", "a", "--labels", "a"], 2, ["give each once"]),
        (["  ", "--labels", "a", "--labels", "b"], 2, ["give a text"]),
        (["rain", "--input", "x.txt"], 2, ["leave the TEXT out"]),
        (["--input", "nowhere.txt"], 1, ["cannot read the input (nowhere.txt)"]),
        (["rain", "--template", "no field"], 2, ["--template is"]),
        (["w" * 70, "--labels", "a", "--labels", "b"], 1, ["do not fit", "takes 64"]),
    ],
)
def test_classify_errors_at_a_shell(arguments, code, words, tiny, capfdbinary):
    """What is wrong is one line."""
    assert_fails(call(capfdbinary, "classify", "-m", tiny, *arguments), code, *words)


def test_check_head_at_a_shell(headed, tiny, tiny_bert, tiny_t5, tmp_path, capfdbinary):
    """A model of another kind is refused, with the command that fits it."""
    for command in (["generate", "rain"], ["chat"], ["inspect", "rain"]):
        assert_fails(
            call(capfdbinary, *command, "-m", headed["bert"]), 1, "BertForSequenceClassification", "hfkit classify"
        )
        assert_fails(
            call(capfdbinary, *command, "-m", headed["answers"]), 1, "BertForQuestionAnswering", "hfkit answer"
        )
    (tmp_path / "text").write_text("the rain falls")
    context = ["--context", tmp_path / "text"]
    assert_fails(call(capfdbinary, "answer", "what?", "-m", headed["bert"], *context), 1, "hfkit classify")
    assert_fails(call(capfdbinary, "classify", "rain", "-m", headed["answers"]), 1, "hfkit answer")
    for command in (["generate", "rain"], ["classify", "rain"], ["answer", "what?", *context]):
        assert_fails(call(capfdbinary, *command, "-m", tiny_bert), 1, "BertForMaskedLM", "hfkit finetune --head")
    labels = ["--labels", "a", "--labels", "b"]
    assert_fails(call(capfdbinary, "classify", "rain", "-m", tiny_t5, *labels), 1, "has an encoder", "hfkit generate")
    assert_fails(call(capfdbinary, "classify", "rain", "-m", tiny), 2, "--labels")


# calibration


def test_calibration_error():
    """The calibration error is that of a plain count."""
    draw = random.Random(0)
    claimed = [draw.random() for _ in range(500)] + [0.0, 1.0, 0.1, 0.3, 0.7]
    right = [draw.random() < one**2 for one in claimed]
    expected = 0.0
    for low in range(10):
        inside = [i for i, one in enumerate(claimed) if low <= one * 10 < low + 1 or low == 9 and one == 1]
        expected += abs(sum(claimed[i] for i in inside) - sum(right[i] for i in inside)) / len(claimed)
    assert calibration_error(claimed, right) == pytest.approx(expected)
    assert calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert calibration_error([1.0] * 4, [False] * 4) == pytest.approx(1)
    assert calibration_error([], []) != calibration_error([], [])  # NaN: nothing is known
