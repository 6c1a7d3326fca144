"""`answer`: find the answer to a question in a text with a model of BERT's type, or let a causal model write it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfkit.errors import HfkitError
from hfkit.generation import generate, loaded
from hfkit.heads import HeadCollator, windows
from hfkit.models import LanguageModel, head_of
from hfkit.options import ModelOptions
from hfkit.tasks import Task, task_of

_LONGEST = 30  # tokens of an answer
_BATCH = 16  # windows at a time
_GENERATIVE = Task("{context}\n\nQuestion: {question}\nAnswer: {answer}")


@dataclass(frozen=True)
class Answer:
    """An answer; `str()` is its text, which is empty where there is none."""

    answer: str
    score: float  # probability among all spans; of a written answer that of its tokens
    start: int | None  # character of the context; None for a written answer, or for none
    end: int | None
    question: str
    model: str

    def __str__(self) -> str:
        return self.answer

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return dict(vars(self))


def answer(
    question: str,
    context: str,
    *,
    model: str | ModelOptions | LanguageModel | None = None,
    no_answer_threshold: float = 0.0,
    **overrides: Any,
) -> Answer:
    """Answer a question from a text.

    A model with a question-answering head points at a part of the text, by overlapping windows if it is long. A causal
    model writes the answer, after its own template if it has one.

    Args:
        question, context: what is asked, and the text that has the answer.
        model: what `load` returned or takes.
        no_answer_threshold: how much likelier (difference of logits) "no answer" must be than the best span to be
            given; raise it to get more answers.
        overrides: options of `generate`, for a causal model.

    Raises:
        HfkitError: the texts are empty or do not fit, or the model cannot be loaded.
    """
    if not question.strip() or not context.strip():
        raise HfkitError("give a question, and a text to answer it from")
    lm = loaded(model, "question-answering", "text")
    if head_of(lm.model.config) == "question-answering":
        return find_answers(lm, [(question, context)], no_answer_threshold)[0]
    return _write(lm, question, context, overrides)


def _write(lm: LanguageModel, question: str, context: str, options: dict[str, Any]) -> Answer:
    task = task_of(lm.tokenizer) or _GENERATIVE
    given = {"max_new_tokens": 40, "temperature": 0, "stop_strings": [task.end], "raw": True} | options
    found = generate(task.prompt({"question": question, "context": context}), model=lm, **given)
    score = float(torch.tensor(found.logprob).exp())
    return Answer(found.completion.strip(), score, None, None, question, lm.name)


@torch.inference_mode()
def find_answers(lm: LanguageModel, pairs: Sequence[tuple[str, str]], threshold: float) -> list[Answer]:
    """The likeliest span of each (question, context), or none."""
    length = min(lm.context or 512, 512)
    parts = [
        (number, part)
        for number, (question, context) in enumerate(pairs)
        for part in windows(question, context, lm.tokenizer, length)
    ]
    collate = HeadCollator(lm.tokenizer.pad_token_id or 0)
    found: list[list[tuple[float, int, int]]] = [[] for _ in pairs]  # (score, start, end) of each span
    nothing = [float("inf")] * len(pairs)  # the least score of "no answer" of its windows
    for at in range(0, len(parts), _BATCH):
        batch = parts[at : at + _BATCH]
        inputs = collate([part["inputs"] for _, part in batch])
        output = lm.model(**{name: tensor.to(lm.model.device) for name, tensor in inputs.items()})
        for (number, part), start, end in zip(
            batch, output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True
        ):
            nothing[number] = min(nothing[number], float(start[0] + end[0]))
            found[number] += _spans(part["offsets"], start, end)
    answers = []
    for (question, context), spans, none in zip(pairs, found, nothing, strict=True):
        score, first, last = max(spans, default=(float("-inf"), 0, 0))
        scores = torch.tensor([none, *(span[0] for span in spans)])
        probability = float((torch.tensor(max(score, none)) - scores.logsumexp(0)).exp())
        if none - score > threshold:
            answers.append(Answer("", probability, None, None, question, lm.name))
        else:
            shown = float((torch.tensor(score) - scores.logsumexp(0)).exp())
            answers.append(Answer(context[first:last], shown, first, last, question, lm.name))
    return answers


def _spans(offsets: list[Any], start: torch.Tensor, end: torch.Tensor) -> list[tuple[float, int, int]]:
    """Scores of the likely spans of one window, with their characters."""
    inside = [at for at, place in enumerate(offsets) if place]
    starts = sorted(inside, key=lambda at: -float(start[at]))[:20]
    ends = sorted(inside, key=lambda at: -float(end[at]))[:20]
    return [
        (float(start[a] + end[b]), offsets[a][0], offsets[b][1]) for a in starts for b in ends if a <= b < a + _LONGEST
    ]
