"""A template makes prompts and answers of rows; a model that learned one carries it, for hfkit and for others."""

import json
import random
import shutil
from pathlib import Path

import pytest
from support import trials
from support.shell import assert_fails, call, edit_json
from transformers import AutoTokenizer

import hfkit
from hfkit.cli.chat import Conversation
from hfkit.corpus.documents import Example
from hfkit.corpus.encoding import IGNORED, encode_examples
from hfkit.corpus.templates import Task, give_task, make_task, task_of
from hfkit.errors import HfkitError, OptionError
from hfkit.options import GenerateOptions, TaskOptions

pytestmark = pytest.mark.usefixtures("brisk")
TEMPLATE = r"E: {en}\nF: {fr}"
HARD = [
    "Good morning",
    'she said "no"',
    "{{ x }} {% if %}",
    "a\\n\\b",
    "line\nline",
    "über 雨 🙂",
    "{en}",
    "it's 100 %",
]


class Silent:
    """For `call` where the output does not matter."""

    def readouterr(self):
        return b"", b""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    """Pairs whose answer is always the same, so that a small model learns it in a second."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = "rain wind stone river light".split()
    path.write_text("".join(json.dumps({"en": f"{a} {b}", "fr": "oui"}) + "\n" for a in words for b in words))
    return str(path)


@pytest.fixture(scope="module")
def learned(tiny, rows, tmp_path_factory) -> str:
    """`tiny` after it learned TEMPLATE at a shell."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    options = ["--max-steps", 80, "--learning-rate", 0.01, "--per-device-train-batch-size", 8, "--no-bf16"]
    options += ["--eval-steps", 80, "--lr-scheduler-type", "constant", "--optim", "adamw_torch"]
    result = call(Silent(), "finetune", rows, "-m", tiny, "--template", TEMPLATE, "-o", folder, "-q", *options)
    assert result.returncode == 0
    return str(folder)


# templates


@pytest.mark.parametrize("seed", range(20))
def test_example_is_the_filled_template(seed):
    """Prompt and completion are the filled template."""
    draw = random.Random(seed)
    names = draw.sample(["a", "b", "text", "label_2", "über"], draw.randint(1, 5))
    pieces = ["", " ", "\n", "x: ", "{{", "}} ", '"', " {{{{ ", "é\n\n"]
    template = "".join(draw.choice(pieces) + f"{{{name}}}" for name in names) + draw.choice(pieces)
    row = {name: draw.choice(["", "rain", "{a}", "two words", "}}"]) for name in names}
    task = Task(template)
    example = task.example(row | {"other": "never"})
    whole = example["prompt"] + example["completion"]
    filled = template.format(**row)
    assert whole == filled + ("\n" if template.endswith(f"{{{names[-1]}}}") else "")
    assert [*task.inputs, task.answer] == names
    assert not example["prompt"].endswith(" ") or row[names[-2]] == ""
    assert example["completion"].endswith(task.end) and task.end


def test_example_moves_spaces_to_the_answer_and_trims_values():
    """The space before the answer is part of the answer, and values are trimmed."""
    task = Task("Q: {q}\nA:  {a}")
    assert task.example({"q": "  why?\n", "a": " so "}) == {"prompt": "Q: why?\nA:", "completion": "  so\n"}
    assert Task("{n} is {kind}.").example({"n": 3, "kind": True}) == {"prompt": "3 is", "completion": " True."}


@pytest.mark.parametrize(
    "template", ["", "no field", "{}", "{0}", "{a} {a}", "{a.b}", "{a[0]}", "{a!r} {b}", "{a:>9}", "{a", "a}", "{a} {"]
)
def test_task_refuses_an_invalid_template(template, rows, tiny, tmp_path, capfdbinary):
    """The error is about --template, in Python and at a shell."""
    with pytest.raises(OptionError, match="--template is"):
        Task(template)
    if template:
        result = call(capfdbinary, "finetune", rows, "-m", tiny, "--template", template, "-o", tmp_path / "run")
        assert_fails(result, 2, "--template is")


def test_make_task_reads_typed_line_breaks():
    r"""A typed \n is a line break."""
    options = TaskOptions(template=TEMPLATE, labels=["oui", "non"], metric=["chrf"])
    assert make_task(options) == Task("E: {en}\nF: {fr}", ("oui", "non"), ("chrf",))
    assert make_task(TaskOptions()) is make_task(None) is None


