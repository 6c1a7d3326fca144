"""Rows for models with a head, which label a text or find an answer in it: read, encoded, and cut into windows."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.console import note, note_once
from hfkit.corpus.cache import Report
from hfkit.corpus.documents import read_table
from hfkit.corpus.encoding import backend_of, content_of, encode, fingerprint, sha256_of
from hfkit.corpus.examples import choose_text_column, text_of
from hfkit.corpus.files import Corpora, Corpus
from hfkit.corpus.rows import column_names, row_error
from hfkit.corpus.sequences import LabelledItem
from hfkit.corpus.templates import enclosing_tokens
from hfkit.corpus.training_data import TrainingData, hold_out
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions, DataOptions

_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?", re.I)
STRIDE = 128  # tokens that neighbouring windows of a long context share


class Question(NamedTuple):
    """A question about a text."""

    question: str
    context: str
    answers: list[str]  # all correct ones; none if the context does not answer it
    start: int  # of the first answer, in characters of the context; -1 if it is not there


def gather_labelled_data(
    corpus: Corpora | Corpus,
    tokenizer: PreTrainedTokenizerBase,
    data: DataOptions,
    head: str,
    length: int,
    seed: int,
    labels: Sequence[str] | None,
) -> TrainingData:
    """Rows to train a head on, and those that are held out.

    Args:
        labels: those of the model whose head is trained further; without them, those of the rows.

    Raises:
        HfkitError: a column is missing, or there are too few rows or labels.
    """
    read = classification_rows if head == "classification" else question_rows
    rows: list[Any] = read(corpus, data)
    held: list[Any] = read(data.eval_file, replace(data, exclude=None)) if data.eval_file else []
    texts = 1 if head == "classification" else 2  # a row begins with its text, or with its question and context
    if head == "classification":
        labels = labels or sorted({label for _, label in rows})
        if len(labels) < 2:
            raise HfkitError("a classification needs rows of at least two labels")
        counts = Counter(label for _, label in rows).most_common()
        shown = ", ".join(f"{label!r} {count:,}" for label, count in counts[:20])
        note(f"{len(counts)} labels: {shown}{' ...' if len(counts) > 20 else ''}")
    if not held:
        sizes = np.array([len(row[0]) for row in rows])
        contents = np.array([content_of("\0".join(row[:texts])) for row in rows])
        kept, out = hold_out(contents, sizes, data.eval_fraction, seed)
        rows, held = [rows[i] for i in kept], [rows[i] for i in out]
    if head == "classification":
        train_set, held_out = (encode_labelled(part, tokenizer, list(labels or ()), length) for part in (rows, held))
    else:
        train_set, held_out = (encode_questions(part, tokenizer, length) for part in (rows, held))
    if not train_set:
        raise HfkitError("there is nothing to train on: the corpus is too small")
    report = Report(kind=head, documents=len(rows) + len(held), tokenizer=fingerprint(tokenizer))
    report.tokens = sum(len(item["input_ids"]) for item in train_set)
    report.characters = sum(len(text) for row in rows for text in row[:texts])
    report.fingerprint = sha256_of(repr((rows, held)))
    average = report.tokens / len(train_set)
    return TrainingData(train_set, held_out, len(train_set), average, report, head=head, labels=tuple(labels or ()))


def classification_rows(corpus: Corpora | Corpus, options: CorpusOptions) -> list[tuple[str, str]]:
    """(text, label) of every row. HfkitError if a row has none.

    A label is a text or a whole number: 1, "1" and 1.0 are the same.
    """
    rows: list[tuple[str, str]] = []
    name, column = options.label_column, ""
    for row, where in read_table(corpus, options, [name]):
        if name not in row:
            raise HfkitError(f"no column {name!r} ({where}: {column_names(row)}): name it with --label-column")
        if not column or column not in row:
            column = choose_text_column(row, where, options.text_column, name)
            note_once(f"{where}: the text is column {column!r}, the label {name!r}")
        rows.append((text_of(row, column, where), _read_label(row[name], name, where)))
    return rows


def _read_label(value: Any, column: str, where: str) -> str:
    label = str(value).strip()
    if isinstance(value, list | dict | bytes):
        reason = "has a list, an object or bytes instead of one label"
    elif value is None or label.lower() in ("", "nan"):
        reason = "has no label"
    elif not isinstance(value, float) and not _DECIMAL.fullmatch(label):
        return label
    elif float(label).is_integer():
        return str(int(float(label)))
    else:
        reason = f"has the fraction {label}, but a class is a text or a whole number"
    raise row_error(f"column {column!r} {reason}", where)


def question_rows(corpus: Corpora | Corpus, options: CorpusOptions) -> list[Question]:
    """Every row as a Question, without answers where the context has none.

    Rows are those of SQuAD, or have texts in `answer` or `answers`. HfkitError if a column is missing.
    """
    rows = []
    for row, where in read_table(corpus, options, ["question", "context"]):
        answers: Any = row.get("answers", row.get("answer"))
        starts = [row.get("answer_start")]
        if isinstance(answers, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
            answers, starts = answers.get("text"), list(answers.get("answer_start") or [])
        elif isinstance(answers, list) and all(isinstance(answer, Mapping) for answer in answers):
            answers, starts = ([answer.get(key) for answer in answers] for key in ("text", "answer_start"))
        if not row.keys() >= {"question", "context"} or answers is None:
            raise HfkitError(f"rows must have question, context and answer ({where}: {column_names(row)})")
        question, context = (text_of(row, name, where) for name in ("question", "context"))
        if isinstance(answers, str) and answers[:1] in ("[", "{") and answers not in context:
            raise row_error("answers are a list written as text", where, "write JSON Lines, or one answer a row")
        answers = [answer for answer in ([answers] if isinstance(answers, str) else answers) if answer]
        if not all(isinstance(answer, str) for answer in answers):
            raise row_error("an answer is not text", where)
        rows.append(Question(question, context, answers, _find_answer(context, answers, starts)))
    return rows


def _find_answer(context: str, answers: list[str], starts: list[Any]) -> int:
    """Where the first answer starts: where the row says, if that is correct, else its first occurrence, or -1."""
    if not answers:
        return -1
    start = str(next(iter(starts), None)).strip().removesuffix(".0")  # a table has it as text, pandas as a float
    if start.isdecimal() and context.startswith(answers[0], int(start)):
        return int(start)
    return context.find(answers[0])


def encode_labelled(
    rows: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, labels: list[str], length: int
) -> list[LabelledItem]:
    """Token ids of each text, cut at `length`, and the number of its label."""
    numbers = {label: number for number, label in enumerate(labels)}
    items = []
    for text, label in rows:
        if label not in numbers:
            raise HfkitError(f"label {label!r} is not one of the model's: {', '.join(labels)}")
        items.append({"input_ids": encode_text(text, tokenizer, length), "labels": numbers[label]})
    return items


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Token ids of a text, cut at `length`; the tokens that close a text are kept."""
    ids = encode(text, tokenizer, "the model")
    if len(ids) <= length:
        return ids
    _, end = enclosing_tokens(tokenizer)
    return ids[: length - len(end)] + end


