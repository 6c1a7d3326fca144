"""Help that fits 80 columns, and one sentence for each mistake on a command line, a recipe or a Python call."""

import re

import pytest
import typer
from support.shell import assert_fails, call, run

import hfkit
from hfkit import declaration, options
from hfkit.cli import app

COMMANDS = typer.main.get_command(app.app).commands
EXAMPLES = {name: command.examples for name, command in COMMANDS.items() if name != "recipes"}
FLAGS = {name: {param.name: param for param in command.params} for name, command in COMMANDS.items()}


# help


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_cuts_nothing(capfdbinary, monkeypatch, name):
    """At 80 columns every flag stands whole in the help."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = call(capfdbinary, name, "--help").stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 160
    words = set(re.findall(r"--[\w-]+", "\n".join(lines).replace("[no-]", "")))
    wanted = {opt for param in COMMANDS[name].params for opt in param.opts if opt.startswith("--")}
    assert wanted <= words and "…" not in "".join(lines)


def test_help_fits_80_columns(capfdbinary, monkeypatch):
    """The list of commands cuts no sentence."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = call(capfdbinary, "--help").stdout.decode().splitlines()
    assert max(map(len, lines)) <= 80 and not [line for line in lines[1:] if line.endswith("...")]


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_help_ends_with_examples(capfdbinary, monkeypatch, name):
    """The help of a command ends with examples, whose flags exist."""
    monkeypatch.setenv("COLUMNS", "100")
    lines = call(capfdbinary, "help", name).stdout.decode().splitlines()
    assert EXAMPLES[name] and [line.strip() for line in lines[-len(EXAMPLES[name]) :]] == EXAMPLES[name]
    known = {opt for param in FLAGS[name].values() for opt in param.opts}
    used = {word for line in EXAMPLES[name] if f"hfkit {name}" in line for word in re.findall(r" (--?[a-z-]+)", line)}
    assert used <= known


# names from elsewhere


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("generate hi --max_length 5", "--max-new-tokens"),
        ("generate hi --length 5", "--max-new-tokens"),
        ("generate hi --num_samples 5", "--num-return-sequences"),
        ("generate hi --model_name_or_path gpt2", "--model"),
        ("finetune c.txt --lr 1e-4", "--learning-rate"),
        ("finetune c.txt --batch-size 4", "--per-device-train-batch-size"),
        ("finetune c.txt --n_epochs 4", "--num-train-epochs"),
        ("pretrain c.txt --max_length 4", "--block-size"),
        ("finetune c.txt --output x", "--output-dir"),
        ("finetune --train_file c.txt", "the corpus itself, such as hfkit finetune corpus.txt"),
        ("generate --text hi", "the prompt itself, such as hfkit generate"),
        ("generate --prompt=hi", "the prompt itself, such as hfkit generate"),
        ("generate hi --tempereture 1", "did you mean --temperature?"),
    ],
)
def test_unknown_option_gets_hfkits_name(capfdbinary, line, right):
    """An option from a tutorial is answered with the name that hfkit has for it."""
    assert_fails(call(capfdbinary, *line.split()), 2, right)


def test_known_names_exist():
    """Every name in the table is an option or an argument of a command, and shadows none."""
    known = {name for flags in FLAGS.values() for name in flags}
    for ours, theirs in declaration._ALSO_CALLED.items():
        assert ours in known, ours
        for name, flags in FLAGS.items():
            found = {
                their: declaration.find_known_name(their, flags) for their in theirs.split() if their not in flags
            }
            assert ours not in flags or all(found.values()), name


def test_unknown_name_in_recipe_and_python(capfdbinary, tmp_path):
    """A recipe and a Python call get the same hint as a flag."""
    (tmp_path / "r.yaml").write_text("lr: 1e-4\n")
    assert_fails(
        call(capfdbinary, "finetune", "x", "-c", tmp_path / "r.yaml"), 2, "line 1", "hfkit calls it 'learning_rate'"
    )
    with pytest.raises(TypeError, match="unknown option 'max_length': hfkit calls it 'max_new_tokens'"):
        hfkit.generate("hi", max_length=5)
    with pytest.raises(TypeError, match="'epochs': hfkit calls it 'num_train_epochs'"):
        hfkit.finetune("c.txt", epochs=5)


@pytest.mark.parametrize("options_", [{"top_p": 0.5}, options.TrainOptions(), 3])
def test_options_of_another_type(options_):
    """Something else in place of options is refused, with the way to pass it."""
    with pytest.raises(
        TypeError, match=f"options are GenerateOptions.*not a {type(options_).__name__}: pass its items"
    ):
        hfkit.generate("hi", options=options_)


