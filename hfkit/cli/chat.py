"""`hfkit chat`: turn by turn, through the chat template where a model has one, else as one raw text."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hfkit import console
from hfkit.cli.flags import flags
from hfkit.cli.prompts import load_for, reach_server
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

if TYPE_CHECKING:
    from collections.abc import Generator

    from hfkit.inference.remote import Server
    from hfkit.inference.results import Generation
    from hfkit.models.loading import LanguageModel

_HELP = '''/set NAME VALUE  change an option: /set temperature 0.5; /set alone lists all
/reset           forget the conversation
/save FILE       write the conversation to a new FILE
/exit            leave, as exit alone and Ctrl-D do; Ctrl-C ends a reply
"""              begins and ends a text of several lines
An empty line lets a base model continue by itself.'''


@flags
def chat(model: ModelOptions, server: ServerOptions, sampling: GenerateOptions) -> None:
    """Talk with a model, turn by turn.

    A model with a chat template gets the turns through it; a base model continues them as one raw text.

    Examples:
        hfkit chat
        hfkit chat -m runs/chat -t 0.7
    """
    check_samples(sampling)
    if server.server:
        remote, sampling = reach_server(server, model, sampling)
        # Other servers do not know how to truncate.
        talk: Conversation = RemoteConversation(remote, replace(sampling, truncate=remote.is_hfkit))
    else:
        lm, _, sampling = load_for(None, model, sampling)
        talk = Conversation(lm, replace(sampling, truncate=True))
    manner = "through its chat template" if talk.has_template else "as raw text that it continues"
    console.note(f"{talk.name} gets your turns {manner}; /help lists the commands")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # a bad byte must not end the chat
    while (text := _read_turn()) is not None:
        if text.strip().lower() in ("exit", "quit"):
            return
        if text.startswith("/"):
            if not _obey(talk, text):
                return
            continue
        try:
            talk.add("user", text)
            talk.add("assistant", _print_reply(talk))
        except HfkitError as error:
            talk.undo()
            console.fail(str(error))
        # Every reply draws other numbers, yet the first seed determines the whole chat.
        talk.options = replace(talk.options, seed=(talk.options.seed or 0) + 1)


def check_samples(sampling: GenerateOptions) -> None:
    """OptionError for several samples."""
    if (sampling.num_return_sequences or 1) > 1:
        raise OptionError("a chat has one reply: leave --num-return-sequences out")


class Conversation:
    """The turns so far: messages for a chat template, which a model without one gets as one raw text."""

    def __init__(self, lm: LanguageModel, options: GenerateOptions) -> None:
        self.lm, self.options = lm, options
        self.messages: list[dict[str, str]] = []
        self._saved: set[Path] = set()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.lm.name

    @property
    def has_template(self) -> bool:
        """Whether the turns go through the model's chat template."""
        return bool(self.lm.tokenizer.chat_template) and not self.options.raw

    @property
    def text(self) -> str:
        """The turns as one raw text."""
        return "".join(message["content"] for message in self.messages)

    def add(self, role: str, text: str) -> None:
        """Add a turn of the "user" or the "assistant"; HfkitError if it is not UTF-8."""
        if bad := re.search("[\ud800-\udfff]", text):  # what bytes that are not UTF-8 became
            place = len(text[: bad.start()].encode()) + 1
            raise HfkitError(f"this turn is not UTF-8 text (byte {place}) and is left out: convert it")
        self.messages.append({"role": role, "content": text})

    def reply(self) -> Generator[str, None, Generation]:
        """The pieces of the model's reply to the turns."""
        from hfkit.inference import generation

        return generation.stream(self.prompt(), model=self.lm, options=self.options)

    def prompt(self) -> str | list[int]:
        """The prompt of the reply; the oldest turns are left out if it would not fit the model.

        Raises:
            HfkitError: the chat template cannot be used.
        """
        if not self.has_template:
            return self.text
        ids: list[int] = []
        for first in range(0, len(self.messages), 2):
            ids = self._apply_template(self.messages[first:])
            if len(ids) + (self.options.max_new_tokens or 100) <= (self.lm.context or sys.maxsize):
                break
        return ids

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            prompt = self.lm.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            return cast(list[int], prompt)  # of one conversation, tokenized
        except Exception as error:  # a template is a program: it can fail in every way
            reason = f"the chat template of {self.lm.name} fails: {first_line(error)}"
            raise HfkitError(f"{reason}; /set raw true leaves it out") from error

    def undo(self) -> None:
        """Remove the user's last turn, which got no reply."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def set_option(self, name: str, value: str) -> None:
        """Change one option; OptionError if there is no such option or value."""
        if not (field := GenerateOptions.find_name(name)):
            raise OptionError(f"no option {name!r}: see hfkit chat --help")
        options = replace(self.options, **{field: GenerateOptions.read_value(field, value)})
        check_samples(options)
        self.options = options

    def save(self, name: str) -> Path:
        """Write the messages as JSON Lines, or the raw text, to a new file or one that this chat has written."""
        path = Path(name).expanduser()
        content = "".join(map(console.to_json, self.messages)) if self.has_template else self.text
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8", errors="replace") as file:
                self._saved.add(path)
                file.write(content)
        except FileExistsError as error:
            raise HfkitError(f"{path} exists: save to another file") from error
        except OSError as error:
            raise HfkitError(f"cannot save ({path}): {error.strerror}") from error
        return path


class RemoteConversation(Conversation):
    """The turns of a chat with a model on a server, which has the chat template and cuts what is too long."""

    def __init__(self, server: Server, options: GenerateOptions) -> None:
        self._server, self.options = server, options
        self.messages, self._saved = [], set()

    @property
    def name(self) -> str:
        return self._server.model

    @property
    def has_template(self) -> bool:
        return self._server.has_chat_template and not self.options.raw

    def reply(self) -> Generator[str, None, Generation]:
        return self._server.stream(self.messages if self.has_template else self.text, options=self.options)


def _read_turn() -> str | None:
    """Read one turn from stdin; None at its end. Text between two marks of three quotes may have several lines."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401, gives input() history and editing
    lines: list[str] = []
    try:
        while not lines or sum(line.count('"""') for line in lines) % 2:
            lines.append(input(_prompt_sign("... " if lines else "> ") if terminal else ""))
    except EOFError:
        if not lines:
            return None
    return "\n".join(lines).replace('"""', "")


def _prompt_sign(sign: str) -> str:
    """Return the sign that asks for a turn, bold and cyan where the terminal has colours.

    Without a terminal on stdout, `input` would write it there: then it goes to stderr.
    """
    if not sys.stdout.isatty():
        print(sign, end="", file=sys.stderr, flush=True)
        return ""
    # readline does not count what stands between \001 and \002.
    return f"\001\x1b[1;36m\002{sign}\001\x1b[0m\002" if console.has_colour(sys.stdout) else sign


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
                values = {name: getattr(talk.options, name) for name in talk.options.names()}
                console.note(", ".join(f"{name} {value}" for name, value in values.items() if value is not None))
                console.note("not set: " + ", ".join(name for name, value in values.items() if value is None))
            case "reset", []:
                talk.messages.clear()
            case "save", [_, *_]:
                console.note(f"saved to {talk.save(rest)}")
            case _:
                print(_HELP, file=sys.stderr)
    except HfkitError as error:
        console.fail(str(error))
    return True


def _print_reply(talk: Conversation) -> str:
    """Print the reply while it is generated, and return it. Ctrl-C ends it and keeps its beginning."""
    pieces, reply = talk.reply(), ""
    try:
        while True:
            piece = next(pieces)
            console.write(piece)
            reply += piece
    except KeyboardInterrupt:
        pieces.close()
    except StopIteration as stop:
        if stop.value.finish_reason == "length" and sys.stdout.isatty():
            console.write(f" [cut after {console.counted(stop.value.tokens, 'token')}]", dim=True)
    console.write("\n")
    return reply
