"""The command line: instant help, one sentence for each failure, exit codes, pipes and terminals."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import typer
from support.shell import WATCH, assert_fails, call, run

import hfkit
from hfkit import console
from hfkit.cli import app
from hfkit.errors import StoppedError

COMMANDS = sorted(typer.main.get_command(app.app).commands)
HFKIT = [sys.executable, "-m", "hfkit"]


def test_main_stays_light(tmp_path):
    """Help and usage errors import nothing heavy."""
    (tmp_path / "bad.yaml").write_text("temprature: 1")
    right = [["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    wrong = [
        *([], ["nope"], ["generate", "--nope"], ["generate", "a", "b"], ["generate", "--top-p", "3", "hi"]),
        *(
            ["generate", "-c", f"{tmp_path}/bad.yaml"],
            ["generate", "hi", "--dtype", "float8"],
            ["generate", "--resume"],
        ),
        *(["generate", "hi", "-i", "x.txt"], ["chat", "extra"], ["generate", "hi", "--min-new-tokens=9", "-n=8"]),
    ]
    missing = [["generate", "hi", "-m", "./nowhere"], ["chat", "-m", "a//b"], ["generate", "-i", f"{tmp_path}/none"]]
    watch = WATCH.replace('"torch"', '"torch", "numpy"')
    command = [sys.executable, "-c", watch, json.dumps([*right, *wrong, *missing])]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=True)
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[[")]
    expected = [[line, code, []] for code, lines in ((0, right), (2, wrong), (1, missing)) for line in lines]
    assert told == expected
    assert "Traceback" not in result.stderr
    assert all(line.startswith("hfkit: error: ") for line in result.stderr.splitlines())
    assert len(result.stderr.splitlines()) == len(wrong) + len(missing) - 1  # without a command: the help alone


def test_help_covers_every_option():
    """Every command and every option has a help text."""
    for command in typer.main.get_command(app.app).commands.values():
        assert command.help and all(option.help for option in command.params)


def test_recipe_yields_to_flags(capfdbinary, tiny, tmp_path):
    """A flag beats the recipe, and the recipe beats the default."""
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny}\nmax_new_tokens: 3\nseed: 5\njson: true\n")

    def tokens(*flags):
        return json.loads(call(capfdbinary, "generate", "hi", *flags).stdout)["tokens"]

    assert tokens("-m", tiny, "-s", 5, "--json") > 3
    assert tokens("-c", tmp_path / "recipe.yaml") == 3
    assert tokens("-c", tmp_path / "recipe.yaml", "-n", 2) == 2
    assert tokens("-n", 2, "-c", tmp_path / "recipe.yaml") == 2


def test_flags_take_underscores(capfdbinary, tiny):
    """Options may be spelt as in transformers."""
    line = ["generate", "hi", "-m", tiny, "-s", 1, "--top-p", 0.5, "--max-new-tokens", 5]
    underscored = [str(part).replace("top-p", "top_p").replace("max-new-tokens", "max_new_tokens") for part in line]
    assert call(capfdbinary, *underscored).stdout == call(capfdbinary, *line).stdout != b""


# failures


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ZeroDivisionError("division"), 1, "this should not happen: ZeroDivisionError: division"),
        (KeyError("x"), 1, "--debug"),
        (RuntimeError("a\nb\x1b[31m"), 1, "\\x1b"),
        (MemoryError(), 1, "out of memory"),
        (EOFError("cut"), 1, "a file ends too early: cut"),
        (OSError(28, "No space left on device", "/x"), 1, "No space left on device (/x)"),
        (hfkit.HfkitError("wrong (x): do y"), 1, "error: wrong (x): do y"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("command", ["generate", "chat", "info"])
def test_explain_prints_one_line(capfdbinary, monkeypatch, error, code, words, command):
    """Any exception becomes one line, which does not show the prompt."""

    def fail(*arguments, **keywords):
        secret = "my secret prompt"  # noqa: F841, tracebacks with locals would show it
        raise error

    [monkeypatch.setattr(f"hfkit.cli.{name}.find_model", fail) for name in ("generate", "prompts", "info")]
    prompt = ["my secret prompt"] if command == "generate" else []
    result = call(capfdbinary, command, *prompt)
    assert_fails(result, code, words)
    assert b"secret" not in result.stderr


def test_explain_debug(capfdbinary, tiny):
    """--debug adds the traceback."""
    plain = call(capfdbinary, "generate", "x" * 99, "-m", tiny)
    debug = call(capfdbinary, "generate", "x" * 99, "-m", tiny, "--debug")
    assert_fails(plain, 1, "99 tokens", "64")
    assert debug.returncode == 1 and b"Traceback" in debug.stderr and plain.stderr in debug.stderr


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141), (SystemExit(3), 3), (SystemExit("x"), 1)]
)
def test_explain_is_silent_about_signals(capfdbinary, monkeypatch, error, code):
    """Ctrl-C, a closed pipe and SystemExit print nothing."""

    def end(*arguments):
        raise error

    monkeypatch.setattr("hfkit.cli.generate.find_model", end)
    result = call(capfdbinary, "generate", "hi")
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


def test_main_ctrl_c():
    """Ctrl-C ends with 130 and no traceback."""
    process = subprocess.Popen([*HFKIT, "generate"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdin.write(b"a prompt that does not end")
    while struct.unpack("i", fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)))[0]:
        time.sleep(0.01)  # until it reads what is in the pipe
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read() == b""


# pipes


def shell(command: str) -> tuple[int, bytes]:
    """Run a line of bash, where $HFKIT stands for hfkit; the exit code of its first process, and what stderr says."""
    script = f"HFKIT='{' '.join(HFKIT)}'; {command}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("command", "code", "lines"),
    [
        ("$HFKIT generate --help | head -1", 141, 0),
        ("$HFKIT generate --help | true", 141, 0),
        ("$HFKIT generate --help >&-", 0, 0),
        ("$HFKIT generate -m ./nowhere <&-", 1, 1),
        ("$HFKIT generate -m ./nowhere hi 2>&-", 1, 0),
        ("$HFKIT --help >/dev/full", 1, 1),
        ("$HFKIT nope 2>/dev/full", 2, 0),
    ],
)
def test_main_closed_streams(command, code, lines):
    """A closed or full standard stream causes no traceback."""
    returned, told = shell(command)
    # who reads may be slow to close: then all was written
    assert returned in ((0, code) if code == 141 else (code,))
    assert len(told.splitlines()) == lines and b"Traceback" not in told


class Broken:
    """A stdout that nobody reads, or whose disk is full."""

    def __init__(self, error):
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = write
    isatty = staticmethod(lambda: False)
    fileno = staticmethod(lambda: os.open(os.devnull, os.O_WRONLY))


@pytest.mark.parametrize("flags", [[], ["--json"], ["-n", 1], ["--sweep", "top_k=1,2"]])
def test_main_reader_gone(capfdbinary, monkeypatch, tiny, flags):
    """Text for a reader who has gone is dropped silently."""
    monkeypatch.setattr(sys, "stdout", Broken(BrokenPipeError(32, "Broken pipe")))
    result = call(capfdbinary, "generate", "hi", "-m", tiny, "-s", 1, *flags)
    assert (result.returncode, result.stderr) == (141, b"")


# terminals

NASTY = [
    *("\x1b[31m", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\", "\x1b]52;c;aGk=\x07", "\x1bc", "\x1b[2J", "\x9b31m"),
    *(
        "\x07",
        "\r",
        "\x08",
        "\x00",
        "\x7f",
        "\x85",
        "\x0b",
        "\x0c",
        "\x90q",
        "\x9d0;x\x9c",
        "\u202e",
        "\u2066",
        "\u200f",
    ),
    *("\u061c", "\u2028", "\u2029", "\ufeff", "\u200b", *map(chr, range(0x80, 0xA0)), *map(chr, range(1, 9))),
]


@pytest.mark.parametrize("sequence", NASTY, ids=ascii)
def test_write_escapes_for_terminals_only(sequence):
    """Control characters are escaped for a terminal and unchanged in a pipe."""

    def written(terminal: bool) -> str:
        leader, follower = os.openpty() if terminal else os.pipe()
        with open(follower, "w", encoding="utf-8", newline="") as file:
            assert file.isatty() == terminal
            console.write(f"a{sequence}b\t", file)
        return drain(leader).decode()

    shown = written(True)
    assert shown.startswith("a") and shown.endswith("b\t")
    assert all(ord(character) >= 32 or character == "\t" for character in shown)
    assert shown.isascii() and sequence[-1] not in shown[1:-2] or sequence[-1].isprintable()
    assert written(False) == f"a{sequence}b\t"


def drain(leader: int) -> bytes:
    """Everything that was written to a terminal, or a pipe, whose other end is closed; it may come in pieces."""
    written = b""
    with contextlib.suppress(OSError):  # how Linux says that a terminal has ended
        while piece := os.read(leader, 100_000):
            written += piece
    os.close(leader)
    return written


def on_terminal(monkeypatch, *arguments) -> tuple[int, str]:
    """What `hfkit ARGUMENTS` shows on a terminal."""
    leader, follower = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["hfkit", *map(str, arguments)])
    with open(follower, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(SystemExit) as end:
            app.main()
    return end.value.code, drain(leader).decode().replace("\r\n", "\n")


def test_generate_streams_the_same_text(capfdbinary, monkeypatch, tiny):
    """A stream on a terminal shows what a pipe gets."""
    monkeypatch.setenv("NO_COLOR", "1")
    line = ["generate", "hi", "-m", tiny, "-s", 3, "-n", 20, "-q"]
    piped = call(capfdbinary, *line, "--num-return-sequences", 2)
    code, shown = on_terminal(monkeypatch, *line, "--num-return-sequences", 2)
    assert code == piped.returncode == 0
    assert shown == console.printable(piped.stdout.decode())


def test_generate_escapes_the_completion(capfdbinary, monkeypatch, tiny):
    """What a model writes cannot control the terminal."""
    line = ["generate", "hi", "-m", tiny, "-s", 3, "-n", 4, "-q", "--sequence-bias", "\x1b=100"]
    assert call(capfdbinary, *line).stdout == b"hi" + 4 * b"\x1b" + b"\n"
    assert on_terminal(monkeypatch, *line) == (0, "\x1b[2mhi\x1b[22m" + 4 * "\\x1b" + "\n")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_write_without_colours(monkeypatch, name, value):
    """The prompt is dimmed on a terminal with colours alone."""
    for has_colour in (True, False):
        leader, follower = os.openpty()
        with open(follower, "w", encoding="utf-8", newline="") as file:
            console.write("a\x1b", file, dim=True)
        assert drain(leader) == (b"\x1b[2ma\\x1b\x1b[22m" if has_colour else b"a\\x1b")
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
@pytest.mark.parametrize("flags", [[], ["--json"], ["--sweep", "top_k=1,2"]])
def test_write_in_another_encoding(tiny, encoding, flags):
    """An output that lacks some characters gets the text all the same, with one note."""
    line = ["generate", "Äpfel 😀", "-m", tiny, "-n", 2, "-s", 1, *flags]
    result = run(*line, env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    if "--sweep" not in flags:
        assert ("Äpfel" if encoding == "latin-1" else "?pfel").encode("latin-1") in result.stdout
        assert [line for line in result.stderr.splitlines() if b"PYTHONIOENCODING=utf-8" in line]
    assert run("recipes", env={"PYTHONIOENCODING": encoding}).returncode == 0


def test_file_names_cannot_drive_the_terminal(capfdbinary, tiny, tmp_path):
    """A control character in a file's name never reaches stderr raw."""
    path = tmp_path / "a\x1b[31mb\x9b.txt"
    path.write_bytes(b"good\n\xff\n")
    for line in (["-i", path], ["-i", f"{path}-not-there"], ["hi", "-c", f"{path}.yaml"], ["hi", "-o", path]):
        result = call(capfdbinary, "generate", *line, "-m", tiny, "-n", 1, "-s", 1)
        assert result.returncode and b"\\x1b[31m" in result.stderr
        assert b"\x1b" not in result.stderr and "\x9b".encode() not in result.stderr


