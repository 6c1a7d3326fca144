"""What a person at a terminal sees: notes on stderr, text made safe to show."""

import contextlib
import functools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from hfkit import processes


@dataclass
class _State:
    quiet: bool = processes.rank > 0  # of several processes the first one speaks for all
    verbose: bool = False
    debug: bool = False


state = _State()
# C0 but newline and tab, DEL, C1, line and paragraph separators, zero-width and bidirectional controls:
# all that can move the cursor, recolour, rename the window or reorder what is read.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def configure(*, quiet: bool, verbose: bool, debug: bool) -> None:
    """Set how much is said, before anything heavy is imported; the libraries read their part from the environment."""
    state.quiet, state.verbose, state.debug = quiet or processes.rank > 0, verbose, debug
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its caches
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def printable(text: str) -> str:
    """`text` with every control character shown as an escape (`\\x1b`), so that it cannot drive a terminal."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write(text: str, file: IO[str] | None = None) -> None:
    """Write a result to stdout: untouched to a pipe or file, printable to a terminal; shown at once."""
    file = file or sys.stdout
    if file.isatty():
        file.write(printable(text))
    else:
        # Half a surrogate pair cannot be UTF-8; nothing else is changed.
        file.write(text.encode("utf-8", "replace").decode("utf-8"))
    file.flush()


def write_table(head: Sequence[str], rows: Iterable[Sequence[str]], width: int = 120, **options: Any) -> None:
    """Write a table to stdout, its cells printable; `width` holds where it is no terminal, `options` are rich's."""
    import shutil

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # a str would be read as rich's markup

    table = Table(**options)
    for name in head:
        table.add_column(Text(printable(name)))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else width).print(table)


def note(text: str) -> None:
    """A line on stderr, unless `--quiet`."""
    if not state.quiet:
        print(f"hfkit: {printable(text)}", file=sys.stderr, flush=True)


@functools.cache
def note_once(text: str) -> None:
    """A note that is shown once in a process, however often the code gets there."""
    note(text)


def detail(text: str) -> None:
    """A line on stderr under `--verbose`."""
    if state.verbose:
        note(text)


def fail(text: str) -> None:
    """The one line of an error."""
    line = " ".join(printable(text).split("\n"))
    with contextlib.suppress(OSError):  # nobody listens
        print(f"hfkit: error: {line}", file=sys.stderr, flush=True)


def progress(total: int | None, unit: str, label: str = "", **options: Any) -> Any:
    """A tqdm bar on stderr, on a terminal only."""
    from tqdm import tqdm

    hidden = state.quiet or not sys.stderr.isatty()
    big = {"unit_scale": True} if unit in ("B", "tok") else {}
    return tqdm(total=total, desc=label or None, unit=unit, disable=hidden, file=sys.stderr, **{**big, **options})


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' bars and warnings off stderr: hfkit says what matters itself. Not under `--verbose`."""
    if state.verbose:
        yield
        return
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one library about another
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def duration(seconds: float) -> str:
    """A time as a person says it."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, math.ceil(seconds))} seconds"
