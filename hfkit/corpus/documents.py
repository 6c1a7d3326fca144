"""A corpus as a stream of records: which files belong to it, and the documents and examples in them."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.corpus.formats import kind_of, read_text
from hfkit.corpus.rows import Row, column_names, read_hub_rows, read_rows
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError, first_line
from hfkit.options import CorpusOptions

END = "<|endoftext|>"  # separates documents in a plain text, as in GPT-2's own corpora
PREPARED = "prepared.json"  # marks a folder made by `hfkit prepare`
Corpora = str | Path | Sequence[str | Path]
_EXAMPLE_COLUMNS = (("messages",), ("prompt", "completion"))
_TEXT_COLUMNS = ("text", "content", "document", "body")
_PIECE, _LONGEST = 4000, 16_000  # characters of a piece; _LONGEST where there is no good place to cut
_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # as in Unicode
# GPT-2's pre-tokenizer always splits here, so cutting here cannot change the tokens.
_BORDER = re.compile(rf"[^\s](?=[{_SPACE}])|[^\W_](?=[^\w\s])")


class Piece(NamedTuple):
    """A part of a document, cut where a byte-level BPE tokenizer ends a token anyway."""

    text: str
    last: bool  # the document ends here


class Example(NamedTuple):
    """A row of which only the answer is learned: `messages`, or `prompt` and `completion`."""

    row: dict[str, Any]
    where: str

    @property
    def answers(self) -> list[str]:
        """The texts that are learned."""
        if "messages" not in self.row:
            return [self.row["completion"]]
        return [turn["content"] for turn in self.row["messages"] if turn["role"] == "assistant"]


@dataclass(frozen=True)
class Corpus:
    """Files and Hub data sets, found but not yet read."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]  # of the files, from `kind_of`
    hub: tuple[str, ...] = ()
    left_out: int = 0  # files in folders that are empty or not text

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of the files' content; names and time stamps do not matter."""
        total = hashlib.sha256(repr((self.kinds, self.hub)).encode())
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_corpus(sources: Corpora | Corpus) -> Corpus:
    """The files that `sources` name: files, folders, globs and `hf://NAME` data sets.

    A `Corpus` is returned as it is: finding one reads the start of every file, so find it once and pass it on.

    Raises:
        HfkitError: a file does not exist, is empty, or is not text.
    """
    if isinstance(sources, Corpus):
        return sources
    files: dict[Path, str] = {}
    hub, left_out = [], 0
    for source in map(str, [sources] if isinstance(sources, str | Path) else sources):
        if not source:  # Path("") would be the current folder
            raise HfkitError("no corpus '': name a file, a folder or hf://NAME")
        if source.startswith("hf://"):
            hub.append(source.removeprefix("hf://"))
            continue
        paths, chosen = _find_paths(source)
        kinds = {path: kind for path in paths if (kind := kind_of(path, chosen))}
        if not kinds:
            raise HfkitError(f"nothing to read ({source}): it has no text, CSV, JSON, Parquet or Arrow files")
        left_out += len(paths) - len(kinds)
        files |= kinds
    if not files and not hub:
        raise HfkitError("no corpus: name a file, a folder or hf://NAME")
    return Corpus(tuple(files), tuple(files.values()), tuple(hub), left_out)


def is_prepared(folder: Path) -> bool:
    """Whether `hfkit prepare` made this folder."""
    try:
        return "fingerprint" in json.loads((folder / PREPARED).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _find_paths(source: str) -> tuple[list[Path], bool]:
    """The files that a source stands for, and whether it names a single one."""
    try:
        path = Path(source).expanduser()
        if is_prepared(path):
            raise HfkitError(f"{source} was made by prepare: only finetune takes it, alone and without --streaming")
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.is_file())
            return [file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts)], False
        if path.is_file():
            return [path], True
        if path.exists():
            raise HfkitError(f"{source} is not a file or folder: save its output to a file first")
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HfkitError(f"cannot read the corpus ({source}): {first_line(error)}") from error
    if not paths:
        raise HfkitError(f"no corpus {source!r}: no such file or folder")
    return paths, len(paths) == 1


def read_records(corpus: Corpus, options: CorpusOptions) -> Iterator[Piece | Example]:
    """All records of `corpus` in order: Examples from rows with an answer, Pieces from texts and other rows.

    Raises:
        HfkitError: a file is damaged, a row lacks a column (the message has the line), or the corpus has both Pieces
            and Examples.
    """
    kind: type[Piece | Example] | None = None
    for name, records in _read_sources(corpus, options):
        for record in records:
            if kind and not isinstance(record, kind):
                raise HfkitError(f"the corpus mixes texts and examples ({name} differs): train on one kind at a time")
            kind = type(record)
            yield record


