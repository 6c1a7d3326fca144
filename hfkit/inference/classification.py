"""`classify`: label texts, by the likelihood of each label as an answer, or with a model that has a head for it."""

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hfkit.console import note
from hfkit.corpus.encoding import encode, encode_answers
from hfkit.corpus.labelled import encode_text
from hfkit.corpus.sequences import HeadCollator, group
from hfkit.corpus.templates import Task, make_task, task_of
from hfkit.errors import HfkitError, OptionError
from hfkit.models.architecture import head_of
from hfkit.models.loading import LanguageModel, loaded
from hfkit.options import ModelOptions, TaskOptions

_WINDOW = 128  # texts that are sorted by length together
_TOKENS = {"cpu": 16_384, "cuda": 131_072}  # at a time, of texts with the labels behind each
_SCORED = {"cpu": 2048, "cuda": 16_384}  # likewise, of the labels alone: their logits are what takes memory
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
    found = []
    for one in classify_each(many, lm, options):
        if isinstance(one, HfkitError):
            raise one if len(many) == 1 else type(one)(f"text {len(found)}: {one}") from one
        found.append(one)
    return found[0] if isinstance(text, str | Mapping) else found


def classify_each(
    texts: Iterable[str | Mapping[str, Any] | HfkitError], lm: LanguageModel, options: TaskOptions
) -> Iterator[Classification | HfkitError]:
    """As `classify`, in order; in place of a text that cannot be labelled, or was not read, an HfkitError."""
    task = None if head_of(lm.model.config) == "classification" else labelling_task(lm, options)
    if not task and (options.labels or options.template):
        raise OptionError(f"{lm.name} has labels of its own: leave --labels and --template out")
    names = list(task.labels) if task else label_names(lm.model)
    labels = _label_ids(lm, task) if task else []
    device = lm.model.device.type
    tokens = _TOKENS.get(device, _TOKENS["cpu"]) // (len(labels) or 1)
    most = _SCORED.get(device, _SCORED["cpu"]) // sum(map(len, labels)) if task else _WINDOW
    # Without a token for it, a head does not see where the padding begins.
    tokens = 1 if not task and lm.model.config.pad_token_id is None else tokens
    texts, long = iter(texts), 0
    while window := list(islice(texts, _WINDOW)):
        found: dict[int, Any] = {}
        items = []
        for number, given in enumerate(window):
            try:
                if isinstance(given, HfkitError):
                    raise given
                found[number] = _shown(given, task)
                ids = _prompt_ids(lm, task.fill(given), labels) if task else _text_ids(lm, found[number])
                long += not task and len(ids) == lm.context
                items.append({"input_ids": ids, "number": number})
            except HfkitError as error:
                found[number] = error
        for some in _batches(items, tokens, max(1, most)):
            rows = [item["input_ids"] for item in some]
            scores = label_scores(lm, rows, labels).softmax(-1) if task else _head_probabilities(lm, rows)
            if scores.isnan().any():
                raise HfkitError(f"{lm.name} gives values that are not numbers: try --dtype float32")
            for item, row in zip(some, scores.tolist(), strict=True):
                order = sorted(range(len(names)), key=lambda index, row=row: -row[index])
                shares = {names[index]: row[index] for index in order}
                found[item["number"]] = Classification(found[item["number"]], names[order[0]], shares, lm.name)
        yield from (found[number] for number in range(len(window)))
    if long:
        note(f"{long} texts have {lm.context} tokens or more, which {lm.name} takes: their ends are left out")


def _batches(items: list[dict[str, Any]], tokens: int, most: int) -> Iterator[list[dict[str, Any]]]:
    """Items of like length, at most so many tokens and items together."""
    for some in group(sorted(items, key=lambda item: len(item["input_ids"])), tokens):
        yield from (some[at : at + most] for at in range(0, len(some), most))


def _shown(given: str | Mapping[str, Any], task: Task | None) -> str:
    """The text of a row: its columns that are looked at."""
    if isinstance(given, str):
        return given
    if not task and not isinstance(given.get("text"), str):
        raise HfkitError("a model with a head labels the column 'text': rename the column")
    return " ".join(str(given[name]) for name in (task.inputs if task else ["text"]) if name in given)


