"""`hfkit inspect` at a shell: colours on a terminal, plain columns elsewhere; pictures and pages in files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hfkit import console
from hfkit.cli.flags import JSON, flags
from hfkit.cli.prompts import loading, read_prompt
from hfkit.declaration import argument
from hfkit.errors import OptionError
from hfkit.options import InspectOptions, ModelOptions
from hfkit.storage import check_free, make_writable, write_bytes

if TYPE_CHECKING:
    from hfkit.inference.inspection import Inspection


@flags
def inspect(
    model: ModelOptions,
    options: InspectOptions,
    text: str | None = argument(None, help="Text to inspect; without it, stdin is read."),
    json: bool = JSON,
) -> None:
    """Show how likely a text is, and what would come next.

    With --attention, also what each attention head looks at, on a page.

    Examples:
        hfkit inspect "The cat sat."
        hfkit inspect "The cat sat." --attention -o heads.html
    """
    path = _check_output(options)  # before torch is imported
    text = read_prompt(text, wanted="text to inspect")
    with loading(model):
        from hfkit.inference import inspection

        result = inspection.inspect(text, model=model, options=options)
    attention = result.attention
    layers = 0 if attention is None else len(attention)
    if options.layer is not None and options.layer >= layers:
        raise OptionError(f"--layer is {options.layer}: {result.model} has layers 0 to {layers - 1}")
    if json:
        console.write_json(result.to_dict())
    else:
        _write_tokens(result)
        _write_next(result)
    if path:
        if path.suffix == ".png" and attention is not None:
            from hfkit.reporting.pictures import draw_attention

            content = draw_attention(attention, result.words, options.layer)
        else:
            content = inspection.to_page(result, options.layer).encode()
        write_bytes(path, content)
        console.note(f"written: {path}")


def _check_output(options: InspectOptions) -> Path | None:
    """The file to write, if any. HfkitError if the options contradict each other, or the file exists."""
    if options.layer is not None and not options.attention:
        raise OptionError("--layer chooses what --attention draws: add --attention")
    if not options.output and not options.attention:
        return None
    path = Path(options.output or "attention.html")
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
    console.write(f"{inspection.sentence} under {console.printable(inspection.model)}\n")


def _style(bits: float) -> str:
    """No colour for what was expected, red for what was very surprising."""
    if bits < 1:
        return ""
    return ("on dark_green" if bits < 4 else "on dark_goldenrod" if bits < 8 else "on dark_red") + " white"


def _write_next(inspection: Inspection) -> None:
    from hfkit.inference.inspection import percent

    names = ("text", "probability", *inspection.left)
    rows = [[percent(row[name]) for name in names] for row in inspection.following]
    head = ("next", "alone", *(f"{name}\n{count:,} left" for name, count in inspection.left.items()))
    console.write_table(head, rows, wraps=False)
