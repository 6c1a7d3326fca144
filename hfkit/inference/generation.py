"""Continue prompts: `generate` for one or many, `stream` for text as it comes."""

import atexit
import functools
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, overload

from hfkit.corpus.files import find_corpus
from hfkit.corpus.overlap import WORDS, Index, index_corpus
from hfkit.errors import HfkitError, NotFiniteError, OptionError
from hfkit.inference import batches
from hfkit.inference.controls import check_controls, check_options, continues, is_batchable, is_plain, is_sampled
from hfkit.inference.decoding import Completion
from hfkit.inference.remote import CONCURRENT, Server, seed_of
from hfkit.inference.results import Generation
from hfkit.inference.text import Prompt, Request, Text, fit_prompt, list_texts, repeats
from hfkit.models.loading import LanguageModel, Model, loaded, split_options
from hfkit.options import GenerateOptions, ServerOptions

_WINDOW = 8  # batches that are sorted by length together
_ATTEMPTS = 10  # samples of one text until one copies little enough
# Added to the seed for each redraw. It is larger than any number of prompts, so no redraw has another prompt's seed,
# and `seed % REDRAW_STRIDE` gives the first one back. The low 32 bits change, too: a CPU's generator ignores the rest.
REDRAW_STRIDE = 2**40 + 1_000_003


# A str is a Sequence[str], too: the overloads for one prompt come first.
@overload
def generate(
    prompt: Text | Request, *, model: Model = None, num_return_sequences: None = None, **overrides: Any
) -> Generation: ...
@overload
def generate(
    prompt: Text | Request, *, model: Model = None, num_return_sequences: int, **overrides: Any
) -> list[Generation]: ...
@overload
def generate(
    prompt: Sequence[Text | Request], *, model: Model = None, num_return_sequences: None = None, **overrides: Any
) -> list[Generation]: ...
@overload
def generate(
    prompt: Sequence[Text | Request], *, model: Model = None, num_return_sequences: int, **overrides: Any
) -> list[list[Generation]]: ...
def generate(
    prompt: Text | Request | Sequence[Text | Request],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
    **overrides: Any,
) -> Any:
    """Continue one prompt, or many in batches.

    Args:
        prompt: a text, or a list of texts. With an empty text the model begins by itself. A model that learned a task
            puts the text into its template; where that has several fields, a mapping gives them.
        model: what `load` returned or takes. A model given by name stays loaded for the next call.
        options: how to generate. Every field of `GenerateOptions`, `ModelOptions` and `ServerOptions` is a
            keyword, too: `top_p=0.9`, `server="http://localhost:8000"`.
        batch_size: most rows at a time, by default what suits the device; for a server, requests at a time (16).

    Returns:
        A `Generation` for a text, a list of them for a list. With `num_return_sequences` each prompt gives a list.

    Raises:
        HfkitError: the prompt does not fit the model, an option is out of range, the model cannot be loaded.
        TypeError: an option is unknown.

    The seed of prompt `i`, sample `k` is `seed + i * num_return_sequences + k`; it alone gives the same text again, in
    float32. Other precisions round differently in a batch.
    """
    groups = ((GenerateOptions, options), (ServerOptions, None))
    model, options, server = split_options(model, overrides, *groups)
    prompts, is_single = list_texts(prompt, "a prompt")
    check_options(options)  # before a model is loaded
    if server.server:
        remote = Server(server, model)
        each = remote.generate_each(enumerate(prompts), options=options, concurrent=batch_size or CONCURRENT)
    else:
        novel_index(options)
        lm = loaded(model)
        requests = []  # all of them first: one that does not fit is an error before any is run
        for number, text in enumerate(prompts):
            try:
                requests.append(_prepare(lm, text, options))
            except HfkitError as error:
                raise error if is_single else type(error)(f"prompt {number}: {error}") from error
        each = generate_each(enumerate(requests), model=lm, options=options, batch_size=batch_size)
    results: list[Any] = []
    for _, result in each:
        if isinstance(result, HfkitError):
            raise result
        results.append(result if options.num_return_sequences else result[0])
    return results[0] if is_single else results


def generate_each(
    prompts: Iterable[tuple[int, Prompt | HfkitError]],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda texts: None,
) -> Iterator[tuple[int, list[Generation] | HfkitError]]:
    """For each numbered prompt, in order, its samples; or the error that kept just this prompt from running.

    Prompts are read some batches ahead, so that rows of like length can share one. A prompt may be a list of token
    ids. An HfkitError among the prompts is passed through. The number goes into the seed, see `generate`.
    `on_done` is called with the number of texts that were just finished.
    """
    lm, options = loaded(model), options or GenerateOptions()
    first_seed = seed_of(options)
    check_controls(lm, options)
    samples, size = options.num_return_sequences or 1, batch_size or batches.default_size(lm)
    together, prompts = is_batchable(lm, options), iter(prompts)
    seeds = samples if is_plain(lm, options) else 1  # one beam search gives all samples
    while window := list(islice(prompts, window_size(lm, options, batch_size))):
        results: dict[int, list[Generation] | HfkitError] = {}
        rows: list[tuple[int, Request]] = []
        for number, prompt in window:
            try:
                if isinstance(prompt, HfkitError):
                    raise prompt
                request, seed = _prepare(lm, prompt, options), first_seed + number * samples
                if together:
                    results[number] = []
                    rows += [(number, replace(request, seed=seed + k)) for k in range(seeds)]
                else:
                    results[number] = _run_alone(lm, options, replace(request, seed=seed))
                    on_done(samples)
            except HfkitError as error:
                results[number] = error
                on_done(samples)
        completions = batches.run_all(lm, [request for _, request in rows], options, size, on_done)
        for (number, request), texts in zip(rows, completions, strict=True):
            try:
                if isinstance(generations := results[number], list):
                    generated = [_generation(lm, options, request, completion) for completion in texts]
                    generations += [_redraw(lm, options, request, generation) for generation in generated]
            except HfkitError as error:
                results[number] = error
        yield from results.items()


