"""A corpus as a stream of records: which files belong to it, and the documents and examples in them."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.console import note_once
from hfkit.corpus.examples import Convert, choose_form
from hfkit.corpus.folders import FolderFiles, describe_output, list_folder
from hfkit.corpus.formats import kind_of, read_text
from hfkit.corpus.pieces import cut_text
from hfkit.corpus.rows import Row, column_names, read_hub_rows, read_notebook, read_rows
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError, first_line
from hfkit.options import CorpusOptions

END = "<|endoftext|>"  # separates documents in a plain text, as in GPT-2's own corpora
PREPARED = "prepared.json"  # marks a folder made by `hfkit prepare`
Corpora = str | Path | Sequence[str | Path]


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
        turns = [turn for turn in self.row["messages"] if turn["role"] == "assistant" and turn.get("weight", 1)]
        calls = [[json.dumps(call["function"]) for call in turn.get("tool_calls", [])] for turn in turns]
        return ["".join([turn["content"], *called]) for turn, called in zip(turns, calls, strict=True)]


@dataclass(frozen=True)
class Corpus:
    """Files and Hub data sets, found but not yet read."""

    files: tuple[Path, ...]
    kinds: tuple[str, ...]  # of the files, from `kind_of`
    hub: tuple[str, ...] = ()
    left_out: int = 0  # files in folders that are empty or not text
    from_folder: frozenset[Path] = frozenset()  # files that were not named but lie in a folder
    splits: Mapping[Path, str] = field(default_factory=dict)  # of files in a DatasetDict

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of the files' content; names and time stamps do not matter."""
        # Of files in a folder those without a clear text are left out.
        roles = [
            (kind, self.splits.get(path), kind != "text" and path in self.from_folder, _is_notebook(path))
            for path, kind in zip(self.files, self.kinds, strict=True)
        ]
        total = hashlib.sha256(repr((roles, self.hub)).encode())
        for path in self.files:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()


def find_corpus(sources: Corpora | Corpus, exclude: Path | None = None) -> Corpus:
    """The files that `sources` name: files, folders, globs and `hf://NAME` data sets.

    A `Corpus` is returned as it is: finding one reads the start of every file, so find it once and pass it on.

    exclude: a folder that is not read although it is in a source: the output of the run.

    Raises:
        HfkitError: a file does not exist, is empty, or is not text; or a source is a model.
    """
    if isinstance(sources, Corpus):
        return sources
    files: dict[Path, str] = {}
    splits: dict[Path, str] = {}
    hub, from_folder, left_out = [], set(), 0
    for source in map(str, [sources] if isinstance(sources, str | Path) else sources):
        if source.startswith("hf://"):
            hub.append(source.removeprefix("hf://"))
            continue
        listing = _list_source(source, exclude)
        is_single = len(listing.files) == 1 and not Path(source).expanduser().is_dir()
        kinds = {path: kind for path in listing.files if (kind := kind_of(path, is_single))}
        if not kinds:
            for path in listing.files:
                kind_of(path, chosen=True)  # says what it is, if it is a PDF or the like
            raise HfkitError(f"nothing to read ({source}): it has no text, CSV, JSON, Parquet or Arrow files")
        unread = len(listing.files) - len(kinds)
        _note_left_out(source, unread, listing.skipped)
        left_out += unread
        from_folder |= set() if is_single else kinds.keys() - files.keys()
        files |= kinds
        splits |= listing.splits
    if not files and not hub:
        raise HfkitError("no corpus: name a file, a folder or hf://NAME")
    return Corpus(tuple(files), tuple(files.values()), tuple(hub), left_out, frozenset(from_folder), splits)


def _list_source(source: str, exclude: Path | None) -> FolderFiles:
    """The files that a source stands for, whatever they hold."""
    if not source:  # Path("") would be the current folder
        raise HfkitError("no corpus '': name a file, a folder or hf://NAME")
    if address := re.match(r"https?://(?:huggingface\.co/datasets/([\w.-]+(?:/[\w.-]+)?))?", source):
        remedy = f"did you mean hf://{address[1]}?" if address[1] else f"download the file first (curl -LO {source})"
        raise HfkitError(f"{source} is a web address: {remedy}")
    try:
        path = Path(source).expanduser()
        if is_prepared(path):
            raise HfkitError(f"{source} was made by prepare: only finetune takes it, alone and without --streaming")
        if path.is_dir():
            if output := describe_output(path):
                raise HfkitError(f"{source} is {output}: did you mean -m {source}?")
            return list_folder(path, exclude)
        if path.is_file():
            return FolderFiles([path])
        if path.exists():
            raise HfkitError(f"{source} is not a file or folder: save its output to a file first")
        paths = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HfkitError(f"cannot read the corpus ({source}): {first_line(error)}") from error
    if not paths:
        raise HfkitError(f"no corpus {source!r}: no such file or folder")
    folders = dict.fromkeys(path.parent for path in paths)
    outputs = [
        folder for folder in folders if describe_output(folder) or (exclude and folder.resolve() == exclude.resolve())
    ]
    files = [path for path in paths if path.parent not in outputs]
    if not files:
        raise HfkitError(f"{source} names files of {outputs[0]}, a run or a model: did you mean -m {outputs[0]}?")
    return FolderFiles(files, skipped=outputs)


