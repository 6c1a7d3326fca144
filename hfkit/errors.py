"""The one error that is the user's to fix; the command line shows its sentence without a traceback."""


class HfkitError(Exception):
    """Something in the request, not in the code, is wrong: the message says what, where, and what to do."""

    exit_code = 1


class OptionError(HfkitError, ValueError):
    """An option's value is out of its range. On the command line this is a usage error (exit code 2)."""

    exit_code = 2


class LockedError(HfkitError):
    """Another process holds a folder."""


class DivergedError(HfkitError):
    """The loss of a training, or its weights, are no numbers any more."""


class StoppedError(HfkitError):
    """A run ended as Ctrl-C or SIGTERM asked; what it had done is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


def first_line(error: Exception) -> str:
    """What an error of a library says, on one line; its name if it says nothing."""
    said = getattr(error, "strerror", None) or str(error)
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
