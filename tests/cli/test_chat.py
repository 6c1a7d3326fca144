"""hfkit chat, with turns from stdin as a script would give them."""

import json
import os
import subprocess
import sys

import pytest
from support.shell import assert_fails, call, edit_json, run

import hfkit
from hfkit.cli import chat
from hfkit.cli.chat import Conversation
from hfkit.options import GenerateOptions

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def typed(monkeypatch):
    """Give these lines to stdin."""
    import io

    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.fixture
def templated(copy, tiny):
    """The tiny model with a chat template."""
    folder = copy(tiny)
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return hfkit.load(str(folder))


def test_chat_base_model(tiny, typed, capfdbinary):
    """A base model continues the whole text."""
    typed("ab\n\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 4, "-s", 5)
    first = hfkit.generate("ab", model=tiny, max_new_tokens=4, seed=5).completion
    second = hfkit.generate("ab" + first, model=tiny, max_new_tokens=4, seed=6).completion
    assert result.returncode == 0
    assert result.stdout.decode() == f"{first}\n{second}\n"


def test_conversation_uses_the_template(templated):
    """The chat template gets all messages."""
    talk = Conversation(templated, GenerateOptions(max_new_tokens=4))
    talk.add("user", "hi")
    talk.add("assistant", "yo")
    talk.add("user", "so")
    assert templated.tokenizer.decode(talk.prompt()) == "[user]hi[assistant]yo[user]so[assistant]"


def test_conversation_drops_the_oldest_turns(templated):
    """The oldest turns are dropped when the context is full."""
    talk = Conversation(templated, GenerateOptions(max_new_tokens=4))
    for word in ("one", "two", "three"):
        talk.add("user", word)
        ids = talk.prompt()
        talk.add("assistant", "x" * 9)
    text = templated.tokenizer.decode(ids)
    assert len(ids) + 4 <= templated.context
    assert text.startswith("[user]two") and text.endswith("[user]three[assistant]")


def test_chat_several_lines(tiny, typed, capfdbinary, tmp_path):
    """A turn may have several lines."""
    typed(f'"""a\nb"""\n/save {tmp_path}/said\n/exit\nnever\n')
    assert call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1).returncode == 0
    assert (tmp_path / "said").read_text().startswith("a\nb")


