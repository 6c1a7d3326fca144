"""From a row to what is learned: a text, a prompt with its completion, or a conversation, in the known forms."""

import math
import os
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from hfkit.corpus.conversations import UnlearnedError, check_answer, make_conversation
from hfkit.corpus.rows import column_names, row_error
from hfkit.errors import HfkitError

Values = str | dict[str, Any]  # a text, or `messages`, or `prompt` and `completion`
Convert = Callable[[dict[str, Any], str], Values]
Form = tuple[tuple[str, ...], Convert, str]  # columns of its rows, how they are read, and a note
_TEXT_COLUMNS = ("text", "content", "document", "body")
# A row with one column of each kind is a question and its answer.
_QUESTIONS = ("instruction", "question", "query", "problem", "prompt", "inputs", "input", "human", "user")
_ANSWERS = ("output", "response", "answer", "solution", "targets", "target", "assistant")
_ABOUT = ("input", "context")  # what the question is about
_UNCLEAR = ("choices", "options", "passage")  # without these a question may make no sense
_BORDER = "\n\nAssistant:"  # before an answer in Anthropic's data


def choose_form(row: dict[str, Any], where: str, text_column: str | None) -> tuple[Convert, str]:
    """How rows like this one become what is learned, and a note about that. HfkitError if its form is not known."""
    cells = {name: value for name, value in row.items() if value is not None}
    if isinstance(cells.get("conversation"), str):  # written down as one text
        del cells["conversation"]
    form = next((form for form in _FORMS if cells.keys() >= set(form[0])), None) or _find_question(cells)
    if form and not text_column:
        columns, convert, name = form

        def read_example(row: dict[str, Any], where: str) -> Values:
            if missing := [name for name in columns if row.get(name) is None]:
                remedy = "all rows of a file must have the form of the first"
                raise row_error(f"a row without {column_names(missing)}", where, remedy)
            return convert(row, where)

        return read_example, name
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
    remedy = "Name it with --text-column, or make a prompt and its answer with --template"
    raise HfkitError(f"which column is the text ({where}: {column_names(row)})? {remedy}")


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column. HfkitError if there is none."""
    if column not in row:
        raise HfkitError(f"no column {column!r} ({where}): it has {column_names(row)}")
    if not isinstance(value := row[column], str):
        raise row_error(f"column {column!r} is not text", where)
    return value


def _read_messages(column: str) -> Convert:
    return lambda row, where: make_conversation(row, row[column], where)


def _read_pair(row: dict[str, Any], where: str) -> Values:
    prompt, completion = row["prompt"], row["completion"]
    if row.get("label") is False:  # of preference data: the completion is a bad example
        raise UnlearnedError(f"'label' is false ({where}): the completion is not learned")
    if isinstance(prompt, list) and isinstance(completion, list):
        return make_conversation(row, completion, where, prompt)
    if row.get("system"):
        remedy = "put it into the prompt, or write messages"
        raise row_error("'system' would be lost beside a prompt", where, remedy)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise row_error("prompt and completion must be texts", where)
    return {"prompt": prompt, "completion": check_answer(completion, where)}


def _find_question(row: dict[str, Any], answers: tuple[str, ...] = _ANSWERS) -> Form | None:
    """The form of a question and its answer, whatever their columns are called; None if that is not clear."""
    names = {str(name).lower(): name for name in row}
    if "instruction" in names:  # `input` is what it is about
        names.pop("input", None)
    questions = [names[name] for name in _QUESTIONS if name in names]
    replies = [names[name] for name in answers if name in names]
    if len(questions) != 1 or len(replies) != 1 or names.keys() & {*_TEXT_COLUMNS, *_UNCLEAR}:
        return None
    return _question_form(questions[0], replies[0])


def _question_form(question: str, answer: str) -> Form:
    names = question.lower(), answer.lower()

    def read_question(row: dict[str, Any], where: str) -> Values:
        row = {str(name).lower(): value for name, value in row.items()}
        parts = [text_of(row, name, where) for name in dict.fromkeys((names[0], *_ABOUT)) if row.get(name)]
        if type(number := row[names[1]]) in (int, float) and math.isfinite(number):  # a table has it as a text
            row[names[1]] = str(number)
        turns, history = ["\n\n".join(parts), text_of(row, names[1], where)], row.get("history") or []
        if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
            raise row_error("'history' must be a list of [question, answer]", where)
        return make_conversation(row, [*history, turns], where)

    return (question, answer), read_question, f"the rows are questions ({question!r}) and answers ({answer!r})"


def _read_preference(row: dict[str, Any], where: str) -> Values:
    """A row with a better and a worse answer: the better one is learned. What both begin with is the prompt."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    has_question = any(str(name).lower() in _QUESTIONS for name in row)
    if isinstance(chosen, dict):  # the next message
        return make_conversation(row, [chosen], where, row.get("conversations") or row.get("messages"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        pairs = zip(chosen[:-1], rejected, strict=False)
        count = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        if not isinstance(prompt, list) and count:
            prompt, chosen = chosen[:count], chosen[count:]
        elif not isinstance(prompt, list) and has_question:
            prompt = [{"role": "user", "content": text_of(row, "prompt", where)}]
        return make_conversation(row, chosen, where, prompt)
    if "prompt" not in row and (form := _find_question(row, ("chosen",))):
        return form[1](row, where)
    if has_question:
        return _read_pair(row | {"prompt": text_of(row, "prompt", where), "completion": chosen}, where)
    chosen, rejected = (text_of(row, name, where) for name in ("chosen", "rejected"))
    shared = os.path.commonprefix([chosen, rejected]).rpartition(" ")[0]
    stop = chosen.rfind(_BORDER) + len(_BORDER) if _BORDER in chosen else len(shared)
    return {"prompt": chosen[:stop], "completion": check_answer(chosen[stop:], where)}


def _read_calls(row: dict[str, Any], where: str) -> Values:
    turns = [("user", row["query"]), ("function_call", row["answers"])]
    return make_conversation(row, [{"role": role, "content": content} for role, content in turns], where)


def _read_openai_preference(row: dict[str, Any], where: str) -> Values:
    """OpenAI's row with `input`, `preferred_output` and `non_preferred_output`."""
    if not isinstance(row["input"], dict) or not row["input"].get("messages"):
        raise row_error("'input' must be an object with messages", where)
    return make_conversation(row["input"], row["preferred_output"], where, row["input"]["messages"])


_FORMS: tuple[Form, ...] = (
    (("input", "preferred_output"), _read_openai_preference, "the rows are preferences: the preferred one is learned"),
    (("chosen", "rejected"), _read_preference, "the rows are preferences: 'chosen' is learned, 'rejected' is not"),
    (("messages",), _read_messages("messages"), "the rows are conversations (messages)"),
    (("prompt", "completion"), _read_pair, "the rows have prompt and completion"),
    (("conversations",), _read_messages("conversations"), "the rows are conversations (ShareGPT)"),
    (("conversation",), _read_messages("conversation"), "the rows are conversations"),
    (("query", "tools", "answers"), _read_calls, "the rows are questions ('query') and tool calls ('answers')"),
    _question_form("instruction", "output"),  # Alpaca, whatever else it has
)
