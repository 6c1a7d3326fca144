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
    """For `call` where nobody looks at what is printed."""

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
def test_prompt_and_completion_are_the_filled_template(seed):
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


def test_space_before_the_answer_is_the_answers_and_values_are_trimmed():
    task = Task("Q: {q}\nA:  {a}")
    assert task.example({"q": "  why?\n", "a": " so "}) == {"prompt": "Q: why?\nA:", "completion": "  so\n"}
    assert Task("{n} is {kind}.").example({"n": 3, "kind": True}) == {"prompt": "3 is", "completion": " True."}


@pytest.mark.parametrize(
    "template", ["", "no field", "{}", "{0}", "{a} {a}", "{a.b}", "{a[0]}", "{a!r} {b}", "{a:>9}", "{a", "a}", "{a} {"]
)
def test_a_template_that_is_none_is_told(template, rows, tiny, tmp_path, capfdbinary):
    with pytest.raises(OptionError, match="--template is"):
        Task(template)
    if template:
        result = call(capfdbinary, "finetune", rows, "-m", tiny, "--template", template, "-o", tmp_path / "run")
        assert_fails(result, 2, "--template is")


def test_a_template_as_it_is_typed_has_its_line_breaks():
    options = TaskOptions(template=TEMPLATE, labels=["oui", "non"], metric=["chrf"])
    assert make_task(options) == Task("E: {en}\nF: {fr}", ("oui", "non"), ("chrf",))
    assert make_task(TaskOptions()) is make_task(None) is None


