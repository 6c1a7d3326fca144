"""What comes before the first token: the prompt, or many from a file; a model that they fit; a seed."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hfkit import console, processes
from hfkit.errors import HfkitError, OptionError
from hfkit.hub import cache_folder
from hfkit.imports import import_lean
from hfkit.models.sources import BUNDLED, find_model
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

if TYPE_CHECKING:
    from hfkit.inference.remote import Server
    from hfkit.inference.text import Request
    from hfkit.models.folder import ModelFiles
    from hfkit.models.loading import LanguageModel

STDIN = Path("-")


def read_prompts(path: Path) -> Iterator[str | dict[str, Any] | HfkitError]:
    """Yield one prompt for each line of a text file; for each object of a JSON Lines file its `prompt`, or the object.

    A line that holds no prompt yields an HfkitError in its place. Raises HfkitError if the file cannot be read.
    """
    is_json = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    with open_input(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                if path == STDIN and line.startswith(b'{"'):
                    console.note("stdin looks like JSON Lines and is read as such")
                    is_json = True
            try:
                yield _parse_prompt(line, is_json)
            except HfkitError as error:
                yield error


def check_input(path: Path) -> None:
    """HfkitError if the file cannot be read. What can be read only once is left alone."""
    if can_be_read_twice(path):
        open_input(path).__exit__(None, None, None)


def can_be_read_twice(path: Path) -> bool:
    """Whether `path` is neither stdin nor a named pipe."""
    return path != STDIN and not path.is_fifo()


def open_input(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open a file, or stdin for "-", for reading; HfkitError if that fails."""
    if path == STDIN:
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return path.open("rb")
    except OSError as error:
        raise HfkitError(f"cannot read the input ({path}): {error.strerror}") from error


def _parse_prompt(line: bytes, is_json: bool) -> str | dict[str, Any]:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise HfkitError(f"not UTF-8 (byte {error.start + 1}): convert the file") from None
    if is_json:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            raise HfkitError("not valid JSON: write an object with a prompt on each line") from None
        if isinstance(row, dict) and row and "prompt" not in row:
            return row  # the columns of a task
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise HfkitError("no prompt: write an object with the key 'prompt' and a text")
        text = row["prompt"]
    if not text.strip():
        raise HfkitError("empty prompt: write a text, or delete the line")
    return text


def read_prompt(prompt: str | None, *, wanted: str | None = None) -> str:
    """Return `prompt`, or stdin's text for "-" and for None. A person at a terminal is asked for it.

    wanted: what the text is, if an empty one is an error.

    Raises:
        OptionError: there is no text, or it is not UTF-8.
    """
    try:
        if prompt is None and sys.stdin.isatty():
            prompt = _ask(wanted or "prompt")
        elif prompt is None or prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise OptionError(f"stdin is not UTF-8 text (byte {error.start + 1}): convert it") from error
    if wanted and not prompt.strip():
        raise OptionError(f"give a {wanted}, as an argument or on stdin")
    return prompt


def _ask(what: str) -> str:
    """Ask on stderr, because stdout carries results only, for one line of text."""
    print(f"{what}: ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):  # Ctrl-D
        raise OptionError(f"give a {what}, as an argument or on stdin")
    return line.removesuffix("\n")


@contextlib.contextmanager
def loading(model: ModelOptions) -> Iterator[ModelFiles]:
    """Import the libraries that a command needs for this model, and say so on a terminal while the block lasts."""
    source = find_model(model)  # a wrong name is an error before torch is imported
    with console.status(f"loading {source.name} ..."):
        needs_all = source.adapter or source.trust_remote_code or model.device_map or model.quantize
        if processes.count == 1 and not needs_all and (kind := source.config.get("model_type")):
            import_lean(kind)
        yield source


def load_for(
    prompt: str | None, model: ModelOptions, sampling: GenerateOptions
) -> tuple[LanguageModel, Request | None, GenerateOptions]:
    """Load a model for `prompt`, or for prompts that come later (None), after every check that needs no weights.

    Returns the model, the encoded prompt, and `sampling` with a seed. A random seed is printed if the text depends on
    it.

    Raises:
        HfkitError: the model cannot generate text, or `prompt` does not fit it.
    """
    with loading(model) as source:
        from hfkit.inference import controls, generation
        from hfkit.inference.remote import with_seed
        from hfkit.inference.text import ends_in_space, fit_prompt
        from hfkit.models import architecture
        from hfkit.models.loading import load_config, load_tokenizer, load_weights

        controls.check_options(sampling)
        if source.folder == BUNDLED and sys.stdout.isatty():
            _introduce_bundled_model()
        generation.novel_index(sampling)
        tokenizer, config = load_tokenizer(source), load_config(source)
        architecture.check_head(source.name, config, "text")
        request = None if prompt is None else fit_prompt(prompt, sampling, tokenizer, config, source.name)
        if request and ends_in_space(request, tokenizer):
            console.note("the prompt ends in a space, but words of this model begin with theirs: leave it out")
        lm = load_weights(source, model, tokenizer, config)
    seeded = with_seed(sampling)
    if sampling.seed is None and controls.is_sampled(lm, sampling):
        console.note(f"seed {seeded.seed}")
    return lm, request, seeded


def _introduce_bundled_model() -> None:
    """Say once to each user what the bundled model can do; a file in the user's cache remembers it."""
    with contextlib.suppress(OSError, HfkitError):  # it was said before; no home directory
        mark = cache_folder() / "introduced"
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
        console.note(
            "the bundled model is a small GPT-2 that has read old story books: it continues stories, and knows no "
            "facts; -m gpt2 downloads a larger one"
        )


def reach_server(
    options: ServerOptions, model: ModelOptions, sampling: GenerateOptions
) -> tuple[Server, GenerateOptions]:
    """`load_for` where the model is on a server."""
    from hfkit.inference.remote import Server, may_sample, with_seed

    server, seeded = Server(options, model), with_seed(sampling)
    if sampling.seed is None and may_sample(sampling):
        console.note(f"seed {seeded.seed}")
    return server, seeded
