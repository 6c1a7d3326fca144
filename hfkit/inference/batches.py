"""A prompt as the token ids that a model is given, once it is sure that they fit it."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from hfkit.console import note, quiet_libraries
from hfkit.corpus.encoding import encode, language_token
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError
from hfkit.inference.controls import counts_ngrams, draws, end_tokens, generate_arguments, generation_config, stops
from hfkit.inference.decoding import Completion, Rows, StopTexts, complete, decode
from hfkit.models.architecture import context_length
from hfkit.models.loading import LanguageModel
from hfkit.options import GenerateOptions

_NEW_TOKENS = 100
Prompt = str | Mapping[str, Any] | Sequence[int]  # a row where the model's task has several fields


@dataclass(frozen=True)
class Request:
    """A prompt that fits the model."""

    prompt: str | Mapping[str, Any]
    ids: list[int]
    new_tokens: int  # most that may be generated
    seed: int | None = None


def fit_prompt(
    prompt: Prompt, options: GenerateOptions, tokenizer: PreTrainedTokenizerBase, config: Any, name: str
) -> Request:
    """Encode `prompt` and see that it fits a model of this `config`; needs no weights.

    Raises:
        HfkitError: prompt and new tokens are more than the model takes; the message has the numbers.
    """
    if isinstance(prompt, str | Mapping):
        text: str | Mapping[str, Any] = prompt
        task = None if options.raw else task_of(tokenizer)
        if isinstance(prompt, Mapping) and not task:
            raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
        if options.src_lang:
            language_token(tokenizer, options.src_lang)
            tokenizer.src_lang = options.src_lang
        ids = encode(task.fill(prompt) if task else str(prompt), tokenizer, name)
    else:
        text, ids = tokenizer.decode(prompt), list(prompt)
    limit, wanted = context_length(config) or sys.maxsize, options.max_new_tokens
    if config.is_encoder_decoder:  # prompt and output have a context each
        if options.truncate:
            ids = ids[-limit:]
        if len(ids) > limit:
            raise HfkitError(f"the text has {len(ids)} tokens, {name} takes {limit}: shorten it, or --truncate")
        if wanted and wanted > limit:
            raise HfkitError(f"{name} writes at most {limit} tokens: lower --max-new-tokens ({wanted})")
        # A translation ends by itself, and is about as long as the text.
        return Request(text, ids, wanted or min(max(_NEW_TOKENS, 2 * len(ids)), limit))
    if options.truncate:
        ids = _end(ids, limit - (wanted or min(_NEW_TOKENS, limit // 2)), tokenizer.bos_token_id)
    room = limit - len(ids)
    if room < (wanted or 1):
        new = f"{wanted} new ones" if wanted else "a new one"
        raise HfkitError(
            f"{len(ids)} tokens of prompt and {new} do not fit {name}, which takes {limit} together: "
            "shorten the prompt, lower --max-new-tokens, or --truncate"
        )
    return Request(text, ids, wanted or min(_NEW_TOKENS, room))


def _end(ids: list[int], room: int, bos: int | None) -> list[int]:
    """The last `room` of `ids`, behind the token that begins a text if they have it."""
    if len(ids) <= room or room < 1:
        return ids
    return [bos, *ids[len(ids) - room + 1 :]] if ids[0] == bos and room > 1 else ids[-room:]


_ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}
_TOKENS_AT_ONCE = {"cpu": 32_768, "cuda": 262_144}  # prompt and new tokens of all rows


class _NoMemory(HfkitError):
    """The device has too little memory for a batch."""


def default_size(lm: LanguageModel) -> int:
    """Rows that the model's device is good for at a time."""
    return _ROWS_AT_ONCE.get(lm.model.device.type, 64)


def run_all(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    size: int,
    on_done: Callable[[int], None],
) -> list[Completion]:
    """What comes of each request, in batches of at most `size` rows; `on_done` is told the size of each."""
    found: dict[int, Completion] = {}
    for batch in _batches(lm, requests, options, size):
        completions = _run_smaller(lm, [requests[index] for index in batch], options)
        found |= dict(zip(batch, completions, strict=True))
        on_done(len(batch))
    return [found[index] for index in range(len(requests))]


