"""From a row to what is learned: a text, a prompt with its completion, or a conversation, in the known forms."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hfkit.corpus.rows import column_names
from hfkit.errors import HfkitError

_TEXT_COLUMNS = ("text", "content", "document", "body")
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"), "system": "system",
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
}  # fmt: skip
_ELSEWHERE = ("function_call", "audio")  # of a message: what an assistant does instead of writing
Values = str | dict[str, Any]
Convert = Callable[[dict[str, Any], str], Values]


def choose_form(row: dict[str, Any], where: str, text_column: str | None) -> tuple[Convert, str]:
    """How rows like this one become what is learned, and a note about that.

    The function returns a text, or a dict with `messages`, or with `prompt` and `completion`.

    Raises:
        HfkitError: the row has no known form; the message names its columns.
    """
    if not text_column:
        for columns, convert, name in _FORMS:
            if row.keys() >= set(columns):
                return convert, name
    column = choose_text_column(row, where, text_column)

    def read_column(row: dict[str, Any], where: str) -> str:
        if column not in row:
            raise HfkitError(f"no column {column!r} ({where}): it has {column_names(row)}")
        return check_text(row[column] if row[column] is not None else "", column, where)

    return read_column, f"the text is column {column!r}"


def choose_text_column(
    row: Mapping[str, Any], where: str, text_column: str | None = None, label_column: str | None = None
) -> str:
    """The column that holds the text: the one that was asked for, one with a usual name, or the only one with text.

    Raises:
        HfkitError: there is no such column, or more than one.
    """
    if text_column:
        if text_column not in row:
            raise HfkitError(f"no column {text_column!r} ({where}: {column_names(row)}): choose another --text-column")
        return text_column
    named = [name for name in row if str(name).lower() in _TEXT_COLUMNS and name != label_column]
    others = {name: value for name, value in row.items() if name != label_column}
    texts = [name for name, value in others.items() if isinstance(value, str)]
    # Where a column is a list, an object or null, the text may be in there: the only other text is an id or a title.
    is_plain = not any(value is None or isinstance(value, list | dict) for value in others.values())
    candidates = named or (texts if is_plain else [])
    if len(candidates) == 1:
        return candidates[0]
    if isinstance(row.get("translation"), dict):
        raise HfkitError(
            f"translations in one column ({where}): write a column for each language and use --template, such as "
            "'English: {en}\\nFrench: {fr}'"
        )
    raise HfkitError(f"which column is the text ({where}: {column_names(row)})? Name it with --text-column")


def check_text(value: Any, column: str, where: str) -> str:
    """`value` if it is text. HfkitError if not."""
    if not isinstance(value, str):
        raise HfkitError(f"column {column!r} is not text ({where}): fix or delete the row")
    return value


def _check_answer(answer: str, where: str) -> str:
    if not answer.strip():
        raise HfkitError(f"an answer is empty ({where}): fix or delete the row")
    return answer


def _read_pair(row: dict[str, Any], where: str) -> Values:
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:  # of preference data: the completion is a bad example
        raise HfkitError(f"'label' is false, but hfkit learns every completion ({where}): delete the row")
    if row.get("system") and not isinstance(prompt, list):
        raise HfkitError(
            f"'system' would be lost beside a prompt ({where}): put it into the prompt, or write messages"
        )
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
            raise HfkitError(f"the prompt has answers, which would be learned ({where}): write the row as messages")
        return _make_conversation(row, [*prompt, *completion], where)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise HfkitError(f"prompt and completion must be texts ({where}): fix or delete the row")
    return {"prompt": prompt, "completion": _check_answer(completion, where)}


def _read_messages(row: dict[str, Any], where: str) -> Values:
    return _make_conversation(row, row.get("messages"), where)


def _read_sharegpt(row: dict[str, Any], where: str) -> Values:
    turns = row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        for turn in turns:
            if turn["from"] not in _SPEAKERS:
                raise HfkitError(f"unknown speaker {turn['from']!r} ({where}): fix or delete the row")
        turns = [
            {**turn, "role": _SPEAKERS[turn["from"]], "content": turn.get("value"), "from": None, "value": None}
            for turn in turns
        ]
    return _make_conversation(row, turns, where)


def _read_alpaca(row: dict[str, Any], where: str) -> Values:
    question = [check_text(row.get(name) or "", name, where) for name in ("instruction", "input")]
    pairs = [*(row.get("history") or []), ["\n\n".join(filter(None, question)), row.get("output")]]
    turns = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise HfkitError(f"'history' must be a list of [question, answer] ({where}): fix or delete the row")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _make_conversation(row, turns, where)


_FORMS: tuple[tuple[tuple[str, ...], Convert, str], ...] = (
    (("messages",), _read_messages, "the rows are conversations (messages)"),
    (("prompt", "completion"), _read_pair, "the rows have prompt and completion"),
    (("conversations",), _read_sharegpt, "the rows are conversations (ShareGPT)"),
    (("instruction", "output"), _read_alpaca, "the rows have instruction, input and output (Alpaca)"),
)


def _make_conversation(row: dict[str, Any], messages: Any, where: str) -> Values:
    """{"messages": turns}, each with a role and a text. HfkitError names a key whose meaning would be lost."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise HfkitError(f'messages must be a list of {{"role", "content"}} ({where}): fix or delete the row')
    if row.get("functions"):
        raise HfkitError(f"'functions' are not learned ({where}): write them as 'tools'")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise HfkitError(f"'tools' must be a list of objects ({where}): fix or delete the row")
    turns = [_read_turn(message, f"{where}, message {number}") for number, message in enumerate(messages, 1)]
    system = row.get("system")
    if isinstance(system, str) and system and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise HfkitError(f"messages without an assistant ({where}): there is no answer to learn")
    return {"messages": turns, **({"tools": _without_nulls(tools)} if tools else {})}


