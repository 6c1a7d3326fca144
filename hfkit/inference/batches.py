"""Run requests through a model: in batches of similar length, or one by one through transformers' special loops."""

import contextlib
import copy
import ctypes
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hfkit.console import note
from hfkit.errors import HfkitError, NotFiniteError, first_line
from hfkit.inference import graphs
from hfkit.inference.controls import (
    beams,
    endings,
    generate_arguments,
    generation_config,
    is_sampled,
    needs_equal_lengths,
)
from hfkit.inference.decoding import Completion, Rows, StopTexts, complete, decode
from hfkit.inference.text import Request
from hfkit.models.architecture import for_device
from hfkit.models.loading import LanguageModel, load, vocabulary_size
from hfkit.options import GenerateOptions

_ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}
TOKENS_AT_ONCE = {"cpu": 32_768, "cuda": 262_144}  # prompt and new tokens of all rows
_LOGITS_KEPT = 1 << 28  # of all steps of a beam search: 1 GB. Log-probabilities are read from them in the end
# transformers samples with torch's global generator in its loops for beams and speculation, so one of them runs at a
# time. Assistants are changed by it, too: they are loaded here and belong to nobody else.
_special_loops = threading.Lock()
_LOOK = 0.1  # seconds between looks whether a request that waits for its turn is still wanted
# transformers warns of the way in which it calls an assistant itself. No user can change that.
logging.getLogger("transformers.generation.utils").addFilter(
    lambda record: "Passing `generation_config` together" not in record.getMessage()
)


class _NoMemory(HfkitError):
    """The device has too little memory for a batch."""


class _EarlyEnd(StoppingCriteria):
    """Ends all rows at the first step at which `is_over()` is true. transformers then returns what they have."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._is_over(), device=input_ids.device)


def default_size(lm: LanguageModel) -> int:
    """Rows that the model's device is good for at a time."""
    return for_device(_ROWS_AT_ONCE, lm.model.device.type)


def end_compute_threads() -> None:
    """End this thread's OpenMP threads, as it will compute no more for a while and another thread does.

    Each thread that computes has OpenMP threads of its own. While the process has more of them than cores, idle ones
    included, GNU's library lets them sleep between any two operations, which costs some 70 microseconds each time.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a torch without OpenMP
            ctypes.CDLL(torch._C.__file__).omp_pause_resource_all(1)  # 1: omp_pause_soft, of OpenMP 5.0


def pad(rows: Sequence[Sequence[int]], *, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows of tokens, (rows, longest) each.

    A row is padded with its own first token, so that no penalty counts a token that the row does not have.
    """
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left" if left else "right"}
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], **options)
    firsts = torch.tensor([[row[0]] for row in rows])
    return torch.where(mask.bool(), pad_sequence([torch.tensor(row) for row in rows], **options), firsts), mask


