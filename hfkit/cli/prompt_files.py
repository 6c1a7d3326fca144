"""Many prompts from a file, their results to a file: in order, each exactly once, whatever happens in between."""

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hfkit.errors import HfkitError, OptionError
from hfkit.storage import check_regular, lock_file


def read_prompts(path: Path) -> Iterator[str | dict[str, Any] | HfkitError]:
    """One prompt a line of a text file; of a `.jsonl` file each object's `prompt`, or without one the object.

    A line that is none comes as an HfkitError in its place. Raises HfkitError where the file cannot be read at all.
    """
    rows = path.suffix in (".jsonl", ".json", ".ndjson")
    with open_input(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield _prompt_of(line, rows)
            except HfkitError as error:
                yield error


def check_input(path: Path) -> None:
    """HfkitError where there is no such file; a pipe can only be opened once, and is not touched."""
    if not path.is_fifo():
        open_input(path).close()


def open_input(path: Path) -> IO[bytes]:
    """Open a file to read, with an HfkitError where that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise HfkitError(f"cannot read the input ({path}): {error.strerror}") from error


def _prompt_of(line: bytes, rows: bool) -> str | dict[str, Any]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise HfkitError(f"not UTF-8 (byte {error.start + 1}): convert the file") from None
    if rows:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise HfkitError("not JSON: write an object with a prompt on each line") from None
        if isinstance(row, dict) and row and "prompt" not in row:
            return row  # the columns of a task
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
    if not text.strip():
        raise HfkitError("empty prompt: write a text, or delete the line")
    return text


def read_prompt(prompt: str | None) -> str:
    """The prompt that was given, or stdin's text ("-", or no prompt and stdin is no terminal), or an empty one."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        return ""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text (byte {error.start + 1}): convert it") from error
    return text.removesuffix("\n").removesuffix("\r")


class Results:
    """A JSON Lines file that grows prompt by prompt and gets its name when it is complete.

    Until then it is `NAME.partial`. Each record names the `line` of its prompt, so that a later run can go on.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool = False, samples: int = 1) -> None:
        """samples: records that a prompt has. Raises HfkitError where the file is taken, or cannot be written."""
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.done: dict[int, str] = {}  # line -> prompt that has its records
        self.last: dict[str, Any] | None = None  # record that was written last
        if path.is_dir():
            raise HfkitError(f"{path} is a folder: name a file as --output")
        check_regular(path)
        if path.exists() and not overwrite:
            if resume:
                raise HfkitError(f"{path} is complete: there is nothing to resume; --overwrite makes it anew")
            raise HfkitError(f"{path} exists: --overwrite replaces it, or name another --output")
        try:
            self._file = self.partial.open("a+b")
            is_locked = lock_file(self._file)
        except OSError as error:
            raise HfkitError(f"cannot write the output ({self.partial}): {error.strerror}") from error
        if not is_locked:
            raise HfkitError(f"{self.partial} is being written by another process: name another --output")
        if self._file.tell() and not (resume or overwrite):
            raise HfkitError(f"{self.partial} is an unfinished run: --resume goes on with it, --overwrite begins anew")
        self._file.truncate(self._keep(samples) if resume else 0)

    def _keep(self, samples: int) -> int:
        """Read what an interrupted run left; bytes to keep, without a torn line or too few records at the end."""
        self._file.seek(0)
        end = position = count = 0
        before = None
        for line in self._file:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("line"), int):
                break
            same = record["line"] == before
            if count == samples if same else before is not None and count < samples:
                raise HfkitError(
                    f"{self.partial} has another --num-return-sequences: give the same, or --overwrite begins anew"
                )
            before, count, position = record["line"], count + 1 if same else 1, position + len(line)
            if count == samples:
                end, self.last, self.done[before] = position, record, record.get("prompt")
        return end

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append the records of whole prompts."""
        self._file.write(b"".join(to_line(record).encode() for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the file its name: it is complete."""
        self._file.close()
        os.replace(self.partial, self.path)


def to_line(record: dict[str, Any]) -> str:
    """A record as one line of JSON Lines; half a surrogate pair, which UTF-8 cannot hold, stays an escape."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(record)
    return line + "\n"
