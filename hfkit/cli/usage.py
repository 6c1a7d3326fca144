"""The help of a command, with examples; and one sentence for each mistake on a command line."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from hfkit.declaration import find_known_name

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

EXAMPLES = {
    "generate": (
        'hfkit generate "Once upon a time"',
        'hfkit generate "The king" -m gpt2 -n 50 -t 0.7 --top-p 0.9 --seed 1',
        "hfkit generate -i prompts.txt -o texts.jsonl",
    ),
    "chat": ("hfkit chat", "hfkit chat -m runs/chat -t 0.7"),
    "finetune": (
        "hfkit finetune corpus.txt",
        "hfkit finetune corpus.txt -m gpt2 --lora --num-train-epochs 5",
        "hfkit finetune --config generation-stories",
    ),
    "pretrain": ("hfkit pretrain corpus.txt --size mini",),
    "prepare": ("hfkit prepare corpus.txt",),
    "evaluate": ("hfkit evaluate held-out.txt", "hfkit evaluate held-out.txt -m bundled -m runs/corpus"),
    "inspect": ('hfkit inspect "The cat sat."', 'hfkit inspect "The cat sat." --attention -o heads.html'),
    "classify": (
        'hfkit classify "What a film!" --labels positive --labels negative',
        "hfkit classify -i reviews.txt -m runs/sentiment",
    ),
    "answer": (
        'hfkit answer "Who has a hat?" --context story.txt',
        'echo "Ann has a hat." | hfkit answer "Who has a hat?"',
    ),
    "tune": ("hfkit tune corpus.txt -n 20", "hfkit tune corpus.txt --search learning_rate=1e-5..1e-3"),
    "copy": ("hfkit recipes copy generation-stories",),
    "report": ("hfkit report runs/a runs/b -o runs.html",),
    "export": ("hfkit export runs/corpus -o my-model",),
    "info": ("hfkit info", "hfkit info -m gpt2"),
    "warm": ("hfkit warm", "hfkit warm --idle 2h", "hfkit warm --stop"),
}
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
_METAVARS = {"int": "N", "int range": "N", "float": "X", "float range": "X", "str": "TEXT", "path": "PATH"}


class Command(TyperCommand):
    """A command whose help fits 80 columns, cuts no name, and ends with examples."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Return the parts of the usage line, arguments in capitals."""
        return [piece.upper().replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the arguments and options, a section for each group."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            title = "Arguments" if param.param_type_name == "argument" else "Options"
            title = getattr(param, "rich_help_panel", None) or title
            sections.setdefault(title, []).append((_names(param, ctx), _help_text(param, ctx)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=28)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                formatter.write("".join(f"  {example}\n" for example in examples))


def _value_kind(param: Any, ctx: Context) -> str:
    """Return what kind of value an option takes: `int range`, `str`, `auto|float32`, or its own placeholder."""
    kind = str(param.metavar or param.display_type_rich(ctx=ctx).strip("<>"))
    return kind.removeprefix("list[").removesuffix("]")


def _names(param: Any, ctx: Context) -> str:
    """Return the names of an option with a placeholder for its value: `-t, --temperature X`, `--[no-]lora`."""
    if param.param_type_name == "argument":
        return str(param.name).upper() + ("..." if param.nargs == -1 else "")
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        return names.replace("--", "--[no-]")
    kind = _value_kind(param, ctx)
    return names if param.is_flag else f"{names} {_METAVARS.get(kind, 'NAME' if '|' in kind else kind)}"


def _help_text(param: Any, ctx: Context) -> str:
    """Return the help text, with the values that there are and the default."""
    text = param.help or ""
    if "|" in (kind := _value_kind(param, ctx)):
        text += f" One of {kind.replace('|', ', ')}."
    if (highest := getattr(param, "max", None)) is not None:
        text += f" At most {highest:g}."
    if param.default not in (None, False, True, ()) and not param.required and "[default" not in text:
        text += f" [default: {param.default}]"
    return text


def explain_usage(error: typer.TyperException) -> str:
    """Return one sentence for a usage error of Typer: what is wrong, and what to write."""
    match type(error).__name__:
        case "NoSuchOption":
            return _explain_option(error)
        case "MissingParameter":
            return _explain_missing(error)
        case "BadParameter":
            return _explain_value(error)
        case "BadOptionUsage":
            name = getattr(error, "option_name", "")
            if "requires" in error.message:
                return f"{name} needs a value"
            hint = f": write the prompt itself, such as {EXAMPLES['generate'][0]}" if name == "--prompt" else ""
            return f"{name} takes no value{hint}"
    if unknown := re.fullmatch(r"No such command '(.*?)'\..*", error.message, re.DOTALL):
        return _explain_command(unknown[1], error)
    if extra := re.fullmatch(r"Got unexpected extra argument\(s\) \((.*)\)", error.message, re.DOTALL):
        return _explain_extra(extra[1], error)
    return f"{error.format_message()} (see --help)"


def _path_of(error: Any) -> str:
    """Return the command as typed, such as `hfkit recipes copy`."""
    return "hfkit" + str(error.ctx.command_path).partition("hfkit")[2]


def _explain_option(error: Any) -> str:
    name, command, path = error.option_name, error.ctx.command, _path_of(error)
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
        example = EXAMPLES.get(command.name, (path,))[0]
        return f"unknown option {name}: write the {known} itself, such as {example}"
    close = get_close_matches(name, [flag for flag in flags.values() if flag.startswith("--")], n=1)
    return f"unknown option {name}: " + (f"did you mean {close[0]}?" if close else f"see {path} --help")


def _explain_missing(error: Any) -> str:
    path, name = _path_of(error), error.param.name
    example = EXAMPLES.get(error.ctx.command.name, (f"{path} {name.upper()}",))[0]
    return f"{path} needs a {name}, such as {example}"


def _explain_value(error: Any) -> str:
    """Describe a value that pydantic refused, in the words that `Options` uses for it."""
    name = max(error.param.opts, key=len) if error.param else "a value"
    faults: list[Any] = getattr(error.__context__, "errors", list)()
    if not faults:
        return f"{name}: {error.message} (see --help)"
    fault = faults[0]
    bounds = fault.get("ctx", {})
    wanted = {
        "float_parsing": "a number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "less_than_equal": f"at most {bounds.get('le', 0):g}",
        "greater_than_equal": f"at least {bounds.get('ge', 0):g}",
    }.get(fault["type"])
    if choices := re.findall(r"'(.*?)'", fault["msg"].partition("is not one of")[2]):
        wanted = f"one of {', '.join(choices)}"
    return f"{name} is {fault['input']!r}: " + (f"it must be {wanted}" if wanted else fault["msg"])


def _explain_command(name: str, error: Any) -> str:
    commands = error.ctx.command.commands
    if name in _COMMANDS and error.ctx.parent is None:
        return f"unknown command {name!r}: hfkit calls it {_COMMANDS[name]}"
    if " " in name:
        return f'{name!r} is not a command: hfkit generate "{name}" continues a text'
    close = get_close_matches(name, commands, n=1)
    return f"unknown command {name!r}: " + (
        f"did you mean {close[0]!r}?" if close else f"see {_path_of(error)} --help"
    )


def _explain_extra(extra: str, error: Any) -> str:
    path, name = _path_of(error), error.ctx.command.name
    values = [error.ctx.params.get(p.name) for p in error.ctx.command.params if p.param_type_name == "argument"]
    if name in _TEXT_COMMANDS and values:
        return f'a text of several words needs quotes: {path} "{values[0]} {extra}"'
    taken = f"only {values[0]!r}" if values else "options alone"
    return f"unexpected {extra!r}: {path} takes {taken} here (see --help)"
