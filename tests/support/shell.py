"""hfkit as a person runs it, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hfkit import console
from hfkit.cli import app

# Runs each line of arguments in turn and tells which heavy packages are there after it.
WATCH = """
import json, sys
from hfkit.cli import app as cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["hfkit", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        heavy = {"torch", "transformers", "datasets", "rich", "pydantic"} & set(sys.modules)
        print(json.dumps([arguments, end.code, sorted(heavy)]))
"""


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file in place."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def run(*arguments, input: bytes | None = None, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """`hfkit ARGUMENTS` in a process of its own, outputs as bytes."""
    command = [sys.executable, "-m", "hfkit", *map(str, arguments)]
    stdin = {} if input is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command,
        input=input,
        capture_output=True,
        env={**os.environ, **(env or {})},
        **{"timeout": 120, **stdin, **options},
    )


def call(capfdbinary, *arguments) -> subprocess.CompletedProcess:
    """`hfkit ARGUMENTS` in this process: seconds faster than `run`."""
    before, sys.argv = sys.argv, ["hfkit", *map(str, arguments)]
    capfdbinary.readouterr()
    try:
        app.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
        console.configure(quiet=False, verbose=False, debug=False)
    out, err = capfdbinary.readouterr()
    return subprocess.CompletedProcess(["hfkit", *arguments], code, out, err)


def assert_fails(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line on stderr, with these words in it; the right exit code; nothing on stdout."""
    lines = [line for line in result.stderr.decode().splitlines() if not line.startswith("hfkit: seed")]
    assert result.returncode == code, (result.returncode, result.stderr)
    assert len(lines) == 1 and lines[0].startswith("hfkit: error: "), result.stderr
    assert all(word in lines[0] for word in words), (words, lines[0])
    assert result.stdout == b""
