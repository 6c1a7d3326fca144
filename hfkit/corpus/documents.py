"""Any corpus as a stream of records: which files it is, what is in them, and where a bad byte stands."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.corpus.formats import Row, kind_of, read_hub_rows, read_rows, read_text
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError, first_line
from hfkit.options import CorpusOptions
from hfkit.storage import LIST

END = "<|endoftext|>"  # in a plain text it ends a document, as in GPT-2's own corpora
PREPARED = "prepared.json"  # in a folder that `prepare` made
Corpora = str | Path | Sequence[str | Path]
_EXAMPLES = (("messages",), ("prompt", "completion"))  # columns
_TEXT_COLUMNS = ("text", "content", "document", "body")
_PIECE, _LONGEST = 4000, 16_000  # characters of a piece; _LONGEST where there is no place to cut
_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # as Unicode has it
# Between a word and white space, or a word and a sign: GPT-2's own pattern for words ends there in any case.
_BORDER = re.compile(rf"[^\s](?=[{_SPACE}])|[^\W_](?=[^\w\s])")


class Piece(NamedTuple):
    """A part of a document, cut where a tokenizer of GPT-2's kind makes no token of what stands on both sides."""

    text: str
    last: bool  # the document ends here


class Example(NamedTuple):
    """A row whose answer alone is learned: `messages`, or `prompt` and `completion`."""

    row: dict[str, Any]
    where: str

    @property
    def answers(self) -> list[str]:
        if "messages" not in self.row:
            return [self.row["completion"]]
        return [turn["content"] for turn in self.row["messages"] if turn["role"] == "assistant"]


@dataclass(frozen=True)
class Corpus:
    """Files and Hub data sets, found but not yet read."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]  # of the files, as `kind_of` names them
    hub: tuple[str, ...] = ()
    left_out: int = 0  # files of a folder that are empty or no text

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


def find_corpus(sources: "Corpora | Corpus", exclude: Path | None = None) -> Corpus:
    """The files that `sources` name: files, folders, globs and `hf://NAME` data sets; a Corpus is returned as it is.

    exclude: a folder that is not read although it is in a source: the output of the run.

    Raises:
        HfkitError: there is no such file, it is empty, or it is not text.
    """
    if isinstance(sources, Corpus):
        return sources
    files: dict[Path, str] = {}
    hub, left_out = [], 0
    for source in [sources] if isinstance(sources, str | Path) else sources:
        if not str(source):  # else it would be the folder that we are in
            raise HfkitError("no corpus '': name a file, a folder or hf://NAME")
        if str(source).startswith("hf://"):
            hub.append(str(source).removeprefix("hf://"))
            continue
        paths, chosen = _paths(str(source), exclude)
        found = {path: kind for path in paths if (kind := kind_of(path, chosen))}
        left_out += len(paths) - len(found)
        if not found:
            raise HfkitError(f"nothing to read ({source}): it holds no text, CSV, JSON, Parquet or Arrow files")
        files |= found
    if not files and not hub:
        raise HfkitError("no corpus: name a file, a folder or hf://NAME")
    return Corpus(tuple(files), tuple(files.values()), tuple(hub), left_out)


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` made this folder."""
    try:
        return "fingerprint" in json.loads((folder / PREPARED).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _is_output(folder: Path, exclude: Path | None) -> bool:
    """Whether hfkit writes there: a run, a search, or what `exclude` names."""
    return (folder / LIST).is_file() or bool(exclude and folder.resolve() == exclude.resolve())


def _paths(source: str, exclude: Path | None) -> tuple[list[Path], bool]:
    """Files that a source stands for, and whether it named just one."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            if is_prepared(path):
                raise HfkitError(
                    f"{source} was made by prepare: only finetune takes it, alone and without --streaming"
                )
            outputs = {folder for folder in path.rglob("*") if folder.is_dir() and _is_output(folder, exclude)}
            files = (file for file in sorted(path.rglob("*")) if file.is_file() and outputs.isdisjoint(file.parents))
            return [file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts)], False
        if path.is_file():
            return [path], True
        if path.exists():
            raise HfkitError(f"{source} is not a file or folder: save what it gives to a file first")
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user who is not there
        raise HfkitError(f"cannot read the corpus ({source}): {first_line(error)}") from error
    if not paths:
        raise HfkitError(f"no corpus {source!r}: no such file or folder")
    return paths, len(paths) == 1


def read_records(corpus: Corpus, options: CorpusOptions) -> Iterator[Piece | Example]:
    """All records of `corpus` in order: of rows with an answer Examples, of other rows and texts Pieces.

    Raises:
        HfkitError: a file is damaged, a row lacks what it should have (the message has the line), or there are both
            Pieces and Examples.
    """
    wanted: type = object
    for name, records in _sources(corpus, options):
        for record in records:
            if not isinstance(record, wanted):
                raise HfkitError(f"the corpus mixes texts and examples ({name} is other): train on one kind at a time")
            wanted = type(record)
            yield record


def _sources(corpus: Corpus, options: CorpusOptions) -> Iterator[tuple[str, Iterator[Piece | Example]]]:
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if kind == "text" and options.template:
            raise HfkitError(f"{path} is a plain text: a template takes rows (CSV, JSON Lines, Parquet)")
        if kind == "text":
            yield str(path), cut_pieces(read_text(path, options.errors))
        else:
            yield str(path), _records(read_rows(path, kind, options.errors), options)
    for name in corpus.hub:
        yield f"hf://{name}", _records(read_hub_rows(name, options), options)


def read_table(corpus: Corpus, options: CorpusOptions) -> Iterator[Row]:
    """The rows of `corpus` as they are, each with where it stands. HfkitError if it is made of plain texts."""
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if kind == "text":
            raise HfkitError(f"{path} is a plain text: give rows (CSV, JSON Lines, Parquet) with named columns")
        yield from read_rows(path, kind, options.errors)
    for name in corpus.hub:
        yield from read_hub_rows(name, options)


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut a text into Pieces of some 4,000 characters; END begins another document.

    Where the chunks of the text end does not matter.
    """
    rest, ended = "", False  # ended: nothing has come since the last END
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(END)
        for text in whole:
            yield from _document(text)
        *pieces, rest = _cut(rest, len(rest) - len(END))  # its end may be the beginning of an END
        yield from (Piece(text, False) for text in pieces)
        ended = (ended or bool(whole)) and not pieces
    if rest.strip() or not ended:
        yield from _document(rest)


def _document(text: str) -> Iterator[Piece]:
    *pieces, rest = _cut(text, len(text))
    yield from (Piece(piece, False) for piece in pieces)
    yield Piece(rest, True)


def _cut(text: str, size: int) -> list[str]:
    """Pieces of the first `size` characters of a text, of which more may come, and then what is left."""
    pieces, start = [], 0
    while size > start + 2 * _PIECE and (end := _find_cut(text, start, size)):
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _find_cut(text: str, start: int, size: int) -> int:
    """Where the piece that begins at `start` ends; 0 if that is not to be seen in `size` characters."""
    low, high, last = start + _PIECE // 2, start + _PIECE, start + _LONGEST
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, low, high)
        end = low + len(text[low:end].rstrip(_SPACE)) if end > low else low
        if end > low:
            return end
    if border := _BORDER.search(text, high, min(size, last)):
        return border.end()
    return last if size > last else 0


