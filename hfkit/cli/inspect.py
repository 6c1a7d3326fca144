"""`hfkit inspect` at a shell: colours on a terminal, plain columns elsewhere, pictures and pages in files."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfkit import console
from hfkit.cli import prompt_files
from hfkit.cli.flags import Json, flags
from hfkit.errors import HfkitError, OptionError
from hfkit.options import InspectOptions, ModelOptions
from hfkit.storage import make_writable, write_bytes

if TYPE_CHECKING:
    from hfkit.inference.inspection import Inspection, Token


@flags
def inspect(
    model: ModelOptions,
    options: InspectOptions,
    text: Annotated[str | None, typer.Argument(help="Text to look at; without it, stdin is read.")] = None,
    json: Json = False,
) -> None:
    """Show how likely each token of a text is, what would come next, and what heads look at."""
    check_output(options)  # before torch is imported
    text = prompt_files.read_prompt(text, wanted="text to inspect")
    write_inspection(text, model, options, json=json)


def write_inspection(text: str, model: ModelOptions, options: InspectOptions, *, json: bool) -> None:
    """Inspect `text`, print what was found, and write the file that was asked for."""
    from hfkit.inference.inspection import inspect, to_page
    from hfkit.reporting.pictures import draw_attention

    path = check_output(options)
    found = inspect(text, model=model, options=options)
    layers = range(0 if found.attention is None else len(found.attention))
    if options.layer is not None and options.layer not in layers:
        raise OptionError(f"--layer is {options.layer}: {found.model} has layers 0 to {layers[-1]}")
    if json:
        console.write(dumps(found.to_dict(), ensure_ascii=False) + "\n")
    else:
        _write_text(found)
        _write_next(found)
    if path:
        if path.suffix == ".png":
            content = draw_attention(found.attention, found.words, options.layer)
        else:
            drawn = layers if options.layer is None else [options.layer]
            pictures = {layer: draw_attention(found.attention, found.words, layer) for layer in drawn}
            content = to_page(found, pictures).encode()
        write_bytes(path, content)
        console.note(f"written: {path}")


def check_output(options: InspectOptions) -> Path | None:
    """The file to write, if there is one; before a model is loaded."""
    if options.layer is not None and not options.attention:
        raise OptionError("--layer chooses what --attention draws: add --attention")
    if not options.output and not options.attention:
        return None
    path = Path(options.output or "attention.png")
    if path.suffix not in (".png", ".html"):
        raise OptionError(f"--output is {path}: it must end in .png or .html")
    if path.suffix == ".png" and not options.attention:
        raise OptionError("--output takes a .png with --attention only: write a .html")
    if path.exists() and not options.overwrite:
        raise HfkitError(f"{path} exists: --overwrite replaces it, or name another --output")
    make_writable(path.parent)
    return path


def _write_text(found: Inspection) -> None:
    if not sys.stdout.isatty():
        for token in found.tokens:
            bits, rank = ("-", "-") if token.bits is None else (f"{token.bits:.2f}", str(token.rank))
            console.write(f"{bits:>7} {rank:>6}  {token.text}\n")
    else:
        from rich.console import Console
        from rich.text import Text

        line = Text()
        for token in found.tokens:
            line.append(console.printable(token.text).replace("·", " "), style=_style(token))
            line.append("\n" if "↵" in token.text else "")
        Console(highlight=False).print(line)
    console.write(f"{found.bits:.1f} bits in {len(found.tokens)} tokens under {console.printable(found.model)}\n")


def _style(token: Token) -> str:
    """From no colour, for what was expected, to red, for what was not."""
    if token.bits is None or token.bits < 1:
        return ""
    return ("on dark_green" if token.bits < 4 else "on dark_goldenrod" if token.bits < 8 else "on dark_red") + " white"


def _write_next(found: Inspection) -> None:
    from hfkit.inference.inspection import cell

    rows = [[cell(row[name]) for name in ("text", "probability", *found.left)] for row in found.following]
    console.write_table(("next", "alone", *(f"{name}\n{count:,} left" for name, count in found.left.items())), rows)
