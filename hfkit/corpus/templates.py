"""How a row becomes a text: by a task's template for prompt and answer, or by the chat template of a tokenizer.

A model that learned a task carries it in its folder: under "task" in tokenizer_config.json, which transformers reads
and writes unchanged, and as a chat template, which other programs know, if the prompt has a single field.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hfkit.console import note_once
from hfkit.corpus.rows import column_names, row_error
from hfkit.declaration import unescape
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "task"  # in tokenizer_config.json
# For conversations with a tokenizer that has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")  # marks what the assistant says in a template
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # what programs call the thoughts before an answer
Message = dict[str, Any]  # role, content (a text), and what else the template reads


@dataclass(frozen=True)
class Task:
    r"""A template such as `English: {en}\nFrench: {fr}`: the last field is the answer, all before it the prompt."""

    template: str
    labels: tuple[str, ...] = ()  # all possible answers; empty if any text may be one
    metric: tuple[str, ...] = ()  # how answers are scored

    def __post_init__(self) -> None:
        if not self.columns or len(set(self.columns)) < len(self.columns):
            form = "write each column once and the answer last, such as 'English: {en}\\nFrench: {fr}'"
            raise OptionError(f"--template is {self.template!r}: {form}")

    @property
    def columns(self) -> list[str]:
        """All columns that a row must have, the answer's last."""
        return [name for _, name in _parse(self.template)[0]]

    @property
    def inputs(self) -> list[str]:
        """Columns of the prompt."""
        return self.columns[:-1]

    @property
    def answer(self) -> str:
        """Column of the answer."""
        return self.columns[-1]

    @property
    def end(self) -> str:
        """The text after the answer, which ends it; a newline if the template has none."""
        return _parse(self.template)[1] or "\n"

    def prompt(self, row: Mapping[str, Any], where: str = "") -> str:
        """The prompt that a row gives. HfkitError if a column is missing."""
        *fields, (last, _) = _parse(self.template)[0]
        return "".join(text + _value_of(row, name, where) for text, name in fields) + last.rstrip(" ")

    def complete(self, answer: str) -> str:
        """What the model writes after the prompt: `answer` and its end.

        Trailing spaces of the prompt belong to the answer: BPE tokens carry their leading space.
        """
        text, _ = _parse(self.template)[0][-1]
        return text[len(text.rstrip(" ")) :] + answer + self.end

    def example(self, row: Mapping[str, Any], where: str = "") -> dict[str, str]:
        """A row as prompt and completion, for training. An empty answer says that there is none: its end is learned.

        Raises:
            HfkitError: a column is missing, or the answer is not one of the labels.
        """
        answer = _value_of(row, self.answer, where)
        if self.labels and answer not in self.labels:
            raise HfkitError(f"{self.answer} is {answer!r} ({where}): the labels are {', '.join(self.labels)}")
        return {"prompt": self.prompt(row, where), "completion": self.complete(answer)}

    def fill(self, values: str | Mapping[str, Any]) -> str:
        """A prompt from a row, or from the value of its only column. HfkitError if the prompt has more columns."""
        if not isinstance(values, str):
            return self.prompt(values)
        if len(self.inputs) != 1:
            names = ", ".join(self.inputs)
            raise HfkitError(f"the model's template has the fields {names}: give rows with these, by --input")
        return self.prompt({self.inputs[0]: values})

    def chat_template(self, begin: str = "") -> str | None:
        """The template in Jinja, with the last message as its field; None if the prompt does not have one field.

        begin: what the tokenizer writes before a text. Chat templates must write it themselves.
        """
        if len(self.inputs) != 1:
            return None
        (first, _), (last, _) = _parse(self.template)[0]
        before, after = (json.dumps(text, ensure_ascii=False) for text in (begin + first, last.rstrip(" ")))
        return f"{{{{ {before} + (messages[-1]['content'] | trim) + {after} }}}}"


@functools.cache
def _parse(template: str) -> tuple[list[tuple[str, str]], str]:
    """(text, name of the field after it) of each field, and the text after the last one."""
    fields: list[tuple[str, str]] = []
    before = ""
    try:
        for text, name, form, conversion in string.Formatter().parse(template):
            before += text
            if name is None:  # a doubled brace, or the end
                continue
            if form or conversion or not name.isidentifier():
                raise ValueError("a field is the name of a column, such as {text}")
            fields.append((before, name))
            before = ""
    except ValueError as error:
        raise OptionError(f"--template is {template!r}: {error}; double a brace that is not part of a field") from None
    return fields, before


def _value_of(row: Mapping[str, Any], name: str, where: str) -> str:
    place = f" ({where})" if where else ""
    if name not in row:
        raise HfkitError(f"no column {name!r}{place}: there are {column_names(row)}")
    value = row[name]
    if value is None or isinstance(value, list | dict | bytes) or value != value:  # noqa: PLR0124, NaN alone differs
        raise HfkitError(f"column {name!r} is not text{place}: fix or delete the row")
    return str(value).strip()


def make_task(options: TaskOptions | None) -> Task | None:
    """The task that `options` describe; None without a template."""
    if options is None or options.template is None:
        return None
    return Task(unescape(options.template), tuple(options.labels or ()), tuple(options.metric or ()))