def _without_nulls(value: Any) -> Any:
    """Columnar files give every object all the keys of the others, with nulls."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """An assistant's calls of tools, as OpenAI has them; the arguments as an object, which chat templates expect."""
    read: list[dict[str, Any]] = []
    try:
        for call in map(_without_nulls, calls):
            read.append(call)
            function = call["function"]
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"])
            if not isinstance(function["name"], str) or not isinstance(function.setdefault("arguments", {}), dict):
                raise TypeError
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        form = '{"function": {"name": ..., "arguments": {...}}}'
        raise HfkitError(f"'tool_calls' must be a list of {form} ({where}): fix or delete the row") from error
    return read


def _read_turn(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose content is a text, which may be empty beside calls of tools."""
    for name in _ELSEWHERE:
        if message.get(name):
            raise HfkitError(f"{name!r} is not learned ({where}): write the row as prompt and completion")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise HfkitError(f"a message has no role ({where}): fix or delete the row")
    if message.get("weight") not in (None, 0, 1):
        raise HfkitError(f"'weight' is {message['weight']!r}, but an answer is learned or not ({where}): write 0 or 1")
    calls = _read_calls(message["tool_calls"], where) if message.get("tool_calls") else []
    if calls and content is None:
        content = ""
    if isinstance(content, list):
        content = _join_parts(content, where)
    if not isinstance(content, str):
        raise HfkitError(f"'content' is {'null' if content is None else 'not text'} ({where}): fix or delete the row")
    if role == "assistant" and not calls:
        _check_answer(content, where)
    # Columnar files have every key in every message; a chat template would take a null for a value.
    others = {name: value for name, value in message.items() if value is not None}
    if others.get("weight") == 1:
        del others["weight"]
    return {**others, "role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts, as OpenAI has it."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise HfkitError(f"'content' has a part of type {kind!r} ({where}): only text is learned")
    return "".join(part["text"] for part in parts)
