"""`hfkit classify` and `hfkit answer`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hfkit
from hfkit import console
from hfkit.cli.flags import JSON, flags
from hfkit.cli.prompts import STDIN, check_input, loading, read_prompt, read_prompts
from hfkit.corpus.formats import read_text
from hfkit.corpus.templates import make_task
from hfkit.declaration import argument, option
from hfkit.errors import HfkitError, OptionError
from hfkit.models.folder import ModelFiles
from hfkit.models.sources import find_model
from hfkit.options import ModelOptions, ServerOptions, TaskOptions

if TYPE_CHECKING:
    from hfkit.inference.results import Classification

    Labeller = Callable[[Iterable[Any]], Iterator[Classification | HfkitError]]


@flags
def classify(
    model: ModelOptions,
    server: ServerOptions,
    task: TaskOptions,
    text: str | None = argument(None, help="Text to label; without it, stdin is read."),
    input: Path | None = option(None, "Many texts: a line each, or a row of .jsonl each; - is stdin.", short="-i"),
    json: bool = JSON,
) -> None:
    """Label a text, or many, and print label and probability.

    Examples:
        hfkit classify "What a film!" --labels positive --labels negative
        hfkit classify -i reviews.txt -m runs/sentiment
    """
    if input and text is not None:
        raise OptionError("--input brings its own texts: leave the TEXT out")
    make_task(task)  # report a wrong template before a model is loaded
    if input:
        check_input(input)
    elif text is not None:
        text = read_prompt(text, wanted="text to label")
    if not server.server:
        _check_labels(find_model(model), task)
    if input:
        _label_file(input, _labeller(server, model, task), json=json)
        return
    if text is None:
        text = read_prompt(None, wanted="text to label")
    result = next(_labeller(server, model, task)([text]))
    if isinstance(result, HfkitError):
        raise result
    _print_label(result, json)


def _labeller(server: ServerOptions, model: ModelOptions, task: TaskOptions) -> Labeller:
    """What labels texts: a model on a server, or one that is loaded here."""
    if server.server:
        from hfkit.inference.remote import Server

        return partial(Server(server, model).classify_each, options=task)
    with loading(model):
        from hfkit.inference.classification import classify_each
        from hfkit.models.loading import loaded

        return partial(classify_each, lm=loaded(model, "text", "classification"), options=task)


def _check_labels(source: ModelFiles, task: TaskOptions) -> None:
    """OptionError if a language model clearly has no labels to choose from; before torch is imported."""
    files = [folder / "tokenizer_config.json" for folder in (source.adapter, source.folder) if folder]
    has_task = any('"task"' in file.read_text("utf-8", "replace") for file in files if file.is_file())
    if source.is_causal and not task.labels and not has_task:
        example = "--labels positive --labels negative"
        raise OptionError(f"{source.name} has no labels of its own: give each with --labels, such as {example}")


def _label_file(path: Path, label_each: Labeller, *, json: bool) -> None:
    """Label each line of a file. Report the lines that cannot be read, then raise HfkitError."""
    failures = 0
    for number, result in enumerate(label_each(read_prompts(path)), 1):
        if isinstance(result, HfkitError):
            console.note(f"{path}, line {number}: {result}")
            failures += 1
        else:
            _print_label(result, json)
    if failures:
        raise HfkitError(
            f"{console.counted(failures, 'text')} could not be labelled ({path}): fix the lines named above"
        )


def _print_label(result: Classification, json: bool) -> None:
    if json:
        console.write_json(result.to_dict())
    else:
        console.write(f"{result.label}\t{result.probabilities[result.label]:.3f}\n")


@flags
def answer(
    model: ModelOptions,
    question: str = argument(help="What to find out."),
    context: Path = option(STDIN, "File with the text that has the answer; - is stdin."),
    no_answer_threshold: float = option(0.0, "How much likelier 'no answer' must be than the best span, in logits."),
    json: bool = JSON,
) -> None:
    """Answer a question from a text. Without an answer, exit with code 1; --json prints an empty one instead.

    Examples:
        hfkit answer "Who has a hat?" --context story.txt
        echo "Ann has a hat." | hfkit answer "Who has a hat?"
    """
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
        guess = "a model that points at an answer gives its best guess with a higher --no-answer-threshold"
        raise HfkitError(f"the text does not answer that; {guess}")
