"""Decoding on a GPU, as far as a CPU shows it: its steps give the same texts, and never read a result back."""

import contextlib
import functools

import pytest
import torch
from support.graphs import FakeGraph
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import hfkit
from hfkit import console
from hfkit.inference import batches, graphs
from hfkit.inference.decoding import _draw_without_waiting, draw
from hfkit.inference.text import fit_prompt
from hfkit.options import GenerateOptions

PROMPTS = ["the cat", "a", "what is it that you want"]


@pytest.fixture(scope="module")
def lms(tiny, tiny_llama):
    return {"gpt2": hfkit.load(tiny), "llama": hfkit.load(tiny_llama)}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as `graphs` sees it; the list grows with what it records and replays."""
    events = []
    monkeypatch.setattr(graphs, "suits", lambda lm, new_tokens: new_tokens >= 8)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", functools.partial(FakeGraph, events))
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph.recorded)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the current one")
    monkeypatch.delattr(torch._dynamo, "mark_static_address")  # it would import the compiler
    return events


CONTROLS = {"seed": 2, "top_p": 0.9, "repetition_penalty": 1.3}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"temperature": 0}),
        ("gpt2", {"seed": 1}),
        ("gpt2", {"seed": 3, "stop_strings": ["e"]}),
        ("gpt2", {"seed": 4, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.4}),
        ("llama", CONTROLS),
    ],
)
def test_sample_equals_transformers(lms, monkeypatch, name, options, request):
    """Rows of different lengths, with and without a prompt that is padded."""
    lm, options = lms[name], {"max_new_tokens": 14, **options}
    plain = [*hfkit.generate(PROMPTS, model=lm, **options), hfkit.generate(PROMPTS[0], model=lm, **options)]
    events = request.getfixturevalue("gpu")
    ours = [*hfkit.generate(PROMPTS, model=lm, **options), hfkit.generate(PROMPTS[0], model=lm, **options)]
    assert [text.completion for text in ours] == [text.completion for text in plain]
    assert [text.tokens for text in ours] == [text.tokens for text in plain]
    assert [text.logprob for text in ours] == pytest.approx([text.logprob for text in plain], abs=1e-3)
    assert events.count("recorded") == 2 or "stop_strings" in options
    monkeypatch.undo()


def test_sample_ends(lms, gpu, monkeypatch):
    """All rows may end before the last token; what they write after that is not in the result."""
    lm, options = lms["gpt2"], GenerateOptions(temperature=0, max_new_tokens=40)
    request = fit_prompt("the cat", options, lm.tokenizer, lm.model.config, lm.name)
    (whole,) = batches.run_batch(lm, [request], options)
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", whole.tokens[20])
    gpu.clear()
    (ended,) = batches.run_batch(lm, [request], options)
    assert ended.finish_reason == "stop" and ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[20]) + 1]
    assert len(gpu) < 36  # recorded once, and replayed until the next look at whether it has ended


@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}], ids=["recorded", "beside it"])
def test_sample_in_time(lms, gpu, more):
    text = hfkit.generate("the cat", model=lms["gpt2"], max_new_tokens=50, max_time=1e-9, **more)
    assert (text.tokens, text.finish_reason) == (1, "length") and not gpu


def test_what_is_recorded(lms, gpu, monkeypatch):
    """The choice of a token with the step, unless it depends on the tokens before."""
    finished = []
    step = graphs.Step.__init__
    monkeypatch.setattr(graphs.Step, "__init__", lambda *all: (finished.append(all[-1]), step(*all))[1])
    for more in ({"temperature": 0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"no_repeat_ngram_size": 2}):
        hfkit.generate("the cat", model=lms["gpt2"], max_new_tokens=12, **more)
    assert [bool(each) for each in finished] == [True, True, False]


def test_stream_and_short_texts(lms, gpu):
    lm = lms["gpt2"]
    pieces = list(hfkit.stream("the cat", model=lm, seed=4, max_new_tokens=20))
    assert len(pieces) > 5 and "replayed" in gpu
    assert "".join(pieces) == hfkit.generate("the cat", model=lm, seed=4, max_new_tokens=20).completion
    gpu.clear()
    hfkit.generate("the cat", model=lm, max_new_tokens=7)
    assert not gpu


def test_steps_that_cannot_be_recorded(lms, gpu, monkeypatch, capfd):
    """They go on without a graph, on the stream that they began on."""
    lm, streams = lms["gpt2"], []
    plain = [text.completion for text in hfkit.generate(PROMPTS[:2], model=lm, seed=1, max_new_tokens=16)]

    @contextlib.contextmanager
    def graph(recorded, **options):
        raise RuntimeError("operation not permitted\nwhen")
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(console.state, "verbose", True)
    assert [text.completion for text in hfkit.generate(PROMPTS[:2], model=lm, seed=1, max_new_tokens=16)] == plain
    assert streams == ["the current one"]
    assert "cannot be recorded, so they take longer: operation not permitted" in capfd.readouterr().err


def test_steps_without_memory(lms, gpu, monkeypatch, capfd):
    """The batch is halved, as in transformers' loop."""
    lm, forward = lms["gpt2"], graphs.Step.forward
    plain = [text.completion for text in hfkit.generate(PROMPTS[:2], model=lm, seed=1, max_new_tokens=16)]

    def limited(step):
        if len(step._token) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(step)

    monkeypatch.setattr(graphs.Step, "forward", limited)
    assert [text.completion for text in hfkit.generate(PROMPTS[:2], model=lm, seed=1, max_new_tokens=16)] == plain
    assert "out of memory with 2 texts at a time: going on with 1" in capfd.readouterr().err


SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("family", graphs._FAMILIES)
def test_step_reads_nothing_back(family):
    """Tensors without data: to read one is an error. None of the operations has a part on the CPU."""
    config = AutoConfig.for_model(family, vocab_size=99, bos_token_id=0, eos_token_id=0, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = graphs.FixedCache(hfkit.LanguageModel(model, None), 30)
    heads = 4 if family == "gpt2" else 2
    width = getattr(config, "head_dim", None) or 8
    cache.early_initialization(3, heads, width, dtype=torch.bfloat16, device="meta")
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            devices.update(each.device.type for each in tree_leaves((args, kwargs, result)) if torch.is_tensor(each))
            return result

    step = graphs.Step(model, cache, torch.ones(3, 5, dtype=torch.long, device="meta"))
    with torch.no_grad(), Watch():
        logits = step.forward()
    assert logits.shape == (3, 1, 99) and devices == {"meta"}


def test_suits(lms, tiny_t5, monkeypatch):
    class OnGPU:
        """A model that says that it is on a GPU."""

        device = torch.device("cuda", 0)

        def __init__(self, model, **more):
            vars(self).update(config=model.config, **more)

    lm = lms["gpt2"]
    assert not graphs.suits(lm, 50)  # on a CPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def suits(model, tokens=50, **more):
        return graphs.suits(lm._replace(model=OnGPU(model, **more)), tokens)

    assert suits(lm.model) and suits(lms["llama"].model)
    assert not suits(lm.model, tokens=4)
    assert not suits(hfkit.load(tiny_t5).model)
    assert not suits(lm.model, is_quantized=True)
    assert suits(lm.model, hf_device_map={"": 0}) and not suits(lm.model, hf_device_map={"a": 0, "b": 1})
    assert not suits(lm.model, device=torch.device("cuda", 1))
    with monkeypatch.context() as patch:
        patch.setattr(lm.model.config, "_attn_implementation", "flash_attention_2")
        assert not suits(lm.model)


def test_draw():
    """Without a look at each row it is what torch.multinomial draws."""
    probabilities = torch.randn(4, 999, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)

    def seeded():
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    assert torch.equal(_draw_without_waiting(probabilities, seeded()), draw(probabilities, seeded()))


def test_no_cache_asked_for(lms, gpu):
    options = {"model": lms["gpt2"], "seed": 1, "max_new_tokens": 12}
    without = hfkit.generate("a", use_cache=False, **options)
    assert not gpu
    assert without.completion == hfkit.generate("a", **options).completion and gpu
