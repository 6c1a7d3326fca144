"""A run records the hfkit command that begins it again, and nothing of the program around it."""

import json
import subprocess
import sys

import pytest

SCRIPT = "import hfkit; hfkit.finetune({!r}, model={!r}, output_dir={!r}, max_steps=1, bf16=False)"


@pytest.mark.parametrize("how", ["script", *(pytest.param(how, marks=pytest.mark.slow) for how in ("-c", "-m hfkit"))])
def test_begin_records_command(tmp_path, tiny, corpus, how):
    """The arguments of a Python program may hold a password."""
    run, script = tmp_path / "run", tmp_path / "program.py"
    script.write_text(SCRIPT.format(corpus, tiny, str(run)))
    line = {"script": [script], "-c": ["-c", script.read_text()]}.get(how)
    line = [*line, "--password", "hunter2"] if line else ["-m", "hfkit", "finetune", corpus, "-m", tiny, "-o", run]
    line += [] if how != "-m hfkit" else ["--max-steps", "1", "--no-bf16"]
    result = subprocess.run([sys.executable, *map(str, line)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in ("run.json", "metrics.json"):
        command = json.loads((run / name).read_text())["command"]
        assert command == f"hfkit finetune {corpus} --model {tiny} --output-dir {run} --max-steps 1 --no-bf16"
    assert not [path for path in run.iterdir() if path.is_file() and b"hunter2" in path.read_bytes()]
