"""`hfkit classify` and `hfkit answer` at a shell."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hfkit import console
from hfkit.cli.flags import Json, flags
from hfkit.cli.prompt_files import check_input, read_prompt, read_prompts
from hfkit.corpus.formats import read_text
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import find_model
from hfkit.options import ModelOptions, TaskOptions

if TYPE_CHECKING:
    from hfkit.inference.classification import Classification


@flags
def classify(
    model: ModelOptions,
    task: TaskOptions,
    text: Annotated[str | None, typer.Argument(help="Text to label; without it, stdin is read.")] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="Many texts: a line each, or a row of .jsonl each.")
    ] = None,
    json: Json = False,
) -> None:
    """Label a text, or many, and print label and probability."""

    write_labels(text, input, model, task, json=json)


@flags
def answer(
    question: Annotated[str, typer.Argument(help="What to find out.")],
    model: ModelOptions,
    context: Annotated[
        Path, typer.Option("--context", help="File with the text that has the answer; - or nothing: stdin.")
    ] = Path("-"),
    no_answer_threshold: Annotated[
        float, typer.Option(help="How much likelier than the best span 'no answer' must be to be given.")
    ] = 0.0,
    json: Json = False,
) -> None:
    """Answer a question from a text."""

    write_answer(question, context, model, no_answer_threshold, json=json)


def write_labels(text: str | None, path: Path | None, model: ModelOptions, task: TaskOptions, *, json: bool) -> None:
    """Label the text, or each line of the file; lines that cannot be read are reported, and the exit code is 1."""
    from hfkit.inference.classification import Classification, classify_each
    from hfkit.models.loading import loaded

    if path and text is not None:
        raise OptionError("--input brings its own texts: leave the TEXT out")
    if path:
        check_input(path)
    make_task(task)  # a wrong template is told before a model is loaded
    given = None if path else read_prompt(text)
    if given is not None and not given.strip():
        raise OptionError("give a text to label")
    find_model(model)
    lm = loaded(model, "text", "classification")
    faults = 0
    for number, one in enumerate(classify_each(read_prompts(path) if path else [given], lm, task), 1):
        if isinstance(one, Classification):
            _print(one, json)
        elif not path:
            raise one
        else:
            console.note(f"{path}, line {number}: {one}")
            faults += 1
    if faults:
        raise HfkitError(f"{faults} texts could not be labelled ({path}): mend the lines named above")


def _print(one: Classification, json: bool) -> None:
    if json:
        console.write(dumps(one.to_dict(), ensure_ascii=False) + "\n")
    else:
        console.write(f"{one.label}\t{one.probabilities[one.label]:.3f}\n")


def write_answer(question: str, context: Path, model: ModelOptions, threshold: float, *, json: bool) -> None:
    """Print the answer; nothing, and exit code 1, where the text has none."""
    from hfkit.inference.answering import answer

    if str(context) == "-":
        text = read_prompt("-")
    else:
        check_input(context)
        text = "".join(read_text(context, "strict"))
    find_model(model)
    found = answer(question, text, model=model, no_answer_threshold=threshold)
    if json:
        console.write(dumps(found.to_dict(), ensure_ascii=False) + "\n")
    elif found.answer:
        console.write(found.answer + "\n")
        where = "" if found.start is None else f" (characters {found.start} to {found.end})"
        console.detail(f"probability {found.score:.3f}{where}")
    else:
        raise HfkitError("the text does not answer that; a higher --no-answer-threshold gives the best guess")
