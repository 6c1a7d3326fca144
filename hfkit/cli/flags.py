"""Teach Typer that a dataclass parameter is a group of flags, and that `--config` fills them from a recipe."""

import functools
import glob
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hfkit import console
from hfkit.declaration import Options
from hfkit.errors import HfkitError, OptionError
from hfkit.recipes import read_values, shipped

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
CorpusArgument = Annotated[list[str], typer.Argument(help="Files, folders, globs, hf://NAME, or what `prepare` made.")]


def flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command: each field of its `Options` parameters becomes a flag, in a help panel of its own.

    Every command gets `--config`, `--quiet`, `--verbose` and `--debug` as well.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and issubclass(parameter.annotation, Options)
    }

    @functools.wraps(command)
    def call(config: Path | None, quiet: bool, verbose: bool, debug: bool, **values: Any) -> Any:
        console.configure(quiet=quiet, verbose=verbose, debug=debug)  # _read_recipe has used `config`
        for name, group in groups.items():
            values[name] = group(**{field: values.pop(field) for field in group.names()})
        try:
            return command(**values)
        except EOFError as error:  # Typer would take it for Ctrl-D
            raise HfkitError(f"a file ends too early: {error}") from error

    parameters = [parameter for name, parameter in signature.parameters.items() if name not in groups]
    for group in groups.values():
        parameters += _group_parameters(group)
    call.__signature__ = signature.replace(parameters=[*parameters, *_COMMON])  # type: ignore[attr-defined]
    return call


def _group_parameters(group: type[Options]) -> list[inspect.Parameter]:
    types = get_type_hints(group)
    panel = f"{group.__name__.removesuffix('Options')} options"
    return [
        _flag(field.name, types[field.name], field.default, field.metadata, rich_help_panel=panel)
        for field in fields(group)
    ]


def _flag(name: str, type_: Any, default: Any, metadata: Mapping[str, Any], **extra: Any) -> inspect.Parameter:
    long, short = "--" + name.replace("_", "-"), metadata.get("short")
    if type_ in (bool, bool | None) and metadata.get("negatable", True):
        long += "/--no-" + name.replace("_", "-")
    names = [long, short] if short else [long]
    keywords: dict[str, Any] = {"help": metadata["help"], **metadata.get("typer", {}), **extra}
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[type_, typer.Option(*names, **keywords)],
    )


def _read_recipe(context: typer.Context, path: Path | None) -> None:
    """Make the recipe's values the defaults of this command; flags on the command line still win."""
    if not path:
        return
    takes_list = {
        parameter.name: getattr(parameter, "multiple", False) or parameter.nargs == -1
        for parameter in context.command.params
        if parameter.name and parameter.name != "config"
    }
    values = read_values(path, takes_list)
    for name, value in values.items():
        if takes_list[name] and not isinstance(value, list):
            values[name] = [value]
        elif isinstance(value, dict) or (isinstance(value, list) and not takes_list[name]):
            raise OptionError(f"{name} is {value} ({path}): it takes one value")
    # Typer parses these values like the text of a flag, so both meet the same checks.
    context.default_map = values


def _complete_recipe(incomplete: str) -> list[str]:
    """Return shipped recipes and files for tab completion."""
    return [name for name in shipped() if name.startswith(incomplete)] + glob.glob(f"{glob.escape(incomplete)}*")


_COMMON = [
    _flag(
        "config",
        Path | None,
        None,
        {"help": "YAML recipe: its values replace the defaults, flags win.", "short": "-c"},
        is_eager=True,
        callback=_read_recipe,
        autocompletion=_complete_recipe,
    ),
    _flag("quiet", bool, False, {"help": "No notes on stderr.", "short": "-q", "negatable": False}),
    _flag("verbose", bool, False, {"help": "Print choices made and speeds.", "short": "-v", "negatable": False}),
    _flag("debug", bool, False, {"help": "Show the traceback of an error.", "negatable": False}),
]
