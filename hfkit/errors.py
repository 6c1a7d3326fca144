"""The one error that is the user's to fix; the command line shows its sentence without a traceback."""


class HfkitError(Exception):
    """Something in the request, not in the code, is wrong: the message says what, where, and what to do."""


class OptionError(HfkitError, ValueError):
    """An option's value is out of its range. On the command line this is a usage error (exit code 2)."""
