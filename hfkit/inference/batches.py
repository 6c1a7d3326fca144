"""Run requests through a model: in batches of like length, by the plain loop or by transformers' others."""

import contextlib
import copy
import functools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from hfkit.console import note
from hfkit.errors import HfkitError, NotFiniteError
from hfkit.inference.controls import draws, endings, generate_arguments, generation_config, needs_equal_lengths
from hfkit.inference.decoding import Completion, Rows, StopTexts, complete, decode
from hfkit.inference.prompts import Request
from hfkit.models.loading import LanguageModel, load
from hfkit.options import GenerateOptions

_ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}
_TOKENS_AT_ONCE = {"cpu": 32_768, "cuda": 262_144}  # prompt and new tokens of all rows
# transformers samples with torch's global generator in its loops for beams and speculation, so one of them runs at a
# time. Assistants are changed by it, too: they are loaded here and belong to nobody else.
_special_loops = threading.Lock()
# What transformers says about the way in which it calls an assistant itself is nothing that a user could change.
logging.getLogger("transformers.generation.utils").addFilter(
    lambda record: "Passing `generation_config` together" not in record.getMessage()
)


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
    """The result of each request, in batches of at most `size` rows. `on_done` is called with the size of each."""
    results: dict[int, Completion] = {}
    for batch in _batches(lm, requests, options, size):
        completions = _run_smaller(lm, [requests[index] for index in batch], options)
        results |= dict(zip(batch, completions, strict=True))
        on_done(len(batch))
    return [results[index] for index in range(len(requests))]


