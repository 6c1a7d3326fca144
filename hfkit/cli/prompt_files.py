"""Files of `hfkit generate --input` and `--output`: prompts in; results out, each exactly once after interruptions."""

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hfkit import console
from hfkit.errors import HfkitError, OptionError
from hfkit.storage import check_free, check_regular, lock_file, write_text

STDIN = Path("-")


def read_prompts(path: Path) -> Iterator[str | dict[str, Any] | HfkitError]:
    """Yield one prompt for each line of a text file; for each object of a JSON Lines file its `prompt`, or the object.

    A line that holds no prompt yields an HfkitError in its place. Raises HfkitError if the file cannot be read.
    """
    is_json = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    with open_input(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if path == STDIN and line.startswith(b'{"'):
                    console.note("stdin looks like JSON Lines and is read as such")
                    is_json = True
            try:
                yield _parse_prompt(line, is_json)
            except HfkitError as error:
                yield error


def check_input(path: Path) -> None:
    """HfkitError if the file cannot be read. What can be read only once is left alone."""
    if can_be_read_twice(path):
        open_input(path).__exit__(None, None, None)


def can_be_read_twice(path: Path) -> bool:
    """Whether `path` is neither stdin nor a named pipe."""
    return path != STDIN and not path.is_fifo()


def open_input(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a file, or stdin for "-", for reading; HfkitError if that fails."""
    if path == STDIN:
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return path.open("rb")
    except OSError as error:
        raise HfkitError(f"cannot read the input ({path}): {error.strerror}") from error


def _parse_prompt(line: bytes, is_json: bool) -> str | dict[str, Any]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise HfkitError(f"not UTF-8 (byte {error.start + 1}): convert the file") from None
    if is_json:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise HfkitError("not valid JSON: write an object with a prompt on each line") from None
        if isinstance(row, dict) and row and "prompt" not in row:
            return row  # the columns of a task
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
        text = row["prompt"]
    if not text.strip():
        raise HfkitError("empty prompt: write a text, or delete the line")
    return text


def read_prompt(prompt: str | None, *, wanted: str | None = None) -> str:
    """Return `prompt`, or stdin's text for "-" and for None. A person at a terminal is asked for it.

    wanted: what the text is, if an empty one is an error.

    Raises:
        OptionError: there is no text, or it is not UTF-8.
    """
    try:
        if prompt is None and sys.stdin.isatty():
            prompt = _ask(wanted or "prompt")
        elif prompt is None or prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text (byte {error.start + 1}): convert it") from error
    if wanted and not prompt.strip():
        raise OptionError(f"give a {wanted}, as an argument or on stdin")
    return prompt


def _ask(what: str) -> str:
    """Ask on stderr, because stdout carries results only, for one line of text."""
    print(f"{what}: ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):  # Ctrl-D
        raise OptionError(f"give a {what}, as an argument or on stdin")
    return line.removesuffix("\n")


class Results:
    """A JSON Lines file that grows prompt by prompt and gets its name when it is complete.

    Until then it is `NAME.partial`, and `NAME.partial.json` holds the settings of the run. Each record names the
    `line` of its prompt, so that a later run can continue.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool = False) -> None:
        """Open the file.

        Raises:
            HfkitError: the file exists, belongs to a running process, or cannot be written.
        """
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self._settings_path = path.with_name(f"{path.name}.partial.json")
        self.done: dict[int, str] = {}  # line -> prompt, of the prompts whose records are all there
        self.settings: dict[str, Any] | None = None  # of the run that is resumed
        if path.is_dir():
            raise HfkitError(f"{path} is a folder: name a file as --output")
        check_regular(path)
        check_regular(self.partial, links=False)
        check_free(path, overwrite=overwrite, flag="--output")
        try:
            self._file = self.partial.open("a+b")
            is_locked = lock_file(self._file)
        except OSError as error:
            raise HfkitError(f"cannot write the output ({self.partial}): {error.strerror}") from error
        if not is_locked:
            raise HfkitError(f"{self.partial} is being written by another process: name another --output")
        if self._file.tell() and not (resume or overwrite):
            raise HfkitError(f"{self.partial} is an unfinished run: --resume continues it, --overwrite begins anew")
        self._file.truncate(self._read_done() if resume and not overwrite else 0)

    def _read_done(self) -> int:
        """Read what an interrupted run left; return how many of its bytes to keep: the records of whole prompts."""
        self._file.seek(0)
        if not self._file.read(1):
            return 0
        try:
            self.settings = dict(json.loads(self._settings_path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise HfkitError(f"cannot read {self._settings_path}: {error}; --overwrite begins anew") from error
        samples = self.settings.get("num_return_sequences") or 1
        self._file.seek(0)
        end = position = count = 0
        current = None
        for line in self._file:
            try:
                record = json.loads(line)
                number, prompt = record["line"], record["prompt"]
            except (ValueError, LookupError, TypeError):
                break  # the interruption has torn this line
            count = count + 1 if number == current else 1
            current, position = number, position + len(line)
            if count == samples and line.endswith(b"\n"):
                end, self.done[number] = position, prompt
        return end

    def begin(self, settings: dict[str, Any]) -> None:
        """Store the settings of the run, for a later one that continues it. Call it before the first `add`."""
        write_text(self._settings_path, json.dumps(settings))

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append the records of whole prompts."""
        with self._named_errors():
            self._file.write(b"".join(to_line(record).encode() for record in records))
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the complete file its name."""
        with self._named_errors():
            self._file.close()
            os.replace(self.partial, self.path)
            self._settings_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say which file could not be written: an error of a full disk does not."""
        try:
            yield
        except OSError as error:
            raise HfkitError(f"cannot write {self.partial}: {error.strerror}; fix that and try again") from error


def to_line(record: dict[str, Any]) -> str:
    """Return a record as one line of JSON Lines."""
    return console.to_json(record) + "\n"
