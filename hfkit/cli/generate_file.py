"""`hfkit generate --input`: many prompts in batches, in order, on one process or several; interrupted and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfkit import console, processes
from hfkit.cli.prompts import can_be_read_twice, check_input, load_for, reach_server, read_prompts
from hfkit.declaration import Options, flag_of, option, set_fields
from hfkit.errors import HfkitError, OptionError, hide_passwords
from hfkit.models.sources import find_model
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions
from hfkit.storage import check_free, check_regular, lock_file, write_text

if TYPE_CHECKING:
    from hfkit.inference.results import Generation
    from hfkit.models.loading import LanguageModel

    Numbered = tuple[int, list[Generation] | HfkitError]  # index of a prompt, and its samples or its error

_LOST = 5  # seconds of work


@dataclass(frozen=True, kw_only=True)
class FileOptions(Options):
    """Prompts from a file, and a file for their texts."""

    input: Path | None = option(
        None, "Many prompts: a line each, or `prompt` of each .jsonl object; - is stdin.", short="-i"
    )
    output: Path | None = option(None, "Write JSON Lines to this file.", short="-o")
    resume: bool = option(False, "Continue an --output that was interrupted.")
    overwrite: bool = option(False, "Replace --output if it exists.")
    batch_size: int | None = option(None, "Most texts at a time. [default: what suits the device]", min=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.resume or self.overwrite) and not self.output:
            raise OptionError("--resume and --overwrite are about a file: add --output FILE")
        if self.resume and not self.input:
            raise OptionError("--resume is for many prompts: add --input FILE")
        if self.resume and self.input and not can_be_read_twice(self.input):
            raise OptionError("--resume compares the input with what is done: --input must be a file, not a pipe")


def write_results(
    model: ModelOptions, server: ServerOptions, sampling: GenerateOptions, path: Path, files: FileOptions
) -> None:
    """Continue every prompt of the file `path`. Several processes share the prompts; the first one writes.

    A server gets `batch_size` requests at a time.

    Raises:
        HfkitError: the run cannot begin or be resumed; or, in the end, some prompts could not be run.
    """
    check_input(path)
    output, resume = files.output, files.resume and not files.overwrite
    if resume and output and output.is_file():
        console.note(f"{output} is complete: there is nothing to resume")
        return
    settings, leads = _settings_of(model, server, sampling), processes.rank == 0
    file = Results(output, resume=resume, overwrite=files.overwrite) if output and leads else None
    done, previous = processes.gather([(file.done, file.settings) if file else ({}, None)])[0]
    if done:
        _check_same(f"{output}.partial", previous, settings, path, done)
        sampling = replace(sampling, seed=previous["seed"])
    if server.server:
        remote, sampling = reach_server(server, model, sampling)
    else:
        lm, _, sampling = load_for(None, model, sampling)
    sampling = replace(sampling, seed=processes.gather([sampling.seed])[0])
    if file:
        file.begin(settings | {"seed": sampling.seed})
    count, failures, tokens, samples = len(done), 0, 0, sampling.num_return_sequences or 1
    started = time.perf_counter()
    with _open_bar(path, samples, len(done)) as bar:
        todo = ((index, prompt) for index, prompt in enumerate(read_prompts(path)) if index + 1 not in done)
        if server.server:
            from hfkit.inference.remote import CONCURRENT

            results = remote.generate_each(todo, options=sampling, concurrent=files.batch_size or CONCURRENT)
            windows: Iterator[list[Numbered]] = ([result] for result in results)
        else:
            windows = _generate_windows(lm, sampling, todo, files.batch_size, bar)
        for window in windows:
            records = []
            for index, result in window:
                count += 1
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
                console.write_json(*records)
            bar.update(count * samples - bar.n)
    if file:
        file.finish()
    seconds = time.perf_counter() - started
    console.detail(f"{console.counted(tokens, 'token')} in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s)")
    if failures and leads:
        raise HfkitError(
            f"{failures:,} of {console.counted(count, 'prompt')} could not be run ({path}): fix the lines named above"
        )


def _settings_of(model: ModelOptions, server: ServerOptions, sampling: GenerateOptions) -> dict[str, Any]:
    """Return every option that changes the texts. A resumed run must share them."""
    if server.server:
        place = {"model": model.model, "server": hide_passwords(server.server)}
    else:
        place = {"model": find_model(model).name}
    return place | {name: getattr(model, name) for name in ("revision", "dtype", "quantize")} | set_fields(sampling)


def _check_same(
    name: str, previous: dict[str, Any], settings: dict[str, Any], path: Path, done: dict[int, str]
) -> None:
    """HfkitError unless the interrupted run `name` had these settings, and the prompts that it has done.

    A seed that is not given now is taken from that run.
    """
    for field in [*settings, *previous]:
        before, now = previous.get(field), settings.get(field)
        if before != now and (field, now) != ("seed", None):
            made = f"{name} was made with {flag_of(field)} {before}, not {now}"
            raise HfkitError(f"{made}: give the same options, or --overwrite begins anew")
    same = {line for line, prompt in enumerate(read_prompts(path), 1) if done.get(line) == prompt}
    if missing := done.keys() - same:
        made = f"{name} was made from another input: line {min(missing)} of {path} differs"
        raise HfkitError(f"{made}; --overwrite begins anew")


def _generate_windows(
    lm: LanguageModel,
    sampling: GenerateOptions,
    prompts: Iterator[tuple[int, Any]],
    batch_size: int | None,
    bar: Any,
) -> Iterator[list[Numbered]]:
    """Yield results in the order of the input, a window at a time. Each process has its share of every window.

    An interruption loses a window. So windows begin small, and grow only while they take a few seconds.
    """
    from hfkit.inference import controls, generation

    def advance(texts: int) -> None:
        bar.update(texts * processes.count)

    most = generation.window_size(lm, sampling, batch_size)
    least = generation.window_size(lm, sampling, batch_size, 1) if controls.is_batchable(lm, sampling) else 1
    size = least
    while window := list(islice(prompts, size * processes.count)):
        started = time.monotonic()
        share = window[processes.rank :: processes.count]
        results = generation.generate_each(share, model=lm, options=sampling, batch_size=batch_size, on_done=advance)
        shares = processes.gather([(list(results), time.monotonic() - started)])
        yield sorted(chain.from_iterable(results for results, _ in shares), key=lambda numbered: numbered[0])
        size = min(most, 2 * size) if max(seconds for _, seconds in shares) < _LOST else max(least, size // 2)


def _open_bar(path: Path, samples: int, done: int) -> Any:
    """Open a progress bar over the texts. The length of a pipe is not known."""
    lines = None
    if can_be_read_twice(path):
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
    return console.progress(lines and lines * samples, "text", initial=done * samples)


class Results:
    """A JSON Lines file that grows prompt by prompt and gets its name when it is complete.

    Until then it is `NAME.partial`, and `NAME.partial.json` holds the settings of the run. Each record names the
    `line` of its prompt, so that a later run can continue.
    """

    def __init__(self, path: Path, *, overwrite: bool, resume: bool = False) -> None:
        """Open the file.

        Raises:
            HfkitError: the file exists, belongs to a running process, or cannot be written.
        """
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")
        self._settings_path = path.with_name(f"{path.name}.partial.json")
        self.done: dict[int, str] = {}  # line -> prompt, of the prompts whose records are all there
        self.settings: dict[str, Any] | None = None  # of the run that is resumed
        check_regular(path)
        check_regular(self.partial, links=False)
        check_free(path, overwrite=overwrite, flag="--output")
        try:
            self._file = self.partial.open("a+b")
            is_locked = lock_file(self._file)
        except OSError as error:
            raise HfkitError(f"cannot write the output ({self.partial}): {error.strerror}") from error
        if not is_locked:
            raise HfkitError(f"{self.partial} is being written by another process: name another --output")
        if self._file.tell() and not (resume or overwrite):
            raise HfkitError(f"{self.partial} is an unfinished run: --resume continues it, --overwrite begins anew")
        self._file.truncate(self._read_done() if resume else 0)

    def _read_done(self) -> int:
        """Read what an interrupted run left; return how many of its bytes to keep: the records of whole prompts."""
        self._file.seek(0)
        if not self._file.read(1):
            return 0
        try:
            self.settings = dict(json.loads(self._settings_path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise HfkitError(f"cannot read {self._settings_path}: {error}; --overwrite begins anew") from error
        samples = self.settings.get("num_return_sequences") or 1
        self._file.seek(0)
        end = position = count = 0
        current = None
        for line in self._file:
            try:
                record = json.loads(line)
                number, prompt = record["line"], record["prompt"]
            except (ValueError, LookupError, TypeError):
                break  # the interruption has torn this line
            count = count + 1 if number == current else 1
            current, position = number, position + len(line)
            if count == samples and line.endswith(b"\n"):
                end, self.done[number] = position, prompt
        return end

    def begin(self, settings: dict[str, Any]) -> None:
        """Store the settings of the run, for a later one that continues it. Call it before the first `add`."""
        write_text(self._settings_path, json.dumps(settings))

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append the records of whole prompts."""
        with self._named_errors():
            self._file.write("".join(map(console.to_json, records)).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the complete file its name."""
        with self._named_errors():
            self._file.close()
            os.replace(self.partial, self.path)
            self._settings_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say which file could not be written: an error of a full disk does not."""
        try:
            yield
        except OSError as error:
            raise HfkitError(f"cannot write {self.partial}: {error.strerror}; fix that and try again") from error
