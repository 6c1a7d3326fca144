"""All commands, and the end of each: one line on stderr where it failed, and an exit code."""

import gc
import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Annotated, Any, NoReturn

import typer

import hfkit
from hfkit import console, processes
from hfkit.cli import recipes
from hfkit.cli.chat import chat
from hfkit.cli.classify import answer, classify
from hfkit.cli.evaluate import evaluate
from hfkit.cli.generate import generate
from hfkit.cli.info import info
from hfkit.cli.inspect import inspect
from hfkit.cli.report import export, report
from hfkit.cli.train import finetune, prepare, pretrain, tune
from hfkit.errors import HfkitError, StoppedError

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


app.add_typer(recipes.app, name="recipes")
for _command in (
    *(generate, chat, finetune, pretrain, prepare, evaluate, inspect, classify, answer, tune, report, export, info),
):
    app.command()(_command)


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


def explain(error: BaseException) -> int:
    """Say on stderr what went wrong; the exit code of it."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # Typer makes the one of the other
    if console.state.debug and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case KeyboardInterrupt() | typer.Abort():
            return 130
        case BrokenPipeError():
            return 141  # whoever read has had enough, as after SIGPIPE
        case StoppedError() if processes.rank > 0:
            return error.exit_code  # the first process says it
        case HfkitError():
            if processes.rank > 0:
                time.sleep(5)  # where the first process says the same, the launcher ends this one before it does
            console.fail(str(error))
            return error.exit_code
        case RuntimeError() if processes.count > 1 and re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
            console.fail(f"process {processes.rank} lost the other processes: see what they say")
        case typer.TyperException() if hasattr(error, "format_message"):
            if message := error.format_message():  # none where the help was shown instead
                console.fail(f"{message} (see --help)")
            return getattr(error, "exit_code", 2)
        case MemoryError():
            console.fail("out of memory: use a smaller model, a smaller --batch-size, or --quantize int8")
        case OSError() if error.strerror:
            where = f" ({error.filename})" if error.filename else ""
            console.fail(f"{error.strerror}{where}: mend that and run it again")
        case _:
            console.fail(
                f"this should not happen: {type(error).__name__}: {error}; run again with --debug and report it"
            )
    return 1


def ask_again(lost: Any) -> None:
    """A `sys.unraisablehook`: Ctrl-C or SIGTERM that came where Python swallows all exceptions comes once more."""
    match lost.exc_value:
        case KeyboardInterrupt():
            number = signal.SIGINT
        case SystemExit(code=code) if code == 128 + signal.SIGTERM:
            number = signal.SIGTERM
        case _:
            return sys.__unraisablehook__(lost)
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # here it would be swallowed, too


def close_stdout() -> None:
    """What cannot be written any more must not make Python complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
