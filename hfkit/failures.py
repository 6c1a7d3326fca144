"""How a command ends that did not do what it was asked: one line on stderr, and an exit code."""

import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import Any

import typer

from hfkit import console, processes
from hfkit.errors import HfkitError, StoppedError


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
