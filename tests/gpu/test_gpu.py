"""hfkit on a GPU: what it writes, learns and measures there is what it does on a CPU. `bash tests/gpu/run.sh`."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings

import httpx2 as httpx
import pytest
import torch
from support import trials
from transformers import TrainerCallback

import hfkit
from hfkit.errors import StoppedError
from hfkit.inference import batches, graphs
from hfkit.inference.text import fit_prompt
from hfkit.models.quantization import bits_of
from hfkit.options import GenerateOptions

pytestmark = pytest.mark.gpu
PROMPTS = [
    "Once upon a time",
    "The river",
    "He opened the door, and",
    "“I do not know,” she said. “It",
    "A",
    "It was cold",
]
WAYS = pytest.mark.parametrize("way", [{"temperature": 0}, {"seed": 5}], ids=["greedy", "sampled"])
TOKENS = 40
BITSANDBYTES = pytest.mark.skipif(
    os.environ.get("HFKIT_GPU_DRY") != "1" and not importlib.util.find_spec("bitsandbytes"),
    reason="bitsandbytes is not installed",
)


@pytest.fixture(scope="session")
def exact(device):
    """The bundled model in float32."""
    return hfkit.load("bundled", device=device, dtype="float32")


@pytest.fixture(scope="session")
def half(device):
    return hfkit.load("bundled", device=device, dtype="bfloat16")


@pytest.fixture(scope="session")
def on_cpu():
    return hfkit.load("bundled", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """Words in random order, some 100,000 tokens of the bundled model."""
    return trials.write_corpus(tmp_path_factory.mktemp("gpu") / "corpus.txt", documents=1200, seed=1)


@pytest.fixture
def recorded(monkeypatch):
    """Grows with each graph that is recorded."""
    record, made = graphs.Step._record, []

    def watched(step):
        record(step)
        made.append(step._graph)

    monkeypatch.setattr(graphs.Step, "_record", watched)
    return made


def regret(lm, context: list[int], tokens: list[int]) -> float:
    """The most nats by which a token of a greedy text misses the best one, for a model in float32."""
    with torch.no_grad():
        scores = lm.model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return float((scores.max(-1).values - scores.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max())


# generating


@WAYS
def test_generate_batch_equals_single(exact, way):
    batch = hfkit.generate(PROMPTS, model=exact, max_new_tokens=TOKENS, **way)
    for number, (prompt, text) in enumerate(zip(PROMPTS, batch, strict=True)):
        seed = {"seed": way["seed"] + number} if "seed" in way else way
        alone = hfkit.generate(prompt, model=exact, max_new_tokens=TOKENS, **seed)
        assert (text.completion, text.tokens) == (alone.completion, alone.tokens)
        assert text.logprob == pytest.approx(alone.logprob, abs=1e-2)


def test_generate_equals_cpu(exact, on_cpu):
    texts = [hfkit.generate(PROMPTS, model=lm, temperature=0, max_new_tokens=TOKENS) for lm in (exact, on_cpu)]
    assert [text.completion for text in texts[0]] == [text.completion for text in texts[1]]
    pairs = [[text.logprob for text in each] for each in texts]
    assert pairs[0] == pytest.approx(pairs[1], abs=1e-2)


def test_generate_bfloat16(half, on_cpu):
    """Every token is one that float32 nearly chooses, in a batch and alone."""
    options = GenerateOptions(temperature=0, max_new_tokens=TOKENS)
    requests = [fit_prompt(prompt, options, half.tokenizer, half.model.config, half.name) for prompt in PROMPTS]
    batch = batches.run_batch(half, requests, options)
    alone = [batches.run_batch(half, [request], options)[0] for request in requests]
    for request, text in zip(requests * 2, [*batch, *alone], strict=True):
        assert regret(on_cpu, request.ids, text.tokens) < 0.3
    # Until the first token at which two are equally good, batch and single are the same.
    assert sum(a.tokens[:3] == b.tokens[:3] for a, b in zip(batch, alone, strict=True)) >= len(PROMPTS) - 2


@pytest.mark.real_gpu("CUDA graphs; tests/inference/test_graphs.py shows the steps")
@WAYS
@pytest.mark.parametrize("model", ["bundled", "tiny_llama"])
def test_graph_equals_transformers(model, way, device, recorded, monkeypatch, request):
    """A replayed step gives what transformers' loop gives, and is really recorded."""
    name = model if model == "bundled" else request.getfixturevalue(model)
    lm = hfkit.load(name, device=device, dtype="float32")
    ours = hfkit.generate(PROMPTS, model=lm, max_new_tokens=TOKENS, **way)
    assert recorded and all(recorded)
    monkeypatch.setattr(graphs, "suits", lambda *_: False)
    plain = hfkit.generate(PROMPTS, model=lm, max_new_tokens=TOKENS, **way)
    assert [text.completion for text in ours] == [text.completion for text in plain]


