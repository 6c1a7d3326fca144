"""Every option, declared once (standard library only).

A field here is at the same time a flag (`--top-p`), a recipe key (`top_p:`) and a Python argument (`top_p=`).
Names are those of transformers, so `GenerationConfig` receives them unchanged. None means "not set": the model's
own default applies.
"""

import functools
import math
import numbers
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NoReturn, Self, get_args, get_origin, get_type_hints

from hfkit.errors import OptionError


def option(default: Any, help: str, *, short: str | None = None, above: float | None = None, **typer: Any) -> Any:
    """A dataclass field with its help text.

    `typer` takes what `typer.Option` does (`min`, `max`, ...); `above` is a bound that the value must exceed.
    """
    return field(default=default, metadata={"help": help, "short": short, "above": above, "typer": typer})


def set_fields(options: Any) -> dict[str, Any]:
    """The fields that were given a value, by name."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


_hints = functools.cache(get_type_hints)


def _is(value: Any, type_: Any) -> bool:
    """Whether `value` is of an annotated type. A whole number is a float as well (numpy's, too); True is no number."""
    origin, parts = get_origin(type_), get_args(type_)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list | tuple) and all(_is(item, parts[0]) for item in value)
    if origin:  # a union
        return any(_is(value, part) for part in parts)
    kind = {int: numbers.Integral, float: numbers.Real}.get(type_, type_)
    return isinstance(value, kind) and isinstance(value, bool) == (type_ is bool)


