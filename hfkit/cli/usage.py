"""The help of a command, with examples; and one sentence for each mistake on a command line."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hfkit.declaration import find_known_name

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

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


def _keep_text(params: Any) -> Any:
    """Pass on each value as it was typed. Typer would import pydantic, only to check that a text is a text."""
    for param in params:
        param.process_value = lambda ctx, value, param=param: (
            param.callback(ctx, param, value) if param.callback else value
        )
    return params


class Group(TyperGroup):
    """A list of commands."""

    def get_params(self, ctx: Context) -> Any:
        """Return the flags that stand before a command."""
        return _keep_text(super().get_params(ctx))


class Command(TyperCommand):
    """A command whose help fits 80 columns, cuts no name, and ends with the examples of its docstring."""

    def __init__(self, name: str, *, help: str, **settings: Any) -> None:
        help, _, examples = help.partition("\n\nExamples:\n")
        super().__init__(name, help=help, **settings)
        self.examples = [line.strip() for line in examples.splitlines()]

    def get_params(self, ctx: Context) -> Any:
        """Return the arguments and flags."""
        return _keep_text(super().get_params(ctx))

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Return the parts of the usage line, without Typer's braces around arguments that are needed."""
        return [re.sub("[{}]", "", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the arguments and options, a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            title = getattr(param, "rich_help_panel", None) or title
            sections.setdefault(title, []).append((_names(param), param.help or ""))
        for title, rows in filter(lambda section: section[1], sections.items()):
            with formatter.section(title):
                formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
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