def test_chat_save_keeps_files(tiny, typed, capfdbinary, tmp_path, monkeypatch):
    """/save writes a new file, and again what this chat has written, but no file of somebody else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes").write_text("precious")
    typed("ab\n/save ~/notes\n/save ~/said\ncd\n/save ~/said\n")
    errors = call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1).stderr.decode().splitlines()[1:]
    said = tmp_path / "said"
    assert errors == [
        f"hfkit: error: {tmp_path / 'notes'} exists: save to another file",
        *[f"hfkit: saved to {said}"] * 2,
    ]
    assert (tmp_path / "notes").read_text() == "precious"
    assert said.read_text().startswith("ab") and "cd" in said.read_text()


def test_chat_set_takes_flags(tiny, typed, capfdbinary):
    """/set takes what --help calls an option, and refuses several samples."""
    typed("/set n 3\n/set stop zz\n/set num_return_sequences 3\n/set\nab\n")
    lines = call(capfdbinary, "chat", "-m", tiny, "-s", 1).stderr.decode().splitlines()[1:]
    assert lines[0] == "hfkit: error: a chat has one reply: leave --num-return-sequences out"
    assert "max_new_tokens 3" in lines[1] and "stop_strings ['zz']" in lines[1] and len(lines) == 3


def test_chat_set_and_reset(tiny, typed, capfdbinary):
    """/set changes an option, /reset forgets the conversation."""
    typed("ab\n/reset\n/set temperature 0\n/set seed 5\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 4, "-s", 5)
    greedy = hfkit.generate("ab", model=tiny, max_new_tokens=4, temperature=0).completion
    assert result.stdout.decode().split("\n")[1] == greedy


@pytest.mark.parametrize(
    "line", ["/set temprature 1", "/set temperature hot", "/set top_p 3", "/save /no/such/folder/x"]
)
def test_chat_wrong_command(tiny, typed, capfdbinary, line):
    """A wrong command is one line, and the chat continues."""
    typed(f"{line}\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1)
    assert result.returncode == 0 and result.stdout
    assert [row[:13] for row in result.stderr.decode().splitlines()[1:]] == ["hfkit: error:"]


@pytest.mark.parametrize("word", ["exit", "Quit", " exit "])
def test_chat_leaves(tiny, typed, capfdbinary, word):
    """`exit` or `quit` alone leaves, whatever its case."""
    typed(f"{word}\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1)
    assert (result.returncode, result.stdout) == (0, b"")


def test_chat_set_alone(tiny, typed, capfdbinary):
    """/set alone lists every option."""
    typed("/set\n")
    lines = call(capfdbinary, "chat", "-m", tiny, "-s", 7, "-t", 0.5).stderr.decode().splitlines()[1:]
    assert "seed 7" in lines[0] and "temperature 0.5" in lines[0] and "top_p" in lines[1]
    assert all(name in " ".join(lines) for name in GenerateOptions.names())


# turns that fail


@pytest.mark.parametrize(("template", "bad"), [(None, b"caf\xe9"), (TEMPLATE, b"a\x80b\xff")])
def test_chat_after_a_bad_byte(copy, tiny, template, bad):
    """A turn that is not UTF-8 is left out, and the next one is answered as if it had not been."""
    folder = copy(tiny)
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    line = ["chat", "-m", folder, "-n", 3, "-t", 0]
    result = run(*line, input=b"so\n" + bad + b"\nyes\n")
    assert result.returncode == 0
    assert result.stdout == run(*line, input=b"so\nyes\n").stdout and result.stdout.count(b"\n") >= 2
    errors = [line for line in result.stderr.decode().splitlines() if "error" in line]
    assert len(errors) == 1 and "not UTF-8 text (byte " in errors[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nsystem') }}",
        "{{ nothing.at.all }}",
        "{% for x in %}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content.upper() }}",
        {"tool_use": "x"},
        ["x"],
        7,
    ],
)
def test_chat_with_a_bad_template(tiny, typed, capfdbinary, monkeypatch, template):
    """A chat template that fails is one line for each turn; the chat continues, and /set raw true leaves it out."""
    load = chat.load_for

    def load_bad(*arguments):
        lm, *rest = load(*arguments)
        monkeypatch.setattr(lm.tokenizer, "chat_template", template)
        return lm, *rest

    monkeypatch.setattr(chat, "load_for", load_bad)
    typed("ab\nab\n/set raw true\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1)
    assert result.returncode == 0 and result.stdout.count(b"\n") >= 1
    lines = result.stderr.decode().splitlines()[1:]
    assert len(lines) == 2 and lines[0].startswith("hfkit: error: the chat template of ")
    assert all("/set raw true" in line for line in lines) and "this should not happen" not in lines[0]


def test_chat_sign_of_a_cut(tiny):
    """On a terminal a reply that was cut at its limit says so; the prompt's sign is not written to a pipe."""
    leader, follower = os.openpty()
    os.write(leader, b"ab\n/exit\n")
    command = [sys.executable, "-m", "hfkit", "chat", "-m", tiny, "-n", "3", "-s", "1"]
    with subprocess.Popen(command, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    assert b"> " not in out and b"> " in err
    os.write(leader, b"ab\n/exit\n")
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=subprocess.DEVNULL) as process:
        assert process.wait(60) == 0
    os.close(follower)
    shown = b""
    while b"[cut after 3 tokens]" not in shown:
        shown += os.read(leader, 10_000)
    os.close(leader)


def test_conversation_save(templated, tmp_path):
    """Messages are saved as JSON Lines."""
    talk = Conversation(templated, GenerateOptions())
    talk.add("user", "hi")
    talk.add("assistant", "yo")
    talk.save(str(tmp_path / "said"))
    rows = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert rows == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_chat_refuses_several_replies(tiny, capfdbinary):
    """Several replies are refused."""
    assert_fails(call(capfdbinary, "chat", "-m", tiny, "--num-return-sequences", 2), 2, "one reply")
