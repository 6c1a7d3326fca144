"""A run records the hfkit command that began it, and nothing of the program around it."""

import json
import sys

import pytest

import hfkit

pytestmark = pytest.mark.usefixtures("brisk")


@pytest.mark.parametrize("program", ["program.py", "-c", "/usr/bin/hfkit", "/lib/hfkit/__main__.py"])
def test_begin_records_command(tmp_path, tiny, corpus, monkeypatch, program):
    """The arguments of a Python program may hold a password; those of hfkit are what was typed."""
    monkeypatch.setattr(sys, "argv", [program, "--password", "hunter2 "])
    run = hfkit.finetune(corpus, model=tiny, output_dir=tmp_path / "run", max_steps=1, bf16=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    is_ours = "hfkit" in program
    expected = "hfkit --password 'hunter2 '" if is_ours else "hfkit finetune --config recipe.yaml"
    assert json.loads(files["run.json"])["command"] == run.metrics["command"] == expected
    assert is_ours or not [name for name, content in files.items() if b"hunter2" in content]
