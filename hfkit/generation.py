"""Continue prompts: `generate` for one or many, `stream` for text as it comes."""

import functools
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig

from hfkit.console import note, quiet_libraries
from hfkit.decoding import Completion, Rows, complete, decode, repeats
from hfkit.encoding import Prompt, Request, prepare
from hfkit.errors import HfkitError, OptionError
from hfkit.models import LanguageModel, load
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.sampling import check, draws, end_tokens, generate_arguments, generation_config, is_plain, stops

_WINDOW = 8  # batches that are sorted by length together
_BATCH = {"cpu": 64, "cuda": 256}
_BATCH_TOKENS = {"cpu": 32_768, "cuda": 262_144}  # prompt and new tokens of all rows


@dataclass(frozen=True)
class Generation:
    """One generated text; `str()` gives prompt and continuation (of a model with an encoder: the output alone)."""

    prompt: str
    completion: str
    finish_reason: str  # "stop": end-of-text token or stop string; "length": max_new_tokens or max_time
    tokens: int  # generated, an end-of-text token included
    logprob: float  # of the completion under the model, in nats (natural logarithm), before any sampling control
    seed: int | None  # gives the same text again; None where nothing was drawn
    model: str
    echo: bool = field(default=True, repr=False)
    loops: bool = field(default=False, repr=False)  # the text ends in a repetition

    def __str__(self) -> str:
        return self.prompt + self.completion if self.echo else self.completion

    def to_dict(self) -> dict[str, Any]:
        """The fields that `--json` prints."""
        names = ("prompt", "completion", "finish_reason", "tokens", "logprob", "seed", "model")
        return {name: getattr(self, name) for name in names}


Model = str | ModelOptions | LanguageModel | tuple[Any, Any] | None


def generate(
    prompt: str | Sequence[str],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
    **overrides: Any,
) -> Any:
    """Continue one prompt, or many in batches.

    Args:
        prompt: a text, or a list of texts. An empty text lets the model begin.
        model: what `load` returned or takes. A model given by name stays loaded for the next call.
        options: how to generate. Every field of `GenerateOptions` is a keyword, too: `generate(..., top_p=0.9)`.
        batch_size: most rows at a time; by default as many as the device is good for.

    Returns:
        A `Generation` for a text, a list of them for a list. With `num_return_sequences` each prompt gives a list.

    Raises:
        HfkitError: the prompt does not fit the model, an option is out of range, the model cannot be loaded.
        TypeError: an option is unknown.

    The seed of prompt `i`, sample `k` is `seed + i * num_return_sequences + k`; it alone gives the same text again.
    """
    options = GenerateOptions.make(options, overrides)
    lm = loaded(model)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    results = []
    for _, result in generate_each(enumerate(prompts), model=lm, options=options, batch_size=batch_size):
        if isinstance(result, HfkitError):
            raise result
        results.append(result if options.num_return_sequences else result[0])
    return results[0] if isinstance(prompt, str) else results


def generate_each(
    prompts: Iterable[tuple[int, Prompt | HfkitError]],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, list[Generation] | HfkitError]]:
    """For each numbered prompt, in order, its samples; or the error that kept just this prompt from running.

    Prompts are read some batches ahead, so that rows of like length can share one. A prompt may be a list of token
    ids. An HfkitError among the prompts is passed through. The number goes into the seed, see `generate`.
    """
    lm, options = loaded(model), options or GenerateOptions()
    if options.seed is None:
        options = replace(options, seed=draw_seed())
    check(lm, options)
    samples = options.num_return_sequences or 1
    size = batch_size or _BATCH.get(lm.model.device.type, 64)
    prompts = iter(prompts)
    while window := list(islice(prompts, window_size(lm, batch_size))):
        results: dict[int, list[Any] | HfkitError] = {}
        rows: list[tuple[int, int, Request]] = []
        for number, prompt in window:
            try:
                if isinstance(prompt, HfkitError):
                    raise prompt
                request = _prepare(lm, prompt, options)
            except HfkitError as error:
                results[number] = error
                continue
            seed = options.seed + number * samples
            if not is_plain(options):
                results[number] = _run_special(lm, replace(request, seed=seed), options)
                continue
            results[number] = [None] * samples
            rows += [(number, k, replace(request, seed=seed + k)) for k in range(samples)]
        # Rows of a batch end together at the latest, so they share their number of new tokens.
        rows.sort(key=lambda row: (row[2].new_tokens, len(row[2].ids)), reverse=True)
        for batch in _batches(lm, rows, size):
            for (number, k, _), generation in zip(
                batch, _run_smaller(lm, [r for *_, r in batch], options), strict=True
            ):
                results[number][k] = generation  # type: ignore[index]
        yield from results.items()