def task_of(tokenizer: PreTrainedTokenizerBase) -> Task | None:
    """The task that a model learned, from its tokenizer. HfkitError if it is damaged."""
    saved = getattr(tokenizer, "init_kwargs", {}).get(_KEY)
    try:
        return saved and Task(saved["template"], tuple(saved.get("labels", ())), tuple(saved.get("metric", ())))
    except (KeyError, TypeError, HfkitError) as error:
        raise HfkitError(f"the model's task cannot be read (tokenizer_config.json): {error}") from error


def give_task(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Make `tokenizer` carry `task`; saving the tokenizer saves it, too."""
    begin, _ = enclosing_tokens(tokenizer)
    tokenizer.init_kwargs[_KEY] = asdict(task)
    template = task.chat_template("".join(tokenizer.convert_ids_to_tokens(begin)))
    tokenizer.chat_template = template or tokenizer.chat_template


def enclosing_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer writes before and after a text."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = whole.index(bare[0]) if bare else 0
    return whole[:start], whole[start + len(bare) :]


class RenderedChat(NamedTuple):
    """A conversation, or its beginning, in the chat template."""

    text: str
    answers: list[tuple[int, int]]  # where each text that is learned begins and ends, in characters


def set_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template CHAT_TEMPLATE, so that the template is saved with the model."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE


def render_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, tools: list[Any] | None = None
) -> list[RenderedChat]:
    """A conversation as what a model learns from it: one text, or a text for each answer.

    The template's own {% generation %} marks decide what is learned, if it has them; else what follows the prompt for
    each answer. Many templates render earlier turns differently once there are later ones (they drop the reasoning,
    for example). These give a text for each answer, which ends with it, as at inference. Answers of weight 0 are not
    learned.

    Raises:
        HfkitError: the template fails, or it leaves out the text of an answer.
    """
    renderer = _Renderer(tokenizer, where, tools)
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [turn for turn in answers if messages[turn].get("weight", 1)]
    whole = renderer.render(messages)
    if learned == answers and whole.answers and _holds(whole, spoken := [messages[turn] for turn in answers]):
        _note_lost_thoughts(spoken, whole.text)
        return [whole]
    chats = [renderer.render_answer(messages[: turn + 1]) for turn in learned]
    for turn, chat in zip(learned, chats, strict=True):
        if not _holds(chat, [messages[turn]]):
            remedy = "fix the row, or use a model whose template has them"
            raise row_error("the chat template leaves out an answer or its calls of tools", where, remedy)
        _note_lost_thoughts([messages[turn]], chat.text)
    if all(whole.text.startswith(chat.text) for chat in chats):
        return [RenderedChat(whole.text, [span for chat in chats for span in chat.answers])]
    return chats


class _Renderer:
    """A tokenizer's chat template for a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str, tools: list[Any] | None) -> None:
        self._tokenizer, self._where, self._tools = tokenizer, where, tools
        self._template = tokenizer.get_chat_template(None if tokenizer.chat_template else CHAT_TEMPLATE, tools)
        if tools and "tools" not in self._template:
            remedy = "delete them, or use another model"
            raise row_error("the chat template has no place for 'tools'", where, remedy)

    def render(self, messages: list[Message], *, prompt: bool = False) -> RenderedChat:
        """A conversation, with what the template's own marks say is learned. prompt: with what asks for an answer.

        This is `apply_chat_template`, which does not return the marks.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        has_marks = bool(_GENERATION.search(self._template))
        options: dict[str, Any] = {"chat_template": self._template, "return_assistant_tokens_mask": has_marks}
        options |= {"add_generation_prompt": prompt, **self._tokenizer.special_tokens_map}
        try:
            rendered: Any = render_jinja_template([messages], self._tools, **options)
        except Exception as error:  # a template can raise anything
            reason = f"the chat template rejects this conversation ({self._where}): {first_line(error)}"
            raise HfkitError(reason) from error
        texts, marks = rendered
        return RenderedChat(texts[0], marks[0] if marks else [])

    def render_answer(self, messages: list[Message]) -> RenderedChat:
        """A conversation up to an answer, which is learned: all that follows the prompt that asks for it."""
        text = self.render(messages).text
        # A prompt can go on where the answer does not, with the beginning of a thought.
        start = len(os.path.commonprefix([self._render_prompt(messages, text), text]))
        if (place := text.rfind(messages[-1]["content"].strip())) >= 0:
            start = min(start, place)
        return RenderedChat(text, [(start, len(text))])

    def _render_prompt(self, messages: list[Message], text: str) -> str:
        """What comes before the last message. text: all messages."""
        if len(messages) > 1:
            with contextlib.suppress(HfkitError):  # many templates need a question before an answer
                return self.render(messages[:-1], prompt=True).text
        header = self.render(messages, prompt=True).text.removeprefix(text).strip()
        return text[: text.rfind(header) + len(header)] if header else text


def _holds(chat: RenderedChat, messages: list[Message]) -> bool:
    """Whether the text of each message, or the name of each function that it calls, is in what is learned."""
    learned = "".join("".join(chat.text[start:stop] for start, stop in chat.answers).split())
    expected = [message["content"] for message in messages]
    expected += [call["function"]["name"] for message in messages for call in message.get("tool_calls", [])]
    return all("".join(text.split()) in learned for text in expected)


def _note_lost_thoughts(messages: list[Message], text: str) -> None:
    """Say which thoughts of these messages are not in the rendered text. Many templates have a place for one name."""
    for name in _THOUGHTS:
        if any(str(message.get(name) or "").strip() not in text for message in messages):
            note_once(f"the chat template leaves out {name!r} of answers: it is not learned")
