"""Type checkers see what `generate` and `classify` return."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from typing import Any, assert_type

from hfkit.inference.classification import classify
from hfkit.inference.generation import generate
from hfkit.inference.results import Classification, Generation
from hfkit.inference.text import Request
from hfkit.options import GenerateOptions

request = Request("a", [1], 3)
assert_type(generate("a"), Generation)
assert_type(generate("a", temperature=0.5, model="gpt2"), Generation)
assert_type(generate({"en": "a"}), Generation)
assert_type(generate(request, options=GenerateOptions()), Generation)
assert_type(generate("a", num_return_sequences=2), list[Generation])
assert_type(generate(["a", "b"], batch_size=2), list[Generation])
assert_type(generate([request]), list[Generation])
assert_type(generate(("a", {"en": "b"}), num_return_sequences=2), list[list[Generation]])
assert_type(classify("a"), Classification)
assert_type(classify({"text": "a"}, labels=["a", "b"]), Classification)
assert_type(classify(["a"]), list[Classification])
generate(5)
classify(None)
"""


@pytest.mark.slow
def test_overloads_tell_the_type_of_a_result(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", str(tmp_path / "program.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    lines = [line for line in result.stdout.splitlines() if "program.py" in line and "error" in line]
    wrong = PROGRAM.splitlines().index("generate(5)") + 1
    assert [line.partition(": error: ")[0].rpartition(":")[2] for line in lines] == [str(wrong), str(wrong + 1)], lines
