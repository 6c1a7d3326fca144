"""`hfkit generate --input`: many prompts in batches, in order, on one process or several; interrupted and resumed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit import console, processes
from hfkit.cli.generation_setup import load_for_generation, reach_server, with_seed
from hfkit.cli.prompt_files import Results, can_be_read_twice, read_prompts, to_line
from hfkit.declaration import set_fields
from hfkit.errors import HfkitError, OptionError, hide_passwords
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

if TYPE_CHECKING:
    from hfkit.inference.results import Generation
    from hfkit.models.loading import LanguageModel

    Numbered = tuple[int, list[Generation] | HfkitError]  # index of a prompt, and its samples or its error


def write_results(
    model: ModelOptions,
    server: ServerOptions,
    sampling: GenerateOptions,
    path: Path,
    output: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    batch_size: int | None,
) -> None:
    """Continue every prompt of the file `path`. Several processes share the prompts; the first one writes.

    A server gets `batch_size` requests at a time.

    Raises:
        HfkitError: the run cannot begin or be resumed; or, in the end, some prompts could not be run.
    """
    if resume and not can_be_read_twice(path):
        raise OptionError("--resume compares the input with what is done: --input must be a file, not a pipe")
    if resume and not overwrite and output and output.is_file():
        console.note(f"{output} is complete: there is nothing to resume")
        return
    settings = _settings_of(model, server, sampling)
    samples, leads = sampling.num_return_sequences or 1, processes.rank == 0
    file = Results(output, resume=resume, overwrite=overwrite) if output and leads else None
    done, previous = processes.gather([(file.done, file.settings) if file else ({}, None)])[0]
    if done:
        _check_same_settings(output, previous, settings)
        _check_same_input(output, path, done)
        sampling = replace(sampling, seed=previous["seed"])
    if server.server:
        remote, sampling = reach_server(server, model, sampling)
    else:
        lm = load_for_generation(model, sampling)
        if leads:
            sampling = with_seed(lm, sampling)
    sampling = replace(sampling, seed=processes.gather([sampling.seed])[0])
    if file:
        file.begin(settings | {"seed": sampling.seed})
    failures = total = tokens = 0
    started = time.perf_counter()
    with _open_bar(path, samples, len(done)) as bar:
        prompts = ((index, prompt) for index, prompt in enumerate(read_prompts(path)) if index + 1 not in done)
        if server.server:
            windows: Iterator[list[Numbered]] = (
                [each] for each in remote.generate_each(prompts, options=sampling, concurrent=batch_size or 16)
            )
        else:
            windows = _generate_windows(lm, sampling, prompts, batch_size, bar)
        for window in windows:
            records = []
            for index, result in window:
                total += 1
                if isinstance(result, HfkitError):
                    failures += 1
                    if leads:
                        reason = console.printable(f"{path}, line {index + 1}: {result}")
                        bar.write(f"hfkit: {reason}", file=sys.stderr)
                    continue
                tokens += sum(sample.tokens for sample in result)
                records += [sample.to_dict() | {"line": index + 1} for sample in result]
            if file:
                file.add(records)
            elif leads:
                console.write("".join(map(to_line, records)))
            bar.n = (len(done) + total) * samples
            bar.refresh()
    if file:
        file.finish()
    if not leads:
        return
    seconds = time.perf_counter() - started
    console.detail(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)")
    if failures:
        total += len(done)
        raise HfkitError(f"{failures} of {total} prompts could not be run ({path}): fix the lines named above")


def _settings_of(model: ModelOptions, server: ServerOptions, sampling: GenerateOptions) -> dict[str, Any]:
    """Return every option that changes the texts. A resumed run must share them."""
    names = ("revision", "dtype", "quantize")
    name, place = (
        (model.model, {"server": hide_passwords(server.server)}) if server.server else (find_model(model).name, {})
    )
    return {"model": name, **place, **{name: getattr(model, name) for name in names}, **set_fields(sampling)}


def _check_same_settings(output: Path | None, previous: dict[str, Any], settings: dict[str, Any]) -> None:
    """HfkitError unless an interrupted run had these settings. A seed that is not given now is taken from it."""
    for name in [*settings, *previous]:
        before, now = previous.get(name), settings.get(name)
        if before != now and (name, now) != ("seed", None):
            flag = name.replace("_", "-")
            raise HfkitError(
                f"{output}.partial was made with --{flag} {before}, not {now}: give the same options, "
                "or --overwrite begins anew"
            )


def _check_same_input(output: Path | None, path: Path, done: dict[int, str]) -> None:
    """HfkitError unless the prompts that are done stand in this file, on the same lines."""
    same = {line for line, prompt in enumerate(read_prompts(path), 1) if line in done and prompt == done[line]}
    if missing := done.keys() - same:
        raise HfkitError(
            f"{output}.partial was made from another input: line {min(missing)} of {path} differs; "
            "--overwrite begins anew"
        )


def _generate_windows(
    lm: LanguageModel,
    sampling: GenerateOptions,
    prompts: Iterator[tuple[int, Any]],
    batch_size: int | None,
    bar: Any,
) -> Iterator[list[Numbered]]:
    """Yield results in the order of the input, a window at a time. Each process has its share of every window."""
    from hfkit.inference import generation

    size = generation.window_size(lm, sampling, batch_size) * processes.count

    def advance(texts: int) -> None:
        bar.update(texts * processes.count)

    while window := list(islice(prompts, size)):
        share = window[processes.rank :: processes.count]
        results = generation.generate_each(share, model=lm, options=sampling, batch_size=batch_size, on_done=advance)
        yield sorted(processes.gather(list(results)), key=lambda numbered: numbered[0])


def _open_bar(path: Path, samples: int, done: int) -> Any:
    """Open a progress bar over the texts, on a terminal only. The length of a pipe is not known."""
    from tqdm import tqdm

    total = None
    if can_be_read_twice(path):
        with path.open("rb") as file:
            total = sum(1 for _ in file) * samples
    hidden = console.state.quiet or not sys.stderr.isatty() or processes.rank != 0
    return tqdm(total=total, initial=done * samples, unit="text", disable=hidden, file=sys.stderr)