def is_prepared(folder: Path) -> bool:
    """Whether `hfkit prepare` made this folder."""
    try:
        return "fingerprint" in json.loads((folder / PREPARED).read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _note_left_out(source: str, files: int, folders: list[Path]) -> None:
    parts = [f"{files} files that are empty or not text"] if files else []
    parts += [f"{len(folders)} folders with a run or a model, such as {folders[0]}"] if folders else []
    if parts:
        note_once(f"{source}: left out {' and '.join(parts)}")


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
    task = make_task(options)
    is_empty, unclear = True, []
    for name, rows in _open_sources(corpus, options, is_table=task is not None):
        if rows is None:
            yield name, cut_pieces(_read_plain(Path(name), options.errors))
        elif task:
            yield name, (Example(task.example(row, where), where) for row, where in rows)
        else:
            try:
                first = next(rows)
                convert, description = choose_form(*first, options.text_column)
            except StopIteration:
                continue
            except HfkitError as error:
                if Path(name) not in corpus.from_folder:
                    raise
                unclear.append(error)  # a settings file or the like, which only lies beside the texts
                continue
            yield name, _make_records(chain([first], rows), convert, f"{name}: {description}")
        is_empty = False
    if unclear and is_empty:
        raise unclear[0]
    if unclear:
        note_once(f"left out {len(unclear)} files of rows without a clear text, such as: {unclear[0]}")


def _open_sources(
    corpus: Corpus, options: CorpusOptions, *, is_table: bool
) -> Iterator[tuple[str, Iterator[Row] | None]]:
    """(name, rows) of every file and Hub data set; None instead of rows for a plain text."""
    split, splits = options.dataset_split, list(dict.fromkeys(corpus.splits.values()))
    if len(splits) == 1:
        split = splits[0]
    elif splits and split not in splits:
        raise HfkitError(f"no split {split!r} (there are {column_names(splits)}): choose one with --dataset-split")
    elif splits:
        folder = next(iter(corpus.splits)).parents[1]
        note_once(f"{folder} has {column_names(splits)}: reading {split!r} (--dataset-split)")
    has_rows = bool(corpus.hub) or any(kind != "text" for kind in corpus.kinds)
    for path, kind in zip(corpus.files, corpus.kinds, strict=True):
        if corpus.splits.get(path, split) != split:
            continue
        if kind != "text":
            yield str(path), read_rows(path, kind, options.errors, options.dataset_split)
        elif not is_table:
            yield str(path), None
        elif path in corpus.from_folder and has_rows:
            note_once(f"left out plain texts such as {path}: only rows are read here")
        else:
            raise HfkitError(f"{path} is a plain text: this takes rows (CSV, JSON Lines, Parquet) with named columns")
    for name in corpus.hub:
        yield f"hf://{name}", read_hub_rows(name, options)


def read_table(corpus: Corpora | Corpus, options: CorpusOptions) -> Iterator[Row]:
    """The rows of a corpus, unchanged, each with where it is. HfkitError if the corpus has plain texts."""
    for _, rows in _open_sources(find_corpus(corpus), options, is_table=True):
        yield from rows or ()


def _read_plain(path: Path, errors: str) -> Iterator[str]:
    return read_notebook(path, errors) if _is_notebook(path) else read_text(path, errors)


def _is_notebook(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".ipynb")


def _make_records(rows: Iterable[Row], convert: Convert, description: str) -> Iterator[Piece | Example]:
    for row, where in rows:
        values = convert(row, where)
        note_once(description)
        if isinstance(values, str):
            yield from cut_pieces([values])
        else:
            yield Example(values, where)


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut a text into Pieces of about 4,000 characters; END starts another document.

    The pieces do not depend on where the chunks end.
    """
    rest, ended = "", False  # ended: the text so far ends with END
    for chunk in chunks:
        *documents, rest = (rest + chunk).split(END)
        for text in documents:
            yield from _cut_document(text)
        *pieces, rest = cut_text(rest, len(rest) - len(END))  # the last characters may be the start of an END
        yield from (Piece(text, False) for text in pieces)
        ended = (ended or bool(documents)) and not pieces
    if rest.strip() or not ended:
        yield from _cut_document(rest)


def _cut_document(text: str) -> Iterator[Piece]:
    *pieces, rest = cut_text(text, len(text))
    yield from (Piece(piece, False) for piece in pieces)
    yield Piece(rest, True)


def name_of(sources: Corpora) -> str:
    """A short name for a corpus, from its first source: `runs/NAME`."""
    first = str(sources if isinstance(sources, str | Path) else next(iter(sources), ""))
    name = re.sub(r"(\.(txt|md|csv|tsv|jsonl?|ndjson|parquet|arrow|ipynb))?(\.gz)?$", "", Path(first).name, flags=re.I)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "corpus"
