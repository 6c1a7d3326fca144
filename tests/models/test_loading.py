"""Models of every kind are what they were saved as, or one sentence says why not."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import trials
from support.models import byte_vocabulary, write_gguf
from support.shell import assert_fails, call, edit_json
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaForCausalLM,
    set_seed,
)
from transformers.pytorch_utils import Conv1D

import hfkit
from hfkit import storage
from hfkit.errors import HfkitError, OptionError
from hfkit.models import quantization
from hfkit.models.architecture import choose_dtype
from hfkit.models.loading import load_weights
from hfkit.models.quantization import Int4Linear, Int8Linear, bits_of
from hfkit.options import ModelOptions

pytestmark = pytest.mark.usefixtures("brisk")
IDS = torch.tensor([[72, 101, 108, 108, 111, 44, 33]])


def fails(model, **options) -> str:
    with pytest.raises(HfkitError) as error:
        hfkit.load(str(model), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def hfkit_fails(act) -> str:
    with pytest.raises(HfkitError) as error:
        act()
    return str(error.value)


def edit_weights(folder: Path, change, file: str = "model.safetensors") -> None:
    """Change the tensors of a model's file: `change(tensors)`."""
    tensors = load_file(folder / file)
    change(tensors)
    (folder / file).unlink()  # a loaded model may still map it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


# what is loaded


def test_load_gpt2(tiny):
    """GPT-2 is a GPT2LMHeadModel with a GPT2Tokenizer."""
    model, tokenizer = lm = hfkit.load(tiny)
    assert type(model) is GPT2LMHeadModel and type(tokenizer) is GPT2Tokenizer
    assert not model.training and model.dtype == torch.float32 and lm.name == tiny and lm.context == 64
    assert torch.equal(model(IDS).logits, GPT2LMHeadModel.from_pretrained(tiny)(IDS).logits)


def test_load_bundled():
    """The bundled model is the default, and it reads English."""
    lm = hfkit.load()
    assert lm.name == "bundled" and type(lm.model) is GPT2LMHeadModel
    text, other = "She looked at him and said that she was", "at that was she him she said looked and She"
    ids = [lm.tokenizer(sentence, return_tensors="pt").input_ids for sentence in (text, other)]
    assert lm.model(ids[0], labels=ids[0]).loss + 1 < lm.model(ids[1], labels=ids[1]).loss


def test_load_other_models(tiny_llama, tiny_t5):
    """Other models come from the Auto classes."""
    llama, t5 = hfkit.load(tiny_llama), hfkit.load(tiny_t5)
    assert type(llama.model) is LlamaForCausalLM and llama.context == 128
    assert type(t5.model) is type(AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)) and t5.context is None


def test_load_options(tiny):
    """Options come as keywords or as one object."""
    by_name, as_one = hfkit.load(tiny, dtype="bfloat16"), hfkit.load(ModelOptions(model=tiny, dtype="bfloat16"))
    assert by_name.model.dtype == as_one.model.dtype == torch.bfloat16
    assert hfkit.load(ModelOptions(model=tiny, dtype="bfloat16"), dtype="float32").model.dtype == torch.float32


def test_loaded_until_files_change(copy, tiny, monkeypatch):
    """A model given by name stays loaded until its files change."""
    folder, how = str(copy(tiny)), {"max_new_tokens": 9, "temperature": 0}
    first = hfkit.generate("a", model=folder, **how)
    with monkeypatch.context() as patch:
        patch.setattr("hfkit.models.loading.load_weights", None)
        assert hfkit.generate("a", model=folder, **how) == first
    edit_weights(Path(folder), lambda tensors: tensors["transformer.wte.weight"].neg_())
    assert hfkit.generate("a", model=folder, **how) != first
    monkeypatch.setenv("HFKIT_MODEL", tiny)
    assert hfkit.generate("a", **how).completion == first.completion


THREADS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import hfkit
from hfkit.models import loading

loads, load_weights = [], loading.load_weights
loading.load_weights = lambda *a, **k: loads.append(1) or load_weights(*a, **k)
start = threading.Barrier(4)

def call(kind):
    start.wait()
    return kind()

generate = lambda: hfkit.generate("x", model=sys.argv[1], seed=1, max_new_tokens=3).completion
load = lambda: hfkit.load(sys.argv[1], dtype="bfloat16")
with ThreadPoolExecutor(4) as pool:
    texts = list(pool.map(call, [generate] * 4))
    assert len(set(texts)) == len(loads) == 1, (texts, loads)
    for lm in pool.map(call, [load] * 4):
        assert lm.model.lm_head.weight is lm.model.transformer.wte.weight
