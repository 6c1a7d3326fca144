"""Models with a head that labels a text or finds an answer in it, BERT's above all: their rows, batches and scores."""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.corpus.cache import Report
from hfkit.corpus.documents import Corpora, Corpus, find_corpus, read_table
from hfkit.corpus.encoding import encode, fingerprint
from hfkit.corpus.sequences import LabelledItem, TrainingData, hold_out
from hfkit.errors import HfkitError
from hfkit.options import DataOptions

STRIDE = 128  # tokens that windows of a long context share


class Question(NamedTuple):
    """A question to a text."""

    question: str
    context: str
    answers: list[str]  # all that are right; none if the context has none
    start: int  # of the first one, in characters of the context; -1 if it is not there


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
        labels: of the model, if its head is trained further; else those of the rows.

    Raises:
        HfkitError: a column is missing, or there are too few rows or labels.
    """
    read = classification_rows if head == "classification" else question_rows
    rows: list[Any] = read(corpus, data)
    held: list[Any] = read(data.eval_file, data) if data.eval_file else []
    if head == "classification":
        labels = labels or sorted({row[-1] for row in rows})
        if len(labels) < 2:
            raise HfkitError("a classification needs rows of two labels at least")
        encode = functools.partial(encode_labelled, tokenizer=tokenizer, labels=list(labels), length=length)
    else:
        encode = functools.partial(encode_questions, tokenizer=tokenizer, length=length)
    if not held:
        sizes = np.array([len(row[0]) for row in rows])
        kept, out = hold_out(np.arange(len(rows)), sizes, data.eval_fraction, seed)
        rows, held = [rows[i] for i in kept], [rows[i] for i in out]
    train_set, held_out = encode(rows), encode(held)
    if not train_set:
        raise HfkitError("there is nothing to train on: the corpus is too small")
    tokens = sum(len(item["input_ids"]) for item in train_set)
    characters = sum(len(text) for row in rows for text in row[: 1 if labels else 2])  # a question with its context
    report = Report(
        kind=head, documents=len(rows) + len(held), tokens=tokens, characters=characters,
        fingerprint=hashlib.sha256(repr((rows, held)).encode()).hexdigest(), tokenizer=fingerprint(tokenizer),
    )  # fmt: skip
    count = len(train_set)
    return TrainingData(train_set, held_out, count, tokens / count, report, head=head, labels=tuple(labels or ()))


def classification_rows(corpus: Corpora | Corpus, options: DataOptions) -> list[tuple[str, str]]:
    """(text, label) of every row.

    Raises:
        HfkitError: a column is missing.
    """
    rows = []
    for row, where in read_table(find_corpus(corpus), options):
        label = row.get(options.label_column)
        if label is None and options.label_column in row:
            raise HfkitError(f"column {options.label_column!r} holds no label ({where}): mend or delete the row")
        if label is None:
            names = ", ".join(map(repr, row))
            raise HfkitError(f"no column {options.label_column!r} ({where}: {names}): say so with --label-column")
        rows.append((_text_of(row, options, where), str(label)))
    return rows


def _text_of(row: Mapping[str, Any], options: DataOptions, where: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str) and name != options.label_column]
    name = options.text_column or ("text" if "text" in row else texts[0] if len(texts) == 1 else None)
    if name is None or not isinstance(row.get(name), str):
        names = ", ".join(map(repr, row))
        raise HfkitError(f"which column is the text ({where}: {names})? Say so with --text-column")
    return row[name]


def question_rows(corpus: Corpora | Corpus, options: DataOptions) -> list[Question]:
    """Every row as a Question; no answers where the context has none.

    Rows are as in SQuAD, or have a text in `answer` or `answers`.

    Raises:
        HfkitError: a column is missing.
    """
    rows = []
    for row, where in read_table(find_corpus(corpus), options):
        answers, starts = row.get("answers", row.get("answer")), [row.get("answer_start")]
        if isinstance(answers, Mapping):  # SQuAD's {"text": [...], "answer_start": [...]}
            answers, starts = answers.get("text"), list(answers.get("answer_start") or [])
        if not isinstance(row.get("question"), str) or not isinstance(row.get("context"), str) or answers is None:
            names = ", ".join(map(repr, row))
            raise HfkitError(f"rows must have question, context and answer ({where}: {names})")
        answers = [answer for answer in ([answers] if isinstance(answers, str) else answers) if answer]
        if not all(isinstance(answer, str) for answer in answers):
            raise HfkitError(f"an answer is no text ({where}): mend or delete the row")
        rows.append(Question(row["question"], row["context"], answers, _place(row["context"], answers, starts)))
    return rows


def _place(context: str, answers: list[str], starts: list[Any]) -> int:
    """Where the first answer stands: as the row says, if it does and is right, else where it comes first; or -1."""
    if not answers:
        return -1
    said = isinstance(start := next(iter(starts), None), int) and start >= 0
    return start if said and context.startswith(answers[0], start) else context.find(answers[0])


def encode_labelled(
    rows: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, labels: list[str], length: int
) -> list[LabelledItem]:
    """A text's token ids, cut at `length`, and the number of its label."""
    number = {label: index for index, label in enumerate(labels)}
    items = []
    for text, label in rows:
        if label not in number:
            raise HfkitError(f"label {label!r} is none of the model's: {', '.join(labels)}")
        items.append({"input_ids": encode_text(text, tokenizer, length), "labels": number[label]})
    return items


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Token ids of a text; of one that is too long those of its beginning, closed as the tokenizer closes a text."""
    ids = encode(text, tokenizer, "the model")
    return ids if len(ids) <= length else tokenizer(text, truncation=True, max_length=length)["input_ids"]


def encode_questions(rows: Iterable[Question], tokenizer: PreTrainedTokenizerBase, length: int) -> list[LabelledItem]:
    """Windows over each context, with the places of its first answer's tokens; place 0 where a window has none."""
    items = []
    for question, context, answers, start in rows:
        if answers and start < 0:
            note(f"an answer is not in its context, so it is left out: {answers[0][:60]!r}")
            continue
        span = (start, start + len(answers[0])) if answers else None
        for window in windows(question, context, tokenizer, length):
            places = [
                at
                for at, place in enumerate(window["offsets"])
                if place and span and place[1] > span[0] and place[0] < span[1]
            ]
            inside = (
                places and window["offsets"][places[0]][0] <= span[0] and window["offsets"][places[-1]][1] >= span[1]
            )
            first, last = (places[0], places[-1]) if inside else (0, 0)
            items.append({**window["inputs"], "start_positions": first, "end_positions": last})
    return items


def windows(question: str, context: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[dict[str, Any]]:
    """Overlapping windows of question and context: `inputs`, and `offsets`, the characters of each context token."""
    if not tokenizer.is_fast:
        raise HfkitError("finding answers needs a tokenizer that knows where its tokens stand: use a fast one")
    try:
        encoded = tokenizer(
            question, context, truncation="only_second", max_length=length, stride=min(STRIDE, length // 4),
            return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
    except Exception as error:  # tokenizers': the question alone is too long
        raise HfkitError(f"the question is too long for {length} tokens: shorten it") from error
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    for number in range(len(encoded["input_ids"])):
        of = encoded.sequence_ids(number)
        offsets = [place if of[at] == 1 else None for at, place in enumerate(encoded["offset_mapping"][number])]
        yield {"inputs": {name: encoded[name][number] for name in names}, "offsets": offsets}
