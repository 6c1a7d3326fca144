"""`hfkit recipes`, `report` and `export`: begin a run from a recipe, compare runs, take a run's model elsewhere."""

import shlex
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import typer

import hfkit
from hfkit import console
from hfkit.cli.flags import Command, Group, complete_recipe, flags
from hfkit.declaration import argument, option
from hfkit.models.folder import check_target
from hfkit.models.sources import find_model
from hfkit.options import ExportOptions
from hfkit.recipes import copy_recipe, head_comment, shipped
from hfkit.storage import check_free

recipes = typer.Typer(cls=Group, help="List the shipped recipes; copy one to start from.", invoke_without_command=True)


@recipes.callback()
def list_recipes(context: typer.Context) -> None:
    """Print name and purpose of every recipe; one to a line, except on a narrow terminal."""
    if context.invoked_subcommand is None:
        width, columns = max(map(len, shipped())) + 2, console.columns() if sys.stdout.isatty() else 1000
        for name, path in shipped().items():
            line = f"{name:<{width}}{head_comment(path)[0]}"
            console.write(textwrap.fill(line, columns, subsequent_indent=" " * width) + "\n")
        console.note("next: hfkit recipes copy NAME")


@recipes.command(cls=Command)
@flags
def copy(
    name: str = argument(help="A recipe, as `hfkit recipes` lists it.", autocompletion=complete_recipe),
    to: Path = option(Path(), "Folder."),
) -> None:
    """Copy a recipe and its data; print the commands that use them.

    Examples:
        hfkit recipes copy generation-stories
    """
    files = copy_recipe(name, to)
    console.write("".join(f"{file}\n" for file in files) + "\n" + "\n".join(head_comment(files[0])) + "\n")


@flags
def report(
    run: list[str] = argument(help="Folders of finished runs, or of one search."),
    output: Path = option(Path("runs.html"), "Page to write.", short="-o"),
    overwrite: bool = option(False, "Replace the page if it exists."),
) -> None:
    """Compare training runs, or the trials of a search, on one page.

    Examples:
        hfkit report runs/a runs/b -o runs.html
    """
    check_free(output, overwrite=overwrite, flag="--output")  # before anything heavy is imported
    from hfkit.reporting.pages import write_report

    console.write(f"{write_report(run, output)}\n")
    console.note("next: open it in a browser")


@flags
def export(options: ExportOptions, model: str = argument(help="A run of finetune, an adapter, or any model.")) -> None:
    """Write a model as one folder or GGUF file, or push it to the Hub.

    A LoRA adapter is merged into its base; --dtype and --quantize change the precision. llama.cpp and ollama run GGUF
    files; what they need to know besides is in a Modelfile.

    Examples:
        hfkit export runs/corpus -o my-model
        hfkit export runs/corpus --format gguf --quantize q8_0 -o my-model
    """
    if not options.output_dir and not options.push_to_hub:
        options = replace(options, output_dir=f"{Path(model).resolve().name}-export")  # printed in the end
    source = find_model(model)
    if options.output_dir:  # before torch is imported
        check_target(Path(options.output_dir), source, overwrite=options.overwrite)
    place = hfkit.export(model, options)
    console.write(f"{place}\n")
    if options.output_dir:
        from hfkit.models.architecture import head_of
        from hfkit.models.loading import load_config
        from hfkit.reporting.summaries import command_for

        if (head := head_of(load_config(source))) not in ("masked", "other"):
            console.note(f"next: {command_for(head, shlex.quote(place))}")
    if place.endswith(".gguf"):
        from hfkit.models.modelfile import modelfile_of

        path = Path(place)
        modelfile = modelfile_of(path, is_alone=path == Path(options.output_dir or ""))
        console.note(f"or: ollama create {shlex.quote(path.stem.lower())} -f {shlex.quote(str(modelfile))}")