assert hfkit.load(sys.argv[1]).model.dtype == __import__("torch").get_default_dtype()
"""


def test_load_in_threads(tiny):
    """The first calls of a process may come from several threads: the model is loaded once, with its tied weights."""
    result = subprocess.run([sys.executable, "-c", THREADS, tiny], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_split_options(tiny, corpus, tmp_path, still):
    """Every call that takes a model takes the options of loading one; a loaded model cannot be loaded otherwise."""
    lm, how = hfkit.load(tiny, dtype="bfloat16"), {"dtype": "bfloat16", "device": "cpu"}
    calls = {
        "generate": lambda **more: hfkit.generate("a", seed=1, max_new_tokens=3, **more),
        "stream": lambda **more: list(hfkit.stream("a", seed=1, max_new_tokens=3, **more)),
        "classify": lambda **more: hfkit.classify("a", labels=["a", "b"], **more),
        "answer": lambda **more: hfkit.answer("Who?", "Ann.", max_new_tokens=3, **more),
        "inspect": lambda **more: [token.text for token in hfkit.inspect("ab", **more).tokens],
        "evaluate": lambda **more: hfkit.evaluate(corpus, **more).perplexity,
    }
    for name, use in calls.items():
        by_name, as_one, as_model = (
            use(model=tiny, **how), use(model=ModelOptions(model=tiny), **how), use(model=lm)
        )  # fmt: skip
        if name in ("stream", "inspect", "evaluate"):
            assert by_name == as_one == as_model
        with pytest.raises(OptionError, match="dtype is for loading, and the model is loaded"):
            use(model=lm, **how)
        with pytest.raises(TypeError, match="'dtyp': did you mean 'dtype'"):
            use(model=tiny, dtyp="bfloat16")
    export = hfkit.export(tiny, output_dir=tmp_path / "out", device="cpu", revision="main", dtype="bfloat16")
    assert hfkit.load(export, dtype="auto").model.config.dtype == torch.float32
    with pytest.raises(OptionError, match="an export has whole weights"):
        hfkit.export(ModelOptions(model=tiny, quantize="int8"), output_dir=tmp_path / "out")
    with pytest.raises(OptionError, match="--quantize is 'int8': it must be one of q8_0"):
        hfkit.export(tiny, output_dir=tmp_path / "out", quantize="int8")


# adapters


@pytest.fixture
def adapter(tiny, tmp_path):
    """A LoRA adapter with weights that matter, and the logits of the merged model."""
    import peft

    set_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tiny), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model.merge_and_unload()(IDS).logits


def test_load_adapter(adapter, tiny):
    """An adapter is its base with the weights merged."""
    folder, expected = adapter
    lm = hfkit.load(str(folder))
    assert type(lm.model) is GPT2LMHeadModel and lm.name == str(folder)
    assert torch.allclose(lm.model(IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(hfkit.load(tiny).model(IDS).logits, expected, atol=1e-2)


def test_load_adapter_that_does_not_fit(adapter, tmp_path):
    """An adapter that does not fit its base is refused."""
    folder, _ = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    assert str(folder) in fails(folder)
    for change, words in ((lambda t: t.popitem(), "missing base_model.model.transformer.h."),
                          (lambda t: t.update({"base_model.model.h.9.lora_A.weight": torch.zeros(1)}), "unexpected"),
                          (lambda t: t.clear(), "and 3 more")):  # fmt: skip
        changed = dict(tensors)
        change(changed)
        save_file(changed, folder / "adapter_model.safetensors")
        assert words in fails(folder) and str(folder) in fails(folder)
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    assert "not numbers" in fails(folder)


def test_load_adapter_with_its_own_tokens(tiny, tmp_path):
    """Tokens that were added for an adapter, and their embeddings, come from its folder; an export keeps them."""
    import peft

    tokenizer, model = GPT2Tokenizer.from_pretrained(tiny), GPT2LMHeadModel.from_pretrained(tiny)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.chat_template = "{{ messages[0].content }}!"
    set_seed(3)
    model.resize_token_embeddings(264, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = tokenizer("x<b>y", return_tensors="pt").input_ids
    expected = adapted.merge_and_unload()(ids).logits
    export = hfkit.export(tmp_path / "adapter", output_dir=tmp_path / "whole")
    for folder in (tmp_path / "adapter", export):
        lm = hfkit.load(folder)
        assert lm.tokenizer("x<b>y")["input_ids"] == ids[0].tolist() and lm.tokenizer.chat_template
        assert torch.allclose(lm.model(ids).logits, expected, atol=1e-5)
    edit_weights(tmp_path / "adapter", lambda saved: [saved.pop(name) for name in [*saved] if "lora" not in name],
                 "adapter_model.safetensors")  # fmt: skip
    assert "the tokenizer has 259 tokens, the model 257" in fails(tmp_path / "adapter")


def test_load_adapter_with_its_task(tiny, tmp_path):
    """A task that an adapter learned is used by whatever uses the adapter."""
    rows = "".join(f"{word},{word[::-1]}\n" for word in trials.WORDS * 3)
    (tmp_path / "rows.csv").write_text(f"en,fr\n{rows}")
    run = hfkit.finetune(
        tmp_path / "rows.csv", model=tiny, output_dir=tmp_path / "run", template="E: {en}\nF: {fr}", max_steps=1,
        lora=True, bf16=False,
    )  # fmt: skip
    seen = []
    for model in (run.output_dir, hfkit.export(run.output_dir, output_dir=tmp_path / "whole")):
        seen.append(hfkit.generate({"en": "rain"}, model=model, seed=1, max_new_tokens=3).completion)
        assert "exact_match" in hfkit.evaluate(tmp_path / "rows.csv", model=model).metrics
    assert seen[0] == seen[1]


# GGUF


@pytest.mark.parametrize("positions", [40, 1024, 2000])
def test_load_gguf_gpt2(tmp_path, capfd, positions):
    """A GPT-2 in a GGUF file is the same model."""
    end = "<|endoftext|>"
    tokenizer = GPT2Tokenizer(vocab=byte_vocabulary() | {"th": 257}, merges=[("t", "h")], bos_token=end, eos_token=end)
    set_seed(0)
    config = GPT2Config(
        vocab_size=258, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config).eval()
    lm = hfkit.load(write_gguf(model, tokenizer, tmp_path / "model.gguf"))
    assert type(lm.model) is GPT2LMHeadModel and lm.context == positions
    assert torch.allclose(lm.model(IDS).logits, model(IDS).logits, atol=1e-5)
    assert lm.tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert hfkit.generate("the", model=lm, max_new_tokens=positions - 3 if positions < 99 else 5, temperature=0).tokens
    assert capfd.readouterr() == ("", "")


def test_load_gguf_llama(tiny_llama, tmp_path):
    """A Llama in a GGUF file is the same model."""
    whole = hfkit.load(tiny_llama)
    lm = hfkit.load(write_gguf(whole.model, whole.tokenizer, tmp_path / "model.gguf"))
    assert type(lm.model) is LlamaForCausalLM and lm.context == 128
    assert torch.allclose(lm.model(IDS).logits, whole.model(IDS).logits, atol=1e-4)
    assert lm.tokenizer.decode(lm.tokenizer("the cat")["input_ids"], skip_special_tokens=True) == "the cat"


@pytest.mark.parametrize(
    "damage", [lambda data: data[:99], lambda data: b"GGUF" + b"\xff" * 99, lambda data: data[:-999]]
)
def test_load_gguf_damaged(tiny_llama, tmp_path, damage):
    """A damaged GGUF file is one sentence."""
    whole = hfkit.load(tiny_llama)
    path = Path(write_gguf(whole.model, whole.tokenizer, tmp_path / "model.gguf"))
    path.write_bytes(damage(path.read_bytes()))
    assert "model.gguf" in fails(path)


def test_load_gguf_block_count(tiny_llama, tmp_path):
    """A file with more blocks, or fewer, than it says is not the model that was saved."""
    whole = hfkit.load(tiny_llama)
    path = write_gguf(whole.model, whole.tokenizer, tmp_path / "model.gguf", blocks=1)
    assert "2 blocks, but block_count is 1" in fails(path)
    path = write_gguf(whole.model, whole.tokenizer, tmp_path / "model.gguf", blocks=3)
    assert "missing model.layers.2." in fails(path)
    assert hfkit.load(write_gguf(whole.model, whole.tokenizer, tmp_path / "model.gguf"))


# weights that are not the model's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer.h.0.attn.c_attn.weight"), "missing transformer.h.0.attn.c_attn.weight"),
        (lambda t: t.pop("transformer.wte.weight"), "missing"),
        (lambda t: [t.pop(name) for name in sorted(t)[:9]], "and 4 more"),
        (lambda t: t.update({"transformer.h.7.ln_1.bias": torch.zeros(32)}), "unexpected transformer.h.7.ln_1.bias"),
        (lambda t: t.update({"transformer.ln_f.weight": torch.zeros(31)}), "mismatched"),
        (lambda t: t.update({"transformer.wpe.weight": torch.zeros(99, 32)}), "mismatched"),
        (lambda t: t["transformer.ln_f.bias"].fill_(torch.nan), "not numbers"),
        (lambda t: t["transformer.h.1.mlp.c_fc.weight"][3, 4:5].fill_(torch.inf), "not numbers"),
        (lambda t: t["transformer.h.1.mlp.c_fc.weight"][3, 4:5].fill_(-torch.inf), "c_fc.weight"),
    ],
)
def test_load_weights_that_do_not_fit(copy, tiny, change, words):
    """Weights that do not fit the config are named."""
    folder = copy(tiny)
    edit_weights(folder, change)
    assert words in fails(folder) and str(folder) in fails(folder)


OLD_BUFFERS = {
    f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 9, 9) for i in (0, 1) for name in ("bias", "masked_bias")
}


@pytest.mark.parametrize(
    ("name", "tensors", "count"),
    [
        ("tiny", OLD_BUFFERS, 2),  # transformers itself ignores those called bias
        ("tiny", {"transformer.h.7.x": torch.zeros(1)}, 1),
        ("tiny", {"v_head.summary.weight": torch.zeros(1, 32), "v_head.summary.bias": torch.zeros(1)}, 2),
        ("tiny_llama", {"score.weight": torch.ones(2, 32)}, 1),
    ],
)
def test_check_report_left_over(request, copy, capsys, name, tensors, count):
    """Tensors that the model has no place for are counted in one note, and change nothing."""
    model = request.getfixturevalue(name)
    folder = copy(model)
    edit_weights(folder, lambda saved: saved.update(tensors))
    capsys.readouterr()
    lm = hfkit.load(folder)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hfkit: {folder}: {count} of the weights' tensors are not part of the model, such as ")
    assert torch.equal(lm.model(IDS).logits, hfkit.load(model).model(IDS).logits)


def test_check_report_pooler(tiny_bert, copy, capsys):
    """A classifier of another architecture leaves its pooler; a missing head is an error, as ever."""
    from transformers import AutoConfig, BertForQuestionAnswering

    folder = copy(tiny_bert)
    model = BertForQuestionAnswering(AutoConfig.from_pretrained(tiny_bert))
    model.save_pretrained(folder)
    pooler = {"bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}
    edit_weights(folder, lambda saved: saved.update(pooler))
    assert type(hfkit.load(folder).model) is BertForQuestionAnswering
    assert "2 of the weights' tensors are not part of the model" in capsys.readouterr().err
    edit_weights(folder, lambda saved: saved.pop("qa_outputs.bias"))
    assert "missing qa_outputs.bias" in fails(folder)


@pytest.mark.parametrize("kind", ["run", "adapter", "export", "head"])
def test_check_files(tiny, corpus, tmp_path, kind):
    """One bit that flips in the weights of a run or an export is noticed, whatever it changes."""
    options = {"model": tiny, "max_steps": 1, "bf16": False, "output_dir": tmp_path / "run"}
    if kind == "export":
        folder = Path(hfkit.export(tiny, output_dir=tmp_path / "run"))
    elif kind == "head":
        (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n' * 9)
        folder = Path(hfkit.finetune(tmp_path / "rows.jsonl", head="classification", **options).output_dir)
    else:
        folder = Path(hfkit.finetune(corpus, lora=kind == "adapter", **options).output_dir)
    (path,) = folder.glob("*.safetensors")
    content, name = bytearray(path.read_bytes()), folder.rename(tmp_path / "moved") / path.name
    assert hfkit.load(tmp_path / "moved")
    for position in (-1, len(content) // 2, -99):
        changed = content.copy()
        changed[position] ^= 1
        name.unlink()  # a loaded model still maps the file
        name.write_bytes(changed)
        assert f"the weights are not those that hfkit wrote ({name})" in fails(tmp_path / "moved")
    if kind == "head":
        assert "not those that hfkit wrote" in hfkit_fails(
            lambda: hfkit.finetune(
                tmp_path / "rows.jsonl", **options | {"model": tmp_path / "moved", "output_dir": tmp_path / "next"}
            )
        )
    (tmp_path / "moved" / storage.LIST).unlink()
    assert hfkit.load(tmp_path / "moved")


def test_load_config_of_another_size(copy, tiny):
    """A config of another size is refused."""
    folder = copy(tiny)
    for wrong in ({"n_layer": 3}, {"n_embd": 16}, {"vocab_size": 300}, {"n_positions": 32}, {"n_layer": 1}):
        edit_json(
            folder / "config.json", **({"n_layer": 2, "n_embd": 32, "vocab_size": 257, "n_positions": 64} | wrong)
        )
        assert str(folder) in fails(folder)


@pytest.mark.parametrize(
    "wrong",
    [{"n_layer": "two"}, {"n_head": 3}, {"n_head": 0}, {"n_head": -2}, {"n_layer": -1}, {"model_type": "nonsense"}],
)
def test_load_config_without_sense(copy, tiny, wrong):
    """A config that makes no sense is one sentence."""
    folder = copy(tiny)
    edit_json(folder / "config.json", **wrong)
    assert str(folder) in fails(folder)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"model_type": "gtp2"}, "unknown model_type 'gtp2' ({}/config.json): did you mean 'gpt2'?"),
        ({"model_type": "x/y"}, "unknown model_type 'x/y' ({}/config.json): correct it, or install a transformers"),
        ({"model_type": [3]}, "unknown model_type [3] ({}/config.json): "),
        ({"model_type": "bert"}, "model_type is 'bert', but architectures has GPT2LMHeadModel ({}/config.json)"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "{} is a clip, which does not write text"),
    ],
)
def test_check_type_and_family(copy, tiny, wrong, words):
    """A model_type that is unknown, or not the model's, is named before the weights are read."""
    folder = copy(tiny)
    edit_json(folder / "config.json", **wrong)
    assert words.format(folder) in fails(folder)


