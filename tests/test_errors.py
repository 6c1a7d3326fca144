"""Errors say in one line what is wrong, and can go from process to process."""

import pickle

import pytest

from hfkit import errors
from hfkit.errors import (
    ContextLengthError,
    DivergedError,
    HfkitError,
    LockedError,
    NotFiniteError,
    OptionError,
    StoppedError,
    first_line,
    hide_passwords,
)


def test_stopped_error_pickles():
    """A pool of processes sends an error to its parent as a pickle."""
    plain = (HfkitError, OptionError, ContextLengthError, DivergedError, LockedError, NotFiniteError)
    kinds = [StoppedError("a", 2), *(kind("a") for kind in plain)]
    assert {type(error) for error in kinds} == {kind for kind in vars(errors).values() if isinstance(kind, type)}
    for error in kinds:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301
        assert (type(copy), str(copy), copy.exit_code) == (type(error), "a", error.exit_code)
    assert StoppedError("a", 2).exit_code == 130


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at https://user:secret@host/x", "at https://host/x"),
        ("http://token@host:80 and https://a:b%40c@d", "http://host:80 and https://d"),
        ("https://host/a@b", "https://host/a@b"),
        ("mail me@host", "mail me@host"),
        ("'https://u:p@q@host'", "'https://host'"),
    ],
)
def test_hide_passwords(text, expected):
    """Only the user and password of a URL go."""
    assert hide_passwords(text) == expected
    assert first_line(OSError(f"\n  {text}\nmore")) == expected
