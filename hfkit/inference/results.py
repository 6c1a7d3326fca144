"""What `generate` and `classify` return, wherever the model is. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Generation:
    """One generated text. `str()` is prompt and continuation; for a translator or a learned task, the output alone."""

    prompt: str | Mapping[str, Any]
    completion: str
    finish_reason: str  # "stop": end-of-text token or stop string; "length": max_new_tokens or max_time
    tokens: int  # generated, an end-of-text token included
    logprob: float  # of the completion under the model, in nats (natural logarithm), before any sampling control
    seed: int | None  # gives the same text again; None where nothing was random
    model: str
    echo: bool = field(default=True, repr=False)
    loops: bool = field(default=False, repr=False)  # the text ends in a repetition

    def __str__(self) -> str:
        return f"{self.prompt}{self.completion}" if self.echo else self.completion.strip()

    def to_dict(self) -> dict[str, Any]:
        """The fields that `--json` prints; None for a `logprob` that a server does not tell."""
        names = ("prompt", "completion", "finish_reason", "tokens", "logprob", "seed", "model")
        values = {name: getattr(self, name) for name in names}
        return values | {"logprob": None if math.isnan(self.logprob) else self.logprob}


@dataclass(frozen=True)
class Classification:
    """A text's label; `str()` is the label."""

    text: str
    label: str
    probabilities: dict[str, float]  # of every label, likeliest first
    model: str

    def __str__(self) -> str:
        return self.label

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return dict(vars(self))