class _Checked:
    """Types and ranges hold for Python and recipes as for flags; a lone value stands for a list of one."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value, type_ = getattr(self, f.name), _hints(type(self))[f.name]
            if _is([value], type_):
                value = [value]
                object.__setattr__(self, f.name, value)
            if not _is(value, type_):
                wanted = type_.__name__ if isinstance(type_, type) else str(type_).removesuffix(" | None")
                choices = re.findall(r"'(.*?)'", wanted)
                self._refuse(f.name, f"it must be {'one of ' + ', '.join(choices) if choices else wanted}")
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                continue
            low, high, above = f.metadata["typer"].get("min"), f.metadata["typer"].get("max"), f.metadata["above"]
            inside = (low is None or value >= low) and (high is None or value <= high) and abs(value) < math.inf
            if not inside or (above is not None and value <= above):
                lower = f"more than {above}" if above is not None else "finite" if low is None else f"at least {low}"
                self._refuse(f.name, f"it must be {lower}" + ("" if high is None else f", at most {high}"))

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}: {why}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def make(cls, options: Self | None, overrides: dict[str, Any]) -> Self:
        """`options` with `overrides`; an unknown name is a TypeError, as for any Python argument."""
        unknown = [name for name in overrides if name not in cls.names()]
        if unknown:
            from difflib import get_close_matches

            close = get_close_matches(unknown[0], cls.names(), n=1)
            raise TypeError(f"unknown option {unknown[0]!r}" + (f": did you mean {close[0]!r}?" if close else ""))
        return cls(**{**(vars(options) if options else {}), **overrides})


@dataclass(frozen=True, kw_only=True)
class ModelOptions(_Checked):
    """Which model, in which precision, on which devices."""

    model: str | None = option(
        None,
        "bundled, a Hub name such as gpt2, a folder (model, LoRA adapter) or a .gguf file. [default: $HFKIT_MODEL, "
        "else bundled]",
        short="-m",
    )
    revision: str | None = option(None, "Branch, tag or commit of a model on the Hub.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps ...")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "Precision of the weights.")
    device_map: str | None = option(
        None, "Spread a model over devices with accelerate: auto, balanced, balanced_low_0, sequential."
    )
    quantize: Literal["int8", "int4"] | None = option(None, "Store the weights in 8 or 4 bits: less memory, faster.")
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model: only a local folder, or with --revision COMMIT."
    )


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(_Checked):
    """How text is generated; all but the last eight are fields of `transformers.GenerationConfig`."""

    max_new_tokens: int | None = option(
        None, "Most tokens to add. [default: 100, or what fits the model]", short="-n", min=1
    )
    min_new_tokens: int | None = option(None, "Fewest tokens to add.", min=0)
    do_sample: bool | None = option(None, "Sample (the default), or take the likeliest token.")
    temperature: float | None = option(
        None, "Below 1 sharpens the distribution, above 1 flattens it; 0 is greedy.", short="-t", min=0, max=100
    )
    top_k: int | None = option(None, "Sample among the k likeliest tokens; 0: all.", min=0)
    top_p: float | None = option(None, "Sample among the likeliest tokens that add up to p.", above=0, max=1)
    min_p: float | None = option(None, "Drop tokens less likely than this share of the likeliest.", min=0, max=1)
    top_h: float | None = option(None, "Keep tokens up to this share of the entropy.", above=0, max=1)
    typical_p: float | None = option(None, "Mass of locally typical tokens to keep.", above=0, max=1)
    epsilon_cutoff: float | None = option(None, "Drop tokens less likely than this.", min=0, max=1)
    eta_cutoff: float | None = option(None, "Drop unlikely tokens, adapted to the entropy.", min=0, max=1)
    repetition_penalty: float | None = option(None, "Above 1 makes tokens seen before less likely.", above=0)
    encoder_repetition_penalty: float | None = option(None, "Above 1 keeps close to the prompt.", above=0)
    no_repeat_ngram_size: int | None = option(None, "Never repeat this many tokens in a row.", min=0)
    num_beams: int | None = option(None, "Beam search with so many beams.", min=1)
    length_penalty: float | None = option(None, "Beam search: above 0 favours long texts, below 0 short ones.")
    early_stopping: bool | None = option(None, "Beam search: stop as soon as enough beams have ended.")
    num_return_sequences: int | None = option(None, "Continuations of each prompt.", min=1, max=10_000)
    guidance_scale: float | None = option(None, "Classifier-free guidance: above 1 follows the prompt more.", above=0)
    prompt_lookup_num_tokens: int | None = option(None, "Speculate by copying so many tokens of the prompt.", min=1)
    num_assistant_tokens: int | None = option(None, "Tokens that --assistant-model guesses at a time.", min=1)
    suppress_tokens: list[int] | None = option(None, "Never produce this token id; may be repeated.")
    begin_suppress_tokens: list[int] | None = option(None, "Never begin with this token id; may be repeated.")
    forced_bos_token_id: int | None = option(None, "First token to produce (language codes of translators).", min=0)
    renormalize_logits: bool | None = option(None, "Renormalise after the last processor.")
    use_cache: bool | None = option(None, "Reuse keys and values of earlier tokens.")
    max_time: float | None = option(None, "Stop after so many seconds.", above=0)
    stop_strings: list[str] | None = option(
        None, "End at this text and leave it out; may be repeated.", short="--stop"
    )
    bad_words: list[str] | None = option(None, "Never produce this text; may be repeated.")
    sequence_bias: list[str] | None = option(None, "TEXT=BIAS: add BIAS to the logit of TEXT; may be repeated.")
    negative_prompt: str | None = option(None, "What --guidance-scale moves away from. [default: the last token]")
    watermark: bool | None = option(None, "Mark the text so that transformers' WatermarkDetector can tell it.")
    assistant_model: str | None = option(None, "A smaller model that guesses ahead, for speed.")
    truncate: bool = option(False, "Cut the beginning of a prompt that is too long.")
    seed: int | None = option(
        None, "Random seed; sample k uses SEED+k. [default: drawn, and told]", short="-s", min=0, max=2**63 - 1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and 0 < self.temperature < 1e-3:
            self._refuse("temperature", "it must be 0 (greedy) or at least 0.001")
        for name in ("stop_strings", "bad_words"):
            if "" in (getattr(self, name) or []):
                self._refuse(name, "it takes a text that is not empty")
        if self.max_new_tokens and (self.min_new_tokens or 0) > self.max_new_tokens:
            self._refuse("min_new_tokens", "it must be at most --max-new-tokens")
        if self.prompt_lookup_num_tokens or self.assistant_model:
            for name in ("num_beams", "num_return_sequences"):
                if (getattr(self, name) or 1) > 1:
                    self._refuse(name, "speculation gives one text at a time: leave one of both out")
        self.biases()

    def biases(self) -> list[tuple[str, float]]:
        """`sequence_bias`, TEXT=BIAS each, as pairs."""
        pairs = []
        for given in self.sequence_bias or []:
            text, _, bias = given.rpartition("=")
            try:
                pairs.append((text, float(bias)))
            except ValueError:
                text = ""
            if not text or not math.isfinite(pairs[-1][1]):
                self._refuse("sequence_bias", "write TEXT=BIAS, such as ' rain=-2.5'")
        return pairs