def test_check_type_missing(copy, tiny):
    """A config without model_type is one sentence."""
    folder = copy(tiny)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert f"no model_type ({folder}/config.json)" in fails(folder)


def test_check_family_of_like_families(tiny_llama, copy):
    """Mistral names its weights as Llama does: such a config loads."""
    folder = copy(tiny_llama)
    edit_json(folder / "config.json", model_type="mistral")
    assert torch.equal(hfkit.load(folder).model(IDS).logits, hfkit.load(tiny_llama).model(IDS).logits)


def test_check_head_refused(copy, tiny, capfdbinary):
    """A model that does not write text is refused."""
    folder = copy(tiny)
    GPT2ForSequenceClassification(GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)
    assert_fails(
        call(capfdbinary, "generate", "hi", "-m", folder), 1, "is a GPT2ForSequenceClassification", "classify"
    )
    with pytest.raises(HfkitError, match="GPT2ForSequenceClassification"):
        hfkit.generate("hi", model=str(folder))
    edit_json(folder / "config.json", architectures=["BertModel"], model_type="bert")
    assert str(folder) in fails(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [1, "x"]},
        {"top_p": [1]},
        {"top_k": "many"},
        {"stop_strings": 3},
        {"stop_strings": ["a", 3]},
        {"suppress_tokens": "x"},
        {"begin_suppress_tokens": [1, "x"]},
        {"begin_suppress_tokens": 5},
        {"sequence_bias": 3},
        {"exponential_decay_length_penalty": 3},
        {"min_length": "x"},
        {"bad_words_ids": [3]},
        {"bad_words_ids": 3},
    ],
)
def test_check_values_of_settings(copy, tiny, wrong):
    """A setting of another type in generation_config.json is named, before anything is generated."""
    folder = copy(tiny)
    edit_json(folder / "generation_config.json", **wrong)
    assert f"generation_config.json is damaged ({folder}): {list(wrong)[0]} is" in fails(folder)
    right = {"eos_token_id": [256, 1], "pad_token_id": None, "top_p": 1, "top_k": 5, "suppress_tokens": [3]}
    right |= {"bad_words_ids": [[1, 2]], "sequence_bias": [[[1], 0.5]]}
    right |= {"stop_strings": ["a", "b"], "begin_suppress_tokens": None}
    edit_json(folder / "generation_config.json", **dict.fromkeys(wrong) | right)
    assert hfkit.load(folder)


