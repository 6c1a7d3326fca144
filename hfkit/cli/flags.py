"""Teach Typer that a dataclass parameter is a group of flags, and that `--config` fills them from a recipe."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hfkit import console
from hfkit.errors import HfkitError, OptionError
from hfkit.recipes import read_values

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
CorpusArgument = Annotated[list[str], typer.Argument(help="Files, folders, globs, hf://NAME, or what `prepare` made.")]


def flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command: each field of its dataclass parameters becomes a flag, in a help panel of its own.

    Every command gets `--config`, `--quiet`, `--verbose` and `--debug` as well.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)}

    @functools.wraps(command)
    def call(config: Path | None, quiet: bool, verbose: bool, debug: bool, **values: Any) -> Any:
        console.configure(quiet=quiet, verbose=verbose, debug=debug)  # `config` was used by _read_recipe
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        try:
            return command(**values)
        except EOFError as error:  # Typer would take it for Ctrl-D
            raise HfkitError(f"a file ends too early: {error}") from error

    parameters = [p for name, p in signature.parameters.items() if name not in groups]
    for group in groups.values():
        parameters += _parameters(group)
    call.__signature__ = signature.replace(parameters=[*parameters, *_COMMON])  # type: ignore[attr-defined]
    return call


def _parameters(group: type) -> list[inspect.Parameter]:
    types = get_type_hints(group)
    panel = f"{group.__name__.removesuffix('Options')} options"
    return [
        _flag(field.name, types[field.name], field.default, field.metadata, rich_help_panel=panel)
        for field in fields(group)
    ]


def _flag(name: str, type_: Any, default: Any, metadata: Any, **extra: Any) -> inspect.Parameter:
    long, short = "--" + name.replace("_", "-"), metadata.get("short")
    if type_ in (bool, bool | None) and metadata.get("negatable", True):
        long += "/--no-" + name.replace("_", "-")
    names = [long, short] if short else [long]
    help = metadata["help"].replace("[", r"\[")  # "[default: 3]" is no markup
    option = typer.Option(*names, help=help, **metadata.get("typer", {}), **extra)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, option]
    )


def _read_recipe(context: typer.Context, path: Path | None) -> None:
    """Make the recipe's values the defaults of this command; flags on the command line still win."""
    if path:
        many = {
            p.name: getattr(p, "multiple", False) or p.nargs == -1
            for p in context.command.params
            if p.name and p.name != "config"
        }
        values = read_values(path, many)
        for name, value in values.items():
            if many[name] and not isinstance(value, list):
                values[name] = [value]
            elif isinstance(value, dict) or (isinstance(value, list) and not many[name]):
                raise OptionError(f"{name} is {value} ({path}): it takes one value")
        # A value goes through the same parser as a flag's text, so that both meet the same errors.
        context.default_map = values


_COMMON = [
    _flag(
        "config",
        Path | None,
        None,
        {"help": "YAML recipe: its values replace the defaults, flags win.", "short": "-c"},
        is_eager=True,
        callback=_read_recipe,
    ),
    _flag("quiet", bool, False, {"help": "No notes on stderr.", "short": "-q", "negatable": False}),
    _flag("verbose", bool, False, {"help": "Tell what was chosen, and speeds.", "short": "-v", "negatable": False}),
    _flag("debug", bool, False, {"help": "Show the traceback of an error.", "negatable": False}),
]