def test_example_reports_a_missing_or_empty_column():
    """The error has the place of the row."""
    task = Task("{q}: {a}", labels=("yes", "no"))
    with pytest.raises(HfkitError, match=r"no column 'q' \(f, line 3\): there are 'a', 'b'"):
        task.prompt({"a": "yes", "b": 1}, "f, line 3")
    for value in (None, ["yes"], {"text": "yes"}, float("nan"), b"yes"):
        with pytest.raises(HfkitError, match=r"column 'a' is not text \(f, line 3\)"):
            task.example({"q": "?", "a": value}, "f, line 3")
    with pytest.raises(HfkitError, match="a is 'maybe' .*: the labels are yes, no"):
        task.example({"q": "?", "a": "maybe"}, "f, line 3")
    assert task.fill("x") == task.fill({"q": "x"}) == task.prompt({"q": "x"})
    with pytest.raises(HfkitError, match="fields q, c: .* --input"):
        Task("{q} {c} {a}").fill("x")


# chat templates


@pytest.mark.parametrize(
    "template", ["E: {en}\nF: {fr}", '"{en}" \\ {{{{ 🙂\n=> {fr}\n\n', "{en}{fr}", "{{% {en} %}}: {fr}"]
)
@pytest.mark.parametrize("family", ["tiny", "tiny_llama"])
def test_chat_template_gives_the_same_tokens(family, template, request, tmp_path):
    """The saved chat template gives the same tokens as the task."""
    tokenizer, task = AutoTokenizer.from_pretrained(request.getfixturevalue(family)), Task(template)
    give_task(tokenizer, task)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert task_of(again) == task
    for text in [*HARD, "  spaces \n"]:
        talk = [{"role": "user", "content": "before"}, {"role": "user", "content": text}]
        ids = again.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == again(task.fill(text))["input_ids"], text


def test_chat_template_needs_one_field(tiny):
    """A task with several fields keeps the model's own chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "mine"
    give_task(tokenizer, Task("{a} {b} {c}"))
    assert tokenizer.chat_template == "mine" and task_of(tokenizer).inputs == ["a", "b"]


@pytest.mark.parametrize("family", ["tiny", "tiny_llama"])
@pytest.mark.parametrize("template", ["E: {en}\nF: {fr}", "{en}={fr}"])
def test_example_learns_only_the_answer(family, template, request):
    """Only the answer is learned, in the tokens that it has in the whole text."""
    tokenizer, task = AutoTokenizer.from_pretrained(request.getfixturevalue(family)), Task(template)
    example = task.example({"en": "the rain", "fr": "an end"})
    (row,) = encode_examples([Example(example, "here")], tokenizer)
    ids, learned = row["input_ids"].tolist(), row["labels"] != IGNORED
    assert ids == [*tokenizer(example["prompt"] + example["completion"])["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(row["input_ids"][learned], skip_special_tokens=True).strip(" ") == "an end\n"
    assert ids[: (~learned).sum()] == tokenizer(example["prompt"])["input_ids"]


# models that carry one


def test_give_task_saves_it_for_other_programs(learned):
    """Plain transformers reads the task and its chat template."""
    config = json.loads((Path(learned) / "tokenizer_config.json").read_text())
    assert config["task"] == {"template": "E: {en}\nF: {fr}", "labels": [], "metric": []}
    plain = AutoTokenizer.from_pretrained(learned)
    assert task_of(plain) == Task("E: {en}\nF: {fr}")
    talk = [{"role": "user", "content": "Good morning"}]
    rendered = plain.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert rendered == "E: Good morning\nF:"


def test_generate_fills_the_template(learned, capfdbinary):
    """The prompt is put into the template, and the text ends where the template ends."""
    options = ["-t", "0", "--raw", "--stop", "\n", "--no-prompt"]
    for text in ("Good morning", "wind light"):
        filled = call(capfdbinary, "generate", "-m", learned, text, "-t", "0")
        plain = call(capfdbinary, "generate", "-m", learned, f"E: {text}\nF:", *options)
        assert filled.returncode == plain.returncode == 0
        assert filled.stdout.strip() == plain.stdout.strip()
    assert filled.stdout == b"oui\n"  # the answer alone, as it was learned
    record = json.loads(call(capfdbinary, "generate", "-m", learned, "rain wind", "-t", "0", "--json").stdout)
    assert record["prompt"] == "rain wind" and record["completion"] == " oui" and record["finish_reason"] == "stop"
    sampled = [
        hfkit.generate(prompt, model=learned, seed=3, max_new_tokens=12, **more).completion
        for prompt, more in (("stone wind", {}), ("E: stone wind\nF:", {"raw": True, "stop_strings": ["\n"]}))
    ]
    assert sampled[0] == sampled[1]


def test_generate_raw_or_with_another_stop(learned):
    """stop_strings and raw override the template."""
    generation = hfkit.generate("rain wind", model=learned, temperature=0, stop_strings=["u"])
    assert generation.completion == " o" and str(generation) == "o"
    raw = hfkit.generate("E: rain wind\nF:", model=learned, temperature=0, raw=True, max_new_tokens=8)
    assert str(raw) == raw.prompt + raw.completion and raw.completion.startswith(" oui\n")


def test_chat_fills_the_template(learned):
    """A turn of a chat becomes the same prompt."""
    lm = hfkit.load(learned)
    talk = Conversation(lm, GenerateOptions(max_new_tokens=8))
    talk.add("user", "Good morning")
    assert talk.has_template and talk.prompt() == lm.tokenizer("E: Good morning\nF:")["input_ids"]


def test_generate_input_rows_fill_the_template(learned, tmp_path, capfdbinary):
    """The columns of each row fill the template."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"en": "rain wind", "fr": "?"}\n{"de": "Regen"}\n{"prompt": "wind wind"}\n')
    result = call(capfdbinary, "generate", "-m", learned, "--input", path, "-t", "0")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(record["line"], record["completion"]) for record in records] == [(1, " oui"), (3, " oui")]
    assert result.returncode == 1 and b"line 2: no column 'en': there are 'de'" in result.stderr


