"""Continue prompts: `generate` for one or many, `stream` for text as it comes."""

import functools
import queue
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from hfkit.corpus.documents import find_corpus
from hfkit.corpus.overlap import WORDS, Index, index_corpus
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError, OptionError
from hfkit.inference import batches
from hfkit.inference.batches import Prompt, Request, fit_prompt
from hfkit.inference.controls import check_controls, draws, is_plain
from hfkit.inference.decoding import Completion, repeats
from hfkit.models.loading import LanguageModel, Model, loaded
from hfkit.options import GenerateOptions

_WINDOW = 8  # batches that are sorted by length together
_ATTEMPTS = 10  # at a text that copies too much
# Between their seeds: they are no other prompt's, and the first one can be told from them. A CPU draws by the lower 32
# bits of a seed alone.
FAR = 2**40 + 1_000_003


@dataclass(frozen=True)
class Generation:
    """One generated text; `str()` gives prompt and continuation; of a translator or a task the output alone."""

    prompt: str | Mapping[str, Any]
    completion: str
    finish_reason: str  # "stop": end-of-text token or stop string; "length": max_new_tokens or max_time
    tokens: int  # generated, an end-of-text token included
    logprob: float  # of the completion under the model, in nats (natural logarithm), before any sampling control
    seed: int | None  # gives the same text again; None where nothing was drawn
    model: str
    echo: bool = field(default=True, repr=False)
    loops: bool = field(default=False, repr=False)  # the text ends in a repetition

    def __str__(self) -> str:
        return f"{self.prompt}{self.completion}" if self.echo else self.completion.strip()

    def to_dict(self) -> dict[str, Any]:
        """The fields that `--json` prints."""
        names = ("prompt", "completion", "finish_reason", "tokens", "logprob", "seed", "model")
        return {name: getattr(self, name) for name in names}


