"""Any corpus as a stream of records: which files it is, what is in them, and where a bad byte stands."""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.files import kind_of, read_text
from hfkit.options import CorpusOptions
from hfkit.tables import Row, read_hub_rows, read_rows

END = "<|endoftext|>"  # in a plain text it ends a document, as in GPT-2's own corpora
PREPARED = "prepared.json"  # in a folder that `prepare` made
_PIECE = 4000  # characters
Corpora = str | Path | Sequence[str | Path]
_TEXT_COLUMNS = ("text", "content", "document", "body")


class Piece(NamedTuple):
    """A part of a document, cut where no tokenizer of GPT-2's kind would have joined two words."""

    text: str
    last: bool  # the document ends here


class Example(NamedTuple):
    """A row whose answer alone is learned: `messages`, or `prompt` and `completion`."""

    row: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Corpus:
    """Files and Hub data sets, found but not yet read."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]  # of the files: text, table, json, lines, parquet, arrow
    hub: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of what the files hold; a name or a time stamp does not matter."""
        total = hashlib.sha256(repr((self.kinds, self.hub)).encode())
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_corpus(sources: Corpora) -> Corpus:
    """The files that `sources` name: files, folders, globs and `hf://NAME` data sets.

    Raises:
        HfkitError: there is no such file, it is empty, or it is not text.
    """
    files: dict[Path, str] = {}
    hub = []
    for source in [sources] if isinstance(sources, str | Path) else sources:
        if str(source).startswith("hf://"):
            hub.append(str(source).removeprefix("hf://"))
            continue
        paths, chosen = _paths(str(source))
        found = {path: kind for path in paths if (kind := kind_of(path, chosen))}
        if len(found) < len(paths):
            note(f"{len(paths) - len(found)} files in {source} are no text or empty: left out")
        if not found:
            raise HfkitError(f"nothing to read ({source}): it holds no text, CSV, JSON, Parquet or Arrow files")
        files |= found
    if not files and not hub:
        raise HfkitError("no corpus: name a file, a folder or hf://NAME")
    return Corpus(tuple(files), tuple(files.values()), tuple(hub))


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made this folder."""
    return (folder / PREPARED).is_file()


def _paths(source: str) -> tuple[list[Path], bool]:
    """Files that a source stands for, and whether it named just one."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            hidden = (file for file in sorted(path.rglob("*")) if file.is_file())
            return [file for file in hidden if not any(p.startswith(".") for p in file.relative_to(path).parts)], False
        if path.is_file():
            return [path], True
        if path.exists():
            raise HfkitError(f"{source} is not a file or folder: save what it gives to a file first")
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    except (OSError, ValueError) as error:
        raise HfkitError(f"cannot read the corpus ({source}): {error}") from error
    if not paths:
        raise HfkitError(f"no corpus {source!r}: no such file or folder")
    return paths, len(paths) == 1


def read_records(corpus: Corpus, options: CorpusOptions) -> Iterator[Piece | Example]:
    """All records of `corpus` in order; rows with an answer as Examples, documents in Pieces.

    Raises:
        HfkitError: a file is damaged, or a row lacks what it should have; the message has the line.
    """
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if kind == "text":
            yield from cut_pieces(read_text(path, options.errors))
        else:
            yield from _records(read_rows(path, kind, options.errors), options)
    for name in corpus.hub:
        yield from _records(read_hub_rows(name, options), options)


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut a text into Pieces of some 4,000 characters, between words; END begins another document."""
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(END)
        for text in whole:
            yield from _cut(text, final=True)
        start = 0
        for piece in _cut(rest, final=False):
            start += len(piece.text)
            yield piece
        rest = rest[start:]
    yield from _cut(rest, final=True)


def _cut(text: str, final: bool) -> Iterator[Piece]:
    """Pieces of `text`; unless `final`, what may still grow is left over."""
    start, size = 0, len(text)
    while size - start > 2 * _PIECE:
        low, high = start + _PIECE // 2, start + _PIECE
        at = next((at for mark in ("\n\n", "\n", " ") if (at := text.rfind(mark, low, high)) > 0), high)
        # White space belongs to the word after it: GPT-2 would not join it to the one before.
        end = start + len(text[start:at].rstrip()) or at
        yield Piece(text[start:end], False)
        start = end
    if final:
        yield Piece(text[start:], True)


def _records(rows: Iterable[Row], options: CorpusOptions) -> Iterator[Piece | Example]:
    """Rows as records; the first row shows which columns matter."""
    column = None
    for row, where in rows:
        column = column or _column(row, where, options)
        if column == "messages":
            _check_messages(row.get("messages"), where)
            yield Example({"messages": row["messages"]}, where)
        elif column == "completion":
            pair = {name: row.get(name) for name in ("prompt", "completion")}
            if not all(isinstance(text, str) for text in pair.values()) or not pair["completion"]:
                raise HfkitError(f"prompt and completion must be texts ({where}): mend or delete the row")
            yield Example(pair, where)
        else:
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise HfkitError(f"column {column!r} is no text ({where}): mend or delete the row")
            yield from _cut(text or "", final=True)


def _column(row: dict[str, Any], where: str, options: CorpusOptions) -> str:
    """The column that holds what is learned."""
    names = ", ".join(repr(name) for name in row)
    if options.text_column:
        if options.text_column not in row:
            raise HfkitError(f"no column {options.text_column!r} ({where}): there are {names}")
        return options.text_column
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "completion"
    texts = [name for name, value in row.items() if isinstance(value, str)]
    plain = [name for name in texts if str(name).lower() in _TEXT_COLUMNS] or texts
    if len(plain) != 1:
        raise HfkitError(f"which column is the text ({where}: {names})? Say so with --text-column")
    return plain[0]


def _check_messages(messages: Any, where: str) -> None:
    whole = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not whole or not any(m["role"] == "assistant" for m in messages):
        raise HfkitError(f'messages must be a list of {{"role", "content"}} with an assistant in it ({where})')


def name_of(sources: Corpora) -> str:
    """A short name for a corpus, from its first source: `runs/NAME`."""
    first = str(sources if isinstance(sources, str | Path) else next(iter(sources), ""))
    name = re.sub(r"(\.(txt|md|csv|tsv|jsonl?|ndjson|parquet|arrow))?(\.gz)?$", "", Path(first).name, flags=re.I)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"
