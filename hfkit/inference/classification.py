"""`classify`: label texts, by the likelihood of each label as an answer, or with a model that has a head for it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin

from hfkit.console import note
from hfkit.corpus.encoding import IGNORED, encode, encode_answers
from hfkit.corpus.labelled import encode_text
from hfkit.corpus.sequences import Collator, pad_rows
from hfkit.corpus.templates import Task, make_task, task_of
from hfkit.errors import ContextLengthError, HfkitError, NotFiniteError, OptionError
from hfkit.inference.batches import forward, group_by_length, pad
from hfkit.inference.likelihood import score
from hfkit.inference.remote import Server
from hfkit.inference.results import Classification
from hfkit.inference.text import Text, check_text, list_texts
from hfkit.models.architecture import check_causal, for_device, head_of
from hfkit.models.loading import LanguageModel, Model, loaded, split_options
from hfkit.options import ServerOptions, TaskOptions

_WINDOW = 128  # texts that are sorted by length together
_TOKENS = {"cpu": 16_384, "cuda": 131_072}  # at a time, of texts with their labels
_SCORED = {"cpu": 2048, "cuda": 16_384}  # likewise, of the labels alone: their logits take the memory
_ZERO_SHOT = "{text}\nThis is about: {label}"  # for labels without a template


# A str is a Sequence[str], too: the overload for one text comes first.
@overload
def classify(
    text: Text, *, model: Model = None, options: TaskOptions | None = None, **overrides: Any
) -> Classification: ...
@overload
def classify(
    text: Sequence[Text], *, model: Model = None, options: TaskOptions | None = None, **overrides: Any
) -> list[Classification]: ...


def classify(
    text: Text | Sequence[Text], *, model: Model = None, options: TaskOptions | None = None, **overrides: Any
) -> Classification | list[Classification]:
    """Label one text, or many.

    Args:
        text: a text, or the columns of a row where the template has several; or a list of such.
        model: a model with a classification head, one that learned a task, or any causal model with `labels`.
        options: every field of it, of `ModelOptions` and of `ServerOptions` is a keyword, too: `labels=["a", "b"]`.

    Returns:
        A `Classification` for a text, a list of them for a list.

    Raises:
        HfkitError: there are no labels, a text does not fit, or the model cannot be loaded.
    """
    model, options, server = split_options(model, overrides, (TaskOptions, options), (ServerOptions, None))
    texts, is_single = list_texts(text, "a text")
    if server.server:
        each = Server(server, model).classify_each(texts, options)
    else:
        each = classify_each(texts, loaded(model, "text", "classification"), options)
    results: list[Classification] = []
    for result in each:
        if isinstance(result, HfkitError):
            raise result if len(texts) == 1 else type(result)(f"text {len(results)}: {result}") from result
        results.append(result)
    return results[0] if is_single else results


def classify_each(
    texts: Iterable[Text | HfkitError], lm: LanguageModel, options: TaskOptions
) -> Iterator[Classification | HfkitError]:
    """As `classify`, in order; in place of a text that cannot be labelled, or was not read, an HfkitError."""
    task = None if head_of(lm.model.config) == "classification" else labelling_task(lm, options)
    if not task and (options.labels or options.template):
        raise OptionError(f"{lm.name} has labels of its own: leave --labels and --template out")
    names = list(task.labels) if task else label_names(lm.model)
    labels = label_ids(task, lm.tokenizer) if task else []
    most, tokens = _batch_size(lm, labels)
    texts, cut = iter(texts), 0
    while window := list(islice(texts, _WINDOW)):
        results: dict[int, Classification | HfkitError] = {}
        shown: dict[int, str] = {}
        prompts: dict[int, list[int]] = {}
        for number, text in enumerate(window):
            try:
                if isinstance(text, HfkitError):
                    raise text
                check_text(text, "a text")
                shown[number] = _shown(text, task)
                if task:
                    prompts[number] = _prompt_ids(lm, task.fill(text), labels)
                else:
                    prompts[number] = encode_text(shown[number], lm.tokenizer, lm.context or 512)
                    if len(prompts[number]) == lm.context:
                        cut += 1
            except HfkitError as error:
                results[number] = error
        for batch in group_by_length({number: len(ids) for number, ids in prompts.items()}, most, tokens):
            rows = [prompts[number] for number in batch]
            shares = label_scores(lm, rows, labels).softmax(-1) if task else _head_probabilities(lm, rows)
            if shares.isnan().any():
                raise NotFiniteError.of(lm.name)
            for number, row in zip(batch, shares.tolist(), strict=True):
                ranked = dict(sorted(zip(names, row, strict=True), key=lambda pair: -pair[1]))
                results[number] = Classification(shown[number], next(iter(ranked)), ranked, lm.name)
        yield from (results[number] for number in range(len(window)))
    if cut:
        note(f"{cut} texts have {lm.context} tokens or more, which {lm.name} takes: their ends are left out")


def _batch_size(lm: LanguageModel, labels: list[list[int]]) -> tuple[int, int]:
    """Most texts, and most tokens of texts, at a time."""
    device = lm.model.device.type
    tokens = for_device(_TOKENS, device)
    if labels:
        return max(1, for_device(_SCORED, device) // sum(map(len, labels))), tokens // len(labels)
    # Without a padding token a head does not see where a text ends: one text at a time.
    return 1 if lm.model.config.pad_token_id is None else _WINDOW, tokens


def _shown(text: Text, task: Task | None) -> str:
    """The text of a row: the columns that decide its label."""
    if isinstance(text, str):
        return text
    if not task and not isinstance(text.get("text"), str):
        raise HfkitError("a model with a head labels the column 'text': rename the column")
    return " ".join(str(text[name]) for name in (task.inputs if task else ["text"]) if name in text)


def labelling_task(lm: LanguageModel, options: TaskOptions) -> Task:
    """The task to label texts with: that of the options, else the model's own.

    Raises:
        HfkitError: there are no labels to choose from, or the model does not continue a text.
    """
    check_causal(lm.name, lm.model.config, "use 'hfkit generate', or choose a causal model")
    learned = task_of(lm.tokenizer)
    task = make_task(options) or learned or Task(_ZERO_SHOT)
    labels = tuple(options.labels or task.labels or (learned.labels if learned else ()))
    if len(labels) < 2:
        raise OptionError(f"{lm.name} has no labels of its own: give --labels, once for each")
    if len(set(labels)) < len(labels) or not all(label.strip() for label in labels):
        raise OptionError(f"--labels are {', '.join(map(repr, labels))}: give each once, and none that is empty")
    return Task(task.template, labels, task.metric)


def label_names(model: Any) -> list[str]:
    """The labels of a model with a head, in the order of its outputs.

    Raises:
        HfkitError: its output is a number instead.
    """
    if model.config.num_labels < 2:
        raise HfkitError(f"{model.name_or_path} gives a number, not labels: use its own library")
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


@torch.inference_mode()
def _head_probabilities(lm: LanguageModel, rows: list[list[int]]) -> torch.Tensor:
    """Probabilities by a classification head, (texts, labels); where several labels may hold, of each by itself."""
    inputs = Collator(lm.model.config.pad_token_id or 0, has_mask=True)([{"input_ids": row} for row in rows])
    output = forward(lm, **inputs)
    logits: torch.Tensor = output.logits.float().cpu()
    several = lm.model.config.problem_type == "multi_label_classification"
    return logits.sigmoid() if several else logits.softmax(-1)


def label_ids(task: Task, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each label as an answer; with its end only where one label is the beginning of another."""
    whole = [task.complete(label) for label in task.labels]
    bare = encode_answers([text.removesuffix(task.end) for text in whole], tokenizer)
    nested = any(short is not long and long[: len(short)] == short for short in bare for long in bare)
    return encode_answers(whole, tokenizer) if nested else bare


