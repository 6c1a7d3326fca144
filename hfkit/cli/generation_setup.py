"""What commands do before the first result: import libraries, check the request, load the model, choose a seed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfkit import console, processes
from hfkit.imports import import_lean
from hfkit.models.sources import BUNDLED, ModelFiles, find_model
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

if TYPE_CHECKING:
    from hfkit.inference.prompts import Request
    from hfkit.inference.remote import Server
    from hfkit.models.loading import LanguageModel


@contextlib.contextmanager
def loading(model: ModelOptions) -> Iterator[ModelFiles]:
    """Import the libraries that a command needs for this model, and say so on a terminal while it lasts."""
    source = find_model(model)  # report a wrong name before torch is imported
    with console.status(f"loading {source.name} ..."):
        needs_all = source.adapter or source.trust_remote_code or model.device_map or model.quantize
        if processes.count == 1 and not needs_all and (kind := source.config.get("model_type")):
            import_lean(kind)
        yield source


def load_for_generation(model: ModelOptions, sampling: GenerateOptions) -> LanguageModel:
    """`load_with_prompt` where the prompts come later."""
    return load_with_prompt(model, sampling, None)[0]


def load_with_prompt(
    model: ModelOptions, sampling: GenerateOptions, prompt: str | None
) -> tuple[LanguageModel, Request | None]:
    """Load a model, after every check that does not need its weights, and encode `prompt` for it.

    Raises:
        HfkitError: the model cannot generate text, or `prompt` does not fit it.
    """
    with loading(model) as source:
        return _load_with_prompt(source, model, sampling, prompt)


def _load_with_prompt(
    source: ModelFiles, model: ModelOptions, sampling: GenerateOptions, prompt: str | None
) -> tuple[LanguageModel, Request | None]:
    from hfkit.inference import controls, generation
    from hfkit.inference.prompts import ends_in_space, fit_prompt
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
    return load_weights(source, model, tokenizer, config), request


def _introduce_bundled_model() -> None:
    """Say once to each user what the bundled model can do; a file in the user's cache remembers it."""
    mark = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfkit" / "introduced"
    with contextlib.suppress(OSError):
        if mark.exists():
            return
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    console.note(
        "the bundled model is a small GPT-2 that has read old story books: it continues stories, and knows no facts; "
        "-m gpt2 downloads a larger one"
    )


def with_seed(lm: LanguageModel, sampling: GenerateOptions) -> GenerateOptions:
    """Return `sampling` with a seed. A random one is printed to stderr if the text depends on it."""
    from hfkit.inference import generation
    from hfkit.inference.controls import draws

    if sampling.seed is not None:
        return sampling
    sampling = replace(sampling, seed=generation.draw_seed())
    if draws(lm, sampling):
        console.note(f"seed {sampling.seed}")
    return sampling


def reach_server(
    options: ServerOptions, model: ModelOptions, sampling: GenerateOptions
) -> tuple[Server, GenerateOptions]:
    """`load_for_generation` and `with_seed` for a model on a server."""
    from hfkit.inference.remote import Server, draws, with_seed

    server, seeded = Server(options, model), with_seed(sampling)
    if sampling.seed is None and draws(sampling):
        console.note(f"seed {seeded.seed}")
    return server, seeded
