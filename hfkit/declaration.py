"""How an option is declared: a dataclass field with its help and its range, which hold wherever it is set."""

import functools
import numbers
import os
import re
import sys
from dataclasses import field, fields
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


def _plain(value: Any) -> Any:
    """A path as text, a list for a tuple, Python's number for numpy's."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value.item() if hasattr(value, "item") else value


class Options:
    """Types and ranges hold for Python and recipes as for flags; a lone value stands for a list of one."""

    def __post_init__(self) -> None:
        for f in fields(self):
            type_ = _hints(type(self))[f.name]
            value = _plain(getattr(self, f.name))
            value = [value] if _is([value], type_) else value
            object.__setattr__(self, f.name, value)
            if not _is(value, type_):
                wanted = type_.__name__ if isinstance(type_, type) else str(type_).removesuffix(" | None")
                choices = re.findall(r"'(.*?)'", wanted)
                self._refuse(f.name, f"it must be {'one of ' + ', '.join(choices) if choices else wanted}")
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                continue
            low, high, above = f.metadata["typer"].get("min"), f.metadata["typer"].get("max"), f.metadata["above"]
            finite = abs(value) <= sys.float_info.max  # neither infinity nor an integer that no float can be
            inside = (low is None or value >= low) and (high is None or value <= high) and finite
            if not inside or (above is not None and value <= above):
                lower = f"more than {above}" if above is not None else "finite" if low is None else f"at least {low}"
                self._refuse(f.name, f"it must be {lower}" + ("" if high is None else f", at most {high}"))
            if _is(0.5, type_):  # transformers takes a temperature of 2.0, not of 2
                object.__setattr__(self, f.name, float(value))

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise OptionError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}: {why}")

    @classmethod
    def names(cls) -> list[str]:
        return [f.name for f in fields(cls)]  # type: ignore[arg-type]

    @classmethod
    def make(cls, options: Self | None, overrides: dict[str, Any]) -> Self:
        """`options` with `overrides`; an unknown name is a TypeError, as for any Python argument."""
        return divide(overrides, (cls, options))[0]


def divide(overrides: dict[str, Any], *groups: tuple[type, Any]) -> list[Any]:
    """For each (class, instance or None) of `groups` an instance with the `overrides` that are its fields."""
    known = {name: group for group, _ in groups for name in group.names()}
    unknown = [name for name in overrides if name not in known]
    if unknown:
        from difflib import get_close_matches

        close = get_close_matches(unknown[0], known, n=1)
        raise TypeError(f"unknown option {unknown[0]!r}" + (f": did you mean {close[0]!r}?" if close else ""))
    return [
        group(**{**(vars(given) if given else {}), **{n: v for n, v in overrides.items() if known[n] is group}})
        for group, given in groups
    ]