def _read_sources(corpus: Corpus, options: CorpusOptions) -> Iterator[tuple[str, Iterator[Piece | Example]]]:
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if kind == "text" and options.template:
            raise HfkitError(f"{path} is a plain text: a template takes rows (CSV, JSON Lines, Parquet)")
        if kind == "text":
            yield str(path), cut_pieces(read_text(path, options.errors))
        else:
            yield str(path), _make_records(read_rows(path, kind, options.errors), options)
    for name in corpus.hub:
        yield f"hf://{name}", _make_records(read_hub_rows(name, options), options)


def read_table(corpus: Corpora | Corpus, options: CorpusOptions) -> Iterator[Row]:
    """The rows of a corpus, unchanged, each with where it is. HfkitError if the corpus has plain texts."""
    corpus = find_corpus(corpus)
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if kind == "text":
            raise HfkitError(f"{path} is a plain text: give rows (CSV, JSON Lines, Parquet) with named columns")
        yield from read_rows(path, kind, options.errors)
    for name in corpus.hub:
        yield from read_hub_rows(name, options)


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut a text into Pieces of about 4,000 characters; END starts another document.

    The pieces do not depend on where the chunks end.
    """
    rest, ended = "", False  # ended: the text so far ends with END
    for chunk in chunks:
        *documents, rest = (rest + chunk).split(END)
        for text in documents:
            yield from _cut_document(text)
        *pieces, rest = _cut(rest, len(rest) - len(END))  # the last characters may be the start of an END
        yield from (Piece(text, False) for text in pieces)
        ended = (ended or bool(documents)) and not pieces
    if rest.strip() or not ended:
        yield from _cut_document(rest)


def _cut_document(text: str) -> Iterator[Piece]:
    *pieces, rest = _cut(text, len(text))
    yield from (Piece(piece, False) for piece in pieces)
    yield Piece(rest, True)


def _cut(text: str, size: int) -> list[str]:
    """Pieces of the first `size` characters of a text that may go on, and then the rest."""
    pieces, start = [], 0
    while size > start + 2 * _PIECE and (end := _find_cut(text, start, size)):
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _find_cut(text: str, start: int, size: int) -> int:
    """Where the piece that starts at `start` ends; 0 if the first `size` characters do not show it."""
    low, high, last = start + _PIECE // 2, start + _PIECE, start + _LONGEST
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, low, high)
        end = low + len(text[low:end].rstrip(_SPACE)) if end > low else low
        if end > low:
            return end
    if border := _BORDER.search(text, high, min(size, last)):
        return border.end()
    return last if size > last else 0


def _make_records(rows: Iterable[Row], options: CorpusOptions) -> Iterator[Piece | Example]:
    """Rows as records; the first row decides which columns count."""
    columns: tuple[str, ...] = ()
    task = make_task(options)
    for row, where in rows:
        if task:
            yield Example(task.example(row, where), where)
            continue
        columns = columns or _choose_columns(row, where, options)
        if missing := [name for name in columns if name not in row]:
            raise HfkitError(f"no column {missing[0]!r} ({where}): it has {column_names(row)}")
        values = {name: row[name] for name in columns}
        if options.text_column or columns not in _EXAMPLE_COLUMNS:
            text = values[columns[0]]
            if not isinstance(text, str | None):
                raise HfkitError(f"column {columns[0]!r} is not text ({where}): fix or delete the row")
            yield from cut_pieces([text or ""])
            continue
        if "messages" in values:
            _check_messages(values["messages"], where)
        elif not all(isinstance(text, str) for text in values.values()) or not values["completion"]:
            raise HfkitError(f"prompt and completion must be texts ({where}): fix or delete the row")
        yield Example(values, where)


def _choose_columns(row: dict[str, Any], where: str, options: CorpusOptions) -> tuple[str, ...]:
    """The columns that hold what is learned."""
    if options.text_column:
        return (options.text_column,)
    if example := next((columns for columns in _EXAMPLE_COLUMNS if row.keys() >= set(columns)), None):
        return example
    named = [name for name in row if str(name).lower() in _TEXT_COLUMNS]
    candidates = named or [name for name, value in row.items() if isinstance(value, str)]
    if len(candidates) != 1:
        raise unclear_text_column(row, where)
    return (candidates[0],)


def unclear_text_column(row: Iterable[str], where: str) -> HfkitError:
    """The error for a row in which more than one column, or none, may be the text."""
    return HfkitError(f"which column is the text ({where}: {column_names(row)})? Name it with --text-column")


def _check_messages(messages: Any, where: str) -> None:
    is_valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not is_valid or not any(m["role"] == "assistant" for m in messages):
        raise HfkitError(f'messages must be a list of {{"role", "content"}} with an assistant in it ({where})')


def name_of(sources: Corpora) -> str:
    """A short name for a corpus, from its first source: `runs/NAME`."""
    first = str(sources if isinstance(sources, str | Path) else next(iter(sources), ""))
    name = re.sub(r"(\.(txt|md|csv|tsv|jsonl?|ndjson|parquet|arrow))?(\.gz)?$", "", Path(first).name, flags=re.I)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"
