"""How an option is declared: a dataclass field with its help text and its range, checked wherever it is set."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
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


def flag_of(name: str) -> str:
    """The flag of the option `name`: "--top-p" of "top_p"."""
    return "--" + name.replace("_", "-")


def field_of(flag: str) -> str:
    """The name of an option in Python, however a person spells it: "top_p" of "--top-p"."""
    return flag.strip().lstrip("-").replace("-", "_")


def find_known_name(name: str, known: Iterable[str]) -> str | None:
    """Return the one of the `known` names that means what other programs call `name`, or None."""
    known = set(known)
    name = field_of(name)
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
    name: str | None = None,
    above: float | None = None,
    min: float | None = None,
    max: float | None = None,
    secret: bool = False,
    is_argument: bool = False,
    **typer: Any,
) -> Any:
    """A field of a dataclass, or a parameter of a command, with its help text and its range.

    name: of the flag, if it is not that of the field. above: a bound that the value must exceed. secret: it is in no
    message and no repr. typer: more arguments of `typer.Option`.
    """
    metadata = {"help": help, "short": short, "name": name, "is_argument": is_argument, "typer": typer}
    metadata["bounds"] = {"above": above, "min": min, "max": max}
    return field(default=default, repr=not secret, metadata=metadata)


def argument(default: Any = MISSING, *, help: str, **typer: Any) -> Any:
    """A parameter of a command that is given by its place. It may be empty."""
    return option(default, help, is_argument=True, **typer)


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
_WORDS = {"true": True, "false": False, "null": None}
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are not UTF-8
_hints = functools.cache(get_type_hints)


def kinds_of(group: type["Options"]) -> dict[str, Any]:
    """The type of each field. Where None is the default, the type without None."""
    hints = _hints(group)  # type: ignore[arg-type]  # mypy takes its __hash__ for that of an instance
    return {f.name: hints[f.name] if f.default is not None else get_args(hints[f.name])[0] for f in fields(group)}


def _is(value: Any, kind: Any) -> bool:
    """Whether `value` is of this kind. A whole number is a float as well; True is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_is(item, get_args(kind)[0]) for item in value)
    return isinstance(value, int | float if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def _name_of(kind: Any) -> str:
    """What a message calls a value of this kind."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return _NAMES.get(kind) or f"a list, each {_name_of(get_args(kind)[0])}"


def _read(text: Any, kind: Any) -> Any:
    """The value of this kind that `text` spells; `text` itself if it spells none, which the check then refuses."""
    if isinstance(text, list):
        return [_read(item, kind) for item in text]
    if not isinstance(text, str) or not text or _is(text, kind) or _is([text], kind):
        return text
    for convert in (int, float, Path, lambda word: _WORDS[word.lower()]):
        with contextlib.suppress(ValueError, KeyError):
            value = convert(text)
            if value is None or _is(value, kind) or _is([value], kind):
                return value
    return text


def _find_fault(value: Any, above: float | None, min: float | None, max: float | None) -> str | None:
    """What is wrong with a text or a number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "it is not UTF-8 text" if _HALF_PAIR.search(str(value)) else None
    # Finite; a whole number also within 64 bits.
    is_finite = abs(value) < 2**63 if isinstance(value, int) else abs(value) <= sys.float_info.max
    is_inside = is_finite and (min is None or value >= min) and (max is None or value <= max)
    if is_inside and (above is None or value > above):
        return None
    lower = f"more than {above}" if above is not None else "finite" if min is None else f"at least {min}"
    return f"it must be {lower}" + ("" if max is None else f", at most {max}")


def _plain(value: Any) -> Any:
    """A path as text, a tuple as a list, numpy's number as Python's."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value.item() if hasattr(value, "item") else value


@dataclass(frozen=True, kw_only=True)
class Options:
    """A group of options: Python, recipes and flags meet the same checks. A lone value stands for a list of one."""

    named_by: ClassVar[str | None] = None  # the field that a lone text sets: ModelOptions.make("gpt2")
    is_literal: ClassVar[bool] = False  # whether texts are meant as they are, without `unescape`

    def __post_init__(self) -> None:
        kinds = kinds_of(type(self))
        for f in fields(self):
            kind, value = kinds[f.name], getattr(self, f.name)
            if value is None and f.default is None:
                continue
            value = value if kind is Path else _plain(value)
            value = [value] if _is([value], kind) else value
            object.__setattr__(self, f.name, value)
            if not _is(value, kind):
                self._refuse(f.name, f"it must be {_name_of(kind)}")
            for item in value if isinstance(value, list) else [value]:
                if item == "" and not f.metadata["is_argument"]:
                    self._refuse(f.name, "it must not be empty")
                if fault := _find_fault(item, **f.metadata["bounds"]):
                    self._refuse(f.name, fault)
            if kind is float:  # transformers takes a temperature of 2.0, not of 2
                object.__setattr__(self, f.name, float(getattr(self, f.name)))

    def _refuse(self, name: str, why: str) -> NoReturn:
        f = next(f for f in fields(self) if f.name == name)
        label = name.upper() if f.metadata["is_argument"] else flag_of(name)
        raise OptionError(f"{label} is {repr(getattr(self, name)) if f.repr else 'secret'}: {why}")

    @classmethod
    def read(cls, texts: Mapping[str, Any]) -> Self:
        """The options that a command line or a recipe gives as texts and lists of texts."""
        kinds = kinds_of(cls)
        return cls(**{name: _read(text, kinds[name]) for name, text in texts.items()})

    @classmethod
    def read_value(cls, name: str, text: str) -> Any:
        """The value that `text` gives to one option. Raises OptionError if it cannot be one."""
        value = _read(text, kinds_of(cls)[name])
        cls(**{name: value})
        return value

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    @classmethod
    def find_name(cls, text: str) -> str | None:
        """The field that a person means by its name or its flag, with or without hyphens: "stop", "-n", "top-p"."""
        for f in fields(cls):
            if field_of(text) in map(field_of, filter(None, (f.name, f.metadata["name"], f.metadata["short"]))):
                return f.name
        return None

    @classmethod
    def make(cls, options: Self | str | os.PathLike[str] | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """`options` with `overrides`. A lone text sets the field `named_by`; an unknown name is a TypeError."""
        made: Self = divide(overrides or {}, (cls, options))[0]
        return made


def unescape(text: str) -> str:
    r"""What is meant by a text that was typed at a shell, where \n and \t are two characters each."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


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
            if group.named_by == "model" and not isinstance(options, Mapping | Options):
                raise TypeError(f"a model is a name, a folder or (model, tokenizer), not a {kind}")
            raise TypeError(f"options are {group.__name__}(...), not a {kind}: pass its items as keywords, **{kind}")
        chosen = {name: value for name, value in overrides.items() if owner[name] is group}
        made.append(replace(options, **chosen) if options else group(**chosen))
    return made
