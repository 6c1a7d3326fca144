"""`hfkit recipes`: list the shipped recipes; copy one to start from."""

from pathlib import Path
from typing import Annotated

import typer

from hfkit import console
from hfkit.cli.usage import Command
from hfkit.recipes import copy_recipe, head_comment, shipped

app = typer.Typer(help="List the shipped recipes; copy one to start from.", invoke_without_command=True)


@app.callback()
def list_recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes = shipped()
        width = max(map(len, recipes), default=0)
        console.write("".join(f"{name:<{width}}  {head_comment(path)[0]}\n" for name, path in recipes.items()))
        console.note("next: hfkit recipes copy NAME")


def _complete(incomplete: str) -> list[str]:
    return [name for name in shipped() if name.startswith(incomplete)]


@app.command(cls=Command)
def copy(
    name: Annotated[str, typer.Argument(help="A recipe, as `hfkit recipes` lists it.", autocompletion=_complete)],
    to: Annotated[Path, typer.Option(help="Folder.")] = Path(),
) -> None:
    """Copy a recipe and its data; print the commands that use them."""
    files = copy_recipe(name, to)
    console.write("".join(f"{file}\n" for file in files) + "\n" + "\n".join(head_comment(files[0])) + "\n")