def _run_alone(
    lm: LanguageModel, options: GenerateOptions, request: Request, is_over: Callable[[], bool] = lambda: False
) -> list[Generation]:
    """What one request gives: several samples if they are those of one beam search."""
    if is_plain(lm, options):
        completions = batches.run_batch(lm, [request], options)
    else:
        completions = batches.run_special(lm, [request], options, is_over)[0]
    return [_generation(lm, options, request, completion) for completion in completions]


def _redraw(lm: LanguageModel, options: GenerateOptions, request: Request, generation: Generation) -> Generation:
    """`generation`, or, if it copies more than `novel` allows, the first sample from other seeds that does not.

    Raises:
        HfkitError: all samples copy too much.
    """
    if (index := novel_index(options)) is None:
        return generation
    for _ in range(_ATTEMPTS):
        if not (copied := index.look_up(generation.completion)).words:
            return generation
        request = replace(request, seed=((request.seed or 0) + REDRAW_STRIDE) % 2**63)
        (generation,) = _run_alone(lm, options, request)
    raise HfkitError(
        f"every one of {_ATTEMPTS} samples copies more than {options.novel_words or WORDS} words, such as "
        f"{copied.longest!r}: raise --novel-words or --temperature"
    )


def novel_index(options: GenerateOptions) -> Index | None:
    """What `novel` names, read once, as long as its files stay the same; None if it names nothing."""
    if not options.novel:
        return None
    stamps = tuple((str(file), file.stat().st_mtime_ns) for file in find_corpus(options.novel).files)
    return _index(tuple(options.novel), (options.novel_words or WORDS) + 1, stamps)


@functools.lru_cache(maxsize=1)
def _index(corpus: tuple[str, ...], length: int, stamps: tuple[tuple[str, int], ...]) -> Index:
    return index_corpus(list(corpus), length=length)


def window_size(lm: LanguageModel, options: GenerateOptions, batch_size: int | None, count: int = _WINDOW) -> int:
    """Prompts that are read ahead and sorted together: those of `count` batches."""
    rows = (batch_size or batches.default_size(lm)) * count
    return max(1, rows // (options.num_return_sequences or 1))


def stream(
    prompt: Prompt, *, model: Model = None, options: GenerateOptions | None = None, **overrides: Any
) -> Generator[str, None, Generation]:
    """Continue `prompt` and yield the continuation in pieces as it is generated.

    The pieces joined are the `completion` that `generate` gives for the same seed. The generator's return value (of
    `yield from`) is that `Generation`. Closing the generator ends the work. Arguments and errors: see `generate`.
    """
    groups = ((GenerateOptions, options), (ServerOptions, None))
    model, options, server = split_options(model, overrides, *groups)
    if (options.num_return_sequences or 1) > 1:
        raise OptionError("stream gives one text: leave num_return_sequences out, and change the seed")
    check_options(options)
    if server.server:
        return Server(server, model).stream(prompt, options=options)
    novel_index(options)
    lm = loaded(model)
    check_controls(lm, options)
    request = _prepare(lm, prompt, options)
    return stream_request(lm, replace(request, seed=seed_of(options)), options)


def stream_request(
    lm: LanguageModel, request: Request, options: GenerateOptions, is_over: Callable[[], bool] = lambda: False
) -> Generator[str, None, Generation]:
    """`stream` for a request that has its seed. Once `is_over()` is true, the text ends with what it has."""
    if options.novel or not is_plain(lm, options):  # what may be taken back is not shown before the end
        generation = _redraw(lm, options, request, _run_alone(lm, options, request, is_over)[0])
        yield generation.completion
        return generation
    pieces: queue.SimpleQueue[str | Completion | BaseException] = queue.SimpleQueue()
    rows = batches.new_rows(lm, [request], options, on_text=pieces.put)

    def work() -> None:
        try:
            pieces.put(batches.run_batch(lm, [request], options, rows)[0])
        except BaseException as error:  # noqa: BLE001, raised again by the reader
            pieces.put(error)

    def stop() -> None:
        rows.cancelled.set()
        worker.join()

    worker = threading.Thread(target=work, daemon=True)
    # A thread that is inside torch when Python exits would abort it, and a reader may hold a stream until then.
    atexit.register(stop)
    unregister = atexit.unregister  # the module may be gone when the finally clause runs
    worker.start()
    try:
        while isinstance(piece := pieces.get(), str):
            yield piece
            if is_over():
                rows.cancelled.set()
    finally:
        stop()
        unregister(stop)
    if isinstance(piece, BaseException):
        raise piece
    return _generation(lm, options, request, piece)


def _prepare(lm: LanguageModel, prompt: Prompt, options: GenerateOptions) -> Request:
    return fit_prompt(prompt, options, lm.tokenizer, lm.model.config, lm.name)


def _generation(lm: LanguageModel, options: GenerateOptions, request: Request, completion: Completion) -> Generation:
    if math.isnan(completion.logprob):
        raise NotFiniteError.of(lm.name)
    return Generation(
        prompt=request.prompt,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        tokens=len(completion.tokens),
        logprob=completion.logprob,
        seed=request.seed if is_sampled(lm, options) else None,
        model=lm.name,
        echo=continues(lm, options),
        loops=repeats(completion.tokens),
    )
