"""`answer`: find the answer to a question in a text with a model of BERT's kind, or let a causal model write it."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from hfkit.corpus.labelled import windows
from hfkit.corpus.sequences import Collator
from hfkit.corpus.templates import Task, task_of
from hfkit.errors import HfkitError, NotFiniteError, OptionError
from hfkit.inference.batches import forward
from hfkit.inference.generation import generate
from hfkit.models.architecture import head_of
from hfkit.models.loading import LanguageModel, Model, loaded, split_options
from hfkit.options import GenerateOptions

_LONGEST = 30  # tokens of an answer
_BATCH = 16  # texts, and windows, at a time
_GENERATIVE = Task("{context}\n\nQuestion: {question}\nAnswer: {answer}")


@dataclass(frozen=True)
class Answer:
    """An answer; `str()` is its text, which is empty where the context has none."""

    answer: str
    score: float  # probability among all spans; of a written answer that of its tokens
    start: int | None  # first character in the context; None for a written answer, or where there is none
    end: int | None  # one past the last character
    question: str
    model: str

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return dict(vars(self))


def answer(
    question: str, context: str, *, model: Model = None, no_answer_threshold: float = 0.0, **overrides: Any
) -> Answer:
    """Answer a question from a text.

    A model with a question-answering head points at a part of the text, in overlapping windows if the text is long. A
    causal model writes the answer, with its own template if it has one.

    Args:
        question, context: the question, and the text that has the answer.
        model: what `load` returned or takes.
        no_answer_threshold: how much likelier (difference of logits) "no answer" must be than the best span to be
            returned; raise it to get more answers.
        overrides: fields of `ModelOptions`; and options of `generate`, which a causal model uses.

    Raises:
        HfkitError: the texts are empty or do not fit, or the model cannot be loaded.
    """
    for text in (question, context):
        if not isinstance(text, str):
            raise HfkitError(f"question and context are a str, not {type(text).__name__} ({text!r:.60}): convert it")
    if not question.strip() or not context.strip():
        raise HfkitError("give a question, and a text to answer it from")
    model, _ = split_options(model, overrides, (GenerateOptions, None))  # before a model is loaded
    lm = loaded(model, "question-answering", "text")
    if head_of(lm.model.config) == "question-answering":
        return next(find_answers(lm, [(question, context)], no_answer_threshold))
    if no_answer_threshold:
        raise OptionError(f"--no-answer-threshold is for a model that points at an answer: {lm.name} writes it")
    task = task_of(lm.tokenizer) or _GENERATIVE
    if not {*task.inputs} <= {"question", "context"}:
        raise HfkitError(f"{lm.name} learned another task, from {', '.join(task.inputs)}: use 'hfkit generate'")
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0, "stop_strings": [task.end], "raw": True}
    options |= {name: value for name, value in overrides.items() if name in GenerateOptions.names()}
    generation = generate(task.prompt({"question": question, "context": context}), model=lm, **options)
    score = math.exp(generation.logprob)
    return Answer(generation.completion.strip(), score, start=None, end=None, question=question, model=lm.name)


@torch.inference_mode()
def find_answers(lm: LanguageModel, pairs: Iterable[tuple[str, str]], threshold: float) -> Iterator[Answer]:
    """The likeliest span of each (question, context), or none, in order."""
    length = min(lm.context or 512, 512)
    collate = Collator(lm.tokenizer.pad_token_id or 0, has_mask=True)
    pairs = iter(pairs)
    while batch := list(islice(pairs, _BATCH)):
        parts = [(number, part) for number, pair in enumerate(batch) for part in windows(*pair, lm.tokenizer, length)]
        spans: list[list[np.ndarray]] = [[] for _ in batch]
        no_answer = [math.inf] * len(batch)  # the lowest score of "no answer" among a context's windows
        for first in range(0, len(parts), _BATCH):
            group = parts[first : first + _BATCH]
            inputs = collate([part["inputs"] for _, part in group])
            output = forward(lm, **inputs)
            logits = torch.stack([output.start_logits, output.end_logits], 1).double().cpu().numpy()
            if np.isnan(logits).any():
                raise NotFiniteError.of(lm.name)
            for (number, part), (start, end) in zip(group, logits, strict=True):
                no_answer[number] = min(no_answer[number], start[0] + end[0])
                spans[number].append(_spans(part["offsets"], start, end))
        for (question, context), candidates, none in zip(batch, spans, no_answer, strict=True):
            yield _choose(lm.name, question, context, np.concatenate(candidates, 1), none, threshold)


def _spans(offsets: list[Any], start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """All spans of one window that may be an answer: score, first character, one past the last; (3, spans)."""
    inside = np.array([bool(place and place[0] < place[1]) for place in offsets])
    size = len(offsets)
    near = np.tri(size, size, _LONGEST - 1, dtype=bool) & ~np.tri(size, size, -1, dtype=bool)
    firsts, lasts = np.nonzero(near & inside & inside[:, None])
    places = np.array([place or (0, 0) for place in offsets])
    return np.stack([start[firsts] + end[lasts], places[firsts, 0], places[lasts, 1]])


def _choose(name: str, question: str, context: str, spans: np.ndarray, none: float, threshold: float) -> Answer:
    """The likeliest of `spans`, (3, spans), or no answer where that is likelier by more than `threshold`."""
    spans = spans[:, (-spans[0]).argsort(kind="stable")]
    # Windows overlap: of a span that is in two of them, the better score counts.
    _, firsts = np.unique(spans[1] * (len(context) + 1) + spans[2], return_index=True)
    spans = spans[:, np.sort(firsts)]
    total = np.logaddexp.reduce([none, *spans[0]])
    if not spans.size or none - spans[0, 0] > threshold:
        return Answer("", float(np.exp(none - total)), start=None, end=None, question=question, model=name)
    first, last = map(int, spans[1:, 0])
    text = context[first:last]
    first, last = last - len(text.lstrip()), first + len(text.rstrip())
    probability = float(np.exp(spans[0, 0] - total))
    return Answer(context[first:last], probability, start=first, end=last, question=question, model=name)