# tokenizers


def test_load_tokenizer_too_large(copy, tiny):
    """A tokenizer with more tokens than the model is refused."""
    folder = copy(tiny)
    tokenizer = GPT2Tokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    assert "258 tokens, the model 257" in fails(folder)


def test_load_tokenizer_id_too_large(copy, tiny):
    """An id for which the model has no embedding is refused, not only when a text has that token."""
    folder = copy(tiny)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["q"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(state))
    assert "1000 tokens, the model 257" in fails(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00", '{"model": {}}'])
def test_load_tokenizer_damaged(copy, tiny, text):
    """A damaged tokenizer is one sentence."""
    folder = copy(tiny)
    (folder / "tokenizer.json").write_text(text)
    assert str(folder) in fails(folder)


@pytest.mark.parametrize(("name", "words"), [("vocab.json", "cannot be loaded"), ("vocab.txt", "is empty")])
def test_load_tokenizer_incomplete(copy, tiny, name, words):
    """A tokenizer with files missing is one sentence."""
    folder = copy(tiny)
    (folder / "tokenizer.json").rename(folder / name)
    assert words in fails(folder) and str(folder) in fails(folder)


def test_load_tokenizer_without_end(copy, tiny):
    """A model without an end token or a padding token generates."""
    folder = copy(tiny)
    edit_json(folder / "tokenizer_config.json", eos_token=None, bos_token=None, pad_token=None)
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, eos_token_id=None, bos_token_id=None)
    lm = hfkit.load(str(folder))
    assert lm.tokenizer.pad_token is None and lm.tokenizer.eos_token is None
    found = hfkit.generate(["a", "the cat", "b"], model=lm, max_new_tokens=9, seed=1)
    assert [one.tokens for one in found] == [9] * 3
    with pytest.raises(HfkitError, match="no token that begins a text"):
        hfkit.generate("", model=lm)


