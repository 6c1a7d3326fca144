"""`hfkit generate` at a shell: prompts in, texts out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfkit import console, processes
from hfkit.cli import prompt_files
from hfkit.cli.flags import Json, flags
from hfkit.cli.prompt_files import Results, read_prompts, to_line
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.recipes import read_value

if TYPE_CHECKING:
    from hfkit.inference.generation import Generation
    from hfkit.inference.prompts import Request
    from hfkit.models.loading import LanguageModel


@flags
def generate(
    model: ModelOptions,
    sampling: GenerateOptions,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; without it, stdin is read.")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Many prompts: a line each, or `prompt` of each .jsonl object."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON Lines to this file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an --output that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output if it exists.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts at a time. [default: what the device is good for]")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="NAME=A,B,...", help="Compare values of one option, same seed: temperature=0.3,0.7,1.0."),
    ] = None,
    prompt_shown: Annotated[
        bool, typer.Option("--prompt/--no-prompt", help="Print the prompt before its continuation.")
    ] = True,
    json: Json = False,
) -> None:
    """Continue a prompt (argument, stdin, or many from --input) and print the text."""
    if input and (prompt is not None or sweep):
        raise OptionError("--input brings its own prompts: leave the PROMPT and --sweep out")
    if (resume or overwrite) and not output:
        raise OptionError("--resume and --overwrite are about a file: add --output FILE")
    if resume and not input:
        raise OptionError("--resume goes on with many prompts: add --input FILE")
    # What can go wrong here is said at once, not after the seconds that importing torch takes.
    if input:
        prompt_files.check_input(input)
    text = "" if input else prompt_files.read_prompt(prompt)
    find_model(model)

    if input:
        write_file(model, sampling, input, output, resume=resume, overwrite=overwrite, batch_size=batch_size)
    elif sweep:
        write_sweep(model, sampling, text, sweep, json=json)
    else:
        write_one(model, sampling, text, output, prompt_shown=prompt_shown, json=json, overwrite=overwrite)


def load_for(model: ModelOptions, sampling: GenerateOptions, prompt: str | None = None) -> LanguageModel:
    """Load a model, after everything that can be checked without its weights."""
    return load_with_prompt(model, sampling, prompt)[0]


def load_with_prompt(
    model: ModelOptions, sampling: GenerateOptions, prompt: str | None
) -> tuple[LanguageModel, Request | None]:
    """As `load_for`, with the prompt as the model is to be given it."""
    from hfkit.inference import generation
    from hfkit.inference.prompts import fit_prompt
    from hfkit.models import architecture, loading

    source = find_model(model)
    generation.novel_index(sampling)
    tokenizer, config = loading.load_tokenizer(source), loading.load_config(source)
    architecture.check_head(source.name, config, "text")
    request = None if prompt is None else fit_prompt(prompt, sampling, tokenizer, config, source.name)
    return loading.load_weights(source, model, tokenizer), request


def seeded(lm: LanguageModel, sampling: GenerateOptions) -> GenerateOptions:
    """`sampling` with a seed; one that was not given is drawn and told."""
    from hfkit.inference import generation
    from hfkit.inference.controls import draws

    if sampling.seed is not None:
        return sampling
    sampling = replace(sampling, seed=generation.draw_seed())
    if draws(lm, sampling):
        console.note(f"seed {sampling.seed}")
    return sampling


def write_one(
    model: ModelOptions,
    sampling: GenerateOptions,
    prompt: str,
    output: Path | None,
    *,
    prompt_shown: bool,
    json: bool,
    overwrite: bool,
) -> None:
    """Continue one prompt: streamed to a terminal, else at once."""
    from hfkit.inference import generation
    from hfkit.inference.controls import draws

    file = Results(output, overwrite=overwrite) if output else None
    lm, request = load_with_prompt(model, sampling, prompt)
    assert request  # noqa: S101, there is a prompt
    sampling, started = seeded(lm, sampling), time.perf_counter()
    samples = sampling.num_return_sequences or 1
    if not (json or file) and sys.stdout.isatty() and (samples == 1 or draws(lm, sampling)):
        for k in range(samples):
            one = replace(sampling, num_return_sequences=None, seed=(sampling.seed or 0) + k)
            _write_stream(lm, one, request, prompt_shown, last=k == samples - 1)
        return
    found = generation.generate(request, model=lm, options=sampling, num_return_sequences=samples)
    if file:
        file.add(result.to_dict() | {"line": 1} for result in found)
        file.finish()
    elif json:
        console.write("".join(to_line(result.to_dict()) for result in found))
    else:
        texts = [str(result) if prompt_shown else result.completion for result in found]
        console.write("\n----\n".join(texts) + "\n")
    _tell(found, time.perf_counter() - started)


def _write_stream(
    lm: LanguageModel, sampling: GenerateOptions, request: Request, prompt_shown: bool, last: bool
) -> None:
    from hfkit.inference import generation

    started, first = time.perf_counter(), None
    if prompt_shown and not lm.model.config.is_encoder_decoder:
        console.write(str(request.prompt))
    result = None
    pieces = generation.stream(request, model=lm, options=sampling)
    try:
        while True:
            console.write(next(pieces))
            first = first or time.perf_counter() - started
    except StopIteration as stop:
        result = stop.value
    finally:
        console.write("\n" if last else "\n----\n")
    _tell([result], time.perf_counter() - started, first)


def _tell(results: list[Generation], seconds: float, first: float | None = None) -> None:
    """What a person should know of the texts, on stderr."""
    if any(result.loops for result in results):
        console.note("the text has begun to repeat itself: try --repetition-penalty 1.2 or a higher --temperature")
    tokens = sum(result.tokens for result in results)
    begun = f", the first after {first:.2f} s" if first else ""
    seeds = ", ".join(str(result.seed) for result in results)
    console.detail(f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s{begun}), seed {seeds}")


def write_sweep(model: ModelOptions, sampling: GenerateOptions, prompt: str, sweep: str, *, json: bool) -> None:
    """The same prompt and seed under several values of one option, side by side."""
    from hfkit.inference import generation

    name, _, given = sweep.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    if name not in GenerateOptions.names() or not given:
        raise OptionError(f"--sweep is {sweep!r}: write an option and its values, such as temperature=0.3,0.7,1.0")
    values = [read_value(value) for value in given.split(",")]
    variants = [replace(sampling, **{name: value}) for value in values]
    lm = load_for(model, sampling, prompt)
    if name != "seed":
        seed = seeded(lm, sampling).seed
        variants = [replace(variant, seed=seed) for variant in variants]
    columns: dict[str, list[Generation]] = {}
    for value, variant in zip(values, variants, strict=True):
        samples = variant.num_return_sequences or 1
        found = generation.generate(prompt, model=lm, options=variant, num_return_sequences=samples)
        if json:
            console.write("".join(to_line(result.to_dict() | {name: value}) for result in found))
        columns[f"{name} {value}"] = found
    if not json:
        rows = zip(*columns.values(), strict=False)
        texts = ([result.completion.strip() for result in row] for row in rows)
        console.write_table(list(columns), texts, max(80, 40 * len(columns)), show_lines=True)


def write_file(
    model: ModelOptions,
    sampling: GenerateOptions,
    path: Path,
    output: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    batch_size: int | None,
) -> None:
    """Continue every prompt of a file, in batches; several processes share the prompts, the first one writes."""
    samples, leader = sampling.num_return_sequences or 1, processes.rank == 0
    file = Results(output, samples=samples, resume=resume, overwrite=overwrite) if output and leader else None
    done, last = processes.gather([(file.done, file.last) if file else ({}, None)])[0]
    if last:
        _check_same_input(path, done, output)
    lm = load_for(model, sampling)
    sampling = replace(sampling, seed=processes.gather([_seed(lm, sampling, last, samples)])[0])
    failed = total = tokens = 0
    started = time.perf_counter()
    with _bar(path, samples, len(done)) as bar:
        todo = ((number, prompt) for number, prompt in enumerate(read_prompts(path)) if number + 1 not in done)
        for results in _windows(lm, sampling, todo, batch_size, bar):
            records = []
            for number, result in results:
                total += 1
                if isinstance(result, HfkitError):
                    failed += 1
                    if leader:
                        bar.write(
                            f"hfkit: {path}, line {number + 1}: {console.printable(str(result))}", file=sys.stderr
                        )
                    continue
                tokens += sum(one.tokens for one in result)
                records += [one.to_dict() | {"line": number + 1} for one in result]
            if file:
                file.add(records)
            elif leader:
                console.write("".join(to_line(record) for record in records))
            bar.n = (len(done) + total) * samples
            bar.refresh()
    if file:
        file.finish()
    if not leader:
        return
    seconds = time.perf_counter() - started
    console.detail(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)")
    if failed:
        total += len(done)
        raise HfkitError(f"{failed} of {total} prompts could not be run ({path}): mend the lines named above")


def _check_same_input(path: Path, done: dict[int, str], output: Path | None) -> None:
    """HfkitError unless what is `done` is of the prompts of this file."""
    lines = enumerate(read_prompts(path), 1)
    wrong = set(done) - {line for line, prompt in lines if line in done and prompt == done[line]}
    if wrong:
        what = f"made from another input: line {min(wrong)} differs"
        raise HfkitError(f"{output}.partial was {what}; --overwrite begins anew")


def _seed(lm: LanguageModel, sampling: GenerateOptions, last: dict[str, Any] | None, samples: int) -> int | None:
    """The seed of all: the one that was given, or that of the run that is resumed, or a new one, which is told."""
    from hfkit.inference import generation
    from hfkit.inference.controls import draws

    drawn = draws(lm, sampling)
    if last:
        # The record's own is SEED + (line - 1) * samples + k, and k that of the last sample.
        seed = None if last["seed"] is None else last["seed"] + 1 - last["line"] * samples
        if sampling.novel and seed is not None:  # where the text was drawn again it is some steps farther
            stride = generation.REDRAW_STRIDE
            seed = seed % stride + (sampling.seed or 0) // stride * stride
        if last["model"] != lm.name or drawn != (seed is not None) or (drawn and sampling.seed not in (None, seed)):
            made = f"with {last['model']}" + ("" if seed is None else f" and --seed {seed}")
            raise HfkitError(f"what is to be resumed was made {made}: give the same, or --overwrite begins anew")
        return seed
    return seeded(lm, sampling).seed if processes.rank == 0 else sampling.seed


def _windows(
    lm: LanguageModel,
    sampling: GenerateOptions,
    numbered: Iterator[tuple[int, Any]],
    batch_size: int | None,
    bar: Any,
) -> Iterator[list[tuple[int, Any]]]:
    """Results in the order of the input, a window at a time, with each process's share in every window."""
    from hfkit.inference import generation

    size = generation.window_size(lm, sampling, batch_size) * processes.count

    def tell(texts: int) -> None:
        bar.update(texts * processes.count)

    while window := list(islice(numbered, size)):
        share = window[processes.rank :: processes.count]
        each = generation.generate_each(share, model=lm, options=sampling, batch_size=batch_size, on_done=tell)
        yield sorted(processes.gather(list(each)), key=lambda pair: pair[0])


def _bar(path: Path, samples: int, done: int) -> Any:
    from tqdm import tqdm

    total = None
    if not path.is_fifo():
        with path.open("rb") as file:
            total = sum(1 for _ in file) * samples
    hidden = console.state.quiet or not sys.stderr.isatty() or processes.rank != 0
    return tqdm(total=total, initial=done * samples, unit="text", disable=hidden, file=sys.stderr)