def test_generate_several_fields_take_rows_only(tiny, tmp_path, capfdbinary):
    """A template of several fields takes rows only."""
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"a": f"{i}", "b": "x", "c": "y"}) + "\n" for i in range(8)))
    options = trials.SMALL | {"max_steps": 1, "eval_steps": 1}
    run = hfkit.finetune(str(path), model=tiny, template="{a}-{b}: {c}", output_dir=str(tmp_path / "run"), **options)
    assert AutoTokenizer.from_pretrained(run.output_dir).chat_template is None
    assert_fails(call(capfdbinary, "generate", "-m", run.output_dir, "text"), 1, "fields a, b", "--input")
    row = {"a": "1", "b": "x"}
    how = {"model": run.output_dir, "seed": 1, "max_new_tokens": 5, "temperature": 1.0}
    generation = hfkit.generate(row, **how)
    plain = hfkit.generate("1-x:", raw=True, stop_strings=["\n"], **how)
    assert generation.completion == plain.completion and generation.prompt == row


def test_task_of_a_damaged_folder(learned, copy, capfdbinary):
    """The error names tokenizer_config.json."""
    for broken in ({"labels": []}, "text", {"template": "no field"}):
        folder = copy(learned)
        edit_json(folder / "tokenizer_config.json", task=broken)
        result = call(capfdbinary, "generate", "-m", folder, "rain")
        assert_fails(result, 1, "the model's task cannot be read (tokenizer_config.json)")
        shutil.rmtree(folder)


# rows that do not fit


def test_finetune_and_evaluate_report_missing_columns(tiny, rows, corpus, tmp_path, capfdbinary):
    """The error names the columns that there are."""
    run = ["-m", tiny, "-o", tmp_path / "run"]
    result = call(capfdbinary, "finetune", rows, *run, "--template", "{en} {de}")
    assert_fails(result, 1, "no column 'de' (", "rows.jsonl, line 1", "'en', 'fr'")
    result = call(capfdbinary, "finetune", rows, *run, "--template", TEMPLATE, "--labels", "non", "--labels", "si")
    assert_fails(result, 1, "fr is 'oui'", "line 1", "the labels are non, si")
    assert_fails(call(capfdbinary, "finetune", corpus, *run, "--template", TEMPLATE), 1, "plain text", "takes rows")
    result = call(capfdbinary, "evaluate", rows, "-m", tiny, "--template", "{en} {de}")
    assert_fails(result, 1, "the template's columns are not there", "'en', 'fr'")
    assert not list((tmp_path / "run").glob("[!.]*"))  # nothing but the lock
