"""`hfkit generate`: continue one prompt, many from a file, or one under several values of an option."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

from hfkit import console
from hfkit.cli import prompts
from hfkit.cli.flags import JSON, flags
from hfkit.cli.generate_file import FileOptions, Results, write_results
from hfkit.declaration import argument, option
from hfkit.errors import OptionError
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

if TYPE_CHECKING:
    from hfkit.inference.results import Generation

    Stream = Callable[..., Generator[str, None, Generation]]  # of one prompt; takes `options`
    Generate = Callable[..., Sequence[Generation]]


@flags
def generate(
    model: ModelOptions,
    server: ServerOptions,
    sampling: GenerateOptions,
    files: FileOptions,
    prompt: str | None = argument(None, help="Text to continue; without it, stdin is read."),
    sweep: str | None = option(
        None, "Compare values of one option, same seed: temperature=0.3,0.7,1.0.", metavar="NAME=A,B,..."
    ),
    prompt_shown: bool = option(True, "Print the prompt before its continuation.", name="prompt"),
    json: bool = JSON,
) -> None:
    """Continue a prompt, or many from a file, and print the texts.

    Examples:
        hfkit generate "Once upon a time"
        hfkit generate "The king" -m gpt2 -n 50 -t 0.7 --top-p 0.9 --seed 1
        hfkit generate -i prompts.txt -o texts.jsonl
    """
    if files.input:
        if prompt is not None or sweep:
            raise OptionError("--input brings its own prompts: leave the PROMPT and --sweep out")
        write_results(model, server, sampling, files.input, files)
        return
    prompt = prompts.read_prompt(prompt)
    if not server.server:
        find_model(model)  # a wrong name leaves no file
    if sweep:
        if server.server:
            raise OptionError("--sweep works only on this machine: leave --server out")
        if files.output:
            raise OptionError("--sweep prints a table, or with --json lines: leave --output out")
        _print_sweep(model, sampling, prompt, sweep, json=json)
        return
    file = Results(files.output, overwrite=files.overwrite) if files.output else None
    if server.server:
        remote, sampling = prompts.reach_server(server, model, sampling)
        stream: Stream = partial(remote.stream, prompt)
        run: Generate = partial(remote.generate, prompt)
        can_stream, continues = True, remote.continues(sampling)
    else:
        lm, request, sampling = prompts.load_for(prompt, model, sampling)
        assert request  # noqa: S101, there is a prompt
        from hfkit.inference import controls, generation

        stream = partial(generation.stream, request, model=lm)
        count = sampling.num_return_sequences or 1
        # partial() does not know which overload this is.
        run = partial(generation.generate, request, model=lm, num_return_sequences=count)  # type: ignore[assignment]
        # Several greedy samples come from one beam search, all at once.
        can_stream = count == 1 or controls.is_sampled(lm, sampling)
        continues = controls.continues(lm, sampling)
    if not (json or file) and sys.stdout.isatty() and can_stream:
        _print_streams(stream, sampling, prompt if prompt_shown else "", continues)
    else:
        _print_at_once(run, sampling, file, prompt_shown=prompt_shown, json=json)


def _print_streams(stream: Stream, sampling: GenerateOptions, prompt: str, continues: bool) -> None:
    samples = sampling.num_return_sequences or 1
    for k in range(samples):
        pieces = stream(options=replace(sampling, num_return_sequences=None, seed=(sampling.seed or 0) + k))
        started, first_token = time.perf_counter(), None
        try:
            if continues:
                console.write(prompt, dim=True)
            while True:
                piece = next(pieces)
                console.write(piece if continues or first_token else piece.lstrip())  # an answer stands alone
                first_token = first_token or time.perf_counter() - started
        except StopIteration as stop:
            _describe([stop.value], time.perf_counter() - started, first_token)
        finally:  # after Ctrl-C, too
            console.write("\n" if k == samples - 1 else "\n----\n")


def _print_at_once(
    run: Generate, sampling: GenerateOptions, file: Results | None, *, prompt_shown: bool, json: bool
) -> None:
    """Generate all samples, then write them to `file` or stdout."""
    started = time.perf_counter()
    samples = run(options=sampling)
    if file:
        file.add(sample.to_dict() | {"line": 1} for sample in samples)
        file.finish()
    elif json:
        console.write_json(*(sample.to_dict() for sample in samples))
    else:
        texts = [str(sample) if prompt_shown else sample.completion for sample in samples]
        console.write("\n----\n".join(texts) + "\n")
    _describe(samples, time.perf_counter() - started)


def _describe(samples: Sequence[Generation], seconds: float, first_token: float | None = None) -> None:
    """Print speed, seeds, and a hint if a text repeats itself. Times are in seconds."""
    if any(sample.loops for sample in samples):
        console.note("the text has begun to repeat itself: try --repetition-penalty 1.2 or a higher --temperature")
    tokens = sum(sample.tokens for sample in samples)
    speed = f"{tokens / seconds:.1f} tokens/s" + (f", the first after {first_token:.2f} s" if first_token else "")
    seeds = ", ".join(str(sample.seed) for sample in samples)
    console.detail(f"{console.counted(tokens, 'token')} in {seconds:.2f} s ({speed}), seed {seeds}")


def _print_sweep(model: ModelOptions, sampling: GenerateOptions, prompt: str, sweep: str, *, json: bool) -> None:
    """Print the texts for one prompt and seed under several values of one option, side by side."""
    option, _, listed = sweep.partition("=")
    if not (name := GenerateOptions.find_name(option)) or not listed:
        raise OptionError(f"--sweep is {sweep!r}: write an option and its values, such as temperature=0.3,0.7,1.0")
    values = [GenerateOptions.read_value(name, text) for text in listed.split(",")]
    variants = [replace(sampling, **{name: value}) for value in values]
    lm, _, begun = prompts.load_for(prompt, model, variants[0] if name == "seed" else sampling)
    from hfkit.inference import generation

    columns: dict[str, list[Generation]] = {}
    for value, variant in zip(values, variants, strict=True):
        options = variant if name == "seed" else replace(variant, seed=begun.seed)
        count = options.num_return_sequences or 1
        samples = generation.generate(prompt, model=lm, options=options, num_return_sequences=count)
        if json:
            console.write_json(*(sample.to_dict() | {name: value} for sample in samples))
        columns[f"{name} {value}"] = samples
    if not json:
        texts = [[sample.completion.strip() for sample in samples] for samples in columns.values()]
        rows = list(zip_longest(*texts, fillvalue=""))
        console.write_table(list(columns), rows, max(80, 40 * len(columns)), show_lines=True)