def _prompt_ids(lm: LanguageModel, prompt: str, labels: list[list[int]]) -> list[int]:
    ids, longest = encode(prompt, lm.tokenizer, lm.name), max(map(len, labels))
    if lm.context and len(ids) + longest > lm.context:
        raise ContextLengthError(
            f"{len(ids)} tokens of text and {longest} of a label do not fit {lm.name}, which takes {lm.context} "
            "together: shorten the text"
        )
    return ids


@torch.inference_mode()
def label_scores(lm: LanguageModel, rows: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """Log-likelihood of each label as the answer to each prompt, in nats, (rows, labels); all given as token ids.

    A prompt is computed once, whatever the number of labels: they continue from its keys and values. Where a model
    keeps none, or a state besides them, each label is computed with the whole prompt.
    """
    ids, mask = pad(rows)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    first = forward(lm, input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
    start: torch.Tensor = first.logits[:, -1].float().log_softmax(-1).cpu()
    scores = torch.stack([start[:, label[0]] for label in labels], 1)
    if (longest := max(map(len, labels))) == 1:
        return scores
    cache: Any = getattr(first, "cache", None)
    if not _can_repeat(cache):
        return _whole_scores(lm, rows, labels)
    cache.batch_repeat_interleave(len(labels))
    padded, real = (part.repeat(len(rows), 1) for part in pad(labels, left=False))
    places = mask.sum(1).repeat_interleave(len(labels))[:, None] + torch.arange(longest - 1)
    seen = torch.cat([mask.repeat_interleave(len(labels), 0), real[:, :-1]], 1)
    output = forward(lm, input_ids=padded[:, :-1], attention_mask=seen, position_ids=places, cache=cache)
    targets = padded.masked_fill(real == 0, IGNORED)[:, 1:]
    nll, _ = score(output.logits, targets.to(lm.model.device))
    return scores - nll.sum(1).cpu().view(len(rows), len(labels))


def _can_repeat(cache: Any) -> bool:
    """Whether all that a cache holds can be repeated for each label: not so the state of Mamba and its kind."""
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    return bool(layers) and all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers
    )


def _whole_scores(lm: LanguageModel, rows: list[list[int]], labels: list[list[int]]) -> torch.Tensor:
    """As `label_scores`, by a pass over each prompt with each label."""
    pairs = [(row, label) for row in rows for label in labels]
    ids, _ = pad([row + label for row, label in pairs], left=False)  # where no earlier token sees the padding
    following = [[IGNORED] * (len(row) - 1) + label for row, label in pairs]
    targets = pad_rows(following, IGNORED, shape=(len(pairs), ids.shape[1]))
    nll, _ = score(forward(lm, input_ids=ids).logits, targets.to(lm.model.device))
    return -nll.sum(1).cpu().view(len(rows), len(labels))


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: how far the accuracy is from the predicted probability, on average over bins."""
    if not confidence:
        return math.nan
    places = np.minimum((np.array(confidence) * bins).astype(int), bins - 1)
    gaps = np.bincount(places, np.array(confidence) - np.array(right, float))
    return float(np.abs(gaps).sum() / len(confidence))
