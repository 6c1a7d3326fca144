"""Conversations as text: the chat template, and where in its text the assistant's answers are."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hfkit.console import note_once
from hfkit.errors import HfkitError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
_Render = Callable[..., tuple[str, list[tuple[int, int]]]]  # as `_render`, of messages


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
    template = tokenizer.get_chat_template(None if tokenizer.chat_template else CHAT_TEMPLATE, tools)
    if tools and "tools" not in template:
        raise HfkitError(f"the chat template has no place for 'tools' ({where}): delete them, or use another model")
    render = partial(_render, tokenizer, template, tools, where)
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [turn for turn in turns if messages[turn].get("weight", 1)]
    text, marks = render(messages)
    if learned == turns and _GENERATION.search(template):
        marked = RenderedChat(text, marks)
        if _holds(marked, [messages[turn] for turn in turns]):
            _note_lost_thoughts([messages[turn] for turn in turns], text)
            return [marked]
    chats = [_render_answer(messages[: turn + 1], render) for turn in learned]
    for turn, chat in zip(learned, chats, strict=True):
        if not _holds(chat, [messages[turn]]):
            raise HfkitError(f"the chat template leaves out an answer ({where}): fix the row or the template")
        _note_lost_thoughts([messages[turn]], chat.text)
    if all(text.startswith(chat.text) for chat in chats):
        return [RenderedChat(text, [span for chat in chats for span in chat.answers])]
    return chats


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    tools: list[Any] | None,
    where: str,
    messages: list[Message],
    *,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where the template's own marks begin and end in it.

    prompt: with what asks for an answer. This is `apply_chat_template`, which does not return the marks.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {"return_assistant_tokens_mask": bool(_GENERATION.search(template))}
    options |= tokenizer.special_tokens_map
    try:
        rendered: Any = render_jinja_template(
            [messages], tools, chat_template=template, add_generation_prompt=prompt, **options
        )
    except Exception as error:  # a template can raise anything
        raise HfkitError(f"the chat template rejects this conversation ({where}): {first_line(error)}") from error
    texts, marks = rendered
    return texts[0], marks[0] if marks else []


def _render_answer(messages: list[Message], render: _Render) -> RenderedChat:
    """A conversation up to an answer, which is learned: all that follows the prompt that asks for it."""
    text, _ = render(messages)
    # A prompt can go on where the answer does not, with the beginning of a thought.
    start = len(os.path.commonprefix([_render_prompt(messages, text, render), text]))
    if (place := text.rfind(messages[-1]["content"].strip())) >= 0:
        start = min(start, place)
    return RenderedChat(text, [(start, len(text))])


def _render_prompt(messages: list[Message], text: str, render: _Render) -> str:
    """What comes before the last message. text: all messages."""
    if len(messages) > 1:
        with contextlib.suppress(HfkitError):  # many templates need a question before an answer
            return render(messages[:-1], prompt=True)[0]
    header = render(messages, prompt=True)[0].removeprefix(text).strip()
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