# the end of a run


def test_explain_stopped(capfdbinary, monkeypatch):
    """A run that was stopped is no error, and the whole line that continues it is printed."""
    for line, continued in (
        ("finetune c.txt -o 'my run' --overwrite", "hfkit finetune c.txt -o 'my run' --resume"),
        ("pretrain c.txt --resume", "hfkit pretrain c.txt --resume"),
        ("tune c.txt", "hfkit tune c.txt"),
    ):
        monkeypatch.setattr(sys, "argv", ["hfkit", *shlex.split(line)])
        assert app.explain(StoppedError("stopped as asked: step 5 of 9 is saved", signal.SIGTERM)) == 143
        assert capfdbinary.readouterr().err.decode() == f"hfkit: stopped as asked: step 5 of 9 is saved: {continued}\n"


def test_main_ctrl_c_at_any_time():
    """Ctrl-C while modules are imported, or while Python tears down, prints no traceback."""
    script = """
import os, signal, sys
class AtImport:
    def find_spec(self, name, *rest):
        if name == sys.argv.pop():
            sys.argv.append("recipes")
            os.kill(os.getpid(), signal.SIGINT)
        else:
            sys.argv.append(wanted)
wanted = sys.argv[-1]
sys.meta_path.insert(0, AtImport())
from hfkit.__main__ import main
main()
"""
    for name in ("typer", "hfkit.cli.app", "yaml"):
        result = subprocess.run([sys.executable, "-c", script, name], capture_output=True, timeout=60)
        assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b""), name
    late = (
        "import atexit, os, signal; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT));"
        "from hfkit.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", late, "--version"], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, b"") and result.stdout.startswith(b"hfkit ")


def test_main_ctrl_c_is_ignored_in_the_background():
    """A process that was started with Ctrl-C ignored goes on ignoring it."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); from hfkit.__main__ import main\n"
        "try: main()\nfinally: assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    result = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, b"")