@pytest.mark.real_gpu("waiting for a GPU")
@WAYS
def test_steps_do_not_wait(half, way, monkeypatch):
    """From a token's logits to the next ones nothing waits for the GPU: torch makes such a wait an error."""
    from hfkit.inference.decoding import Rows

    def watched(function):
        def call(*arguments, **keywords):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return call

    for owner, name in ((Rows, "fill"), (Rows, "keep"), (graphs.Step, "forward")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    assert hfkit.generate(PROMPTS[0], model=half, max_new_tokens=TOKENS, **way).tokens


@WAYS
def test_stream_equals_generate(exact, way):
    pieces = list(hfkit.stream(PROMPTS[2], model=exact, max_new_tokens=TOKENS, **way))
    assert len(pieces) > 5
    assert "".join(pieces) == hfkit.generate(PROMPTS[2], model=exact, max_new_tokens=TOKENS, **way).completion


def test_controls(exact):
    """The controls that look at tokens or texts, in one call; and beams."""
    options = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    options |= {"bad_words": [" the"], "stop_strings": ["\n\n"], "num_return_sequences": 3}
    texts = hfkit.generate(PROMPTS[0], model=exact, seed=1, max_new_tokens=TOKENS, **options)
    assert len(texts) == 3 and not any(" the" in text.completion for text in texts)
    beam = hfkit.generate(PROMPTS[0], model=exact, num_beams=3, temperature=0, max_new_tokens=20)
    greedy = hfkit.generate(PROMPTS[0], model=exact, temperature=0, max_new_tokens=20)
    assert beam.logprob >= greedy.logprob - 1e-3


def test_generate_in_a_process(device, exact, tmp_path):
    command = [sys.executable, "-m", "hfkit", "generate", PROMPTS[1], "--seed", "3", "-n", "20", "--json", "-q"]
    command += ["--device", device, "--dtype", "float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text = hfkit.generate(PROMPTS[1], model=exact, seed=3, max_new_tokens=20)
    assert json.loads(done.stdout)["completion"] == text.completion


@pytest.mark.real_gpu("a limit to its memory; test_run_all_out_of_memory injects the error")
def test_generate_out_of_memory(half, capfd):
    torch.cuda.empty_cache()
    with limited_to(500 << 20):
        texts = hfkit.generate(["The"] * 256, model=half, seed=1, max_new_tokens=450, batch_size=256)
    assert len(texts) == 256 and all(text.tokens for text in texts)
    assert "out of memory with 256 texts at a time: going on with 128" in capfd.readouterr().err


class limited_to:  # noqa: N801, reads as a sentence
    """So many bytes more than are in use."""

    def __init__(self, count: int) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        self._share = (torch.cuda.memory_reserved() + count) / total

    def __enter__(self) -> None:
        torch.cuda.set_per_process_memory_fraction(self._share)

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)


# loading


@BITSANDBYTES
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.05), ("int4", 0.3)])
def test_quantized(bits, most, device, exact, text, tmp_path):
    """Text comes out, and the perplexity is that of the whole weights within a share."""
    part = tmp_path / "part.txt"
    part.write_text("".join(open(text).read()[:4000]))
    lm = hfkit.load("bundled", device=device, quantize=bits)
    assert bits_of(lm.model) == bits
    assert hfkit.generate(PROMPTS[:3], model=lm, seed=2, max_new_tokens=20)[0].tokens == 20
    whole, small = (hfkit.evaluate(str(part), model=each).perplexity for each in (exact, lm))
    assert small == pytest.approx(whole, rel=most)


def test_device_map(device, exact):
    spread = hfkit.load("bundled", dtype="float32", device=device, device_map="auto" if device == "cuda" else "cpu")
    assert spread.model.device.type == device
    options = {"temperature": 0, "max_new_tokens": 20}
    texts = [hfkit.generate(PROMPTS, model=lm, **options) for lm in (spread, exact)]
    assert [text.completion for text in texts[0]] == [text.completion for text in texts[1]]


# measuring


