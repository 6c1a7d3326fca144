"""`hfkit inspect` at a shell: colours on a terminal, plain columns elsewhere; pictures and pages in files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfkit import console
from hfkit.cli import prompt_files
from hfkit.cli.flags import Json, flags
from hfkit.cli.generation_setup import loading
from hfkit.errors import OptionError
from hfkit.options import InspectOptions, ModelOptions
from hfkit.storage import check_free, make_writable, write_bytes

if TYPE_CHECKING:
    from hfkit.inference.inspection import Inspection


@flags
def inspect(
    model: ModelOptions,
    options: InspectOptions,
    text: Annotated[str | None, typer.Argument(help="Text to inspect. [default: stdin]")] = None,
    json: Json = False,
) -> None:
    """Show how likely each token of a text is, what would come next, and what attention heads look at."""
    check_output(options)  # before torch is imported
    text = prompt_files.read_prompt(text, wanted="text to inspect")
    write_inspection(text, model, options, json=json)


def write_inspection(text: str, model: ModelOptions, options: InspectOptions, *, json: bool) -> None:
    """Inspect `text`, print the result, and write the file that was asked for."""
    path = check_output(options)
    with loading(model):
        from hfkit.inference.inspection import inspect, to_page

        inspection = inspect(text, model=model, options=options)
    attention = inspection.attention
    layers = 0 if attention is None else len(attention)
    if options.layer is not None and options.layer >= layers:
        raise OptionError(f"--layer is {options.layer}: {inspection.model} has layers 0 to {layers - 1}")
    if json:
        console.write_json(inspection.to_dict())
    else:
        _write_tokens(inspection)
        _write_next(inspection)
    if path:
        if path.suffix == ".png" and attention is not None:
            from hfkit.reporting.pictures import draw_attention

            content = draw_attention(attention, inspection.words, options.layer)
        else:
            content = to_page(inspection, options.layer).encode()
        write_bytes(path, content)
        console.note(f"written: {path}")


def check_output(options: InspectOptions) -> Path | None:
    """The file to write, if any. Call it before a model is loaded.

    Raises:
        HfkitError: the options contradict each other, or the file exists.
    """
    if options.layer is not None and not options.attention:
        raise OptionError("--layer chooses what --attention draws: add --attention")
    if not options.output and not options.attention:
        return None
    path = Path(options.output or "attention.png")
    if path.suffix not in (".png", ".html"):
        raise OptionError(f"--output is {path}: it must end in .png or .html")
    if path.suffix == ".png" and not options.attention:
        raise OptionError("--output takes a .png with --attention only: write a .html")
    check_free(path, overwrite=options.overwrite, flag="--output")
    make_writable(path.parent)
    return path


def _write_tokens(inspection: Inspection) -> None:
    """The text in colours on a terminal; a line for each token elsewhere, and where colours are not wanted."""
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.text import Text

        line = Text()
        for part in inspection.characters:
            line.append(console.printable(part.text).replace("·", " "), style=_style(part.bits))
            line.append("\n" if "↵" in part.text else "")
        Console(highlight=False).print(line)
    else:
        console.write("".join(f"{line}\n" for line in inspection.lines()))
    model = console.printable(inspection.model)
    console.write(f"{inspection.bits:.1f} bits in {len(inspection.tokens)} tokens under {model}\n")


def _style(bits: float) -> str:
    """No colour for what was expected, red for what was very surprising."""
    if bits < 1:
        return ""
    return ("on dark_green" if bits < 4 else "on dark_goldenrod" if bits < 8 else "on dark_red") + " white"


def _write_next(inspection: Inspection) -> None:
    from hfkit.inference.inspection import cell

    names = ("text", "probability", *inspection.left)
    rows = [[cell(row[name]) for name in names] for row in inspection.following]
    head = ("next", "alone", *(f"{name}\n{count:,} left" for name, count in inspection.left.items()))
    console.write_figures(head, rows)
