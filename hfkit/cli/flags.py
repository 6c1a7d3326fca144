"""From a function to a command: its parameters and the fields of its `Options` become flags, and keys of a recipe."""

import copy
import functools
import glob
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from hfkit import console
from hfkit.declaration import Options, argument, kinds_of, option
from hfkit.errors import HfkitError, OptionError
from hfkit.recipes import read_values, shipped

CORPUS = argument(help="Files, folders, globs, hf://NAME, or what `prepare` made.")
JSON = option(False, "Print JSON, for programs.")
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def complete_recipe(incomplete: str) -> list[str]:
    """Return shipped recipes and files for tab completion; Typer chooses those that fit."""
    return [*shipped(), *glob.glob(f"{glob.escape(incomplete)}*")]


@dataclass(frozen=True, kw_only=True)
class CommonFlags(Options):
    """What every command takes."""

    config: Path | None = option(
        None, "YAML recipe: its values replace the defaults, flags win.", short="-c", autocompletion=complete_recipe
    )
    quiet: bool = option(False, "No notes on stderr.", short="-q")
    verbose: bool = option(False, "Print choices made and speeds.", short="-v")
    debug: bool = option(False, "Show the traceback of an error.")


def flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command: every parameter, and every field of its `Options` parameters, becomes a flag or an argument.

    Typer passes on what was typed, as text. Dataclasses read and check it, as they check a recipe or a Python call.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in parameters if p.default is p.empty}
    # A dataclass writes into its fields, and commands share some.
    own_fields = [(p.name, p.annotation, copy.copy(p.default)) for p in parameters if p.name not in groups]
    own = make_dataclass(command.__name__, own_fields, bases=(Options,), frozen=True, kw_only=True)
    classes: list[type[Options]] = [own, *groups.values(), CommonFlags]

    @functools.wraps(command)
    def call(ctx: Any, **typed: Any) -> Any:
        texts = {name: text for name, text in typed.items() if text is not None}
        if "config" in texts:
            recipe = CommonFlags.read_value("config", texts["config"])
            texts = read_values(recipe, [name for name in typed if name != "config"]) | texts
        if missing := [f.name for f in fields(own) if f.default is MISSING and f.name not in texts]:
            raise OptionError(f"{ctx.command_path} needs a {missing[0]}, such as {ctx.command.examples[0]}")
        read: list[Any] = [cls.read({name: texts[name] for name in cls.names() if name in texts}) for cls in classes]
        own_options, *options, common = read
        console.configure(quiet=common.quiet, verbose=common.verbose, debug=common.debug)
        try:
            return command(**vars(own_options), **dict(zip(groups, options, strict=True)))
        except EOFError as error:  # Typer would take it for Ctrl-D
            raise HfkitError(f"a file ends too early: {error}") from error

    typed = [_flag(f, kinds_of(group)[f.name], group.__name__) for group in classes for f in fields(group)]
    ctx = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = inspect.Signature([ctx, *typed])  # type: ignore[attr-defined]
    return call


def _flag(f: "Field[Any]", kind: Any, group: str) -> inspect.Parameter:
    """Return a field as a parameter that Typer makes a flag or an argument of; its value is the text that is typed."""
    item = get_args(kind)[0] if get_origin(kind) is list else kind
    help, highest, more = f.metadata["help"], f.metadata["bounds"]["max"], f.metadata["typer"]
    if get_origin(item) is Literal:
        help += f" One of {', '.join(get_args(item))}."
        more = more | {"autocompletion": lambda: get_args(item)}
    if highest is not None and highest < 2**31:
        help += f" At most {highest:g}."
    if f.default not in (None, False, True, MISSING) and "[default" not in help:
        help += f" [default: {f.default}]"
    more = {"help": help, "metavar": _METAVARS.get(item, "NAME"), **more}
    name = (f.metadata["name"] or f.name).replace("_", "-")
    if f.metadata["is_argument"]:
        info: Any = typer.Argument(**more | {"metavar": name.upper()})
    else:
        names = [f"--{name}/--no-{name}" if kind is bool else f"--{name}", *filter(None, [f.metadata["short"]])]
        panel = f"{group.removesuffix('Options')} options" if group.endswith("Options") else "Options"
        info = typer.Option(*names, rich_help_panel=panel, **more)
    text = bool if kind is bool else str if item is kind else list[str]
    default = inspect.Parameter.empty if f.default is MISSING else None
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[text, info])