def test_evaluate_equals_cpu(exact, half, on_cpu, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("It was a dark night. The wind came over the river, and nobody was in the street. " * 60)
    reference = hfkit.evaluate(str(text), model=on_cpu).perplexity
    assert hfkit.evaluate(str(text), model=exact).perplexity == pytest.approx(reference, rel=1e-3)
    assert hfkit.evaluate(str(text), model=half).perplexity == pytest.approx(reference, rel=2e-2)


# training

SMALL = {"block_size": 64, "max_steps": 6, "eval_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("more", [{}, {"lora": True, "lora_r": 4}], ids=["whole", "lora"])
def test_resume_to_the_bit(more, device, tiny, corpus, tmp_path, brisk):
    """With dropout, in the precision that the device chooses."""
    options = SMALL | {"model": tiny, "device": device, "full_determinism": True, **more}
    hfkit.finetune(corpus, output_dir=tmp_path / "whole", **options)
    with pytest.raises(StoppedError):
        hfkit.finetune(corpus, output_dir=tmp_path / "halves", callbacks=[StopAt(3)], **options)
    hfkit.finetune(corpus, output_dir=tmp_path / "halves", resume=True, **options)
    assert trials.outcome(tmp_path / "halves") == trials.outcome(tmp_path / "whole")


def test_finetune_equals_cpu(device, still, corpus, tmp_path, brisk):
    """In float32 a GPU's losses are those of a CPU, with its padded vocabulary and its fused activation."""
    options = SMALL | {"model": still, "bf16": False, "logging_steps": 1}
    runs = [hfkit.finetune(corpus, output_dir=tmp_path / name, device=name, **options) for name in {device, "cpu"}]
    assert trials.losses(runs[0].metrics) == pytest.approx(trials.losses(runs[-1].metrics), rel=1e-3)
    assert runs[0].metrics["loss"] < runs[0].metrics["loss_before"]


def test_finetune_bundled(device, text, tmp_path, brisk):
    """The defaults of the device: precision, fused optimizer, pinned batches."""
    run = hfkit.finetune(text, model="bundled", device=device, output_dir=tmp_path / "run", **SMALL)
    assert run.metrics["loss"] < run.metrics["loss_before"]
    if device == "cuda":
        assert run.metrics["precision"] == "bfloat16"
    assert hfkit.generate("rain", model=run.output_dir, device=device, max_new_tokens=8).tokens == 8


def test_pretrain(device, text, tmp_path, brisk):
    """With Muon."""
    run = hfkit.pretrain(text, size="tiny", device=device, output_dir=tmp_path / "run", block_size=64, max_steps=8)
    assert run.metrics["optim"] == "muon" and run.metrics["loss"] < run.metrics["loss_before"]


@pytest.mark.real_gpu("compiling for one; test_finetune_compiled compiles for a CPU")
def test_finetune_compiled(still, text, tmp_path, brisk):
    options = SMALL | {"model": still, "device": "cuda", "logging_steps": 1}
    runs = [
        hfkit.finetune(text, output_dir=tmp_path / str(way), torch_compile=way, **options) for way in (False, True)
    ]
    assert [run.metrics["compiled"] for run in runs] == [False, True]
    assert trials.losses(runs[1].metrics) == pytest.approx(trials.losses(runs[0].metrics), abs=2e-2)


@pytest.mark.real_gpu("waiting for a GPU")
def test_training_step_does_not_wait(still, text, tmp_path, brisk):
    """Between two losses that are read, no step waits for the GPU; torch warns of such a wait."""

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            torch.cuda.set_sync_debug_mode("warn" if 3 <= state.global_step < 8 else "default")

        def on_train_end(self, args, state, control, **kwargs) -> None:
            torch.cuda.set_sync_debug_mode("default")

    options = SMALL | {"model": still, "device": "cuda", "logging_steps": 50, "max_steps": 12, "eval_steps": 12}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hfkit.finetune(text, output_dir=tmp_path / "run", callbacks=[Watch()], **options)
    waits = {f"{each.filename}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)}
    assert not waits


@pytest.mark.real_gpu("a limit to its memory; test_fit_without_memory injects the error")
def test_finetune_out_of_memory(text, tmp_path, capfd, brisk):
    torch.cuda.empty_cache()
    options = {"block_size": 512, "max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 64}
    with limited_to(1100 << 20):
        run = hfkit.finetune(text, model="bundled", device="cuda", output_dir=tmp_path / "run", **options)
    assert "out of memory: going on with 32 sequences at a time, 2 times a step" in capfd.readouterr().err
    assert run.metrics["steps"] == 2


def test_lora(device, text, tmp_path, brisk):
    options = SMALL | {"model": "bundled", "device": device, "lora": True}
    run = hfkit.finetune(text, output_dir=tmp_path / "run", **options)
    assert run.metrics["loss"] < run.metrics["loss_before"]
    lm = hfkit.load(run.output_dir, device=device)
    assert hfkit.generate("rain", model=lm, seed=1, max_new_tokens=8).tokens == 8


@pytest.mark.real_gpu("QLoRA: bitsandbytes trains there only")
@BITSANDBYTES
def test_qlora(text, tmp_path, brisk):
    options = SMALL | {"model": "bundled", "device": "cuda", "lora": True, "quantize": "int4"}
    run = hfkit.finetune(text, output_dir=tmp_path / "run", **options)
    assert run.metrics["loss"] < run.metrics["loss_before"]
    assert hfkit.generate("rain", model=run.output_dir, device="cuda", max_new_tokens=8).tokens == 8


# serving


def test_server_equals_generate(exact):
    """Several clients at once get the texts that `generate` gives."""
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from concurrent.futures import ThreadPoolExecutor

    from support.servers import serving

    with serving(exact) as (address, _), ThreadPoolExecutor(len(PROMPTS)) as pool:

        def ask(prompt: str) -> str:
            fields = {"prompt": prompt, "seed": 7, "max_tokens": 20, "model": "bundled"}
            reply = httpx.post(f"{address}/v1/completions", json=fields, timeout=60)
            return reply.json()["choices"][0]["text"]

        texts = list(pool.map(ask, PROMPTS))
    assert texts == [hfkit.generate(prompt, model=exact, seed=7, max_new_tokens=20).completion for prompt in PROMPTS]
