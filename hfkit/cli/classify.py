"""`hfkit classify` and `hfkit answer`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import hfkit
from hfkit import console
from hfkit.cli.flags import Json, flags
from hfkit.cli.generation_setup import loading
from hfkit.cli.prompt_files import STDIN, check_input, read_prompt, read_prompts
from hfkit.corpus.formats import read_text
from hfkit.corpus.templates import make_task
from hfkit.errors import HfkitError, OptionError
from hfkit.models.sources import ModelFiles, find_model
from hfkit.options import ModelOptions, TaskOptions

if TYPE_CHECKING:
    from hfkit.inference.results import Classification


@flags
def classify(
    model: ModelOptions,
    task: TaskOptions,
    text: Annotated[str | None, typer.Argument(help="Text to label; without it, stdin is read.")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Many texts: a line each, or a row of .jsonl each; - is stdin."),
    ] = None,
    json: Json = False,
) -> None:
    """Label a text, or many, and print label and probability."""
    if input and text is not None:
        raise OptionError("--input brings its own texts: leave the TEXT out")
    make_task(task)  # report a wrong template before a model is loaded
    if input:
        check_input(input)
    elif text is not None:
        text = read_prompt(text, wanted="text to label")
    _check_labels(find_model(model), task)
    if input:
        _label_file(input, model, task, json=json)
        return
    if text is None:
        text = read_prompt(None, wanted="text to label")
    with loading(model):
        result = hfkit.classify(text, model=model, options=task)
    _print_label(result, json)


def _check_labels(source: ModelFiles, task: TaskOptions) -> None:
    """OptionError if a language model clearly has no labels to choose from; before torch is imported."""
    heads = " ".join(source.config.get("architectures") or [])
    files = [folder / "tokenizer_config.json" for folder in (source.adapter, source.folder) if folder]
    has_task = any('"task"' in file.read_text("utf-8", "replace") for file in files if file.is_file())
    if ("CausalLM" in heads or "LMHead" in heads) and not task.labels and not has_task:
        example = "--labels positive --labels negative"
        raise OptionError(f"{source.name} has no labels of its own: give each with --labels, such as {example}")


def _label_file(path: Path, model: ModelOptions, task: TaskOptions, *, json: bool) -> None:
    """Label each line of a file. Report the lines that cannot be read, then raise HfkitError."""
    with loading(model):
        from hfkit.inference.classification import classify_each
        from hfkit.inference.results import Classification
        from hfkit.models.loading import loaded

        lm = loaded(model, "text", "classification")
    failures = 0
    for number, result in enumerate(classify_each(read_prompts(path), lm, task), 1):
        if isinstance(result, Classification):
            _print_label(result, json)
        else:
            console.note(f"{path}, line {number}: {result}")
            failures += 1
    if failures:
        raise HfkitError(f"{failures} texts could not be labelled ({path}): fix the lines named above")


def _print_label(result: Classification, json: bool) -> None:
    if json:
        console.write_json(result.to_dict())
    else:
        console.write(f"{result.label}\t{result.probabilities[result.label]:.3f}\n")


@flags
def answer(
    question: Annotated[str, typer.Argument(help="What to find out.")],
    model: ModelOptions,
    context: Annotated[
        Path, typer.Option("--context", help="File with the text that has the answer; - or nothing: stdin.")
    ] = STDIN,
    no_answer_threshold: Annotated[
        float, typer.Option(help="How much likelier than the best span 'no answer' must be to be given.")
    ] = 0.0,
    json: Json = False,
) -> None:
    """Answer a question from a text. If the text has no answer, print nothing and exit with code 1."""
    find_model(model)  # report a wrong name before anybody types a text
    if context == STDIN:
        if sys.stdin.isatty():
            console.note("type or paste the text that has the answer, then press Ctrl-D on a line of its own")
        text = read_prompt("-")
    elif " " in str(context) and not context.exists():
        raise OptionError(f'--context names a file, and there is no {str(context)!r}: echo "..." | hfkit answer ...')
    else:
        check_input(context)
        text = "".join(read_text(context, "strict"))
    with loading(model):
        result = hfkit.answer(question, text, model=model, no_answer_threshold=no_answer_threshold)
    if json:
        console.write_json(result.to_dict())
    elif result.answer:
        console.write(result.answer + "\n")
        place = "" if result.start is None else f" (characters {result.start} to {result.end})"
        console.detail(f"probability {result.score:.3f}{place}")
    else:
        raise HfkitError("the text does not answer that; a higher --no-answer-threshold gives the best guess")
