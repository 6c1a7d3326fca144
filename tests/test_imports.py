"""What a one-shot command does not import changes nothing that it prints, and comes back where it is needed."""

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
from support.shell import run

from hfkit.__main__ import main

# Imports for a model of one type, and tells what is there and what happens after a fault.
IMPORT = """
import json, sys
from hfkit import imports
if sys.argv[2]:
    setattr(imports, sys.argv[2], None)
imports.import_lean(sys.argv[1])
heavy = ("torch._dynamo", "sympy", "scipy", "torch.distributed.tensor", "torch.distributed.fsdp")
import torch, transformers
from transformers import utils
from transformers.models.auto import modeling_auto
flags = [utils.is_torch_distributed_available()]
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9))
names = sorted(dir(transformers.models))
found = [name for name in heavy if name in sys.modules]
print(json.dumps([found, flags, model(torch.tensor([[1, 2]])).logits.shape[-1], len(names)]))
print(json.dumps([torch.compiler.disable(len)("abc"), "torch._dynamo" in sys.modules]))
"""


def import_for(model_type: str, fault: str = "", **env: str) -> list[str]:
    command = [sys.executable, "-c", IMPORT, model_type, fault]
    result = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_lean():
    """What is left out is not there, and is there again when it is used; a fault imports all of it."""
    (heavy, *facts), after = map(json.loads, import_for("gpt2"))
    assert (heavy, facts[:2]) == ([], [[True], 9])
    assert after == [3, True]  # torch's compiler is itself again
    heavy_after_fault, *facts_after_fault = json.loads(import_for("gpt2", "_same")[0])
    assert "torch._dynamo" in heavy_after_fault and facts_after_fault == facts


def test_exit_with_triton(monkeypatch):
    """Objects are frozen at the end of a command, unless Triton is there: its bindings report them as leaks."""
    frozen = []
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    for name in ("hfkit.warm.run", "hfkit.warm.keep_alive", "hfkit.cli.app.main"):
        monkeypatch.setattr(name, lambda: None)
    main()
    assert frozen == [True]
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    main()
    assert frozen == [True]


@pytest.mark.slow
def test_full_imports():
    """HFKIT_FULL_IMPORTS and an unknown type of model import everything."""
    facts = json.loads(import_for("gpt2")[0])[1:]
    for whole in (import_for("gpt2", HFKIT_FULL_IMPORTS="1"), import_for("no such model")):
        assert "torch._dynamo" in json.loads(whole[0])[0] and json.loads(whole[0])[1:] == facts


@pytest.mark.slow
def test_same_text(tiny, tiny_llama, tiny_t5, tiny_bert, tmp_path):
    """Text of GPT-2, a Llama, a translator, and labels of a classifier: the same with all imports and without."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

    set_seed(0)
    config = BertConfig.from_pretrained(tiny_bert, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "classifier")
    for line in (
        ["generate", "Hello", "-s", 1, "-n", 20, "--json"],
        ["generate", "Hello", "-m", tiny, "-s", 1, "-n", 20, "--json"],
        ["generate", "the king", "-m", tiny_llama, "-s", 1, "-n", 20, "--json"],
        ["generate", "the king", "-m", tiny_t5, "-s", 1, "-n", 20, "--json"],
        ["generate", "the king", "-m", tiny_t5, "--num-beams", 3, "-n", 20, "--json"],
        ["classify", "the king", "-m", tmp_path / "classifier", "--json"],
        ["inspect", "Hello", "-m", tiny, "--json", "--attention", "-o", tmp_path / "page.html", "--overwrite"],
    ):
        lean, whole = run(*line), run(*line, env={"HFKIT_FULL_IMPORTS": "1"})
        assert lean.returncode == 0, lean.stderr
        assert (lean.stdout, lean.stderr) == (whole.stdout, whole.stderr)