# precision and place


@pytest.mark.parametrize("name", ["tiny", "tiny_llama", "tiny_t5"])
@pytest.mark.parametrize(("bits", "likeness"), [("int8", 0.998), ("int4", 0.8)])
def test_quantize_like_float32(request, name, bits, likeness):
    """A quantized model computes nearly what float32 does."""
    path = request.getfixturevalue(name)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if name == "tiny_t5" else {})
    whole, small = hfkit.load(path).model, hfkit.load(path, quantize=bits).model
    kinds = {type(module) for module in small.modules()}
    assert not {nn.Linear, Conv1D} & kinds and Int8Linear in kinds and (bits == "int8" or Int4Linear in kinds)
    expected, found = whole(**inputs).logits, small(**inputs).logits
    assert likeness < nn.functional.cosine_similarity(expected.flatten(), found.flatten(), 0) < 1


@pytest.mark.parametrize(("bits", "change"), [("int8", 0.01), ("int4", 0.1)])
def test_quantize_perplexity(bits, change):
    """Quantizing hardly changes the perplexity of the bundled model."""
    text = (
        "The old man sat by the window and watched the rain. He had been there since the morning, and nobody had come "
        "to see him. At last there was a knock at the door, and a boy came in with a letter in his hand. “It is from "
        "your brother,” he said, “and I am to wait for an answer.” The old man took the letter and read it slowly."
    )
    ids = hfkit.load().tokenizer(text, return_tensors="pt").input_ids
    losses = [lm.model(ids, labels=ids).loss.item() for lm in (hfkit.load(), hfkit.load(quantize=bits))]
    assert abs(math.exp(losses[1] - losses[0]) - 1) < change


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("rows", [1, 47, 48, 100])
@pytest.mark.parametrize("shape", [(64, 32), (17, 32), (64, 33), (3, 40)])
def test_quantize_layer(monkeypatch, rows, shape, has_amx):
    """An integer layer is close to the layer that it replaces, with and without the units for bfloat16."""
    monkeypatch.setattr(quantization, "_HAS_AMX", has_amx)
    monkeypatch.setattr(quantization, "_AT_ONCE", 400)  # several parts
    set_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(2, rows, shape[1])
    layers = [Int8Linear, Int4Linear] if Int4Linear.fits(weight) else [Int8Linear]
    for layer in layers:
        found = layer(weight, nn.Parameter(bias))(x)
        expected = nn.functional.linear(x, weight, bias)
        assert found.shape == expected.shape and found.dtype == x.dtype
        assert (found - expected).norm() / expected.norm() < (0.02 if layer is Int8Linear else 0.15)