def window_size(lm: LanguageModel, batch_size: int | None) -> int:
    """Prompts that are read ahead and sorted together."""
    return (batch_size or _BATCH.get(lm.model.device.type, 64)) * _WINDOW


def stream(
    prompt: Prompt, *, model: Model = None, options: GenerateOptions | None = None, **overrides: Any
) -> Generator[str, None, Generation]:
    """Continue `prompt` and yield the continuation in pieces as it is generated.

    The pieces joined are the `completion` that `generate` gives for the same seed. The generator's return value (of
    `yield from`) is that `Generation`. Closing the generator ends the work. Arguments and errors: see `generate`.
    """
    options = GenerateOptions.make(options, overrides)
    if (options.num_return_sequences or 1) > 1:
        raise OptionError("stream gives one text: leave num_return_sequences out, and change the seed")
    lm = loaded(model)
    check(lm, options)
    request = _prepare(lm, prompt, options)
    request = replace(request, seed=draw_seed() if options.seed is None else options.seed)
    return _stream(lm, request, options)


def _stream(lm: LanguageModel, request: Request, options: GenerateOptions) -> Generator[str, None, Generation]:
    if not is_plain(options):  # beams and guesses are taken back: there is nothing to show before the end
        generation = _run_special(lm, request, options)[0]
        yield generation.completion
        return generation
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    rows = _rows(lm, [request], options, on_text=pieces.put)

    def work() -> None:
        try:
            pieces.put(_run(lm, [request], options, rows)[0])
        except BaseException as error:  # noqa: BLE001, raised again by the reader
            pieces.put(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while isinstance(piece := pieces.get(), str):
            yield piece
    finally:
        rows.cancelled.set()
        worker.join()
    if isinstance(piece, BaseException):
        raise piece
    return piece


def draw_seed() -> int:
    """A seed for who gave none; small enough to type again."""
    return secrets.randbelow(2**31)


def loaded(model: Model) -> LanguageModel:
    """`model` as a LanguageModel, loaded if it is a name."""
    if isinstance(model, tuple):
        return LanguageModel(*model)
    return _load(model if isinstance(model, ModelOptions) else ModelOptions(model=model))


@functools.lru_cache(maxsize=1)
def _load(options: ModelOptions) -> LanguageModel:
    return load(options)


def _prepare(lm: LanguageModel, prompt: Prompt, options: GenerateOptions) -> Request:
    return prepare(prompt, options, lm.tokenizer, lm.model.config, lm.name)


def _batches(lm: LanguageModel, rows: list[Any], size: int) -> Iterator[list[Any]]:
    """Cut `rows`, longest first, into batches of at most `size` rows and the device's number of tokens."""
    tokens = _BATCH_TOKENS.get(lm.model.device.type, 32_768)
    while rows:
        longest = rows[0][2]
        alike = sum(row[2].new_tokens == longest.new_tokens for row in rows)
        count = max(1, min(size, alike, tokens // (len(longest.ids) + longest.new_tokens)))
        yield rows[:count]
        rows = rows[count:]


def _run_smaller(lm: LanguageModel, requests: list[Request], options: GenerateOptions) -> list[Generation]:
    """Run a batch; where the device's memory is too small for it, in halves."""
    try:
        return _run(lm, requests, options)
    except torch.OutOfMemoryError as error:
        if len(requests) == 1:
            raise HfkitError(
                "out of memory: lower --max-new-tokens, use a smaller model, or --quantize int8"
            ) from error
    torch.cuda.empty_cache()
    half = len(requests) // 2
    note(f"out of memory with {len(requests)} texts at a time: going on with {half}")
    return _run_smaller(lm, requests[:half], options) + _run_smaller(lm, requests[half:], options)


def _rows(
    lm: LanguageModel,
    requests: Sequence[Request],
    options: GenerateOptions,
    on_text: Callable[[str], None] | None = None,
) -> Rows:
    seeds = [request.seed or 0 for request in requests] if draws(lm, options) else None
    contexts = [_context(lm, request) for request in requests]
    return Rows(lm.tokenizer, contexts, seeds=seeds, eos=end_tokens(lm), stops=stops(lm, options), on_text=on_text)


def _context(lm: LanguageModel, request: Request) -> list[int]:
    """The tokens that the completion goes on from: none for a model with an encoder."""
    return [] if lm.model.config.is_encoder_decoder else request.ids


def _run(
    lm: LanguageModel, requests: Sequence[Request], options: GenerateOptions, rows: Rows | None = None
) -> list[Generation]:
    rows = rows or _rows(lm, requests, options)
    _call(
        lm,
        requests,
        options,
        generation_config(lm, options, requests[0].new_tokens),
        custom_generate=decode,
        rows=rows,
    )
    return [
        _generation(lm, options, request, completion)
        for request, completion in zip(requests, rows.results(), strict=True)
    ]


def _run_special(lm: LanguageModel, request: Request, options: GenerateOptions) -> list[Generation]:
    """Beam search and speculation, in transformers' own loops and with its global random numbers."""
    config = generation_config(lm, options, request.new_tokens)
    config.update(return_dict_in_generate=True, output_logits=True, num_return_sequences=options.num_return_sequences)
    config.stop_strings = stops(lm, options) or None
    devices = [lm.model.device] if lm.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(request.seed or 0)
        output = _call(lm, [request], options, config, tokenizer=lm.tokenizer)
    logprobs = lm.model.compute_transition_scores(
        output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
    ).double()
    # The output of a model with an encoder begins with its start token.
    start = 1 if lm.model.config.is_encoder_decoder else len(request.ids)
    return [
        _generation(
            lm,
            options,
            request,
            complete(lm.tokenizer, _context(lm, request), tokens[start:], end_tokens(lm), stops(lm, options), scores),
        )
        for tokens, scores in zip(output.sequences.tolist(), logprobs.cpu(), strict=True)
    ]


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
        padding = [0] * (width - len(request.ids))
        ids.append(request.ids + padding if right else padding + request.ids)
        ones = [1] * len(request.ids)
        mask.append(ones + padding if right else padding + ones)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    arguments |= {name: tensor.to(lm.model.device) for name, tensor in inputs.items()}
    try:
        with quiet_libraries():
            return lm.model.generate(
                generation_config=config, **generate_arguments(lm, options, len(requests)), **arguments
            )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, TypeError) as error:
        if "probability tensor" in str(error):
            raise HfkitError(f"{lm.name} gives values that are not numbers: try --dtype float32") from error
        if isinstance(error, ValueError):
            raise HfkitError(f"these options cannot be used together: {str(error).splitlines()[0]}") from error
        raise


def _generation(lm: LanguageModel, options: GenerateOptions, request: Request, completion: Completion) -> Generation:
    return Generation(
        prompt=request.prompt,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        tokens=len(completion.tokens),
        logprob=completion.logprob,
        seed=request.seed if draws(lm, options) else None,
        model=lm.name,
        echo=not lm.model.config.is_encoder_decoder,
        loops=repeats(completion.tokens),
    )
