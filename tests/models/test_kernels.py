"""What is decided and made for a GPU, seen on a CPU. `tests/gpu` runs on a real one."""

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.gpus import pretend
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    masking_utils,
)

import hfkit
from hfkit.cli import info
from hfkit.errors import HfkitError
from hfkit.models import architecture, kernels, loading
from hfkit.models.quantization import bitsandbytes_config
from hfkit.models.sources import find_model
from hfkit.options import ModelOptions

GPU = torch.device("cuda", 0)


def test_choices(tiny, monkeypatch):
    """Device, precision, bits and placement follow the GPUs and their memory."""
    source, auto = find_model(ModelOptions(model=tiny)), ModelOptions(model=tiny, quantize="auto")
    pretend(monkeypatch)
    assert architecture.choose_device(ModelOptions()) == GPU
    assert architecture.choose_dtype("auto", GPU) == torch.bfloat16
    assert architecture.choose_bits(auto, source, GPU, torch.bfloat16) is None
    assert architecture.spread_over_devices(GPU, source) is None
    pretend(monkeypatch, count=2, free=1000, bfloat16=False)
    assert architecture.choose_dtype("auto", GPU) == torch.float16
    assert architecture.choose_bits(auto, source, GPU, torch.float16) == "int8"
    assert architecture.spread_over_devices(GPU, source) == "auto"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert architecture.choose_device(ModelOptions()) == torch.device("cuda", 1)
    assert architecture.spread_over_devices(GPU, source) is None


def test_describe_machine(monkeypatch):
    pretend(monkeypatch, count=2, free=5)
    assert info.describe_machine()["devices"]["gpus"] == [{"name": "a GPU", "memory": 10, "free": 5}] * 2


@pytest.fixture
def on_gpu(monkeypatch):
    """Loading takes this CPU for a GPU."""
    pretend(monkeypatch)
    monkeypatch.setattr(GPT2LMHeadModel, "to", lambda self, *arguments: self)


def test_load(tiny, on_gpu):
    """The activation is one kernel, and computes the same."""
    lm, plain, ids = hfkit.load(tiny, dtype="float32"), GPT2LMHeadModel.from_pretrained(tiny).eval(), torch.arange(40)
    assert isinstance(lm.model.transformer.h[0].mlp.act, torch.nn.GELU)
    torch.testing.assert_close(lm.model(ids[None]).logits, plain(ids[None]).logits, rtol=1e-4, atol=1e-4)
    assert lm.model.config.activation_function == "gelu_new"


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_load_quantized(tiny, on_gpu, monkeypatch, bits):
    """transformers gets what bitsandbytes needs, and the device, since what is quantized cannot be moved."""
    read, passed = loading._read_model, {}
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    monkeypatch.setattr(
        loading, "_read_model", lambda source, kind, config, **more: passed.update(more) or read(source, kind, config)
    )
    hfkit.load(tiny, quantize=bits)
    settings = passed["quantization_config"]
    assert (settings.load_in_8bit, settings.load_in_4bit) == (bits == "int8", bits == "int4")
    assert settings.bnb_4bit_quant_type == "nf4" or bits == "int8"
    assert passed["device_map"] == {"": GPU}


def test_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(HfkitError, match=r"needs bitsandbytes: pip install 'hfkit\[bitsandbytes\]'"):
        bitsandbytes_config("int8")


