"""hfkit serve --engine vllm, with a program in vLLM's place that tells what it was started with."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.shell import assert_fails, call, edit_json, run

import hfkit


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A PATH with nothing on it, and a cache of its own."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def install(place, name):
    program = place / "bin" / name
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@" "$VLLM_API_KEY"\nexit 3\n')
    program.chmod(0o755)


def printed_line(capfdbinary, *arguments):
    """The line that is printed where there is no vLLM."""
    result = call(capfdbinary, "serve", "--engine", "vllm", *arguments)
    assert result.returncode == 1 and b"neither vllm nor uvx" in result.stderr
    return result.stdout.decode().split()


def option(line, name):
    return line[line.index(name) + 1]


def test_line_to_run(place, tiny, capfdbinary):
    """Without vLLM, the line to run names the model's own folder, if vLLM can read that."""
    line = printed_line(capfdbinary, "-m", tiny, "--port", 9000, "--dtype", "float32")
    assert line[:3] == ["vllm", "serve", tiny] and option(line, "--max-model-len") == "64"
    assert (option(line, "--served-model-name"), option(line, "--port")) == (tiny, "9000")
    assert (option(line, "--dtype"), option(line, "--host")) == ("float32", "127.0.0.1")
    assert not (place / "cache").exists()


@pytest.mark.parametrize("name", ["vllm", "uvx"])
def test_vllm_is_started(place, tiny, name):
    """vLLM, or uvx, takes the place of this process; the key is not among its arguments."""
    install(place, name)
    result = run("serve", "--engine", "vllm", "-m", tiny, "--host", "0.0.0.0", "--api-key", "sk-secret")  # noqa: S104
    program, *arguments, key = result.stdout.decode().splitlines()
    assert result.returncode == 3, result.stderr
    assert (Path(program).name, key) == (name, "sk-secret") and "sk-secret" not in arguments
    assert arguments[: 3 - (name == "vllm")] == ["vllm", "serve", tiny][name == "vllm" :]
    assert b"sk-secret" not in result.stderr


def test_other_precision_is_converted(place, tiny, copy, capfdbinary):
    """Weights in 8 bits are written again as vLLM reads them, once."""
    import torch

    folder = Path(copy(tiny))
    weights = load_file(folder / "model.safetensors")
    small = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})
    line = printed_line(capfdbinary, "-m", folder)
    made = Path(line[2])
    assert made.is_relative_to(place / "cache") and option(line, "--served-model-name") == str(folder)
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.float32}
    texts = [hfkit.generate("ab", model=str(each), temperature=0, max_new_tokens=8) for each in (folder, made)]
    assert texts[0].completion == texts[1].completion
    stamp = made.stat().st_mtime_ns
    assert printed_line(capfdbinary, "-m", folder) == line and made.stat().st_mtime_ns == stamp
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert printed_line(capfdbinary, "-m", folder)[2] != str(made)


def test_adapter_is_merged(place, tiny, tmp_path, capfdbinary):
    """vLLM gets one folder with the adapter in its weights."""
    peft = pytest.importorskip("peft")
    lm = hfkit.load(tiny, device="cpu")
    model = peft.get_peft_model(lm.model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    made = printed_line(capfdbinary, "-m", tmp_path / "adapter")[2]
    assert "adapter_config.json" not in os.listdir(made)
    texts = [hfkit.generate("ab", model=str(each), temperature=0, max_new_tokens=8)
             for each in (tmp_path / "adapter", made)]  # fmt: skip
    assert texts[0].completion == texts[1].completion


def test_refused(place, tiny, copy, capfdbinary):
    """What vLLM cannot serve is refused before anything is written."""
    bert = Path(copy(tiny))
    edit_json(bert / "config.json", architectures=["BertForSequenceClassification"])
    cases = [
        (["-m", bert], "does not continue texts"),
        (["-m", tiny, "--quantize", "int8"], "whole weights"),
        (["-m", tiny, "-m", "bundled"], "one model"),
        (["-m", tiny, "--max-requests", 3], "leave the other flags out"),
        (["-m", tiny, "--host", "0.0.0.0"], "--api-key"),  # noqa: S104
    ]
    for arguments, words in cases:
        assert_fails(call(capfdbinary, "serve", "--engine", "vllm", *arguments), 2, words)
    assert not (place / "cache").exists()