def _batches(
    lm: LanguageModel, requests: Sequence[Request], options: GenerateOptions, size: int
) -> Iterator[list[int]]:
    """Indices of requests of like length, at most `size` and the device's number of tokens together."""
    tokens, exact = _TOKENS_AT_ONCE.get(lm.model.device.type, 32_768), needs_equal_lengths(lm, options)

    def shape(index: int) -> tuple[int, int]:
        return requests[index].new_tokens, len(requests[index].ids)

    order = sorted(range(len(requests)), key=shape, reverse=True)
    # Rows of a batch share their number of new tokens, so that they end together at the latest.
    for (new, _), group in groupby(order, lambda index: shape(index) if exact else (shape(index)[0], 0)):
        indices = list(group)
        while indices:
            count = max(1, min(size, tokens // (shape(indices[0])[1] + new)))
            yield indices[:count]
            indices = indices[count:]


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
    return _check_finite(lm, rows.results())


def new_rows(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> Rows:
    """The state of a batch. on_text: called with the text of a single row as it comes."""
    seeds = [request.seed or 0 for request in requests] if draws(lm, options) else None
    contexts, ends = [_context(lm, request) for request in requests], endings(lm, options)
    return Rows(lm.tokenizer, contexts, seeds=seeds, eos=ends.tokens, stops=ends.strings, on_text=on_text)


def run_special(lm: LanguageModel, request: Request, options: GenerateOptions) -> list[Completion]:
    """Beam search and speculation, in transformers' own loops and with torch's global random numbers."""
    config = generation_config(lm, options, request.new_tokens)
    config.return_dict_in_generate = config.output_logits = True
    config.num_return_sequences = options.num_return_sequences or 1
    context, ends, start = _context(lm, request), endings(lm, options), _start(lm, len(request.ids))
    criteria = [StopTexts(lm.tokenizer, context, start, ends.strings)] if ends.strings else []
    with _special_loops, torch.random.fork_rng([lm.model.device] if lm.model.device.type == "cuda" else []):
        torch.manual_seed(request.seed or 0)
        assistant = _assistant_arguments(lm, options, start + request.new_tokens)
        arguments = {"tokenizer": lm.tokenizer, "stopping_criteria": StoppingCriteriaList(criteria), **assistant}
        output = _call(lm, [request], options, config, **arguments)
    beams = getattr(output, "beam_indices", None)
    model: Any = lm.model
    scores = model.compute_transition_scores(output.sequences, output.logits, beams, normalize_logits=True)
    completions = [
        complete(lm.tokenizer, context, tokens[start:], ends.tokens, ends.strings, logprobs)
        for tokens, logprobs in zip(output.sequences.tolist(), scores.double().cpu(), strict=True)
    ]
    return _check_finite(lm, completions)


def _assistant_arguments(lm: LanguageModel, options: GenerateOptions, length: int) -> dict[str, Any]:
    """What `generate` takes for an assistant, to write texts of `length` tokens."""
    if not options.assistant_model:
        return {}
    model, tokenizer = assistant = _assistant(options.assistant_model, str(lm.model.device), str(lm.model.dtype))
    if assistant.context and assistant.context < length:
        raise _too_long_for(options.assistant_model)
    if options.num_assistant_tokens:  # transformers takes it from the assistant's config
        model = copy.copy(model)
        model.generation_config = copy.copy(model.generation_config)
        model.generation_config.num_assistant_tokens = options.num_assistant_tokens
    shared = tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    return {"assistant_model": model} | ({} if shared else {"assistant_tokenizer": tokenizer})


@functools.lru_cache(maxsize=1)
def _assistant(name: str, device: str, dtype: str) -> LanguageModel:
    return load(name, device=device, dtype=dtype.removeprefix("torch."))


def _too_long_for(assistant: str) -> HfkitError:
    return HfkitError(f"the text does not fit {assistant}: lower --max-new-tokens, or leave it out")


def _context(lm: LanguageModel, request: Request) -> list[int]:
    """The tokens that the completion continues: none for a model with an encoder."""
    return [] if lm.model.config.is_encoder_decoder else request.ids


def _start(lm: LanguageModel, width: int) -> int:
    """Position of the first new token; the output of a model with an encoder begins with its start token."""
    return 1 if lm.model.config.is_encoder_decoder else width


def _check_finite(lm: LanguageModel, completions: list[Completion]) -> list[Completion]:
    if any(math.isnan(completion.logprob) for completion in completions):
        raise NotFiniteError.of(lm.name)
    return completions


def _call(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    config: GenerationConfig,
    **arguments: Any,
) -> Any:
    """`model.generate` on a padded batch, with its complaints as HfkitErrors."""
    width = max(len(request.ids) for request in requests)
    ids, mask = [], []
    for request in requests:
        gap, ones = width - len(request.ids), [1] * len(request.ids)
        padding = request.ids[:1] * gap  # the row's own token, so that no penalty hits another one
        # A prompt that is continued is padded on the left, an encoder's on the right: its positions count from there.
        right = lm.model.config.is_encoder_decoder
        ids.append(request.ids + padding if right else padding + request.ids)
        mask.append(ones + [0] * gap if right else [0] * gap + ones)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    # A copy, so that transformers does not fill what is None in `config` from the model's own one. What torch.compile
    # returns would pass the attribute on.
    model: Any = copy.copy(getattr(lm.model, "_orig_mod", lm.model))
    model.generation_config = config
    with _errors(lm, options):
        arguments |= {name: tensor.to(lm.model.device) for name, tensor in inputs.items()}
        arguments |= generate_arguments(lm, options, len(requests), _start(lm, width))
        return model.generate(generation_config=config, **arguments)


@contextlib.contextmanager
def _errors(lm: LanguageModel, options: GenerateOptions) -> Iterator[None]:
    """What transformers and torch raise while they generate, as one sentence each."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            hint = "lower --max-new-tokens, or use a smaller model or --quantize int8"
            raise _NoMemory(f"out of memory: {hint}") from error
        if "probability tensor" in str(error):
            raise NotFiniteError.of(lm.name) from error
        if isinstance(error, IndexError) and options.assistant_model:
            raise _too_long_for(options.assistant_model) from error
        if isinstance(error, ValueError):
            raise HfkitError(f"these options cannot be used together: {str(error).splitlines()[0]}") from error
        raise


def logits_processors(lm: LanguageModel, request: Request, options: GenerateOptions) -> LogitsProcessorList:
    """What `run_batch` would apply to the scores of a request that is alone, for a loop that runs elsewhere."""
    processors = LogitsProcessorList()

    def keep(
        model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, *_: Any, **arguments: Any
    ) -> torch.Tensor:
        processors.extend(logits_processor)
        return input_ids

    _call(lm, [request], options, generation_config(lm, options, request.new_tokens), custom_generate=keep)
    return processors
