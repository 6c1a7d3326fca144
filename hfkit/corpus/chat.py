"""Conversations as text: the chat template, and where in its text the assistant's answers are."""

from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from hfkit.errors import HfkitError, first_line

# For conversations with a tokenizer that has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
Message = dict[str, Any]  # role, content


def set_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template CHAT_TEMPLATE, so that the template is saved with the model."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE


def render_chat(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where each of the assistant's answers begins and ends in it (characters).

    Raises:
        HfkitError: the template fails, or it shows earlier turns differently once there are later ones.
    """
    set_template(tokenizer)

    def render(turns: list[Message], **kwargs: Any) -> str:
        try:
            return cast(str, tokenizer.apply_chat_template(turns, tokenize=False, **kwargs))
        except Exception as error:  # a template can raise anything
            raise HfkitError(f"the chat template rejects this conversation ({where}): {first_line(error)}") from error

    text, spans = render(messages), []
    prompt = render(messages, add_generation_prompt=True).removeprefix(text).lstrip()
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        after = render(messages[: turn + 1])
        if turn:
            before = render(messages[:turn], add_generation_prompt=True)
        else:  # many templates cannot render an empty conversation
            before = after.partition(prompt)[0] + prompt
        if not (after.startswith(before) and text.startswith(after)):
            raise HfkitError(f"the chat template changes earlier turns ({where}): give prompt and completion")
        spans.append((len(before), len(after)))
    return text, spans
