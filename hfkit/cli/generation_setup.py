"""What `generate` and `chat` do before the first token: check the request, load the model, choose a seed."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfkit import console
from hfkit.models.sources import BUNDLED, find_model
from hfkit.options import GenerateOptions, ModelOptions

if TYPE_CHECKING:
    from hfkit.inference.text import Request
    from hfkit.models.loading import LanguageModel


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
    from hfkit.inference import controls, generation
    from hfkit.inference.text import ends_in_space, fit_prompt
    from hfkit.models import architecture, loading

    controls.check_options(sampling)
    source = find_model(model)
    if source.folder == BUNDLED and sys.stdout.isatty():
        _introduce_bundled_model()
    generation.novel_index(sampling)
    tokenizer, config = loading.load_tokenizer(source), loading.load_config(source)
    architecture.check_head(source.name, config, "text")
    request = None if prompt is None else fit_prompt(prompt, sampling, tokenizer, config, source.name)
    if request and ends_in_space(request, tokenizer):
        console.note("the prompt ends in a space, but words of this model begin with theirs: leave it out")
    return loading.load_weights(source, model, tokenizer), request


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
