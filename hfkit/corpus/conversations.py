"""Conversations as OpenAI, ShareGPT and others write them, as the messages that chat templates read."""

import json
from collections.abc import Iterator
from typing import Any

from hfkit.corpus.rows import row_error
from hfkit.errors import HfkitError

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "claude"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # an assistant's message whose text is a call
}


def make_conversation(row: dict[str, Any], turns: Any, where: str, prompt: Any = None) -> dict[str, Any]:
    """{"messages": ...}, each with a role and a text, and the row's `tools`.

    turns: messages in any of the known forms, or JSON of them. prompt: those before them, whose answers are not
    learned. HfkitError names a key whose meaning would be lost, or a message without a role or a text.
    """
    tools = _without_nulls(_parse_json(row.get("tools") or row.get("functions") or []))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row_error("'tools' must be a list of objects", where)
    before, after = (list(_unfold(part, where)) for part in (prompt or [], turns))
    numbered = enumerate(before + after, 1)
    messages = [_read_message(message, f"{where}, message {number}") for number, message in numbered]
    for message in messages[: len(before)]:
        if message["role"] == "assistant":
            message["weight"] = 0
    system = row.get("system") or row.get("system_prompt")
    if isinstance(system, str) and system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise UnlearnedError(f"messages without an assistant ({where}): there is no answer to learn")
    return {"messages": messages, **({"tools": [_wrap(tool) for tool in tools]} if tools else {})}


def _parse_json(value: Any) -> Any:
    """The list or object in a JSON text, as tables have them; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    except ValueError:
        return value


def _unfold(turns: Any, where: str) -> Iterator[dict[str, Any]]:
    """Messages with `role` and `content`. A turn may be one, a question with its answer, or the next text."""
    turns = _without_nulls(_parse_json(turns))
    if not isinstance(turns, list):
        raise row_error("messages must be a list of objects", where)
    for number, turn in enumerate(turns):
        match turn:
            case {"from": role}:
                others = {name: part for name, part in turn.items() if name not in ("from", "value")}
                yield {**others, "role": role, "content": turn.get("value")}
            case {"role": _} | {"content": _}:
                yield turn
            case str():
                yield {"role": ("user", "assistant")[number % 2], "content": turn}
            case {"human": question, "assistant": answer} | {"input": question, "output": answer} | [question, answer]:
                yield {"role": "user", "content": question}
                yield {"role": "assistant", "content": answer}
            case _:
                raise row_error("messages must be a list of objects with role and content", where)


def _without_nulls(value: Any) -> Any:
    """A copy without nulls. Columnar files give every object all the keys of the others, and templates read them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose content is a text, which may be empty beside tool calls."""
    if message.get("audio"):  # what an assistant does instead of writing
        raise row_error("'audio' is not learned", where)
    if not isinstance(name := message.get("role"), str):
        raise row_error("a message has no role", where)
    if not (role := _ROLES.get(name.lower())):
        raise row_error(f"unknown role {name!r}", where, "write system, user, assistant or tool")
    if message.pop("train", True) is False:  # as Axolotl has it
        message["weight"] = 0
    if (weight := message.get("weight", 0)) not in (0, 1):
        raise row_error(f"'weight' is {weight!r}, but an answer is learned or not", where, "write 0 or 1")
    if weight == 1:
        del message["weight"]
    content, calls = message.get("content"), message.get("tool_calls")
    if role == "call":
        role, content, calls = "assistant", None, _parse_json(content)
    elif call := message.pop("function_call", None):
        calls = [call]
    if calls:
        message["tool_calls"] = _read_calls(calls, where)
        content = "" if content is None else content
    if isinstance(content, list):
        content = _join_parts(content, where)
    if not isinstance(content, str):
        raise row_error(f"'content' is {'null' if content is None else 'not text'}", where)
    if role == "assistant" and not calls:
        check_answer(content, where)
    return message | {"role": role, "content": content}


class UnlearnedError(HfkitError):
    """A row is in order, but has no answer to learn."""


def check_answer(answer: str, where: str) -> str:
    """The answer. UnlearnedError if it has no text."""
    if not answer.strip():
        raise UnlearnedError(f"an answer is empty ({where})")
    return answer


def _wrap(function: dict[str, Any]) -> dict[str, Any]:
    """A tool, or a call of one, in the object that OpenAI writes around it."""
    return function if "function" in function else {"type": "function", "function": function}


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, except that arguments are an object, as chat templates expect."""
    try:
        wrapped = [_wrap(call) for call in (calls if isinstance(calls, list) else [calls])]
        for function in [call["function"] for call in wrapped]:
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"])
            if not isinstance(function["name"], str) or not isinstance(function.setdefault("arguments", {}), dict):
                raise TypeError
        return wrapped
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        form = '{"function": {"name": ..., "arguments": {...}}}'
        raise row_error(f"'tool_calls' must be a list of {form}", where) from error


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of a content that is a list of parts, as OpenAI has it."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise row_error(f"'content' has a part of type {kind!r}", where, "only text is learned")
    return "".join(part["text"] for part in parts)
