"""`hfkit chat`: turn by turn, through the chat template where a model has one, else as one raw text."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, cast

from hfkit import console
from hfkit.cli.flags import flags
from hfkit.cli.generation_setup import load_for_generation, with_seed
from hfkit.cli.prompt_files import to_line
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.recipes import read_value

if TYPE_CHECKING:
    from hfkit.models.loading import LanguageModel

_HELP = '''/set NAME VALUE  change an option, such as /set temperature 0.5; /set alone lists what is set
/reset           forget the conversation
/save FILE       write the conversation to FILE
/exit            leave, as Ctrl-D does; Ctrl-C ends a reply
"""              begins and ends a text of several lines
An empty line lets a base model continue by itself.'''


@flags
def chat(model: ModelOptions, sampling: GenerateOptions) -> None:
    """Talk with a model, turn by turn.

    A model with a chat template gets the turns through it; a base model continues them as one raw text.
    """
    if (sampling.num_return_sequences or 1) > 1:
        raise OptionError("a chat has one reply: leave --num-return-sequences out")
    find_model(model)  # report a wrong name before torch is imported
    lm = load_for_generation(model, sampling)
    talk = Conversation(lm, replace(with_seed(lm, sampling), truncate=True))
    manner = "through its chat template" if talk.has_template else "as raw text that it continues"
    console.note(f"{lm.name} gets your turns {manner}; /help lists the commands")
    while (text := _read_turn()) is not None:
        if text.startswith("/"):
            if not _obey(talk, text):
                return
            continue
        try:
            talk.add_reply(_print_reply(talk, text))
        except HfkitError as error:
            talk.undo()
            console.fail(str(error))
        # Every reply draws other numbers, yet the first seed determines the whole chat.
        talk.options = replace(talk.options, seed=(talk.options.seed or 0) + 1)


class Conversation:
    """The turns so far: messages for a chat template, or one raw text."""

    def __init__(self, lm: LanguageModel, options: GenerateOptions) -> None:
        self.lm, self.options = lm, options
        self.messages: list[dict[str, str]] = []  # with a chat template
        self.text = ""  # without one

    @property
    def has_template(self) -> bool:
        return bool(self.lm.tokenizer.chat_template)

    def add_turn(self, text: str) -> str | list[int]:
        """Add the user's turn. Return the prompt of the reply; the oldest turns go if it would not fit the model."""
        if not self.has_template:
            self.text += text
            return self.text
        self.messages.append({"role": "user", "content": text})
        ids: list[int] = []
        for first in range(0, len(self.messages), 2):
            prompt = self.lm.tokenizer.apply_chat_template(
                self.messages[first:], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            ids = cast(list[int], prompt)  # one conversation, tokenized
            if len(ids) + (self.options.max_new_tokens or 100) <= (self.lm.context or sys.maxsize):
                break
        return ids

    def add_reply(self, text: str) -> None:
        """Add the model's turn."""
        if self.has_template:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.text += text

    def undo(self) -> None:
        """Remove the user's last turn, which got no reply."""
        if self.has_template:
            self.messages.pop()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages, self.text = [], ""

    def set_option(self, name: str, value: str) -> None:
        """Change one option; OptionError if there is no such option or value."""
        name = name.lstrip("-").replace("-", "_")
        if name not in GenerateOptions.names():
            raise OptionError(f"no option {name!r}: see hfkit chat --help")
        self.options = replace(self.options, **{name: read_value(value)})

    def save(self, path: str) -> None:
        """Write the messages as JSON Lines, or the raw text."""
        content = "".join(map(to_line, self.messages)) if self.has_template else self.text
        try:
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(content)
        except OSError as error:
            raise HfkitError(f"cannot save ({path}): {error.strerror}") from error


def _read_turn() -> str | None:
    """Read one turn from stdin; None at its end. Text between two marks of three quotes may have several lines."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401, gives input() history and editing
    lines: list[str] = []
    try:
        while not lines or sum(line.count('"""') for line in lines) % 2:
            lines.append(input(("... " if lines else "> ") if terminal else ""))
    except EOFError:
        if not lines:
            return None
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text (byte {error.start + 1}): convert it") from error
    return "\n".join(lines).replace('"""', "")


def _obey(talk: Conversation, line: str) -> bool:
    """Carry out a command; return False if it is time to leave."""
    command, _, rest = line[1:].strip().partition(" ")
    try:
        match command, rest.split(maxsplit=1):
            case (("exit" | "quit" | "bye"), _):
                return False
            case "set", [name, value]:
                talk.set_option(name, value)
            case "set", []:
                values = {field.name: getattr(talk.options, field.name) for field in fields(talk.options)}
                console.note(", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
            case "reset", []:
                talk.reset()
            case "save", [_, *_]:
                talk.save(rest)
            case _:
                print(_HELP, file=sys.stderr)
    except HfkitError as error:
        console.fail(str(error))
    return True


def _print_reply(talk: Conversation, text: str) -> str:
    """Print the reply while it is generated, and return it. Ctrl-C ends it and keeps its beginning."""
    from hfkit.inference import generation

    pieces = generation.stream(talk.add_turn(text), model=talk.lm, options=talk.options)
    reply = ""
    try:
        for piece in pieces:
            console.write(piece)
            reply += piece
    except KeyboardInterrupt:
        pieces.close()
    console.write("\n")
    return reply
