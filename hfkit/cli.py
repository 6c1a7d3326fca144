"""The command line: one short function per command, which calls the Python API and prints.

Commands import what is heavy in their bodies, so that `--help` and usage errors are instant.
"""

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import hfkit
from hfkit import (
    console,
    conversation,
    cookbook,
    labelling,
    launching,
    machine,
    measuring,
    processes,
    prompts,
    searching,
    showing,
    writing,
)
from hfkit.errors import HfkitError, OptionError
from hfkit.failures import ask_again, close_stdout, explain
from hfkit.flags import flags
from hfkit.models.sources import find_model
from hfkit.options import (
    CorpusOptions,
    DataOptions,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    LaunchOptions,
    ManyModelsOptions,
    ModelOptions,
    SizeOptions,
    TaskOptions,
    TrainOptions,
    TuneOptions,
)
from hfkit.reporting import pages
from hfkit.training import run_folder

app = typer.Typer(
    name="hfkit",
    help=hfkit.__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --top_p, as transformers spells it, works as well as --top-p
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hfkit {hfkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.add_typer(cookbook.app, name="recipes")
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
@flags
def generate(
    model: ModelOptions,
    sampling: GenerateOptions,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; without it, stdin is read.")] = None,
    input: Annotated[
        Path | None,
        typer.Option("--input", "-i", help="Many prompts: a line each, or `prompt` of each .jsonl object."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write JSON Lines to this file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an --output that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output if it exists.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts at a time. [default: what the device is good for]")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="NAME=A,B,...", help="Compare values of one option, same seed: temperature=0.3,0.7,1.0."),
    ] = None,
    prompt_shown: Annotated[
        bool, typer.Option("--prompt/--no-prompt", help="Print the prompt before its continuation.")
    ] = True,
    json: _Json = False,
) -> None:
    """Continue a prompt (argument, stdin, or many from --input) and print the text."""
    if input and (prompt is not None or sweep):
        raise OptionError("--input brings its own prompts: leave the PROMPT and --sweep out")
    if (resume or overwrite) and not output:
        raise OptionError("--resume and --overwrite are about a file: add --output FILE")
    if resume and not input:
        raise OptionError("--resume goes on with many prompts: add --input FILE")
    # What can go wrong here is said at once, not after the seconds that importing torch takes.
    if input:
        prompts.check_input(input)
    text = "" if input else prompts.read_prompt(prompt)
    find_model(model)

    if input:
        writing.write_file(model, sampling, input, output, resume=resume, overwrite=overwrite, batch_size=batch_size)
    elif sweep:
        writing.write_sweep(model, sampling, text, sweep, json=json)
    else:
        writing.write_one(model, sampling, text, output, prompt_shown=prompt_shown, json=json, overwrite=overwrite)


@app.command()
@flags
def chat(model: ModelOptions, sampling: GenerateOptions) -> None:
    """Talk turn by turn: raw continuation with a base model, the chat template where a model has one."""
    find_model(model)

    conversation.run(model, sampling)


_Corpus = Annotated[list[str], typer.Argument(help="Files, folders, globs, hf://NAME, or what `prepare` made.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the run would be and cost, and stop there.")]


@app.command()
@flags
def finetune(
    corpus: _Corpus,
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    dry_run: _DryRun = False,
    json: _Json = False,
) -> None:
    """Go on training a model on a corpus; print the folder of the result."""

    inputs = [*(data.eval_file or []), *filter(None, [model.model])]
    run_folder.check_request(corpus, train, inputs=inputs, dry_run=dry_run)
    if launching.launch(launch):
        return
    _print_run(hfkit.finetune(corpus, model=model, data=data, train=train, dry_run=dry_run), json)


@app.command()
@flags
def pretrain(
    corpus: _Corpus,
    size: SizeOptions,
    data: DataOptions,
    train: TrainOptions,
    launch: LaunchOptions,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dry_run: _DryRun = False,
    json: _Json = False,
) -> None:
    """Train a tokenizer and a GPT-2 from nothing; print the folder of the result."""

    run_folder.check_request(corpus, train, inputs=data.eval_file or [], dry_run=dry_run)
    if launching.launch(launch):
        return
    _print_run(hfkit.pretrain(corpus, size=size, data=data, train=train, device=device, dry_run=dry_run), json)


@app.command()
@flags
def prepare(
    corpus: _Corpus,
    model: ModelOptions,
    data: DataOptions,
    output: Annotated[Path | None, typer.Option("--output-dir", "-o", help="Folder to keep the tokens in.")] = None,
    json: _Json = False,
) -> None:
    """Tokenize a corpus once; print what is in it, and what training on it would cost here."""
    from json import dumps

    from hfkit.corpus.documents import find_corpus

    find_corpus(corpus)  # so that a mistake is told before torch is imported
    found = hfkit.prepare(corpus, model=model, data=data, output_dir=output)
    console.write((dumps(found.to_dict()) if json else "\n".join(found.lines())) + "\n")


@app.command()
@flags
def evaluate(
    corpus: _Corpus, model: ManyModelsOptions, read: CorpusOptions, options: EvaluateOptions, json: _Json = False
) -> None:
    """Measure how well models predict a corpus: perplexity, bits per byte, accuracy, each with its error."""

    measuring.write(corpus, model, read, options, json=json)


@app.command()
@flags
def inspect(
    model: ModelOptions,
    options: InspectOptions,
    text: Annotated[str | None, typer.Argument(help="Text to look at; without it, stdin is read.")] = None,
    json: _Json = False,
) -> None:
    """Show how likely each token of a text is, what would come next, and what heads look at."""
    from hfkit import prompts

    showing.write(prompts.read_prompt(text), model, options, json=json)


@app.command()
@flags
def classify(
    model: ModelOptions,
    task: TaskOptions,
    text: Annotated[str | None, typer.Argument(help="Text to label; without it, stdin is read.")] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="Many texts: a line each, or a row of .jsonl each.")
    ] = None,
    json: _Json = False,
) -> None:
    """Label a text, or many, and print label and probability."""

    labelling.write(text, input, model, task, json=json)


@app.command()
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
    json: _Json = False,
) -> None:
    """Answer a question from a text."""

    labelling.write_answer(question, context, model, no_answer_threshold, json=json)


