"""How an option is declared: a dataclass field with its help text and its range, checked wherever it is set."""

import functools
import numbers
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, NoReturn, Self, get_args, get_origin, get_type_hints

from hfkit.errors import OptionError

# hfkit's name of an option or argument, and what tutorials and other programs call it.
_ALSO_CALLED = {
    "max_new_tokens": "max_length length max_tokens num_tokens n_tokens n_predict",
    "block_size": "max_length max_seq_length max_seq_len seq_length sequence_length context_length",
    "num_return_sequences": "num_samples nsamples n_samples num_sequences",
    "temperature": "temp greedy",
    "repetition_penalty": "repeat_penalty",
    "num_beams": "beams beam_size beam_width",
    "stop_strings": "stop_sequences stop_words",
    "do_sample": "sample sampling",
    "truncate": "truncation",
    "seed": "random_seed random_state",
    "learning_rate": "lr",
    "num_train_epochs": "epochs n_epochs num_epochs epoch max_epochs",
    "max_steps": "steps num_steps train_steps max_iters iterations",
    "per_device_train_batch_size": "batch_size train_batch_size bs",
    "gradient_accumulation_steps": "grad_accum accumulation_steps accumulate_grad_batches",
    "warmup_steps": "warmup warmup_ratio",
    "weight_decay": "wd",
    "early_stopping_patience": "patience",
    "eval_file": "validation_file val_file eval_data eval_dataset validation_data",
    "eval_fraction": "validation_split validation_split_percentage val_split test_size",
    "lora": "use_lora use_peft peft",
    "lora_r": "rank lora_rank",
    "save_steps": "save_every checkpoint_every",
    "eval_steps": "eval_every",
    "num_processes": "gpus num_gpus nproc_per_node",
    "activation_checkpointing": "gradient_checkpointing",
    "model": "model_name model_path model_name_or_path pretrained_model_name_or_path checkpoint run",
    "quantize": "load_in_8bit load_in_4bit quantization",
    "output_dir": "output out out_dir save_dir",
    "output": "output_dir output_file out",
    "input": "input_file file prompts prompt_file",
    "corpus": "train_file train_data data dataset train_dataset file_path text_file",
    "prompt": "text input_text inputs",
    "text": "prompt input_text inputs",
    "context": "passage document",
}


def find_known_name(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the `known` names that means what other programs call `name`, or None."""
    known = set(known)
    name = name.strip("-").replace("-", "_")
    return next((ours for ours, theirs in _ALSO_CALLED.items() if ours in known and name in theirs.split()), None)


def explain_unknown_name(name: str, known: Iterable[str]) -> str:
    """Return what to write instead of the unknown option `name`; an empty text if nothing is close."""
    known = list(known)
    if ours := find_known_name(name, known):
        return f"hfkit calls it {ours!r}"
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def option(
    default: Any,
    help: str,
    *,
    short: str | None = None,
    above: float | None = None,
    secret: bool = False,
    **typer: Any,
) -> Any:
    """A dataclass field with its help text.

    `above` is a bound that the value must exceed; a `secret` is in no message and no repr; `typer` are arguments of
    `typer.Option` (`min`, `max` ...).
    """
    metadata = {"help": help, "short": short, "above": above, "typer": typer}
    return field(default=default, repr=not secret, metadata=metadata)


_hints = functools.cache(get_type_hints)


def _is(value: Any, type_: Any) -> bool:
    """Whether `value` is of an annotated type. A whole number is a float as well (numpy's, too); True is neither."""
    origin, parts = get_origin(type_), get_args(type_)
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list | tuple) and all(_is(item, parts[0]) for item in value)
    if origin:  # a union
        return any(_is(value, part) for part in parts)
    kind = {int: numbers.Integral, float: numbers.Real}.get(type_, type_)
    return isinstance(value, kind) and isinstance(value, bool) == (type_ is bool)


def _plain(value: Any) -> Any:
    """A path as text, a tuple as a list, numpy's number as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value.item() if hasattr(value, "item") else value


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options: Python and recipes meet the same checks as flags. A lone value stands for a list of one."""

    named_by: ClassVar[str | None] = None  # the field that a lone text sets: ModelOptions.make("gpt2")

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]  # mypy takes its __hash__ for that of an instance
        for f in fields(self):
            type_ = hints[f.name]
            value = _plain(getattr(self, f.name))
            value = [value] if _is([value], type_) else value
            object.__setattr__(self, f.name, value)
            if not _is(value, type_):
                wanted = type_.__name__ if isinstance(type_, type) else str(type_).removesuffix(" | None")
                choices = re.findall(r"'(.*?)'", wanted)
                self._refuse(f.name, f"it must be {'one of ' + ', '.join(choices) if choices else wanted}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._check_range(f.name, value, above=f.metadata["above"], **f.metadata["typer"])
                if _is(0.5, type_):  # transformers takes a temperature of 2.0, not of 2
                    object.__setattr__(self, f.name, float(value))

    def _check_range(
        self, name: str, value: float, *, above: float | None, min: float | None = None, max: float | None = None
    ) -> None:
        # Not infinite, and no whole number that has no place in 64 bits.
        is_finite = abs(value) < 2**63 if isinstance(value, int) else abs(value) <= sys.float_info.max
        is_inside = is_finite and (min is None or value >= min) and (max is None or value <= max)
        if not is_inside or (above is not None and value <= above):
            lower = f"more than {above}" if above is not None else "finite" if min is None else f"at least {min}"
            self._refuse(name, f"it must be {lower}" + ("" if max is None else f", at most {max}"))

    def _refuse(self, name: str, why: str) -> NoReturn:
        is_secret = not next(f for f in fields(self) if f.name == name).repr
        value = "secret" if is_secret else repr(getattr(self, name))
        raise OptionError(f"--{name.replace('_', '-')} is {value}: {why}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def make(cls, options: Self | str | os.PathLike[str] | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """`options` with `overrides`. A lone text sets the field `named_by`; an unknown name is a TypeError."""
        made: Self = divide(overrides or {}, (cls, options))[0]
        return made


def set_fields(options: Options) -> dict[str, Any]:
    """The fields that have a value, by name."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


def divide(overrides: Mapping[str, Any], *groups: tuple[type[Options], Any]) -> list[Any]:
    """For each (class, options) of `groups` the options with those of the `overrides` that are its fields.

    options: an instance, None for the defaults, or for a class with `named_by` a text or path.
    """
    owner = {name: group for group, _ in groups for name in group.names()}
    if unknown := [name for name in overrides if name not in owner]:
        hint = explain_unknown_name(unknown[0], [*owner, "model"])
        raise TypeError(f"unknown option {unknown[0]!r}" + (f": {hint}" if hint else ""))
    made = []
    for group, options in groups:
        if group.named_by and isinstance(options, str | os.PathLike):
            options = group(**{group.named_by: options})
        if options is not None and not isinstance(options, group):
            kind = type(options).__name__
            raise TypeError(f"options are {group.__name__}(...), not a {kind}: pass its items as keywords, **{kind}")
        chosen = {name: value for name, value in overrides.items() if owner[name] is group}
        made.append(group(**{**(vars(options) if options else {}), **chosen}))
    return made