@pytest.mark.parametrize("rows", [1, 100])
def test_quantize_head_far_from_zero(rows):
    """Logits near -100, as GPT-2 has them, are as exact as those near 0."""
    set_seed(0)
    weight, x = torch.randn(64, 32), torch.randn(rows, 32)
    x[:, 0] = 1
    near = Int8Linear(weight, None, is_head=True)(x)
    weight[:, 0] -= 100
    far = Int8Linear(weight, None, is_head=True)(x)
    torch.testing.assert_close(far, near - 100, rtol=0, atol=1e-3)


def test_loaded_explains(tiny):
    """What is not a model and its tokenizer is one sentence."""
    model, tokenizer = hfkit.load(tiny)
    for wrong, words in {
        "model": (model, "a model is a name, a folder or (model, tokenizer), not a GPT2LMHeadModel"),
        "list": ([model, tokenizer], "a model is a name, a folder or (model, tokenizer), not a list"),
        "swapped": ((tokenizer, model), "a loaded model is (model, tokenizer), not (GPT2Tokenizer, GPT2LMHeadModel)"),
        "alone": ((model,), "a loaded model is (model, tokenizer), not (GPT2LMHeadModel)"),
    }.values():
        with pytest.raises(TypeError) as error:
            hfkit.generate("a", model=wrong)
        assert str(error.value) == words