def test_a_column_that_is_missing_or_empty_is_told_with_its_place():
    task = Task("{q}: {a}", labels=("yes", "no"))
    with pytest.raises(HfkitError, match=r"no column 'q' \(f, line 3\): there are 'a', 'b'"):
        task.prompt({"a": "yes", "b": 1}, "f, line 3")
    for value in (None, ["yes"], {"text": "yes"}):
        with pytest.raises(HfkitError, match=r"column 'a' holds no text \(f, line 3\)"):
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
def test_a_chat_template_gives_the_same_tokens(family, template, request, tmp_path):
    tokenizer, task = AutoTokenizer.from_pretrained(request.getfixturevalue(family)), Task(template)
    give_task(tokenizer, task)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert task_of(again) == task
    for text in [*HARD, "  spaces \n"]:
        talk = [{"role": "user", "content": "before"}, {"role": "user", "content": text}]
        found = again.apply_chat_template(talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert found == again(task.fill(text))["input_ids"], text


def test_a_chat_template_has_one_field_and_the_models_own_stays_where_it_cannot(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "mine"
    give_task(tokenizer, Task("{a} {b} {c}"))
    assert tokenizer.chat_template == "mine" and task_of(tokenizer).inputs == ["a", "b"]


@pytest.mark.parametrize("family", ["tiny", "tiny_llama"])
@pytest.mark.parametrize("template", ["E: {en}\nF: {fr}", "{en}={fr}"])
def test_the_answer_alone_is_learned_in_the_tokens_that_the_whole_text_has(family, template, request):
    tokenizer, task = AutoTokenizer.from_pretrained(request.getfixturevalue(family)), Task(template)
    example = task.example({"en": "the rain", "fr": "an end"})
    (row,) = encode_examples([Example(example, "here")], tokenizer)
    ids, learned = row["input_ids"].tolist(), row["labels"] != IGNORED
    assert ids == [*tokenizer(example["prompt"] + example["completion"])["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(row["input_ids"][learned], skip_special_tokens=True).strip(" ") == "an end\n"
    assert ids[: (~learned).sum()] == tokenizer(example["prompt"])["input_ids"]


# models that carry one


def test_the_folder_carries_the_template_for_everybody(learned):
    config = json.loads((Path(learned) / "tokenizer_config.json").read_text())
    assert config["task"] == {"template": "E: {en}\nF: {fr}", "labels": [], "metric": []}
    plain = AutoTokenizer.from_pretrained(learned)
    assert task_of(plain) == Task("E: {en}\nF: {fr}")
    talk = [{"role": "user", "content": "Good morning"}]
    rendered = plain.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert rendered == "E: Good morning\nF:"


def test_generate_puts_a_prompt_into_the_template_and_ends_where_it_ends(learned, capfdbinary):
    options = ["-t", "0", "--raw", "--stop", "\n", "--no-prompt"]
    for text in ("Good morning", "wind light"):
        found = call(capfdbinary, "generate", "-m", learned, text, "-t", "0")
        plain = call(capfdbinary, "generate", "-m", learned, f"E: {text}\nF:", *options)
        assert found.returncode == plain.returncode == 0
        assert found.stdout.strip() == plain.stdout.strip()
    assert found.stdout == b"oui\n"  # the answer alone, as it was learned
    record = json.loads(call(capfdbinary, "generate", "-m", learned, "rain wind", "-t", "0", "--json").stdout)
    assert record["prompt"] == "rain wind" and record["completion"] == " oui" and record["finish_reason"] == "stop"
    sampled = [
        hfkit.generate(prompt, model=learned, seed=3, max_new_tokens=12, **more).completion
        for prompt, more in (("stone wind", {}), ("E: stone wind\nF:", {"raw": True, "stop_strings": ["\n"]}))
    ]
    assert sampled[0] == sampled[1]


def test_another_stop_or_the_prompt_as_it_is_can_be_had(learned):
    found = hfkit.generate("rain wind", model=learned, temperature=0, stop_strings=["u"])
    assert found.completion == " o" and str(found) == "o"
    raw = hfkit.generate("E: rain wind\nF:", model=learned, temperature=0, raw=True, max_new_tokens=8)
    assert str(raw) == raw.prompt + raw.completion and raw.completion.startswith(" oui\n")


def test_a_chat_is_given_the_same_prompt(learned):
    lm = hfkit.load(learned)
    talk = Conversation(lm, GenerateOptions(max_new_tokens=8))
    assert talk.has_template and talk.add_turn("Good morning") == lm.tokenizer("E: Good morning\nF:")["input_ids"]


def test_rows_of_a_file_are_prompts_by_their_columns(learned, tmp_path, capfdbinary):
    path = tmp_path / "in.jsonl"
    path.write_text('{"en": "rain wind", "fr": "?"}\n{"de": "Regen"}\n{"prompt": "wind wind"}\n')
    result = call(capfdbinary, "generate", "-m", learned, "--input", path, "-t", "0")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["line"], one["completion"]) for one in records] == [(1, " oui"), (3, " oui")]
    assert result.returncode == 1 and b"line 2: no column 'en': there are 'de'" in result.stderr


def test_a_template_of_several_fields_takes_rows_only(tiny, tmp_path, capfdbinary):
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"a": f"{i}", "b": "x", "c": "y"}) + "\n" for i in range(8)))
    options = trials.SMALL | {"max_steps": 1, "eval_steps": 1}
    run = hfkit.finetune(str(path), model=tiny, template="{a}-{b}: {c}", output_dir=str(tmp_path / "run"), **options)
    assert AutoTokenizer.from_pretrained(run.output_dir).chat_template is None
    assert_fails(call(capfdbinary, "generate", "-m", run.output_dir, "text"), 1, "fields a, b", "--input")
    row = {"a": "1", "b": "x"}
    found = hfkit.generate(row, model=run.output_dir, seed=1, max_new_tokens=5)
    plain = hfkit.generate("1-x:", model=run.output_dir, seed=1, max_new_tokens=5, raw=True, stop_strings=["\n"])
    assert found.completion == plain.completion and found.prompt == row


def test_a_damaged_task_is_told(learned, copy, capfdbinary):
    for broken in ({"labels": []}, "text", {"template": "no field"}):
        folder = copy(learned)
        edit_json(folder / "tokenizer_config.json", task=broken)
        result = call(capfdbinary, "generate", "-m", folder, "rain")
        assert_fails(result, 1, "the model's task cannot be read (tokenizer_config.json)")
        shutil.rmtree(folder)


# rows that do not fit


def test_columns_that_are_not_there_are_told_at_a_shell(tiny, rows, corpus, tmp_path, capfdbinary):
    run = ["-m", tiny, "-o", tmp_path / "run"]
    result = call(capfdbinary, "finetune", rows, *run, "--template", "{en} {de}")
    assert_fails(result, 1, "no column 'de' (", "rows.jsonl, line 1", "'en', 'fr'")
    result = call(capfdbinary, "finetune", rows, *run, "--template", TEMPLATE, "--labels", "non", "--labels", "si")
    assert_fails(result, 1, "fr is 'oui'", "line 1", "the labels are non, si")
    assert_fails(call(capfdbinary, "finetune", corpus, *run, "--template", TEMPLATE), 1, "plain text", "takes rows")
    result = call(capfdbinary, "evaluate", rows, "-m", tiny, "--template", "{en} {de}")
    assert_fails(result, 1, "the template's columns are not there", "'en', 'fr'")
    assert not list((tmp_path / "run").glob("[!.]*"))  # nothing but the lock
