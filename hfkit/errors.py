"""Errors that the user can fix. The command line prints the message, one line, without a traceback.

HfkitError                    exit code 1
├── OptionError               2, also a ValueError
├── ContextLengthError
├── DivergedError
├── LockedError
├── NotFiniteError
└── StoppedError              128 + the signal: 130 after Ctrl-C, 143 after SIGTERM
"""

import contextlib
import re
import signal as signals
from collections import abc


class HfkitError(Exception):
    """Something in the request is wrong. The message says what is wrong, where, and what to do."""

    exit_code = 1


class OptionError(HfkitError, ValueError):
    """An option has a value that it cannot take. On the command line this is a usage error."""

    exit_code = 2


class ContextLengthError(HfkitError):
    """A text is longer than the model takes."""


class DivergedError(HfkitError):
    """The training loss, or a weight, is NaN or infinite."""


class LockedError(HfkitError):
    """Another process holds the folder or file."""


class NotFiniteError(HfkitError):
    """A model gives NaN or infinity, as half precision does where a value is too large for it."""

    @classmethod
    def of(cls, model: str) -> "NotFiniteError":
        return cls(f"{model} gives values that are not numbers: try --dtype float32")


class StoppedError(HfkitError):
    """Ctrl-C or SIGTERM ended a run; its state is saved."""

    def __init__(self, message: str, signal: int = signals.SIGTERM) -> None:  # pickle passes the message alone
        super().__init__(message)
        self.exit_code = 128 + signal


@contextlib.contextmanager
def needing(what: str, extra: str) -> abc.Iterator[None]:
    """Import the packages of an extra. what: what needs which package, for the error if it is missing."""
    try:
        yield
    except ImportError as error:
        raise HfkitError(f"{what}: pip install 'hfkit[{extra}]'") from error


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the name of its class if it has none."""
    text = hide_passwords(getattr(error, "strerror", None) or str(error))
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def hide_passwords(text: str) -> str:
    """`text` without the user and password of its URLs: "https://user:secret@host" is "https://host"."""
    return re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
