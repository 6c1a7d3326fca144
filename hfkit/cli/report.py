"""`hfkit report` and `hfkit export` at a shell."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import hfkit
from hfkit import console
from hfkit.cli.flags import flags
from hfkit.models.folder import check_target
from hfkit.models.sources import find_model
from hfkit.options import ExportOptions
from hfkit.storage import check_free


@flags
def report(
    run: Annotated[list[str], typer.Argument(help="Folders of finished runs, or of one search.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("runs.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
) -> None:
    """Show training runs side by side on one page, or the trials of a search: results, curves, settings, samples."""
    check_free(output, overwrite=overwrite, flag="--output")  # before anything heavy is imported
    from hfkit.reporting.pages import write_report

    console.write(f"{write_report(run, output)}\n")


@flags
def export(
    model: Annotated[str, typer.Argument(help="A run of finetune, an adapter, or any model.")],
    options: ExportOptions,
) -> None:
    """Write a model as one folder, with adapters merged or another precision; or push it to the Hub."""
    if not options.output_dir and not options.push_to_hub:
        options = replace(options, output_dir=f"{Path(model).resolve().name}-export")  # printed in the end
    if options.output_dir:  # before torch is imported
        check_target(Path(options.output_dir), find_model(model), overwrite=options.overwrite)
    place = hfkit.export(model, options)
    console.write(f"{place}\n")
    if options.output_dir:
        console.note(f"next: hfkit generate -m {shlex.quote(place)}")
