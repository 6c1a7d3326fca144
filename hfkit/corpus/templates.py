"""A task: a template that makes a prompt and its answer from the columns of a row.

A model that learned a task carries it in its folder: under "task" in tokenizer_config.json, which transformers reads
and writes unchanged, and as a chat template, which other programs know, if the prompt has a single field.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfkit.errors import HfkitError, OptionError
from hfkit.options import TaskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEY = "task"  # in tokenizer_config.json


@dataclass(frozen=True)
class Task:
    r"""A template such as `English: {en}\nFrench: {fr}`: the last field is the answer, all before it the prompt."""

    template: str
    labels: tuple[str, ...] = ()  # all possible answers; empty if any text may be one
    metric: tuple[str, ...] = ()  # how answers are scored

    def __post_init__(self) -> None:
        names = [name for _, name in self._fields]
        if not names or len(set(names)) < len(names):
            raise OptionError(
                f"--template is {self.template!r}: write each column once and the answer last, such as "
                "'English: {en}\\nFrench: {fr}'"
            )

    @property
    def _fields(self) -> list[tuple[str, str]]:
        """(text before the field, name of its column) of each field."""
        return [(text, name) for text, name in _parse(self.template) if name]

    @property
    def inputs(self) -> list[str]:
        """Columns of the prompt."""
        return [name for _, name in self._fields[:-1]]

    @property
    def answer(self) -> str:
        """Column of the answer."""
        return self._fields[-1][1]

    @property
    def columns(self) -> list[str]:
        """All columns that a row must have, the answer's last."""
        return [name for _, name in self._fields]

    @property
    def end(self) -> str:
        """The text after the answer, which ends it; a newline if the template has none."""
        text, name = _parse(self.template)[-1]
        return "\n" if name else text

    def prompt(self, row: Mapping[str, Any], where: str = "") -> str:
        """The prompt that a row gives. HfkitError if a column is missing."""
        *fields, (last, _) = self._fields
        return "".join(text + _value_of(row, name, where) for text, name in fields) + last.rstrip(" ")

    def complete(self, answer: str) -> str:
        """What the model writes after the prompt: `answer` and its end.

        Trailing spaces of the prompt belong to the answer: BPE tokens carry their leading space.
        """
        text = self._fields[-1][0]
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
        (first, _), (last, _) = self._fields
        before, after = (json.dumps(text, ensure_ascii=False) for text in (begin + first, last.rstrip(" ")))
        return f"{{{{ {before} + (messages[-1]['content'] | trim) + {after} }}}}"


def _parse(template: str) -> list[tuple[str, str | None]]:
    """(text, name of the field after it) of each field; the last name is None where text follows the last field."""
    fields: list[tuple[str, str | None]] = []
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
    return [*fields, (before, None)] if before else fields


def _value_of(row: Mapping[str, Any], name: str, where: str) -> str:
    place = f" ({where})" if where else ""
    if name not in row:
        raise HfkitError(f"no column {name!r}{place}: there are {', '.join(map(repr, row))}")
    value = row[name]
    if value is None or isinstance(value, list | dict | bytes) or value != value:  # noqa: PLR0124, NaN alone differs
        raise HfkitError(f"column {name!r} is not text{place}: fix or delete the row")
    return str(value).strip()


def make_task(options: TaskOptions | None) -> Task | None:
    """The task that `options` describe; None without a template."""
    if options is None or options.template is None:
        return None
    template = options.template.replace("\\n", "\n").replace("\\t", "\t")  # typed as such in a shell
    return Task(template, tuple(options.labels or ()), tuple(options.metric or ()))


def task_of(tokenizer: PreTrainedTokenizerBase) -> Task | None:
    """The task that a model learned, from its tokenizer. HfkitError if it is damaged."""
    saved = getattr(tokenizer, "init_kwargs", {}).get(_KEY)
    try:
        return saved and Task(saved["template"], tuple(saved.get("labels", ())), tuple(saved.get("metric", ())))
    except (KeyError, TypeError, HfkitError) as error:
        raise HfkitError(f"the model's task cannot be read (tokenizer_config.json): {error}") from error


def give_task(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Make `tokenizer` carry `task`; saving the tokenizer saves it, too."""
    begin, _ = special_tokens(tokenizer)
    tokenizer.init_kwargs[_KEY] = asdict(task)
    template = task.chat_template("".join(tokenizer.convert_ids_to_tokens(begin)))
    tokenizer.chat_template = template or tokenizer.chat_template


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer writes before and after a text."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = whole.index(bare[0]) if bare else 0
    return whole[:start], whole[start + len(bare) :]