@pytest.mark.parametrize("vocabulary", [257, 320])
def test_prepare_training(vocabulary):
    """Loss and gradients are those of the model as it was; a copy has layers of its own."""
    torch.manual_seed(0)
    shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape)).train()
    ready, ids = copy.deepcopy(plain), torch.randint(vocabulary, (2, 16))
    kernels.fuse_activations(ready)
    kernels.prepare_training(ready)
    outputs = [model(input_ids=ids, labels=ids) for model in (plain, ready)]
    assert set(outputs[1]) == {"loss"}
    for output in outputs:
        output.loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    gradients = [{name: part.grad for name, part in model.named_parameters()} for model in (plain, ready)]
    torch.testing.assert_close(gradients[1], gradients[0])
    twin = copy.deepcopy(ready).eval()
    assert twin.lm_head.weight is not ready.lm_head.weight
    torch.testing.assert_close(twin(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_attend_in_blocks(kind, monkeypatch):
    """Padded rows have the loss and gradients of plain attention; a causal model does not compute what is masked."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    match kind:
        case "gpt2":
            model: Any = GPT2LMHeadModel(
                GPT2Config(**shape, **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0))
            )
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32, num_key_value_heads=2))
        case _:
            config = BertConfig(**shape, intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
            model = BertForSequenceClassification(config)
    ids, mask = torch.randint(50, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, 30:] = 0
    labels = torch.tensor([0, 1, 1]) if kind == "bert" else ids.masked_fill(mask == 0, -100)
    module, scores = sys.modules[type(model).__module__], []
    plain = module.eager_attention_forward

    def watch(layer, query, key, *arguments, **options):
        scores.append((query.shape[2], key.shape[2]))
        return plain(layer, query, key, *arguments, **options)

    monkeypatch.setattr(module, "eager_attention_forward", watch)
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    results = []
    for change in (lambda model: model.set_attn_implementation("eager"), kernels.attend_in_blocks):
        scores.clear()
        twin = copy.deepcopy(model).train()
        change(twin)
        loss = twin(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss, {name: part.grad for name, part in twin.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])
    assert scores == 2 * ([(40, 40)] if kind == "bert" else [(16, 16), (16, 32), (8, 40)])
    if kind != "bert":  # new queries, all of which see all keys before them
        cache = DynamicCache(config=twin.eval().config)
        parts = [twin(part, cache=cache, use_cache=True).logits for part in (ids[:, :20], ids[:, 20:24])]
        torch.testing.assert_close(torch.cat(parts, 1), twin(ids[:, :24]).logits)


@pytest.mark.parametrize("kind", ["gpt2", "window"])
@pytest.mark.parametrize("is_real", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_attend_without_mask(kind, is_real, monkeypatch):
    """Compiled, too, a causal model's attention gets no mask, unless a window needs one; losses stay as they are.

    traced: as transformers computes a mask while it is compiled. The compiler itself takes seconds to import.
    """
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
        model: Any = GPT2LMHeadModel(GPT2Config(**shape, **dropout))
    else:
        config = MistralConfig(**shape, intermediate_size=32, num_key_value_heads=2, sliding_window=8)
        model = MistralForCausalLM(config)
    ids = torch.randint(50, (3, 40))
    labels = ids.clone()
    labels[1, 30:] = -100  # padding
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention

    def compiled(graph, inputs):
        """A compiler that looks at what it gets, and compiles nothing."""
        calls = [node for node in graph.graph.nodes if node.target is attend]
        masks.extend((node.kwargs["attn_mask"] is not None, node.kwargs["is_causal"]) for node in calls)
        return graph.forward

    def watched(*tensors, attn_mask, is_causal, **options):
        masks.append((attn_mask is not None, is_causal))
        return attend(*tensors, attn_mask=attn_mask, is_causal=is_causal, **options)

    plain = model(input_ids=ids, labels=labels)
    for change, found in ((lambda model: None, (True, False)), (kernels.attend_without_mask, (False, True))):
        masks.clear()
        twin = copy.deepcopy(model)
        change(twin)
        with monkeypatch.context() as patch:
            if is_real:
                run = torch.compile(twin, backend=compiled)
            else:
                patch.setattr(masking_utils, "is_tracing", lambda *_: True)
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
                run = twin
            loss = run(input_ids=ids, labels=labels, use_cache=False).loss
        assert masks == 2 * [found if kind == "gpt2" else (True, False)]
        torch.testing.assert_close(loss, plain.loss)
        if is_real:
            torch._dynamo.reset()
    assert twin.config._attn_implementation != "sdpa"
    padding = (labels != -100).long()  # a model that is sampled from gets a mask, and uses it
    padding[2, :5] = 0
    torch.testing.assert_close(
        *(each(input_ids=ids, attention_mask=padding).logits[2, 5:] for each in (twin.eval(), model.eval()))
    )
