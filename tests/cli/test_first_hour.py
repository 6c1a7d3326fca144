"""What a newcomer meets: checks that come before torch, a prompt that is asked for, and the next line to type."""

import json
import os
import subprocess
import sys

import pytest
from support.shell import WATCH, assert_fails, call

from hfkit.cli.prompts import read_prompts
from hfkit.errors import OptionError
from hfkit.options import TrainOptions
from hfkit.recipes import copy_recipe
from hfkit.tuning.space import read_space


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with a corpus and some files that are taken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("Once upon a time.\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "heads.png").write_text("")
    return tmp_path


def on_terminal(command: str, typed: str) -> tuple[bytes, bytes, int]:
    """stdout, stderr and exit code of a command whose stdin is a terminal at which `typed` is typed."""
    leader, follower = os.openpty()
    os.write(leader, typed.encode())
    arguments = [sys.executable, "-m", "hfkit", *command.split("|")]
    result = subprocess.run(arguments, stdin=follower, capture_output=True, timeout=60)
    os.close(leader)
    os.close(follower)
    return result.stdout, result.stderr, result.returncode


def test_cheap_checks_come_before_torch(desk):
    """Wrong paths, missing texts, places that are taken and missing labels are reported before torch is imported."""
    lines = [
        "evaluate nosuch.txt",
        "tune nosuch.txt",
        "tune c.txt --eval-file nosuch.txt",
        "finetune c.txt --eval-file nosuch.txt",
        "finetune c.txt -m ./nosuch",
        "prepare c.txt -m ./nosuch",
        "pretrain nosuch.txt",
        "export bundled -o full",
        "inspect",
        "inspect hi --attention -o heads.png",
        "classify hi",
        "classify -i c.txt",
        "generate hi -o heads.png",
        "answer who --context nosuch.txt",
    ]
    command = [sys.executable, "-c", WATCH, json.dumps([line.split() for line in lines])]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=True)
    outcomes = [json.loads(line) for line in result.stdout.splitlines()]
    assert [" ".join(arguments) for arguments, _, _ in outcomes] == lines
    assert all(code in (1, 2) and not heavy for _, code, heavy in outcomes), outcomes
    assert len(result.stderr.splitlines()) == len(lines)


# texts


def test_generate_asks_for_a_prompt(tiny):
    """On a terminal `hfkit generate` asks for the prompt on stderr; Ctrl-D leaves."""
    out, err, code = on_terminal(f"generate|-m|{tiny}|-n|2|-s|1|-q", "Once\n")
    assert (code, err) == (0, b"prompt: ") and out.startswith(b"Once")
    out, err, code = on_terminal(f"generate|-m|{tiny}", "\x04")
    assert (code, out) == (2, b"") and err.startswith(b"prompt: hfkit: error: give a prompt")


def test_answer_says_that_it_waits():
    """On a terminal `hfkit answer` says how the text is given and ended."""
    out, err, code = on_terminal("answer|Who?", "\x04")
    assert code == 1 and b"press Ctrl-D" in err.splitlines()[0] and out == b""


def test_answer_context_is_a_file(capfdbinary):
    """A text in place of a file is answered with the way to give a text."""
    assert_fails(
        call(capfdbinary, "answer", "Who?", "--context", "Ann has a hat."), 2, "names a file", "| hfkit answer"
    )
    assert_fails(call(capfdbinary, "answer", "Who?", "--context", "hat.txt"), 1, "hat.txt", "No such file")


@pytest.mark.parametrize("name", ["p.JSONL", "p.Json", "p.NDJSON"])
def test_read_prompts_ignores_case(tmp_path, name):
    """A file's kind does not depend on the case of its suffix."""
    (tmp_path / name).write_text('{"prompt": "a"}\n')
    assert list(read_prompts(tmp_path / name)) == ["a"]


