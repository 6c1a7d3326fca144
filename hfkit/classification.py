"""`classify`: label texts, by the likelihood of each label as an answer, or with a model that has a head for it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hfkit.encoding import encode
from hfkit.errors import HfkitError, OptionError
from hfkit.generation import loaded
from hfkit.models import LanguageModel, head_of
from hfkit.options import ModelOptions, TaskOptions
from hfkit.tasks import Task, make_task, task_of

_BATCH = 32  # texts at a time
_ZERO_SHOT = "{text}\nThis is about: {label}"  # for labels without a template


@dataclass(frozen=True)
class Classification:
    """A text's label; `str()` is the label."""

    text: str
    label: str
    probabilities: dict[str, float]  # of every label, likeliest first
    model: str

    def __str__(self) -> str:
        return self.label

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return dict(vars(self))


def classify(
    text: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    model: str | ModelOptions | LanguageModel | None = None,
    options: TaskOptions | None = None,
    **overrides: Any,
) -> Any:
    """Label one text, or many.

    Args:
        text: a text, or the columns of a row where the template has several; or a list of such.
        model: a model with a classification head, one that learned a task, or any causal model with `labels`.
        options: every field of `TaskOptions` is a keyword, too: `labels=["good", "bad"]`.

    Returns:
        A `Classification` for a text, a list of them for a list.

    Raises:
        HfkitError: there are no labels, a text does not fit, or the model cannot be loaded.
    """
    options = TaskOptions.make(options, overrides)
    lm = loaded(model, "text", "classification")
    many = [text] if isinstance(text, str | Mapping) else list(text)
    found = list(classify_each(many, lm, options))
    return found[0] if isinstance(text, str | Mapping) else found


def classify_each(
    texts: Iterable[str | Mapping[str, Any]], lm: LanguageModel, options: TaskOptions
) -> Iterator[Classification]:
    """As `classify`, batch by batch; the results come in order."""
    task = None if head_of(lm.model.config) == "classification" else labelling_task(lm, options)
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        if task is None:
            labels, scores = label_names(lm.model), _head_scores(lm, [_only_text(text) for text in batch])
        else:
            labels, scores = list(task.labels), label_scores(lm, [task.fill(text) for text in batch], task)
        for text, row in zip(batch, scores.softmax(-1).tolist(), strict=True):
            order = sorted(range(len(labels)), key=lambda index: -row[index])
            probabilities = {labels[index]: row[index] for index in order}
            shown = text if isinstance(text, str) else " ".join(str(value) for value in text.values())
            yield Classification(shown, labels[order[0]], probabilities, lm.name)


def _only_text(given: str | Mapping[str, Any]) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given.get("text"), str):
        raise HfkitError("a model with a head labels the column 'text': rename the column")
    return given["text"]


def labelling_task(lm: LanguageModel, options: TaskOptions) -> Task:
    """The task to label texts with: as asked for, else the model's own.

    Raises:
        OptionError: there are no labels to choose from.
    """
    own = task_of(lm.tokenizer)
    task = make_task(options) or own or Task(_ZERO_SHOT)
    labels = tuple(options.labels or task.labels or (own.labels if own else ()))
    if len(labels) < 2:
        raise OptionError(f"{lm.name} has no labels of its own: give --labels, once for each")
    return Task(task.template, labels, task.metric)


def label_names(model: Any) -> list[str]:
    """The labels of a model with a head, in the order of its outputs."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


@torch.inference_mode()
def _head_scores(lm: LanguageModel, texts: list[str]) -> torch.Tensor:
    """Logits of a classification head, (texts, labels)."""
    encoded = lm.tokenizer(texts, padding=True, truncation=True, max_length=lm.context, return_tensors="pt")
    return lm.model(**encoded.to(lm.model.device)).logits.float().cpu()


@torch.inference_mode()
def label_scores(lm: LanguageModel, prompts: Sequence[str], task: Task) -> torch.Tensor:
    """Log-likelihood of each label as the answer to each prompt, in nats, (prompts, labels).

    A prompt is computed once, whatever the number of labels: these go on from its keys and values.
    """
    model, tokenizer = lm.model, lm.tokenizer
    rows = [encode(prompt, tokenizer, lm.name) for prompt in prompts]
    labels = [tokenizer(task.complete(label).removesuffix(task.end), add_special_tokens=False)["input_ids"]
              for label in task.labels]  # fmt: skip
    width, longest = max(map(len, rows)), max(map(len, labels))
    if lm.context and width + longest > lm.context:
        raise HfkitError(f"a text of {width} tokens and its label do not fit {lm.name}, which takes {lm.context}")
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    first = model(
        input_ids=ids.to(device), attention_mask=mask.to(device), position_ids=places.to(device), use_cache=True,
        logits_to_keep=1,
    )  # fmt: skip
    start = first.logits[:, -1].float().log_softmax(-1)
    scores = torch.stack([start[:, label[0]] for label in labels], 1)
    if longest == 1:
        return scores.cpu()
    cache = first.past_key_values
    cache.batch_repeat_interleave(len(labels))
    padded = torch.tensor([label + [0] * (longest - len(label)) for label in labels]).repeat(len(rows), 1)
    real = torch.tensor([[1] * len(label) + [0] * (longest - len(label)) for label in labels]).repeat(len(rows), 1)
    output = model(
        input_ids=padded[:, :-1].to(device),
        attention_mask=torch.cat([mask.repeat_interleave(len(labels), 0), real[:, :-1]], 1).to(device),
        position_ids=(mask.sum(1).repeat_interleave(len(labels))[:, None] + torch.arange(longest - 1)).to(device),
        cache=cache,
    )  # fmt: skip
    following = output.logits.float().log_softmax(-1).gather(-1, padded[:, 1:, None].to(device)).squeeze(-1)
    rest = (following.cpu() * real[:, 1:]).sum(1)
    return scores.cpu() + rest.view(len(rows), len(labels))


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: how far the accuracy is from the probability that was claimed, on average."""
    if not confidence:
        return math.nan
    error = 0.0
    for number in range(bins):
        inside = [i for i, claimed in enumerate(confidence) if min(int(claimed * bins), bins - 1) == number]
        if inside:
            claimed = sum(confidence[i] for i in inside) / len(inside)
            accuracy = sum(right[i] for i in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(claimed - accuracy)
    return error