def _batches(
    lm: LanguageModel, requests: Sequence[Request], options: GenerateOptions, size: int
) -> Iterator[list[int]]:
    """Indices of requests of like length, at most `size` and the device's number of tokens together."""
    tokens, exact = _TOKENS_AT_ONCE.get(lm.model.device.type, 32_768), counts_ngrams(lm, options)

    def shape(index: int) -> tuple[int, int]:
        return requests[index].new_tokens, len(requests[index].ids)

    order = sorted(range(len(requests)), key=shape, reverse=True)
    # Rows of a batch end together at the latest, so they share their number of new tokens.
    for (new, _), group in groupby(order, lambda index: shape(index) if exact else (shape(index)[0], 0)):
        alike = list(group)
        while alike:
            count = max(1, min(size, tokens // (shape(alike[0])[1] + new)))
            yield alike[:count]
            alike = alike[count:]


def _run_smaller(lm: LanguageModel, requests: list[Request], options: GenerateOptions) -> list[Completion]:
    """Run a batch; where the device's memory is too small for it, in halves."""
    try:
        return run_batch(lm, requests, options)
    except _NoMemory:
        if len(requests) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(requests) // 2
    note(f"out of memory with {len(requests)} texts at a time: going on with {half}")
    return _run_smaller(lm, requests[:half], options) + _run_smaller(lm, requests[half:], options)


def run_batch(
    lm: LanguageModel, requests: Sequence[Request], options: GenerateOptions, rows: Rows | None = None
) -> list[Completion]:
    """Run one batch; its requests have the same number of new tokens."""
    rows = rows or new_rows(lm, requests, options)
    config = generation_config(lm, options, requests[0].new_tokens)
    _call(lm, requests, options, config, custom_generate=decode, rows=rows)
    return _checked(lm, rows.results())


def new_rows(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> Rows:
    """The state of a batch; on_text: told the text of a single row as it comes."""
    seeds = [request.seed or 0 for request in requests] if draws(lm, options) else None
    contexts = [_context(lm, request) for request in requests]
    return Rows(lm.tokenizer, contexts, seeds=seeds, eos=end_tokens(lm), stops=stops(lm, options), on_text=on_text)


def run_special(lm: LanguageModel, request: Request, options: GenerateOptions) -> list[Completion]:
    """Beam search and speculation, in transformers' own loops and with its global random numbers."""
    config = generation_config(lm, options, request.new_tokens)
    config.return_dict_in_generate = config.output_logits = True
    config.num_return_sequences = options.num_return_sequences or 1
    context, ends = _context(lm, request), stops(lm, options)
    # The output of a model with an encoder begins with its start token.
    start = 1 if lm.model.config.is_encoder_decoder else len(request.ids)
    criteria = StoppingCriteriaList([StopTexts(lm.tokenizer, context, start, ends)] if ends else [])
    with torch.random.fork_rng([lm.model.device] if lm.model.device.type == "cuda" else []):
        torch.manual_seed(request.seed or 0)
        output = _call(lm, [request], options, config, tokenizer=lm.tokenizer, stopping_criteria=criteria)
    beams = getattr(output, "beam_indices", None)
    scores = lm.model.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)
    completions = [
        complete(lm.tokenizer, context, tokens[start:], end_tokens(lm), ends, logprobs)
        for tokens, logprobs in zip(output.sequences.tolist(), scores.double().cpu(), strict=True)
    ]
    return _checked(lm, completions)


def _context(lm: LanguageModel, request: Request) -> list[int]:
    """The tokens that the completion goes on from: none for a model with an encoder."""
    return [] if lm.model.config.is_encoder_decoder else request.ids


def _checked(lm: LanguageModel, completions: list[Completion]) -> list[Completion]:
    if any(math.isnan(completion.logprob) for completion in completions):
        raise _nonsense(lm)
    return completions


def _nonsense(lm: LanguageModel) -> HfkitError:
    """As half precision gives it where a value is too large."""
    return HfkitError(f"{lm.name} gives values that are not numbers: try --dtype float32")


def _call(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    config: GenerationConfig,
    **arguments: Any,
) -> Any:
    """`model.generate` on a padded batch, with its complaints as HfkitErrors."""
    width = max(len(request.ids) for request in requests)
    # Left of a prompt that is to go on; right for an encoder, whose positions count from the first token.
    right = lm.model.config.is_encoder_decoder
    ids, mask = [], []
    for request in requests:
        gap, ones = width - len(request.ids), [1] * len(request.ids)
        padding = request.ids[:1] * gap  # of its own, so that no penalty hits another token
        ids.append(request.ids + padding if right else padding + request.ids)
        mask.append(ones + [0] * gap if right else [0] * gap + ones)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    arguments |= {name: tensor.to(lm.model.device) for name, tensor in inputs.items()}
    try:
        arguments |= generate_arguments(lm, options, len(requests), width + config.max_new_tokens)
        with quiet_libraries():
            return lm.model.generate(generation_config=config, **arguments)
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise _NoMemory(
                "out of memory: lower --max-new-tokens, or use a smaller model or --quantize int8"
            ) from error
        if "probability tensor" in str(error):
            raise _nonsense(lm) from error
        if isinstance(error, IndexError) and options.assistant_model:
            hint = "lower --max-new-tokens, or leave it out"
            raise HfkitError(f"the text does not fit {options.assistant_model}: {hint}") from error
        if isinstance(error, ValueError):
            raise HfkitError(f"these options cannot be used together: {str(error).splitlines()[0]}") from error
        raise