@app.command()
@flags
def tune(
    corpus: _Corpus,
    model: ModelOptions,
    data: DataOptions,
    train: TrainOptions,
    options: TuneOptions,
    json: _Json = False,
) -> None:
    """Search for good training options; print the trials and the best recipe."""

    searching.write(corpus, model, data, train, options, json=json)


@app.command()
@flags
def report(
    run: Annotated[list[str], typer.Argument(help="Folders of finished runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write.")] = Path("runs.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it exists.")] = False,
) -> None:
    """Compare training runs on one page: losses, settings, samples."""
    if output.exists() and not overwrite:
        raise HfkitError(f"{output} exists: --overwrite replaces it, or name another --output")

    console.write(f"{pages.compare_runs(list(run), output)}\n")


@app.command()
@flags
def export(
    model: Annotated[str, typer.Argument(help="A run of finetune, an adapter, any model.")],
    options: ExportOptions,
) -> None:
    """Write a model as one folder: adapter merged, precision changed; or push it to the Hub."""
    console.write(hfkit.export(model, options) + "\n")


def _print_run(run: Any, json: bool) -> None:
    from json import dumps

    if run and processes.rank == 0:
        console.write((dumps(run.metrics) if json else run.output_dir) + "\n")


@app.command()
@flags
def info(model: ModelOptions, json: _Json = False) -> None:
    """Show versions, devices, caches and, with -m, a model's size and limits; say what is wrong and how to mend it."""

    machine.show(model, json=json)


def main() -> NoReturn:
    """Run a command; every failure becomes one line on stderr and an exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))
    # As an exception it lets what was begun be cleared away; but one of several processes may be waiting for another,
    # and must not. A training run has a better answer, while it lasts.
    before, hook, threshold = signal.getsignal(signal.SIGTERM), sys.unraisablehook, gc.get_threshold()
    sys.unraisablehook = ask_again
    if processes.count == 1:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    gc.set_threshold(50_000)  # importing transformers makes many objects and no garbage: a sixth of its time
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001, the one place where all ends
        code = explain(error)
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = hook
        gc.set_threshold(*threshold)
    if code:
        close_stdout()
    sys.exit(code if isinstance(code, int) else 0)
