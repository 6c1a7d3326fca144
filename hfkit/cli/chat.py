"""`hfkit chat`: turn by turn, as raw text with a base model, through the chat template where a model has one."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hfkit import console
from hfkit.cli import generate
from hfkit.cli.flags import flags
from hfkit.cli.prompt_files import to_line
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.recipes import read_value

if TYPE_CHECKING:
    from hfkit.models.loading import LanguageModel


@flags
def chat(model: ModelOptions, sampling: GenerateOptions) -> None:
    """Talk turn by turn: raw continuation with a base model, the chat template where a model has one."""
    find_model(model)

    converse(model, sampling)


_HELP = '''/set NAME VALUE  change an option, such as /set temperature 0.5; /set alone lists what is set
/reset           forget what was said
/save FILE       write the conversation to FILE
/exit            leave, as Ctrl-D does; Ctrl-C ends a reply
"""              begins and ends a text of several lines
An empty line lets a base model go on by itself.'''


class Conversation:
    """What was said so far, and what the model is given of it."""

    def __init__(self, lm: LanguageModel, options: GenerateOptions) -> None:
        self.lm, self.options = lm, options
        self.messages: list[dict[str, str]] = []  # with a chat template
        self.text = ""  # without one

    @property
    def templated(self) -> bool:
        return bool(self.lm.tokenizer.chat_template)

    def say(self, text: str) -> Any:
        """Add the user's turn; the prompt for the reply, cut at its beginning to what fits the model."""
        if not self.templated:
            self.text += text
            return self.text
        self.messages.append({"role": "user", "content": text})
        for first in range(0, len(self.messages), 2):
            ids = self.lm.tokenizer.apply_chat_template(
                self.messages[first:], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            if len(ids) + (self.options.max_new_tokens or 100) <= (self.lm.context or sys.maxsize):
                return ids
        return ids

    def reply(self, text: str) -> None:
        """Add the model's turn."""
        if self.templated:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.text += text

    def undo(self) -> None:
        """Take back the user's last turn, which got no reply."""
        if self.templated:
            self.messages.pop()

    def reset(self) -> None:
        self.messages, self.text = [], ""

    def set(self, name: str, value: str) -> None:
        """Change one option; OptionError where there is no such option or value."""
        name = name.lstrip("-").replace("-", "_")
        if name not in GenerateOptions.names():
            raise OptionError(f"no option {name!r}: see hfkit chat --help")
        self.options = replace(self.options, **{name: read_value(value)})

    def save(self, path: str) -> None:
        """Write the messages as JSON Lines, or the text."""
        content = "".join(map(to_line, self.messages)) if self.templated else self.text
        try:
            with open(path, "w", encoding="utf-8", errors="replace") as file:
                file.write(content)
        except OSError as error:
            raise HfkitError(f"cannot save ({path}): {error.strerror}") from error


def converse(model: ModelOptions, sampling: GenerateOptions) -> None:
    """Read turns from stdin until its end, and answer each."""
    if (sampling.num_return_sequences or 1) > 1:
        raise OptionError("a chat has one reply: leave --num-return-sequences out")
    lm = generate.load_for(model, sampling)
    talk = Conversation(lm, replace(generate.seeded(lm, sampling), truncate=True))
    how = "through its chat template" if talk.templated else "as raw text that it goes on with"
    console.note(f"{lm.name} is given your turns {how}; /help lists the commands")
    while (text := _read()) is not None:
        if text.startswith("/"):
            if not _obey(talk, text):
                return
            continue
        try:
            talk.reply(_answer(talk, text))
        except HfkitError as error:
            talk.undo()
            console.fail(str(error))
        # The next reply draws other numbers, yet the whole chat follows from its first seed.
        talk.options = replace(talk.options, seed=(talk.options.seed or 0) + 1)


def _read() -> str | None:
    """One turn; None at the end of stdin."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401, gives input() history and editing
    lines: list[str] = []
    try:
        while True:
            line = input(("... " if lines else "> ") if terminal else "")
            lines.append(line)
            marks = sum(text.count('"""') for text in lines)
            if marks % 2 == 0:
                return "\n".join(lines).replace('"""', "")
    except EOFError:
        return "\n".join(lines).replace('"""', "") or None
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text (byte {error.start + 1}): convert it") from error


def _obey(talk: Conversation, line: str) -> bool:
    """Carry out a command; False when it is time to leave."""
    command, _, rest = line[1:].strip().partition(" ")
    try:
        match command, rest.split(maxsplit=1):
            case (("exit" | "quit" | "bye"), _):
                return False
            case "set", [name, value]:
                talk.set(name, value)
            case "set", []:
                given = {f.name: getattr(talk.options, f.name) for f in fields(talk.options)}
                console.note(", ".join(f"{name} {value}" for name, value in given.items() if value is not None))
            case "reset", []:
                talk.reset()
            case "save", [_, *_]:
                talk.save(rest)
            case _:
                print(_HELP, file=sys.stderr)
    except HfkitError as error:
        console.fail(str(error))
    return True


def _answer(talk: Conversation, text: str) -> str:
    """Show the reply while it is generated; Ctrl-C ends it and keeps what there is."""
    from hfkit.inference import generation

    pieces, said = generation.stream(talk.say(text), model=talk.lm, options=talk.options), ""
    try:
        for piece in pieces:
            console.write(piece)
            said += piece
    except KeyboardInterrupt:
        pieces.close()
    console.write("\n")
    return said
