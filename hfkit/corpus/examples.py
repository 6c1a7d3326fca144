"""From a row to what is learned: a text, a prompt with its completion, or a conversation, in the known forms."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from hfkit.corpus.rows import column_names, row_error
from hfkit.errors import HfkitError

Values = str | dict[str, Any]  # a text, or `messages`, or `prompt` and `completion`
Convert = Callable[[dict[str, Any], str], Values]
_TEXT_COLUMNS = ("text", "content", "document", "body")
_ASSISTANT = ("assistant", "gpt", "chatgpt", "bot", "model")
_SPEAKERS = {"system": "system", "user": "user", "human": "user", **dict.fromkeys(_ASSISTANT, "assistant")}


def choose_form(row: dict[str, Any], where: str, text_column: str | None) -> tuple[Convert, str]:
    """How rows like this one become what is learned, and a note about that. HfkitError if its form is not known."""
    for columns, convert, name in _FORMS if not text_column else ():
        if row.keys() >= set(columns):
            return convert, name
    column = choose_text_column(row, where, text_column)

    def read_column(row: dict[str, Any], where: str) -> str:
        return "" if row.get(column, "") is None else text_of(row, column, where)

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
    others = {name: value for name, value in row.items() if name != label_column}
    candidates = [name for name in others if str(name).lower() in _TEXT_COLUMNS]
    # Where a column is a list, an object or null, the text may be in there: the only other text is an id or a title.
    if not candidates and not any(value is None or isinstance(value, list | dict) for value in others.values()):
        candidates = [name for name, value in others.items() if isinstance(value, str)]
    if len(candidates) == 1:
        return candidates[0]
    if isinstance(row.get("translation"), dict):
        remedy = "write a column for each language and use --template, such as 'English: {en}\\nFrench: {fr}'"
        raise row_error("translations in one column", where, remedy)
    raise HfkitError(f"which column is the text ({where}: {column_names(row)})? Name it with --text-column")


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column. HfkitError if there is none."""
    if column not in row:
        raise HfkitError(f"no column {column!r} ({where}): it has {column_names(row)}")
    if not isinstance(value := row[column], str):
        raise row_error(f"column {column!r} is not text", where)
    return value


def _check_answer(answer: str, where: str) -> str:
    if not answer.strip():
        raise row_error("an answer is empty", where)
    return answer


def _read_pair(row: dict[str, Any], where: str) -> Values:
    prompt, completion = row.get("prompt"), row.get("completion")
    if row.get("label") is False:  # of preference data: the completion is a bad example
        raise row_error("'label' is false, but hfkit learns every completion", where, "delete the row")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in prompt):
            raise row_error("the prompt has answers, which would be learned", where, "write the row as messages")
        return _read_messages(row | {"messages": prompt + completion}, where)
    if row.get("system"):
        remedy = "put it into the prompt, or write messages"
        raise row_error("'system' would be lost beside a prompt", where, remedy)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise row_error("prompt and completion must be texts", where)
    return {"prompt": prompt, "completion": _check_answer(completion, where)}


def _read_sharegpt(row: dict[str, Any], where: str) -> Values:
    turns = row.get("conversations")
    if isinstance(turns, list) and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        if unknown := [turn["from"] for turn in turns if turn["from"] not in _SPEAKERS]:
            raise row_error(f"unknown speaker {unknown[0]!r}", where)
        spoken = [{"role": _SPEAKERS[turn["from"]], "content": turn.get("value")} for turn in turns]
        turns = [{**turn, **said, "from": None, "value": None} for turn, said in zip(turns, spoken, strict=True)]
    return _read_messages(row | {"messages": turns}, where)


def _read_alpaca(row: dict[str, Any], where: str) -> Values:
    question = [text_of({name: row.get(name) or ""}, name, where) for name in ("instruction", "input")]
    turns = []
    for pair in [*(row.get("history") or []), ["\n\n".join(filter(None, question)), row.get("output")]]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise row_error("'history' must be a list of [question, answer]", where)
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return _read_messages(row | {"messages": turns}, where)


def _read_messages(row: dict[str, Any], where: str) -> Values:
    """{"messages": turns}, each with a role and a text. HfkitError names a key whose meaning would be lost."""
    messages, tools, system = row.get("messages"), row.get("tools") or [], row.get("system")
    if row.get("functions"):
        raise row_error("'functions' are not learned", where, "write them as 'tools'")
    for name, values in (("messages", messages), ("'tools'", tools)):
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise row_error(f"{name} must be a list of objects", where)
    turns = [_read_turn(turn, f"{where}, message {number}") for number, turn in enumerate(_without_nulls(messages), 1)]
    if isinstance(system, str) and system and not any(turn["role"] == "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": system})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise row_error("messages without an assistant", where, "there is no answer to learn")
    return {"messages": turns, **({"tools": _without_nulls(tools)} if tools else {})}


def _without_nulls(value: Any) -> Any:
    """A copy without nulls. Columnar files give every object all the keys of the others, and templates read them."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _read_turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose content is a text, which may be empty beside calls of tools."""
    for name in ("function_call", "audio"):  # what an assistant does instead of writing
        if turn.get(name):
            raise row_error(f"{name!r} is not learned", where, "write the row as prompt and completion")
    if not isinstance(turn.get("role"), str):
        raise row_error("a message has no role", where)
    if (weight := turn.get("weight", 0)) not in (0, 1):
        raise row_error(f"'weight' is {weight!r}, but an answer is learned or not", where, "write 0 or 1")
    if weight == 1:
        del turn["weight"]
    if calls := turn.get("tool_calls"):
        _read_calls(calls, where)
    content = turn.get("content", "" if calls else None)
    if isinstance(content, list):
        content = _join_parts(content, where)
    if not isinstance(content, str):
        raise row_error(f"'content' is {'null' if content is None else 'not text'}", where)
    if turn["role"] == "assistant" and not calls:
        _check_answer(content, where)
    return turn | {"content": content}


def _read_calls(calls: Any, where: str) -> None:
    """Check calls of tools, which are as OpenAI has them. Arguments become an object, as chat templates expect."""
    try:
        for function in [call["function"] for call in calls]:
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"])
            if not isinstance(function["name"], str) or not isinstance(function.setdefault("arguments", {}), dict):
                raise TypeError
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


_FORMS: tuple[tuple[tuple[str, ...], Convert, str], ...] = (
    (("messages",), _read_messages, "the rows are conversations (messages)"),
    (("prompt", "completion"), _read_pair, "the rows have prompt and completion"),
    (("conversations",), _read_sharegpt, "the rows are conversations (ShareGPT)"),
    (("instruction", "output"), _read_alpaca, "the rows have instruction, input and output (Alpaca)"),
)