# the shape of a command line


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train x", "hfkit calls it finetune (continue a model) or pretrain"),
        ("eval x", "hfkit calls it evaluate"),
        ("genrate x", "did you mean 'generate'?"),
        ("recipes copi", "did you mean 'copy'?"),
        ("frobnicate", "see hfkit --help"),
        ("--model gpt2 generate hi", "options stand after the command, hfkit generate --model"),
        ("generate Once upon a time", 'needs quotes: hfkit generate "Once upon a time"'),
        ("inspect The cat", 'needs quotes: hfkit inspect "The cat"'),
        ("chat hello", "unexpected 'hello'"),
        ("recipes copy a b", "unexpected 'b'"),
        ("generate -5", "hfkit generate -- TEXT"),
        ("finetune", "needs a corpus, such as hfkit finetune corpus.txt"),
        ("answer", 'needs a question, such as hfkit answer "Who'),
        ("recipes copy", "needs a name, such as hfkit recipes copy"),
        ("generate hi -n", "-n needs a value"),
        ("generate hi --verbose=3", "--verbose takes no value"),
        ("generate hi --top-p x", "--top-p is 'x': it must be a number"),
        ("generate hi -n 2.5", "--max-new-tokens is '2.5': it must be a whole number"),
        ("generate hi --top-p 3", "--top-p is 3: it must be more than 0, at most 1"),
        ("generate hi --top-k -3", "--top-k is -3: it must be at least 0"),
        ("generate hi --dtype f8", "--dtype is 'f8': it must be one of auto, float32, bfloat16, float16"),
    ],
)
def test_usage_error_is_one_sentence(capfdbinary, line, words):
    """A mistake on the command line is answered with what to write, in hfkit's words."""
    result = call(capfdbinary, *line.split())
    assert_fails(result, 2, words)
    assert b"Input should" not in result.stderr and b"Invalid value" not in result.stderr


def test_text_that_begins_with_a_dash(capfdbinary):
    """A text that looks like an option, and a text without a command, are shown the way out."""
    assert_fails(call(capfdbinary, "generate", "- item"), 2, "a text that begins with - stands after --")
    assert_fails(call(capfdbinary, "Once upon a time"), 2, 'hfkit generate "Once upon a time"')


def test_help_command(capfdbinary):
    """`hfkit help` and `hfkit help COMMAND` print what --help does."""
    assert call(capfdbinary, "help").stdout == call(capfdbinary, "--help").stdout != b""
    assert call(capfdbinary, "help", "info").stdout == call(capfdbinary, "info", "-h").stdout != b""


# values that no option takes

BAD_BYTES = "a\udcffb"  # as Python reads bytes of a command line that are not UTF-8


@pytest.mark.parametrize(
    "line",
    [
        *(["generate", BAD_BYTES], ["generate", "hi", "--stop", BAD_BYTES], ["generate", "hi", "-m", BAD_BYTES]),
        *(["generate", "-i", BAD_BYTES], ["generate", "hi", "-o", BAD_BYTES], ["generate", "hi", "-c", BAD_BYTES]),
        *(["classify", "hi", "--labels", BAD_BYTES], ["answer", BAD_BYTES], ["inspect", BAD_BYTES]),
        *(["finetune", BAD_BYTES], ["evaluate", "c.txt", "-m", BAD_BYTES], ["tune", "c.txt", "--search", BAD_BYTES]),
        *(["recipes", "copy", BAD_BYTES], ["export", BAD_BYTES], ["report", BAD_BYTES], ["info", "-m", BAD_BYTES]),
    ],
    ids=ascii,
)
def test_bytes_that_are_not_utf8(capfdbinary, line):
    """Bytes that are not UTF-8 in any option or argument are a usage error that shows them."""
    assert_fails(call(capfdbinary, *line), 2, r"a\udcffb", "it is not UTF-8 text")


@pytest.mark.parametrize(
    "line",
    [
        *("generate hi", "generate -i c.txt", "inspect hi", "finetune c.txt", "pretrain c.txt", "prepare c.txt"),
        *("tune c.txt", "report runs/a", "export bundled"),
    ],
)
def test_empty_output(capfdbinary, line, tmp_path, monkeypatch):
    """An empty -o, as an unset variable of a shell gives, is a usage error for every command that has one."""
    monkeypatch.chdir(tmp_path)
    assert_fails(call(capfdbinary, *line.split(), "-o", ""), 2, "--output", "is ''", "must")
    assert_fails(call(capfdbinary, "recipes", "copy", "sampling-story", "--to", ""), 2, "--to is ''")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hfkit recipes copy gen", ["generation-news", "generation-poems", "generation-stories"]),
        ("hfkit generate --dtype fl", ["float32", "float16"]),
        ("hfkit gen", ["generate"]),
    ],
)
def test_tab_completion(line, words):
    """A shell completes commands, names of recipes and the values of an option."""
    env = {"_HFKIT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    assert run(env=env).stdout.decode().split() == words