def _records(rows: Iterable[Row], options: CorpusOptions) -> Iterator[Piece | Example]:
    """Rows as records; the first row shows which columns matter."""
    columns: tuple[str, ...] = ()
    task = make_task(options)
    for row, where in rows:
        if task:
            yield Example(task.example(row, where), where)
            continue
        columns = columns or _columns(row, where, options)
        if missing := [name for name in columns if name not in row]:
            raise HfkitError(f"no column {missing[0]!r} ({where}): it has {', '.join(map(repr, row))}")
        picked = {name: row[name] for name in columns}
        if options.text_column or columns not in _EXAMPLES:
            (text,) = picked.values()
            if not isinstance(text, str | None):
                raise HfkitError(f"column {columns[0]!r} is no text ({where}): mend or delete the row")
            yield from cut_pieces([text or ""])
            continue
        if "messages" in picked:
            _check_messages(picked["messages"], where)
        elif not all(isinstance(text, str) for text in picked.values()) or not picked["completion"]:
            raise HfkitError(f"prompt and completion must be texts ({where}): mend or delete the row")
        yield Example(picked, where)


def _columns(row: dict[str, Any], where: str, options: CorpusOptions) -> tuple[str, ...]:
    """The columns that hold what is learned."""
    if options.text_column:
        return (options.text_column,)
    if example := next((columns for columns in _EXAMPLES if row.keys() >= set(columns)), None):
        return example
    named = [name for name in row if str(name).lower() in _TEXT_COLUMNS]
    plain = named or [name for name, value in row.items() if isinstance(value, str)]
    if len(plain) != 1:
        names = ", ".join(map(repr, row))
        raise HfkitError(f"which column is the text ({where}: {names})? Say so with --text-column")
    return (plain[0],)


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
