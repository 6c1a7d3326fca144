"""Output for a person at a terminal: results on stdout, notes and progress on stderr, all of it safe to show."""

import contextlib
import functools
import json
import logging
import math
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from hfkit import processes


@dataclass
class _State:
    quiet: bool = processes.rank > 0  # only the first of several processes prints notes
    verbose: bool = False
    debug: bool = False
    has_status: bool = False  # the terminal shows a status line


state = _State()
# C0 except newline and tab, DEL, C1, line and paragraph separators, zero-width and bidirectional controls:
# everything that can move the cursor, change colours, rename the window or reorder text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def configure(*, quiet: bool, verbose: bool, debug: bool) -> None:
    """Set how much is printed. Call it before a library is imported: they read their settings from the environment."""
    state.quiet, state.verbose, state.debug = quiet or processes.rank > 0, verbose, debug
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("transformers").setLevel(logging.ERROR)  # where it is imported already, see cli.resident
        warnings.simplefilter("ignore")  # one library's about another
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports building its font cache
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "huggingface_hub.utils" in sys.modules:
            sys.modules["huggingface_hub.utils"].disable_progress_bars()


def printable(text: str) -> str:
    """`text` with every control character shown as an escape (`\\x1b`), so that it cannot drive a terminal."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def has_colour(file: IO[str]) -> bool:
    """Whether `file` is a terminal whose user has not turned colours off."""
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(text: str, file: IO[str] | None = None, *, dim: bool = False) -> None:
    """Write a result to stdout and flush it: unchanged to a pipe or file, printable to a terminal.

    dim: on a terminal with colours, show it less bright.
    """
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    text = printable(text) if file.isatty() else text
    # "?" for half a surrogate pair, which UTF-8 cannot hold, and for what another encoding lacks.
    encodable = text.encode(encoding, "replace").decode(encoding)
    if encodable != text and encoding.lower().replace("-", "") != "utf8":
        lacks = f"the output is {encoding}, which lacks some characters"
        note_once(f"{lacks}: they are '?'; PYTHONIOENCODING=utf-8 keeps them")
    file.write(f"\x1b[2m{encodable}\x1b[22m" if dim and has_colour(file) else encodable)
    file.flush()


def to_json(value: Any) -> str:
    """`value` as a line of JSON, in plain characters; half a surrogate pair, which UTF-8 cannot hold, is escaped."""
    line = json.dumps(value, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):x}", line) + "\n"


def write_json(*values: Any) -> None:
    """Write each value to stdout as a line of JSON."""
    write("".join(map(to_json, values)))


def columns() -> int:
    """The width of the terminal."""
    return shutil.get_terminal_size().columns


def write_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], width: int = 120, *, wraps: bool = True, **options: Any
) -> None:
    """Write a table to stdout. One that is too wide wraps its cells or, without `wraps`, puts each on its own line.

    width: columns where stdout is not a terminal. options: those of `rich.table.Table`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # a str would be read as rich's markup

    table = Table(**options)
    for name in head:
        table.add_column(Text(printable(name)))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    screen = Console(width=columns() if sys.stdout.isatty() else width)
    if wraps or screen.measure(table, options=screen.options.update(max_width=9999)).maximum <= screen.width:
        screen.print(table)
        return
    names = [" ".join(name.split()) for name in head]
    longest = max(map(len, names))
    for row in rows:
        lines = [f"{name:<{longest}}  {cell}\n" for name, cell in zip(names, row, strict=True) if cell]
        write("".join([*lines, "\n"]))


@contextlib.contextmanager
def status(text: str, delay: float = 0.5) -> Iterator[None]:
    """Show `text` on a terminal while the block runs, after `delay` seconds; nothing of it stays."""
    if state.quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    timer = threading.Timer(delay, _show_status, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        _clear_status()


def _show_status(text: str) -> None:
    state.has_status = True
    print(printable(text)[: columns() - 1], end="", file=sys.stderr, flush=True)


def _clear_status() -> None:
    if state.has_status:
        state.has_status = False
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print a line to stderr, unless `--quiet`."""
    _clear_status()
    if not state.quiet:
        print(f"hfkit: {printable(text)}", file=sys.stderr, flush=True)


@functools.cache
def note_once(text: str) -> None:
    """A note that is shown once in a process, however often the code gets there."""
    note(text)


def detail(text: str) -> None:
    """Print a line to stderr under `--verbose`."""
    if state.verbose:
        note(text)


def fail(text: str, *, label: str = "error: ") -> None:
    """Print the one line of an error, or of another end, to stderr."""
    line = " ".join(printable(text).split("\n"))
    with contextlib.suppress(OSError):  # stderr is closed
        print(f"hfkit: {label}{line}", file=sys.stderr, flush=True)


def progress(total: int | None, unit: str, label: str = "", **options: Any) -> Any:
    """A tqdm bar on stderr, hidden unless that is a terminal."""
    from tqdm import tqdm

    hidden = state.quiet or not sys.stderr.isatty()
    scale = {"unit_scale": True} if unit in ("B", "tok") else {}
    return tqdm(total=total, desc=label or None, unit=unit, disable=hidden, file=sys.stderr, **{**scale, **options})


_silence_lock, _silence, _silent_blocks = threading.Lock(), contextlib.ExitStack(), 0


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep progress bars and warnings of transformers off stderr, except under `--verbose`.

    The settings belong to the process. Blocks of several threads may overlap: the last one to end restores them.
    """
    global _silent_blocks
    if state.verbose:
        yield
        return
    with _silence_lock:
        if not _silent_blocks:
            _silence.enter_context(_silenced())
        _silent_blocks += 1
    try:
        yield
    finally:
        with _silence_lock:
            _silent_blocks -= 1
            if not _silent_blocks:
                _silence.close()


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    from transformers.utils import logging as library

    level, has_bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one library about another
            yield
    finally:
        library.set_verbosity(level)
        if has_bars:
            library.enable_progress_bar()  # type: ignore[no-untyped-call]


def duration(seconds: float) -> str:
    """A time in words: "90 seconds", "2 hours"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return counted(max(1, math.ceil(seconds)), "second")


def counted(count: int, noun: str) -> str:
    """A number and its noun: "1 step", "1,200 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_error(value: float, error: float | None, form: str) -> str:
    """`value ± error` in this format; the value alone where the error is not known."""
    known = error is not None and math.isfinite(error)
    return f"{value:{form}} ± {error:{form.lstrip('+')}}" if known else f"{value:{form}}"
