"""From a function to a command: its flags, its help with examples, and what to write instead of a mistake.

Its parameters and the fields of its `Options` become flags, and keys of a recipe.
"""

from __future__ import annotations

import copy
import functools
import glob
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, make_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from hfkit import console
from hfkit.declaration import Options, argument, find_known_name, kinds_of, option
from hfkit.errors import HfkitError, OptionError
from hfkit.recipes import read_values, shipped

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

CORPUS = argument(help="Files, folders, globs, hf://NAME, or what `prepare` made.")
JSON = option(False, "Print JSON, for programs.")
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
# What other programs call a command -> what to write.
_COMMANDS = {
    "train": "finetune (continue a model) or pretrain (a new model)",
    **dict.fromkeys(("eval", "test", "score", "perplexity"), "evaluate"),
    **dict.fromkeys(("sample", "predict", "run", "complete", "infer"), "generate"),
    **dict.fromkeys(("search", "sweep", "hyperopt"), "tune"),
    **dict.fromkeys(("convert", "merge", "push", "save"), "export"),
    **{"ask": "answer", "talk": "chat", "tokenize": "prepare", "compare": "report", "list": "recipes"},
    **{"doctor": "info", "env": "info", "version": "--version"},
}
_TEXT_COMMANDS = ("generate", "classify", "inspect", "answer")


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
    own_class = make_dataclass(command.__name__, own_fields, bases=(Options,), frozen=True, kw_only=True)
    classes: list[type[Options]] = [own_class, *groups.values(), CommonFlags]

    @functools.wraps(command)
    def call(ctx: Any, **typed: Any) -> Any:
        texts = {name: text for name, text in typed.items() if text is not None}
        if "config" in texts:
            recipe = CommonFlags.read_value("config", texts["config"])
            texts = read_values(recipe, [name for name in typed if name != "config"]) | texts
        if missing := [f.name for f in fields(own_class) if f.default is MISSING and f.name not in texts]:
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


def _flag(f: Field[Any], kind: Any, group: str) -> inspect.Parameter:
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


def _keep_text(params: Any) -> Any:
    """Pass on each value as it was typed. Typer would import pydantic, only to check that a text is a text."""
    for param in params:
        param.process_value = lambda ctx, value, param=param: (
            param.callback(ctx, param, value) if param.callback else value
        )
    return params


class Group(TyperGroup):
    def get_params(self, ctx: Context) -> Any:
        return _keep_text(super().get_params(ctx))


class Command(TyperCommand):
    """A command whose help fits 80 columns, cuts no name, and ends with the examples of its docstring."""

    def __init__(self, name: str, *, help: str, **settings: Any) -> None:
        help, _, examples = help.partition("\n\nExamples:\n")
        super().__init__(name, help=help, **settings)
        self.examples = [line.strip() for line in examples.splitlines()]

    def get_params(self, ctx: Context) -> Any:
        return _keep_text(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        # Without Typer's braces around arguments that are needed.
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            title = getattr(param, "rich_help_panel", None) or title
            sections.setdefault(title, []).append((_names(param), param.help or ""))
        for title, rows in filter(lambda section: section[1], sections.items()):
            with formatter.section(title):
                formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {example}\n" for example in self.examples))


def _names(param: Any) -> str:
    """Return the names of an option with a placeholder for its value: `-t, --temperature X`, `--[no-]lora`."""
    if param.param_type_name == "argument":
        return f"{param.metavar}{'...' if param.nargs == -1 else ''}"
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        return names.replace("--", "--[no-]")
    return names if param.is_flag else f"{names} {param.metavar}"


def explain_usage(error: typer.TyperException) -> str:
    """Return one sentence for a usage error of Typer: what is wrong, and what to write."""
    match type(error).__name__:
        case "NoSuchOption":
            return _explain_option(error)
        case "BadOptionUsage":
            name = getattr(error, "option_name", "")
            if "requires" in error.message:
                return f"{name} needs a value"
            hint = ": write the prompt itself, such as hfkit generate TEXT" if name == "--prompt" else ""
            return f"{name} takes no value{hint}"
    if unknown := re.fullmatch(r"No such command '(.*?)'\..*", error.message, re.DOTALL):
        return _explain_command(unknown[1], error)
    if extra := re.fullmatch(r"Got unexpected extra argument\(s\) \((.*)\)", error.message, re.DOTALL):
        return _explain_extra(extra[1], error)
    return f"{error.format_message()} (see --help)"


def _explain_option(error: Any) -> str:
    name, command, path = error.option_name, error.ctx.command, error.ctx.command_path
    if subcommands := getattr(command, "commands", {}):
        typed = next((word for word in sys.argv if word in subcommands), None)
        after = f": options stand after the command, {path} {typed} {name} ..." if typed else f": see {path} --help"
        return f"unknown option {name}{after}"
    flags = {param.name: max(param.opts, key=len) for param in command.params}
    if not name.startswith("--") or " " in name:
        return f"unknown option {name}: see {path} --help; a text that begins with - stands after --, {path} -- TEXT"
    if known := find_known_name(name, flags):
        if flags[known].startswith("-"):
            return f"unknown option {name}: hfkit calls it {flags[known]}"
        return f"unknown option {name}: write the {known} itself, such as {command.examples[0]}"
    close = get_close_matches(name, [flag for flag in flags.values() if flag.startswith("--")], n=1)
    return f"unknown option {name}: " + (f"did you mean {close[0]}?" if close else f"see {path} --help")


def _explain_command(name: str, error: Any) -> str:
    if name in _COMMANDS and error.ctx.parent is None:
        return f"unknown command {name!r}: hfkit calls it {_COMMANDS[name]}"
    if " " in name:
        return f'{name!r} is not a command: hfkit generate "{name}" continues a text'
    close = get_close_matches(name, error.ctx.command.commands, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"see {error.ctx.command_path} --help"
    return f"unknown command {name!r}: {hint}"


def _explain_extra(extra: str, error: Any) -> str:
    path, command = error.ctx.command_path, error.ctx.command
    values = [error.ctx.params.get(p.name) for p in command.params if p.param_type_name == "argument"]
    if command.name in _TEXT_COMMANDS and values:
        return f'a text of several words needs quotes: {path} "{values[0]} {extra}"'
    taken = f"only {values[0]!r}" if values else "options alone"
    return f"unexpected {extra!r}: {path} takes {taken} here (see --help)"
