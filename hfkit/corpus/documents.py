"""A corpus as a stream of records: the documents in its texts, the examples in its rows, or the rows themselves."""

import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from hfkit.console import counted, note_once
from hfkit.corpus.conversations import UnlearnedError
from hfkit.corpus.examples import Convert, choose_form
from hfkit.corpus.files import Corpora, Corpus, Source, find_corpus
from hfkit.corpus.formats import TEXTS, read_text
from hfkit.corpus.rows import Row, column_names, read_hub_rows, read_notebook, read_rows
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions

END = "<|endoftext|>"  # separates documents in a plain text, as in GPT-2's own corpora
_PIECE, _LONGEST = 4000, 16_000  # characters of a piece; _LONGEST where there is no good place to cut
_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")  # as in Unicode
# GPT-2's pre-tokenizer always splits here, so cutting here cannot change the tokens.
_BORDER = re.compile(rf"[^\s](?=[{_SPACE}])|[^\W_](?=[^\w\s])")


class Piece(NamedTuple):
    """A part of a document, cut where a byte-level BPE tokenizer ends a token anyway."""

    text: str
    last: bool  # the document ends here

    @property
    def texts(self) -> list[str]:
        return [self.text]


class Example(NamedTuple):
    """A row of which only the answer is learned: `messages`, or `prompt` and `completion`."""

    row: dict[str, Any]
    where: str

    @property
    def texts(self) -> list[str]:
        turns = self.row.get("messages")
        return [turn["content"] for turn in turns] if turns else [self.row["prompt"], self.row["completion"]]

    @property
    def answers(self) -> list[str]:
        """The texts that are learned."""
        if "messages" not in self.row:
            return [self.row["completion"]]
        turns = [turn for turn in self.row["messages"] if turn["role"] == "assistant" and turn.get("weight", 1)]
        calls = [[json.dumps(call["function"]) for call in turn.get("tool_calls", [])] for turn in turns]
        return ["".join([turn["content"], *called]) for turn, called in zip(turns, calls, strict=True)]


def read_records(corpus: Corpus, options: CorpusOptions) -> Iterator[Piece | Example]:
    """All records of `corpus` in order: Examples from rows with an answer, Pieces from texts and other rows.

    Two kinds of files in a folder are left out, with a note: rows without a text, and a README or the like beside
    rows.

    Raises:
        HfkitError: a file is damaged, a row lacks a column (the message has the line), or the corpus has both Pieces
            and Examples.
    """
    if task := make_task(options):
        for row, where in read_table(corpus, options, task.columns):
            yield Example(task.example(row, where), where)
        return
    if descriptions := corpus.descriptions:
        files = counted(len(descriptions), "file")
        note_once(f"left out {files} of descriptions or settings beside the rows, such as {descriptions[0]}")
    left_out = {*descriptions}
    kind: type[Piece | Example] | None = None
    unclear: list[HfkitError] = []
    for source, rows in _open_sources(corpus, options):
        if rows is None:
            if source in left_out:
                continue
            chunks = (read_notebook if source.kind == "notebook" else read_text)(source.path, options.errors)
            records: Iterator[Piece | Example] = cut_pieces(chunks)
        else:
            try:
                first = next(rows)
                convert, form = choose_form(*first, options.text_column)
            except StopIteration:
                continue
            except HfkitError as error:
                if not source.in_folder:
                    raise
                unclear.append(error)
                continue
            records = _make_records(chain([first], rows), convert, f"{source}: {form}")
        for record in records:
            if kind and not isinstance(record, kind):
                raise HfkitError(f"the corpus mixes texts and examples ({source} differs): leave one out (--exclude)")
            kind = type(record)
            yield record
    if unclear and not kind:
        raise unclear[0]
    if unclear:
        note_once(f"left out {counted(len(unclear), 'file')} of rows without a clear text, such as: {unclear[0]}")


def _make_records(rows: Iterable[Row], convert: Convert, description: str) -> Iterator[Piece | Example]:
    unlearned: list[HfkitError] = []
    is_read = False
    for row, where in rows:
        try:
            values = convert(row, where)
        except UnlearnedError as error:
            unlearned.append(error)
            continue
        is_read = True
        note_once(description)
        if isinstance(values, str):
            yield from cut_pieces([values])
        else:
            yield Example(values, where)
    if unlearned and not is_read:
        raise unlearned[0]
    if unlearned:
        note_once(f"left out {counted(len(unlearned), 'row')}, such as: {unlearned[0]}")


def read_table(corpus: Corpora | Corpus, options: CorpusOptions, columns: Collection[str] = ()) -> Iterator[Row]:
    """The rows of a corpus, unchanged, each with where it is.

    columns: what the rows must have. Files in a folder that lack one are left out, if others have all of them.

    Raises:
        HfkitError: the corpus has plain texts, unless these lie in a folder, beside rows.
    """
    corpus = find_corpus(corpus, options)
    has_rows = any(source.kind not in TEXTS for source in corpus.sources)
    is_read = False
    others: list[Source] = []
    for source, rows in _open_sources(corpus, options):
        if rows is None and not (source.in_folder and has_rows):
            form = "rows (CSV, JSON Lines, Parquet) with named columns"
            raise HfkitError(f"{source} is a plain text: this takes {form}")
        if rows is None:
            note_once(f"left out plain texts such as {source}: only rows are read here")
        elif first := next(rows, None):
            rows = chain([first], rows)
            if source.in_folder and not first[0].keys() >= {*columns}:
                others.append(source)
            else:
                is_read = True
                yield from rows
    if is_read and others:
        files = counted(len(others), "file")
        note_once(f"left out {files} without the columns {column_names(columns)}, such as {others[0]}")
    elif others:  # what takes the rows says which column they lack
        yield from read_table(corpus, options)


def _open_sources(corpus: Corpus, options: CorpusOptions) -> Iterator[tuple[Source, Iterator[Row] | None]]:
    """Every file and Hub data set with its rows; None instead of rows for a plain text."""
    split = options.dataset_split
    splits = list(dict.fromkeys(source.split for source in corpus.sources if source.split))
    if len(splits) == 1:
        split = splits[0]
    elif splits:
        if split not in splits:
            raise HfkitError(f"no split {split!r} (there are {column_names(splits)}): choose one with --dataset-split")
        folder = next(source.path.parents[1] for source in corpus.sources if source.split)
        note_once(f"{folder} has {column_names(splits)}: reading {split!r} (--dataset-split)")
    for source in corpus.sources:
        if source.kind == "hub":
            yield source, read_hub_rows(str(source.path), options)
        elif source.kind in TEXTS:
            yield source, None
        elif source.split in (None, split):
            yield source, read_rows(source.path, source.kind, options.errors, options.dataset_split)


def cut_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """Cut a text into Pieces of about 4,000 characters; END starts another document.

    The pieces do not depend on where the chunks end.
    """
    rest, ended = "", False  # ended: the text so far ends with END
    for chunk in chunks:
        *documents, rest = (rest + chunk).split(END)
        for text in documents:
            yield from _cut_document(text)
        *pieces, rest = _cut_text(rest, len(rest) - len(END))  # the last characters may be the start of an END
        yield from (Piece(text, False) for text in pieces)
        ended = (ended or bool(documents)) and not pieces
    if rest.strip() or not ended:
        yield from _cut_document(rest)


def _cut_document(text: str) -> Iterator[Piece]:
    *pieces, rest = _cut_text(text, len(text))
    yield from (Piece(piece, False) for piece in pieces)
    yield Piece(rest, True)


def _cut_text(text: str, size: int) -> list[str]:
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
