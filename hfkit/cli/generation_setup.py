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
    from hfkit.models.loading import LanguageModel


def load_for_generation(model: ModelOptions, sampling: GenerateOptions, prompt: str | None = None) -> LanguageModel:
    """Load a model, after every check that does not need its weights.

    Raises:
        HfkitError: the model cannot generate text, or `prompt` does not fit it.
    """
    from hfkit.inference import generation
    from hfkit.inference.batches import fit_prompt
    from hfkit.models import architecture, loading

    source = find_model(model)
    if source.folder == BUNDLED and sys.stdout.isatty():
        _introduce_bundled_model()
    generation.novel_index(sampling)
    tokenizer, config = loading.load_tokenizer(source), loading.load_config(source)
    architecture.check_head(source.name, config, "text")
    if prompt is not None:
        fit_prompt(prompt, sampling, tokenizer, config, source.name)
    return loading.load_weights(source, model, tokenizer)


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
