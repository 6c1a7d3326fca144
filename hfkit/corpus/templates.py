"""A task: how a row's columns become a prompt and its answer. A model that learned one carries it in its folder.

It stands under "task" in tokenizer_config.json, which transformers reads and writes as it is; and, where the template
has one field beside the answer, as a chat template, which other programs know.
"""

import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfkit.errors import HfkitError, OptionError
from hfkit.options import TaskOptions

_KEY = "task"  # in tokenizer_config.json


@dataclass(frozen=True)
class Task:
    """A template such as `English: {en}\\nFrench: {fr}`; what comes before its last field is the prompt."""

    template: str
    labels: tuple[str, ...] = ()  # all answers there are; empty if any text may be one
    metric: tuple[str, ...] = ()  # how answers are scored

    def __post_init__(self) -> None:
        names = [*self.inputs, self.answer] if self._fields else []
        if len(names) < 1 or len(set(names)) < len(names):
            raise OptionError(
                f"--template is {self.template!r}: write each column once and the answer last, such as "
                "'English: {en}\\nFrench: {fr}'"
            )

    @property
    def _fields(self) -> list[tuple[str, str]]:
        """Each column with the text before it."""
        return [(text, name) for text, name in _parse(self.template) if name]

    @property
    def inputs(self) -> list[str]:
        """Columns that the prompt is made of."""
        return [name for _, name in self._fields[:-1]]

    @property
    def answer(self) -> str:
        """Column of the answer."""
        return self._fields[-1][1]

    @property
    def _gap(self) -> str:
        """Spaces before the answer: they belong to its first word, as a model's tokens have it."""
        text = self._fields[-1][0]
        return text[len(text.rstrip(" ")) :]

    @property
    def end(self) -> str:
        """What follows the answer, and so ends it; a newline if the template says nothing."""
        text, name = _parse(self.template)[-1]
        return "\n" if name else text

    def prompt(self, row: Mapping[str, Any], where: str = "") -> str:
        """What the model is given. HfkitError if a column is missing."""
        *before, (last, _) = self._fields
        return "".join(text + _text(row, name, where) for text, name in before) + last.rstrip(" ")

    def complete(self, answer: str) -> str:
        """What the model is to write after the prompt, its end included."""
        return self._gap + answer + self.end

    def example(self, row: Mapping[str, Any], where: str = "") -> dict[str, str]:
        """A row as prompt and completion, for training.

        Raises:
            HfkitError: a column is missing, or the answer is none of the labels.
        """
        answer = _text(row, self.answer, where)
        if self.labels and answer not in self.labels:
            raise HfkitError(f"{self.answer} is {answer!r} ({where}): the labels are {', '.join(self.labels)}")
        return {"prompt": self.prompt(row, where), "completion": self.complete(answer)}

    def fill(self, given: str | Mapping[str, Any]) -> str:
        """A prompt from the value of its one column, or from a row. HfkitError if there are more columns."""
        if not isinstance(given, str):
            return self.prompt(given)
        if len(self.inputs) != 1:
            names = ", ".join(self.inputs)
            raise HfkitError(f"the model's template has the fields {names}: give rows with these, by --input")
        return self.prompt({self.inputs[0]: given})

    def chat_template(self, begin: str = "") -> str | None:
        """The same in Jinja, with the last message as the one column; None for more columns than one.

        begin: what the tokenizer writes before a text, which it leaves to a chat template.
        """
        if len(self.inputs) != 1:
            return None
        (first, _), (last, _) = self._fields
        before, after = (json.dumps(text, ensure_ascii=False) for text in (begin + first, last.rstrip(" ")))
        return f"{{{{ {before} + (messages[-1]['content'] | trim) + {after} }}}}"


def _parse(template: str) -> list[tuple[str, str | None]]:
    """(text, name of the field after it), the last name None unless the template ends with a field."""
    found, before = [], ""
    try:
        for text, name, form, conversion in string.Formatter().parse(template):
            before += text
            if name is None:  # a brace that was written twice, or the end
                continue
            if form or conversion or not name.isidentifier():
                raise ValueError("a field is the name of a column, such as {text}")
            found.append((before, name))
            before = ""
    except ValueError as error:
        raise OptionError(f"--template is {template!r}: {error}; a brace that is none of a field is doubled") from None
    return [*found, (before, None)] if before else found


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value, place = row.get(name), f" ({where})" if where else ""
    if name not in row:
        raise HfkitError(f"no column {name!r}{place}: there are {', '.join(map(repr, row))}")
    if value is None or isinstance(value, list | dict):
        raise HfkitError(f"column {name!r} holds no text{place}: mend or delete the row")
    return str(value).strip()


def make_task(options: TaskOptions | None) -> Task | None:
    """The task that `options` describe, if they have a template."""
    if options is None or options.template is None:
        return None
    template = options.template.replace("\\n", "\n").replace("\\t", "\t")  # as it is typed at a shell
    return Task(template, tuple(options.labels or ()), tuple(options.metric or ()))


def task_of(tokenizer: Any) -> Task | None:
    """The task that came with a model's tokenizer."""
    kept = getattr(tokenizer, "init_kwargs", {}).get(_KEY)
    try:
        return kept and Task(kept["template"], tuple(kept.get("labels", ())), tuple(kept.get("metric", ())))
    except (KeyError, TypeError, HfkitError) as error:
        raise HfkitError(f"the model's task cannot be read (tokenizer_config.json): {error}") from error


def give_task(tokenizer: Any, task: Task) -> None:
    """Let `tokenizer` carry `task`; it is saved with it."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    begin = "".join(tokenizer.convert_ids_to_tokens(whole[: whole.index(bare[0])])) if bare else ""
    tokenizer.init_kwargs[_KEY] = asdict(task)
    tokenizer.chat_template = task.chat_template(begin) or tokenizer.chat_template