def labelling_task(lm: LanguageModel, options: TaskOptions) -> Task:
    """The task to label texts with: as asked for, else the model's own.

    Raises:
        HfkitError: there are no labels to choose from, or the model is none that goes on with a text.
    """
    if lm.model.config.is_encoder_decoder:
        raise HfkitError(f"{lm.name} has an encoder: use 'hfkit generate', or choose a causal model")
    own = task_of(lm.tokenizer)
    task = make_task(options) or own or Task(_ZERO_SHOT)
    labels = tuple(options.labels or task.labels or (own.labels if own else ()))
    if len(labels) < 2:
        raise OptionError(f"{lm.name} has no labels of its own: give --labels, once for each")
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise OptionError(f"--labels are {', '.join(map(repr, labels))}: give each once, and none that is empty")
    return Task(task.template, labels, task.metric)


def label_names(model: Any) -> list[str]:
    """The labels of a model with a head, in the order of its outputs.

    Raises:
        HfkitError: it gives a number instead.
    """
    if model.config.num_labels < 2:
        raise HfkitError(f"{model.name_or_path} gives a number, not labels: use its own library")
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def _text_ids(lm: LanguageModel, text: str) -> list[int]:
    return encode_text(text, lm.tokenizer, lm.context or 512)


@torch.inference_mode()
def _head_probabilities(lm: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    """What a classification head makes of texts, (texts, labels); where several labels may hold, of each alone."""
    inputs = HeadCollator(lm.model.config.pad_token_id or 0)([{"input_ids": row} for row in rows])
    logits = lm.model(**{name: tensor.to(lm.model.device) for name, tensor in inputs.items()}).logits.float().cpu()
    several = lm.model.config.problem_type == "multi_label_classification"
    return logits.sigmoid() if several else logits.softmax(-1)


def _label_ids(lm: LanguageModel, task: Task) -> list[list[int]]:
    """The tokens of each label as an answer; with what ends it only where one label begins another."""
    whole = [task.complete(label) for label in task.labels]
    bare = encode_answers([text.removesuffix(task.end) for text in whole], lm.tokenizer)
    nested = any(one is not other and other[: len(one)] == one for one in bare for other in bare)
    return encode_answers(whole, lm.tokenizer) if nested else bare


def _prompt_ids(lm: LanguageModel, prompt: str, labels: list[list[int]]) -> list[int]:
    ids, longest = encode(prompt, lm.tokenizer, lm.name), max(map(len, labels))
    if lm.context and len(ids) + longest > lm.context:
        raise HfkitError(
            f"{len(ids)} tokens of text and {longest} of a label do not fit {lm.name}, which takes {lm.context} "
            "together: shorten the text"
        )
    return ids


@torch.inference_mode()
def label_scores(lm: LanguageModel, rows: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Log-likelihood of each label as the answer to each prompt, in nats, (rows, labels); all given as token ids.

    A prompt is computed once, whatever the number of labels: these go on from its keys and values.
    """
    width, longest = max(map(len, rows)), max(map(len, labels))
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    first = _forward(lm, input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    start = first.logits[:, -1].float().log_softmax(-1).cpu()
    scores = torch.stack([start[:, label[0]] for label in labels], 1)
    if longest == 1:
        return scores
    cache = first.cache
    cache.batch_repeat_interleave(len(labels))
    padded = torch.tensor([label + [0] * (longest - len(label)) for label in labels]).repeat(len(rows), 1)
    real = torch.tensor([[1] * len(label) + [0] * (longest - len(label)) for label in labels]).repeat(len(rows), 1)
    places = mask.sum(1).repeat_interleave(len(labels))[:, None] + torch.arange(longest - 1)
    seen = torch.cat([mask.repeat_interleave(len(labels), 0), real[:, :-1]], 1)
    output = _forward(lm, input_ids=padded[:, :-1], attention_mask=seen, position_ids=places, cache=cache)
    logits, targets = output.logits.float(), padded[:, 1:, None].to(output.logits.device)
    following = (logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)).cpu()
    return scores + (following * real[:, 1:]).sum(1).view(len(rows), len(labels))


def _forward(lm: LanguageModel, **inputs: Any) -> Any:
    """The model's outputs; not all models know of positions, or of logits that are not wanted."""
    known = inspect.signature(lm.model.forward).parameters
    device = lm.model.device
    return lm.model(**{
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
        if name in known or name not in ("position_ids", "logits_to_keep")
    })  # fmt: skip


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
