"""hfkit chat, with turns from stdin as a script would give them."""

import json

import pytest
from support.shell import assert_fails, call, edit_json

import hfkit
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
    talk.add_turn("hi")
    talk.add_reply("yo")
    assert templated.tokenizer.decode(talk.add_turn("so")) == "[user]hi[assistant]yo[user]so[assistant]"


def test_conversation_drops_the_oldest_turns(templated):
    """The oldest turns are dropped when the context is full."""
    talk = Conversation(templated, GenerateOptions(max_new_tokens=4))
    for word in ("one", "two", "three"):
        ids = talk.add_turn(word)
        talk.add_reply("x" * 9)
    text = templated.tokenizer.decode(ids)
    assert len(ids) + 4 <= templated.context
    assert text.startswith("[user]two") and text.endswith("[user]three[assistant]")


def test_chat_several_lines(tiny, typed, capfdbinary, tmp_path):
    """A turn may have several lines."""
    typed(f'"""a\nb"""\n/save {tmp_path}/said\n/exit\nnever\n')
    assert call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1).returncode == 0
    assert (tmp_path / "said").read_text().startswith("a\nb")


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


def test_conversation_save(templated, tmp_path):
    """Messages are saved as JSON Lines."""
    talk = Conversation(templated, GenerateOptions())
    talk.add_turn("hi")
    talk.add_reply("yo")
    talk.save(str(tmp_path / "said"))
    rows = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert rows == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_chat_refuses_several_replies(tiny, capfdbinary):
    """Several replies are refused."""
    assert_fails(call(capfdbinary, "chat", "-m", tiny, "--num-return-sequences", 2), 2, "one reply")