def generate(
    prompt: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
    **overrides: Any,
) -> Any:
    """Continue one prompt, or many in batches.

    Args:
        prompt: a text, or a list of texts. An empty text lets the model begin. A model that learned a task puts it
            into its template; where that has several fields, a mapping gives them.
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
    novel_index(options)  # before a model is loaded
    lm = loaded(model)
    is_one = isinstance(prompt, str | Mapping)
    requests = []  # all of them first, so that one that does not fit is told before any is run
    for number, text in enumerate([prompt] if is_one else prompt):
        try:
            requests.append(_prepare(lm, text, options))
        except HfkitError as error:
            raise error if is_one else type(error)(f"prompt {number}: {error}") from error
    results = []
    for _, result in generate_each(enumerate(requests), model=lm, options=options, batch_size=batch_size):
        if isinstance(result, HfkitError):
            raise result
        results.append(result if options.num_return_sequences else result[0])
    return results[0] if is_one else results


def generate_each(
    prompts: Iterable[tuple[int, Prompt | Request | HfkitError]],
    *,
    model: Model = None,
    options: GenerateOptions | None = None,
    batch_size: int | None = None,
    on_done: Callable[[int], None] = lambda texts: None,
) -> Iterator[tuple[int, list[Generation] | HfkitError]]:
    """For each numbered prompt, in order, its samples; or the error that kept just this prompt from running.

    Prompts are read some batches ahead, so that rows of like length can share one. A prompt may be a list of token
    ids. An HfkitError among the prompts is passed through. The number goes into the seed, see `generate`.
    `on_done` is told how many texts more are done.
    """
    lm, options = loaded(model), options or GenerateOptions()
    if options.seed is None:
        options = replace(options, seed=draw_seed())
    check_controls(lm, options)
    samples, size = options.num_return_sequences or 1, batch_size or batches.default_size(lm)
    prompts = iter(prompts)
    while window := list(islice(prompts, window_size(lm, options, batch_size))):
        results: dict[int, list[Any] | HfkitError] = {}
        rows: list[tuple[int, int, Request]] = []
        for number, prompt in window:
            try:
                if isinstance(prompt, HfkitError):
                    raise prompt
                request = prompt if isinstance(prompt, Request) else _prepare(lm, prompt, options)
                seed = options.seed + number * samples
                if is_plain(lm, options):
                    results[number] = [None] * samples
                    rows += [(number, k, replace(request, seed=seed + k)) for k in range(samples)]
                else:
                    results[number] = _special(lm, replace(request, seed=seed), options)
                    on_done(samples)
            except HfkitError as error:
                results[number] = error
                on_done(samples)
        completions = batches.run_all(lm, [request for *_, request in rows], options, size, on_done)
        for (number, k, request), completion in zip(rows, completions, strict=True):
            if isinstance(found := results[number], HfkitError):
                continue
            try:
                found[k] = _redraw(lm, options, request, _generation(lm, options, request, completion))
            except HfkitError as error:
                results[number] = error
        yield from results.items()


def _redraw(lm: LanguageModel, options: GenerateOptions, request: Request, found: Generation) -> Generation:
    """`found`, or where it copies more than `novel` allows the first of other seeds that does not."""
    if not options.novel:
        return found
    most, index, request = options.novel_words or WORDS, novel_index(options), replace(request, seed=found.seed)
    for _ in range(_ATTEMPTS):
        if not (copied := index.look_up(found.completion)).words:
            return found
        request = replace(request, seed=(request.seed + FAR) % 2**63)  # type: ignore[operator]
        found = _generation(lm, options, request, batches.run_batch(lm, [request], options)[0])
    raise HfkitError(
        f"every one of {_ATTEMPTS} samples copies more than {most} words, such as "
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


def _special(lm: LanguageModel, request: Request, options: GenerateOptions) -> list[Generation]:
    return [_generation(lm, options, request, found) for found in batches.run_special(lm, request, options)]


def window_size(lm: LanguageModel, options: GenerateOptions, batch_size: int | None) -> int:
    """Prompts that are read ahead and sorted together."""
    rows = (batch_size or batches.default_size(lm)) * _WINDOW
    return max(1, rows // (options.num_return_sequences or 1))


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
    novel_index(options)
    lm = loaded(model)
    check_controls(lm, options)
    request = _prepare(lm, prompt, options)
    request = replace(request, seed=draw_seed() if options.seed is None else options.seed)
    return _stream(lm, request, options)


def _stream(lm: LanguageModel, request: Request, options: GenerateOptions) -> Generator[str, None, Generation]:
    if options.novel:
        generation = _redraw(
            lm, options, request, _generation(lm, options, request, batches.run_batch(lm, [request], options)[0])
        )
        yield generation.completion
        return generation
    if not is_plain(lm, options):  # beams and guesses are taken back: there is nothing to show before the end
        generation = _special(lm, request, options)[0]
        yield generation.completion
        return generation
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    rows = batches.new_rows(lm, [request], options, on_text=pieces.put)

    def work() -> None:
        try:
            pieces.put(batches.run_batch(lm, [request], options, rows)[0])
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
    return _generation(lm, options, request, piece)


def draw_seed() -> int:
    """A seed for who gave none; small enough to type again."""
    return secrets.randbelow(2**31)


def _prepare(lm: LanguageModel, prompt: Prompt, options: GenerateOptions) -> Request:
    return fit_prompt(prompt, options, lm.tokenizer, lm.model.config, lm.name)


def _generation(lm: LanguageModel, options: GenerateOptions, request: Request, completion: Completion) -> Generation:
    return Generation(
        prompt=request.prompt,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        tokens=len(completion.tokens),
        logprob=completion.logprob,
        seed=request.seed if draws(lm, options) else None,
        model=lm.name,
        echo=not lm.model.config.is_encoder_decoder and (options.raw or not task_of(lm.tokenizer)),
        loops=repeats(completion.tokens),
    )
