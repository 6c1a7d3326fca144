"""The `hfkit` command: registers every subcommand, and turns each failure into one line and an exit code."""

import functools
import gc
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from typing import Annotated, Any, NoReturn

import typer

import hfkit
from hfkit import console, processes
from hfkit.cli.chat import chat
from hfkit.cli.classify import answer, classify
from hfkit.cli.evaluate import evaluate
from hfkit.cli.flags import Command, Group, explain_usage
from hfkit.cli.generate import generate
from hfkit.cli.info import info
from hfkit.cli.inspect import inspect
from hfkit.cli.runs import export, recipes, report
from hfkit.cli.serve import serve, warm
from hfkit.cli.train import finetune, prepare, pretrain, tune
from hfkit.errors import HfkitError, StoppedError

app = typer.Typer(
    name="hfkit",
    cls=Group,
    help=hfkit.__doc__,
    epilog='Start with: hfkit generate "Once upon a time"',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich cuts long names at 80 columns, and takes half of the time that help takes
    # --top_p, the spelling of transformers, works as well as --top-p.
    context_settings={
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hfkit {hfkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


for _command in (
    *(generate, chat, finetune, pretrain, prepare, evaluate, inspect, classify, answer, tune, serve, report, export),
    *(info, warm),
):
    app.command(cls=Command)(_command)
app.add_typer(recipes, name="recipes")


@functools.cache
def command_line() -> Any:
    """All commands with their flags. A resident process makes them once, see `cli.resident`."""
    return typer.main.get_command(app)


def main() -> NoReturn:
    """Run one command, then exit. Nothing but SystemExit leaves this function."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the parent process closed it, as `2>&-` does
            setattr(sys, name, open(os.devnull, "r+"))
        elif name != "stdin" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # no character is worth the loss of a text
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if processes.count == 1:
        # Raise on SIGTERM, so that `finally` blocks run. One of several processes must end at once instead: it may be
        # waiting for a peer that is gone. A training run installs its own handler.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.argv[1:2] == ["help"]:
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    gc.set_threshold(50_000)  # importing transformers creates many objects and no garbage: saves a sixth of its time
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        code = command_line()(prog_name="hfkit", standalone_mode=False)
        sys.stdout.flush()
        processes.leave()
    except BaseException as error:  # noqa: BLE001, every failure ends here
        code = explain(error)
    finally:
        sys.unraisablehook = hook
    if code:
        close_stdout()
    sys.exit(code if isinstance(code, int) else 0)


def explain(error: BaseException) -> int:
    """Print what went wrong as one line on stderr, and return the exit code."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # Typer replaces a BrokenPipeError by exit code 1
    if console.state.debug and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else 1
        case KeyboardInterrupt() | typer.Abort():
            return 130
        case BrokenPipeError():
            return 141  # the reader of a pipe has gone: the code that SIGPIPE gives
        case StoppedError():
            if processes.rank == 0:
                console.fail(f"{error}: {shlex.join(_resume_line(sys.argv[1:]))}", label="")
            return error.exit_code
        case HfkitError():
            if processes.rank > 0:
                # If process 0 fails in the same way, the launcher ends this one before it prints the line again.
                time.sleep(5)
            console.fail(str(error))
            return error.exit_code
        case RuntimeError() if processes.count > 1 and re.search("gloo|nccl|peer", str(error), re.IGNORECASE):
            console.fail(f"process {processes.rank} lost the other processes: see their messages")
        case typer.TyperException() if type(error).__name__ == "NoArgsIsHelpError":
            console.write(f"{error.format_message()}\n")
            return 2
        case typer.TyperException():
            console.fail(explain_usage(error))
            return int(getattr(error, "exit_code", 2))
        case MemoryError():
            console.fail("out of memory: use a smaller model, smaller batches, or --quantize int8")
        case OSError() if error.strerror:
            where = f" ({error.filename})" if error.filename else ""
            console.fail(f"{error.strerror}{where}: fix that and try again")
        case _:
            console.fail(
                f"this should not happen: {type(error).__name__}: {error}; run again with --debug and report it"
            )
    return 1


def send_again(lost: Any) -> None:
    """A `sys.unraisablehook`: deliver a signal again that arrived in a destructor, where Python drops exceptions."""
    match lost.exc_value:
        case KeyboardInterrupt():
            number = signal.SIGINT
        case SystemExit(code=code) if code == 128 + signal.SIGTERM:
            number = signal.SIGTERM
        case _:
            sys.__unraisablehook__(lost)
            return
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # sent from here it would be dropped, too


def _resume_line(arguments: list[str]) -> list[str]:
    """Return the command line that continues a run. `tune` continues without a flag."""
    arguments = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return ["hfkit", *arguments, *(["--resume"] if arguments[0] in ("finetune", "pretrain") else [])]


def close_stdout() -> None:
    """Flush stdout; if that fails, replace it, so that Python does not complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