def encode_questions(rows: Iterable[Question], tokenizer: PreTrainedTokenizerBase, length: int) -> list[LabelledItem]:
    """Windows over each context, with the positions of the first answer's tokens; 0 where a window has no answer."""
    items = []
    for question, context, answers, start in rows:
        if answers and start < 0:
            note(f"an answer is not in its context, so the row is left out: {answers[0][:60]!r}")
            continue
        stop = start + len(answers[0]) if answers else start
        for window in windows(question, context, tokenizer, length):
            offsets = window["offsets"]
            inside = [i for i, span in enumerate(offsets) if span and span[0] < stop and start < span[1]]
            first, last = (inside[0], inside[-1]) if inside else (0, 0)
            if inside and not (offsets[first][0] <= start and stop <= offsets[last][1]):  # the window cuts the answer
                first, last = 0, 0
            items.append({**window["inputs"], "start_positions": first, "end_positions": last})
    return items


def windows(question: str, context: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[dict[str, Any]]:
    """Overlapping windows of a question and its context, of at most `length` tokens.

    Each has its `inputs`, and `offsets`: (start, stop) in characters of the context of each token; None outside it.
    """
    if not tokenizer.is_fast:
        raise HfkitError("finding answers needs the place of each token in the text: use a fast tokenizer")
    backend = backend_of(tokenizer)
    first, second = (backend.encode(text, add_special_tokens=False) for text in (question, context))
    room = length - len(first) - backend.num_special_tokens_to_add(True)
    if room < 1:
        raise HfkitError(f"the question is too long for {length} tokens: shorten it")
    second.truncate(room, stride=min(STRIDE, length // 4, room // 2))
    for part in (second, *second.overflowing):
        window, spans = backend.post_process(first, part), iter(part.offsets)
        inputs = {"input_ids": window.ids, "token_type_ids": window.type_ids}
        yield {
            "inputs": {name: inputs[name] for name in tokenizer.model_input_names if name in inputs},
            # 1 stands for tokens of the context.
            "offsets": [next(spans) if sequence == 1 else None for sequence in window.sequence_ids],
        }