def test_choose_dtype(tiny):
    """Half precision is chosen for GPUs and float32 for CPUs."""
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("mps")) == torch.float16
    for name in ("float32", "bfloat16", "float16"):
        assert hfkit.load(tiny, dtype=name).model.dtype == getattr(torch, name)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", "meta", "hpu", "vulkan", "fpga", "cuda:-1"])
def test_choose_device_missing(tiny, capfdbinary, device):
    """A device that does not exist is one sentence."""
    assert "device" in fails(tiny, device=device)
    assert_fails(call(capfdbinary, "generate", "hi", "-m", tiny, f"--device={device}"), 1, "leave --device out")


def test_choose_device_empty(tiny, capfdbinary):
    """An empty name of a device is a usage error."""
    assert "device" in fails(tiny, device="")
    assert_fails(call(capfdbinary, "generate", "hi", "-m", tiny, "--device="), 2, "--device is ''")


def test_load_device_map(tiny):
    """A device map places the model, and a wrong one is one sentence."""
    lm = hfkit.load(tiny, device_map="auto")
    assert hfkit.generate("a", model=lm, seed=1) == hfkit.generate("a", model=tiny, seed=1)
    assert tiny in fails(tiny, device_map="everywhere")


def test_quantize_auto(tiny, monkeypatch, capsys):
    """`auto` chooses int8, and says so, for a model that fills the memory; else whole weights."""
    assert hfkit.load(tiny, quantize="auto").model.dtype == torch.float32 and not capsys.readouterr().err
    memory = type("", (), {"available": 200_000})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    lm = hfkit.load(tiny, quantize="auto")
    assert bits_of(lm.model) == "int8" and "0.0 GB are free: int8 weights instead" in capsys.readouterr().err
    memory.available = 10**9
    assert bits_of(hfkit.load(tiny, quantize="auto").model) is None


def test_quantize_other_device(tiny, monkeypatch):
    """Quantizing on a device without kernels is refused."""
    from hfkit.models.sources import find_model as find

    options = ModelOptions(model=tiny, quantize="int8")
    monkeypatch.setattr("hfkit.models.architecture.choose_device", lambda *_: torch.device("meta"))
    monkeypatch.setattr(GPT2LMHeadModel, "to", lambda self, *_: self)
    with pytest.raises(HfkitError, match="add --device cpu"):
        load_weights(find(options), options, None)


def test_load_verbose(tiny, capfdbinary):
    """--verbose prints what was chosen."""
    result = call(capfdbinary, "generate", "hi", "-m", tiny, "-n", 2, "-s", 1, "-v")
    assert b"float32 on cpu" in result.stderr and b"tokens/s" in result.stderr and b"seed 1" in result.stderr
    result = call(capfdbinary, "generate", "hi", "-m", tiny, "-n", 2, "-s", 1, "--quantize", "int4", "-v")
    assert b"int4 on cpu" in result.stderr