def group_by_length(lengths: Mapping[int, int], most: int, tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length, the longest first; each group is a list of row numbers.

    A group has at most `most` rows and, with its padding, at most `tokens` tokens. lengths: tokens by row number.
    """
    numbers = sorted(lengths, key=lambda number: lengths[number], reverse=True)
    while numbers:
        count = max(1, min(most, tokens // lengths[numbers[0]]))
        yield numbers[:count]
        numbers = numbers[count:]


def run_all(
    lm: LanguageModel, requests: Sequence[Request], options: GenerateOptions, size: int, on_done: Callable[[int], None]
) -> list[list[Completion]]:
    """The texts of each request, in order: one, or those of its beam search. `on_done` gets how many a batch gave.

    size: most rows of a batch, of which each beam is one.
    """
    # Rows of a batch share their number of new tokens, so that they end together at the latest.
    lengths: dict[tuple[int, int], dict[int, int]] = {}
    exact = needs_equal_lengths(lm, options)
    for number, request in enumerate(requests):
        shape = request.new_tokens, len(request.ids) if exact else 0
        lengths.setdefault(shape, {})[number] = len(request.ids) + request.new_tokens
    width, tokens = beams(lm, options), for_device(TOKENS_AT_ONCE, lm.model.device.type)
    results: dict[int, list[Completion]] = {}
    for (new_tokens, _), alike in lengths.items():
        most = size // width
        if width > 1:
            most = min(most, _LOGITS_KEPT // kept_logits(lm, options, new_tokens))
        for batch in group_by_length(alike, max(1, most), tokens // width):
            texts = _run_smaller(lm, [requests[number] for number in batch], options)
            results |= dict(zip(batch, texts, strict=True))
            on_done(sum(map(len, texts)))
    return [results[number] for number in range(len(requests))]


def _run_smaller(lm: LanguageModel, requests: list[Request], options: GenerateOptions) -> list[list[Completion]]:
    """Run a batch; where the device's memory is too small for it, in halves."""
    try:
        if beams(lm, options) > 1:
            return run_special(lm, requests, options)
        return [[completion] for completion in run_batch(lm, requests, options)]
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
    arguments: dict[str, Any] = {"custom_generate": decode, "rows": rows}
    if graphs.suits(lm, requests[0].new_tokens) and config.use_cache is not False:
        columns = max(len(request.ids) for request in requests) + requests[0].new_tokens
        arguments["cache"] = graphs.FixedCache(lm, columns)
    _call(lm, requests, options, config, **arguments)
    return rows.results()


def new_rows(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> Rows:
    """The state of a batch. on_text: called with the text of a single row as it comes."""
    seeds = [request.seed or 0 for request in requests] if is_sampled(lm, options) else None
    contexts = [_context(lm, request) for request in requests]
    return Rows(lm.tokenizer, contexts, endings(lm, options), seeds=seeds, on_text=on_text)


def kept_logits(lm: LanguageModel, options: GenerateOptions, new_tokens: int) -> int:
    """Numbers that a beam search keeps for each prompt: the logits of all its beams at all steps."""
    return beams(lm, options) * new_tokens * vocabulary_size(lm.model)


def run_special(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    is_over: Callable[[], bool] = lambda: False,
) -> list[list[Completion]]:
    """Beam search and speculation, in transformers' own loops and with torch's global random numbers.

    requests: one, or, if these options are batchable, several with the same number of new tokens. is_over: asked at
    every step; once it is true, the texts end with what they have, which is nothing before their turn.
    """
    request = requests[0]
    config = generation_config(lm, options, request.new_tokens)
    config.return_dict_in_generate = config.output_logits = True
    config.num_return_sequences = count = options.num_return_sequences or 1
    contexts, ends = [_context(lm, request) for request in requests], endings(lm, options)
    start = _start(lm, max(len(request.ids) for request in requests))
    stops: list[StoppingCriteria] = [_EarlyEnd(is_over)]
    if ends.strings:
        stops.append(StopTexts(lm.tokenizer, contexts[0], start, ends.strings))
    while not _special_loops.acquire(timeout=_LOOK):
        if is_over():
            return [[Completion("", "length", [], 0.0)] * count for _ in requests]
    try:
        with torch.random.fork_rng([lm.model.device] if lm.model.device.type == "cuda" else []):
            torch.manual_seed(request.seed or 0)
            arguments = _assistant_arguments(lm, options, start + request.new_tokens)
            arguments |= {"tokenizer": lm.tokenizer, "stopping_criteria": StoppingCriteriaList(stops)}
            output = _call(lm, requests, options, config, **arguments)
    finally:
        _special_loops.release()
    model: Any = lm.model
    scores = model.compute_transition_scores(
        output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
    )
    rows = zip(output.sequences[:, start:].tolist(), scores.double().cpu(), strict=True)
    completions = [
        complete(lm.tokenizer, contexts[row // count], tokens, ends, nats) for row, (tokens, nats) in enumerate(rows)
    ]
    return [completions[first : first + count] for first in range(0, len(completions), count)]


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


def _call(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    config: GenerationConfig,
    **arguments: Any,
) -> Any:
    """`model.generate` on a padded batch. Errors of transformers and torch become one sentence."""
    # A prompt that is continued is padded on the left, an encoder's on the right: its positions count from there.
    ids, mask = pad([request.ids for request in requests], left=not lm.model.config.is_encoder_decoder)
    arguments |= {"input_ids": ids.to(lm.model.device), "attention_mask": mask.to(lm.model.device)}
    # A copy, so that transformers does not fill what is None in `config` from the model's own one. The wrapper of
    # torch.compile would set the attribute on the model inside it.
    model: Any = copy.copy(getattr(lm.model, "_orig_mod", lm.model))
    model.generation_config = config
    arguments |= generate_arguments(lm, options, len(requests), _start(lm, ids.shape[1]))
    try:
        return model.generate(generation_config=config, **arguments)
    except (ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            hint = "lower --max-new-tokens, or use a smaller model or --quantize int8"
            raise _NoMemory(f"out of memory: {hint}") from error
        if "probability tensor" in str(error):
            raise NotFiniteError.of(lm.name) from error
        if isinstance(error, IndexError) and options.assistant_model:
            raise _too_long_for(options.assistant_model) from error
        if isinstance(error, ValueError):
            raise HfkitError(f"these options cannot be used together: {first_line(error)}") from error
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


def forward(lm: LanguageModel, **inputs: Any) -> Any:
    """Call the model, with inputs on its device and without `position_ids` or `logits_to_keep` where it takes none."""
    known, device = inspect.signature(lm.model.forward).parameters, lm.model.device
    for name in {"position_ids", "logits_to_keep"} - set(known):
        inputs.pop(name, None)
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return lm.model(**inputs)
