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


def test_a_base_model_goes_on_with_the_whole_text(tiny, typed, capfdbinary):
    typed("ab\n\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 4, "-s", 5)
    first = hfkit.generate("ab", model=tiny, max_new_tokens=4, seed=5).completion
    second = hfkit.generate("ab" + first, model=tiny, max_new_tokens=4, seed=6).completion
    assert result.returncode == 0
    assert result.stdout.decode() == f"{first}\n{second}\n"


def test_a_template_gets_the_messages(templated):
    talk = Conversation(templated, GenerateOptions(max_new_tokens=4))
    talk.say("hi")
    talk.reply("yo")
    assert templated.tokenizer.decode(talk.say("so")) == "[user]hi[assistant]yo[user]so[assistant]"


def test_the_oldest_turns_go_when_the_context_is_full(templated):
    talk = Conversation(templated, GenerateOptions(max_new_tokens=4))
    for word in ("one", "two", "three"):
        ids = talk.say(word)
        talk.reply("x" * 9)
    text = templated.tokenizer.decode(ids)
    assert len(ids) + 4 <= templated.context
    assert text.startswith("[user]two") and text.endswith("[user]three[assistant]")


def test_a_turn_may_have_several_lines(tiny, typed, capfdbinary, tmp_path):
    typed(f'"""a\nb"""\n/save {tmp_path}/said\n/exit\nnever\n')
    assert call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1).returncode == 0
    assert (tmp_path / "said").read_text().startswith("a\nb")


def test_options_change_and_what_was_said_is_forgotten(tiny, typed, capfdbinary):
    typed("ab\n/reset\n/set temperature 0\n/set seed 5\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 4, "-s", 5)
    greedy = hfkit.generate("ab", model=tiny, max_new_tokens=4, temperature=0).completion
    assert result.stdout.decode().split("\n")[1] == greedy


@pytest.mark.parametrize(
    "line", ["/set temprature 1", "/set temperature hot", "/set top_p 3", "/save /no/such/folder/x"]
)
def test_a_wrong_command_is_one_line_and_the_chat_goes_on(tiny, typed, capfdbinary, line):
    typed(f"{line}\nab\n")
    result = call(capfdbinary, "chat", "-m", tiny, "-n", 2, "-s", 1)
    assert result.returncode == 0 and result.stdout
    assert [row[:13] for row in result.stderr.decode().splitlines()[1:]] == ["hfkit: error:"]


def test_messages_are_saved_as_json_lines(templated, tmp_path):
    talk = Conversation(templated, GenerateOptions())
    talk.say("hi")
    talk.reply("yo")
    talk.save(str(tmp_path / "said"))
    rows = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert rows == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_several_replies_are_refused(tiny, capfdbinary):
    assert_fails(call(capfdbinary, "chat", "-m", tiny, "--num-return-sequences", 2), 2, "one reply")