@pytest.mark.parametrize(("data", "notes"), [(b"a\nb\n", 0), (b'{"prompt": "a"}\n{"prompt": "b"}', 1)])
def test_generate_input_stdin(tiny, data, notes):
    """`--input -` reads many prompts from stdin, as lines of text or JSON Lines."""
    command = [sys.executable, "-m", "hfkit", "generate", "-i", "-", "-m", tiny, "-n", "2", "-s", "1"]
    result = subprocess.run(command, input=data, capture_output=True, timeout=60, check=True)
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["a", "b"]
    assert result.stderr.count(b"JSON Lines") == notes == len(result.stderr.splitlines())


def test_classify_input_stdin(tiny):
    """`classify --input -` reads stdin, too."""
    command = [sys.executable, "-m", "hfkit", "classify", "-i", "-", "-m", tiny, "--labels", "a", "--labels", "b"]
    result = subprocess.run(command, input=b"x\ny\n", capture_output=True, timeout=60, check=True)
    assert len(result.stdout.splitlines()) == 2


def test_resume_needs_a_file(capfdbinary, tmp_path):
    """A run that reads a pipe cannot be resumed: its prompts cannot be compared."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("-", tmp_path / "pipe"):
        line = ["generate", "-i", path, "-o", tmp_path / "o.jsonl", "--resume"]
        assert_fails(call(capfdbinary, *line), 2, "--input must be a file")


# values


@pytest.mark.parametrize(
    ("name", "words"),
    [("sentiment", "'bert-sentiment' or 'sentiment-head'"), ("genaration-poems", "generation-poems")],
)
def test_recipe_that_is_not_there(capfdbinary, tmp_path, name, words):
    """A recipe's name that is incomplete or misspelt gets the names that are close."""
    assert_fails(call(capfdbinary, "generate", "hi", "--config", name), 2, f"no recipe '{name}'", words)
    with pytest.raises(Exception, match=words):
        copy_recipe(name, tmp_path)
    assert_fails(call(capfdbinary, "generate", "hi", "--config", "./xyzzy.yaml"), 2, "'hfkit recipes' lists")


@pytest.mark.parametrize("search", ["learning_rate=1e-5-1e-3", "weight_decay=0.1-0.2", "warmup_steps=0-.5"])
def test_search_range_with_a_dash(search):
    """A range with a dash is answered with two dots; a negative exponent alone is a value."""
    with pytest.raises(OptionError, match=r"a range is written with two dots, such as \w+=1e-5\.\.1e-3"):
        read_space([search], TrainOptions())
    assert read_space(["learning_rate=1e-5,1e-3"], TrainOptions()) == {"learning_rate": [1e-5, 1e-3]}


# the next line


def test_next_line_is_printed(capfdbinary, desk, tiny):
    """prepare, recipes and export end with the line to go on with, on stderr; --quiet leaves it out."""
    result = call(capfdbinary, "prepare", "c.txt", "-m", tiny)
    assert result.stderr.decode().splitlines()[-1] == f"hfkit: next: hfkit finetune c.txt -m {tiny}"
    assert call(capfdbinary, "recipes").stderr == b"hfkit: next: hfkit recipes copy NAME\n"
    assert call(capfdbinary, "recipes", "copy", "sampling-story").returncode == 0
    result = call(capfdbinary, "export", tiny)
    assert (result.stdout, result.returncode) == (b"tiny-export\n", 0)
    assert result.stderr == b"hfkit: next: hfkit generate -m tiny-export\n"
    assert call(capfdbinary, "prepare", "c.txt", "-q").stderr == b""


def test_bundled_model_is_introduced_once(capfdbinary, monkeypatch, tmp_path):
    """At a terminal, and where no file can remember it, never: the text matters more."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.chdir(tmp_path)
    for home, times in (("cache", 1), ("~", 0)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", home)
        results = [call(capfdbinary, "generate", "A", "-n", "2", "-s", "1") for _ in range(2)]
        assert [result.returncode for result in results] == [0, 0]
        assert [b"knows no facts" in result.stderr for result in results] == [times == 1, False]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
