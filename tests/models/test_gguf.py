"""A GGUF file is the model: llama.cpp computes with it what hfkit does, and hfkit reads it back."""

import json
import re
import resource
import sys
import urllib.request
from pathlib import Path

import gguf
import pytest
import torch
from support import trials
from support.shell import assert_fails, call, edit_json
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Tokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import hfkit
from hfkit.corpus.templates import CHAT_TEMPLATE, Task, give_task
from hfkit.errors import HfkitError, OptionError
from hfkit.models.modelfile import write_modelfile

TEXTS = [
    *("the rain", " the  rain ", "  ", "", "\n\n\tstone\r\n", "RAIN's, we'll 1234,5", "naïve déjà-vu 你好 مرحبا"),
    *("\N{GRINNING FACE}\N{ZERO WIDTH JOINER}\N{REGIONAL INDICATOR SYMBOL LETTER D}", "x\xa0y\u2003z", "▁x <0x41>"),
    *("<|endoftext|>a<|endoftext|> b", "<s>a</s> b<unk>", "<|end|>\nwind<note> x", "for(i=0;i<9;++i){a[i]+=1;}"),
]
PROMPTS = ["the rain", "Wind and", "  sing"]
LETTERS = " ".join([*trials.WORDS * 3, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,'"])
SHAPE = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
LLAMA3 |= {"original_max_position_embeddings": 32}


def byte_level(first: pre_tokenizers.PreTokenizer | None, use_regex: bool) -> Tokenizer:
    """A byte-level BPE of 300 tokens and two that were added later. first: what cuts a text before GPT-2's regex."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<|endoftext|>"]}
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **alphabet)
    tokenizer.train_from_iterator([LETTERS] * 9, trainer)
    tokenizer.add_tokens(["<note>"])
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def sentencepiece(*, complete: bool = True) -> Tokenizer:
    """A BPE that falls back to bytes. complete: with all pairs that make a word, as those from SentencePiece have."""
    start = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = start, pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator([LETTERS] * 9, trainers.BpeTrainer(vocab_size=140, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = ["<|endoftext|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    if complete:
        pairs = [(word[:i], word[i:]) for word in dict.fromkeys(map("".join, merges)) for i in range(1, len(word))]
        merges = [pair for pair in pairs if set(pair) <= {*model["vocab"]}]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = start
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def make(folder: Path, name: str) -> str:
    """A random model with sharp logits. Its embedding has more rows than its tokenizer has tokens."""
    end = "<|endoftext|>"
    regex = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|") if name == "llama3" else PRETOKENIZE_REGEX
    first = {"linear": pre_tokenizers.Digits(individual_digits=True)}.get(name)
    if name in ("qwen2", "qwen3", "llama3"):
        first = pre_tokenizers.Split(Regex(regex), "isolated")
    backend = sentencepiece() if name == "mistral" else byte_level(first, use_regex=name in ("gpt2", "odd", "linear"))
    if name in ("llama3", "mistral"):
        backend.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 0)])
    unknown = {"unk_token": "<unk>"} if name == "mistral" else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, **unknown)
    size = {"vocab_size": len(tokenizer) + 10}
    config = {
        "gpt2": lambda: GPT2Config(**size, n_positions=99, n_embd=32, n_layer=2, n_head=2, n_inner=96, bos_token_id=0),
        "odd": lambda: GPT2Config(**size, n_positions=99, n_embd=40, n_layer=1, n_head=2, n_inner=64),
        "llama3": lambda: LlamaConfig(**size, **SHAPE, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "linear": lambda: LlamaConfig(**size, **SHAPE, rope_parameters=LINEAR),
        "mistral": lambda: MistralConfig(**size, **SHAPE, sliding_window=None),
        "qwen2": lambda: Qwen2Config(**size, **SHAPE),
        "qwen3": lambda: Qwen3Config(**size, **SHAPE, head_dim=16),
    }[name]()
    config.eos_token_id = 0
    set_seed(4)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 4
        if parameter.ndim == 1:
            parameter.data += torch.randn(parameter.shape) / 4  # biases of a new model are zero
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class LlamaCpp:
    """A GGUF file in llama.cpp, which computes in float32 where the file has float32."""

    def __init__(self, path: str) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = path
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 256, 1, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def ask(self, path: str, **fields) -> dict:
        data, headers = json.dumps(fields).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)  # noqa: S310
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            return json.load(reply)

    def tokens(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def complete(self, prompt, length: int, **fields) -> dict:
        return self.ask("/completion", prompt=prompt, n_predict=length, temperature=0, return_tokens=True, **fields)


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


# llama.cpp


@pytest.mark.parametrize("name", ["tiny", "tiny_llama", "gpt2", "llama3", "linear", "mistral", "qwen2", "qwen3"])
def test_llama_cpp(name, request, tmp_path):
    """llama.cpp cuts a text into the same tokens, and finds the same token most likely, with the same probability."""
    model = request.getfixturevalue(name) if "tiny" in name else make(tmp_path / name, name)
    lm = hfkit.load(model, device="cpu", dtype="float32")
    llama = LlamaCpp(hfkit.export(model, output_dir=tmp_path / "model.gguf", quantize="f32"))
    for text in TEXTS:
        assert llama.tokens(text) == lm.tokenizer(text)["input_ids"], text
    for prompt in PROMPTS:
        start = lm.tokenizer(prompt)["input_ids"]
        ids = llama.complete(prompt, 20, ignore_eos=True)["tokens"]
        rows = logits(lm.model, start + ids)[len(start) - 1 : -1]
        rows[:, lm.tokenizer.eos_token_id] = -torch.inf
        assert len(ids) == 20
        torch.testing.assert_close(rows[range(20), ids], rows.amax(-1), atol=0.01, rtol=0)  # near ties may differ
        letter = [
            lm.tokenizer.convert_tokens_to_ids("a"),
            1000,
        ]  # a token of half a letter would have no probabilities
        (step,) = llama.complete(start, 1, n_probs=40, logit_bias=[letter])["completion_probabilities"]
        expected = logits(lm.model, start)[-1].log_softmax(-1)
        assert len(step["top_logprobs"]) == 40
        for choice in step["top_logprobs"]:
            assert choice["logprob"] == pytest.approx(float(expected[choice["id"]]), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bundled", "gpt2", "llama3", "tiny_llama"])
def test_llama_cpp_text_and_perplexity(name, request, tmp_path):
    """Whole numbers give hfkit's text for 50 tokens, and q8_0 its perplexity within 1 %."""
    model = make(tmp_path / name, name) if name in ("gpt2", "llama3") else name
    model = request.getfixturevalue(name) if name == "tiny_llama" else model
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text := "the rain falls over a stone, and the wind sings of light. " * 300)
    prompts = [" ".join(text.split()[place : place + 5]) for place in range(10)]
    if name != "bundled":  # learn it, so that no two tokens are equally likely
        small = trials.SMALL | {"max_steps": 120, "eval_steps": 60, "learning_rate": 0.01}
        model = hfkit.finetune(corpus, model=model, output_dir=tmp_path / "run", **small).output_dir
    lm = hfkit.load(model, device="cpu", dtype="float32")
    texts = [hfkit.generate(prompt, model=lm, temperature=0, max_new_tokens=50).completion for prompt in prompts]
    for precision in ("f32", "f16"):
        llama = LlamaCpp(hfkit.export(model, output_dir=tmp_path / f"{precision}.gguf", quantize=precision))
        assert [llama.complete(prompt, 50)["content"] for prompt in prompts] == texts
    llama = LlamaCpp(hfkit.export(model, output_dir=tmp_path / "q8_0.gguf", quantize="q8_0"))
    ids = lm.tokenizer(text[:600])["input_ids"][:90]
    expected = logits(lm.model, ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    measured = []
    for place in range(1, len(ids)):
        letter = [lm.tokenizer.convert_tokens_to_ids("a"), 1000]
        reply = llama.complete(ids[:place], 1, n_probs=lm.model.config.vocab_size, logit_bias=[letter])
        (step,) = reply["completion_probabilities"]
        measured.append({choice["id"]: choice["logprob"] for choice in step["top_logprobs"]}[ids[place]])
    assert torch.tensor(measured).mean().exp() == pytest.approx(float(expected.mean().exp()), rel=0.01)


# reading it back


@pytest.mark.parametrize("name", ["tiny", "tiny_llama", "gpt2", "odd", "llama3", "mistral", "qwen2", "qwen3"])
def test_read_back(name, request, tmp_path):
    """What is read is the model that was written: its logits, its tokens, its settings."""
    model = request.getfixturevalue(name) if "tiny" in name else make(tmp_path / name, name)
    settings = Path(model) / "generation_config.json"
    before = settings.read_text()
    edit_json(settings, do_sample=True, temperature=0.7, top_k=30)
    path = hfkit.export(model, output_dir=tmp_path / "model.gguf")
    settings.write_text(before)
    lm, back = (hfkit.load(place, device="cpu", dtype="float32") for place in (model, path))
    ids = [index % 250 + 3 for index in range(0, 60 * 7, 7)]
    assert torch.equal(logits(back.model, ids), logits(lm.model, ids))
    assert back.context == lm.context
    assert name != "tiny" or type(back.tokenizer) is GPT2Tokenizer
    for text in TEXTS:
        tokens = lm.tokenizer(text)["input_ids"]
        assert back.tokenizer(text)["input_ids"] == tokens
        assert back.tokenizer.decode(tokens) == lm.tokenizer.decode(tokens)
    for kind in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "all_special_ids"):
        assert getattr(back.tokenizer, kind) == getattr(lm.tokenizer, kind)
    chosen = back.model.generation_config
    assert (chosen.do_sample, chosen.temperature, chosen.top_k, chosen.top_p) == (True, 0.7, 30, None)


def test_read_back_task(tiny, copy, tmp_path):
    """A task, and its chat template, go with the file."""
    folder = copy(tiny)
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    give_task(tokenizer, Task("English: {en}\nFrench: {fr}\n"))
    tokenizer.save_pretrained(folder)
    path = hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    answers = [hfkit.generate({"en": "rain"}, model=model, max_new_tokens=9, device="cpu") for model in (folder, path)]
    assert answers[0].completion == answers[1].completion
    assert hfkit.load(path).tokenizer.chat_template == tokenizer.chat_template


def test_read_foreign(tmp_path, capfd):
    """Without what hfkit adds to a file, transformers reads tokens and weights, and a line says what it cannot."""
    source = make(tmp_path / "source", "llama3")
    path = Path(hfkit.export(source, output_dir=tmp_path / "mistral.gguf"))
    data = path.read_bytes()
    for key in (b"tokenizer.huggingface.json", b"hfkit.rope_parameters"):
        assert data.count(key) == 1
        data = data.replace(key, b"x" + key[1:])
    path.write_bytes(data)
    capfd.readouterr()
    lm, back = hfkit.load(source, device="cpu"), hfkit.load(path, device="cpu")
    assert "transformers cannot read its rope_freqs" in capfd.readouterr().err
    for text in ("the rain", " Wind 12"):
        assert back.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    for name, tensor in lm.model.named_parameters():
        assert torch.equal(back.model.get_parameter(name), tensor), name


@pytest.mark.parametrize(("quantize", "steps"), [("f16", 2048), ("bf16", 256), ("q8_0", 254), ("q4_0", 8)])
def test_precision(tmp_path, quantize, steps):
    """No number is further from its own than the precision allows for the largest in its block."""
    source = make(tmp_path / "source", "mistral")
    path = hfkit.export(source, output_dir=tmp_path / "model.gguf", quantize=quantize)
    whole = AutoModelForCausalLM.from_pretrained(source)
    for name, tensor in hfkit.load(path, device="cpu").model.named_parameters():
        original = whole.get_parameter(name).detach()
        if tensor.ndim == 1:
            assert torch.equal(tensor, original), name
            continue
        embedding = "embed" in name or "lm_head" in name
        largest = original.reshape(-1, 32).abs().amax(-1, keepdim=True)
        limit = largest / (254 if embedding and quantize == "q4_0" else steps) + largest / 2000  # f16 holds the scale
        error = (tensor - original).reshape(-1, 32).abs()
        assert (error <= limit).all() and error.max() > 0, name


def test_precision_of_odd_matrices(tmp_path, capfd):
    """Rows that do not divide into blocks stay in f16, and a line says so; what is small stays in f32."""
    path = hfkit.export(make(tmp_path / "odd", "odd"), output_dir=tmp_path / "model.gguf", quantize="q4_0")
    assert "4 matrices stay in f16, as their rows are no multiple of 32 numbers" in capfd.readouterr().err
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name, kind in types.items() if kind == "Q4_0"} == {"blk.0.ffn_down.weight"}
    assert types["token_embd.weight"] == types["blk.0.attn_qkv.weight"] == "F16"
    assert types["position_embd.weight"] == types["blk.0.attn_qkv.bias"] == "F32" and "output.weight" not in types
    assert hfkit.generate("a", model=path, max_new_tokens=3, device="cpu").tokens


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16"), ("float8_e4m3fn", "BF16")])
def test_precision_by_default(tiny, tmp_path, dtype, kind):
    """The file has the precision of the model; float8 becomes bfloat16."""
    folder = hfkit.export(tiny, output_dir=tmp_path / "folder", dtype=dtype)
    path = hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {kind, "F32"}


def test_sentencepiece_with_pairs_left_out(tmp_path, copy, capfd):
    """A tokenizer that joins fewer pairs than SentencePiece would is written with a warning."""
    folder = copy(make(tmp_path / "source", "mistral"))
    hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    assert "SentencePiece" not in capfd.readouterr().err
    sentencepiece(complete=False).save(str(folder / "tokenizer.json"))
    hfkit.export(folder, output_dir=tmp_path / "model.gguf", overwrite=True)
    assert "reads the tokenizer as SentencePiece's, and may cut some words" in capfd.readouterr().err


# what cannot be written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "relu"}, "llama.cpp cannot compute .*, whose activation_function is 'relu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "whose scale_attn_by_inverse_layer_idx is True"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "is a GPT2ForSequenceClassification: use 'hfkit cl"),
        ({"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"]}, "is a gpt_neo, and GGUF is written for"),
    ],
)
def test_refuse_model(tiny, copy, tmp_path, changes, words):
    """What llama.cpp does not compute is refused before anything is loaded or written."""
    folder = copy(tiny)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(HfkitError, match=words):
        hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_refuse_rope_and_tokenizer(tiny_llama, copy, tmp_path):
    """So are a rotary embedding and a tokenizer that it does not have."""
    folder = copy(tiny_llama)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(HfkitError, match="GGUF is not written for rope_type 'dynamic'"):
        hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Whitespace"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    edit_json(folder / "tokenizer.json", model=tokenizer["model"] | {"byte_fallback": False})
    with pytest.raises(
        HfkitError, match="llama.cpp has no tokenizer like that of .*a BPE that cuts texts by Whitespa"
    ):
        hfkit.export(folder, output_dir=tmp_path / "model.gguf")
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(HfkitError, match="has no eos_token, which GGUF needs"):
        hfkit.export(folder, output_dir=tmp_path / "model.gguf")


def test_refuse_options(tiny, tmp_path, monkeypatch, capfdbinary):
    """Options that contradict each other, and a missing package, are one line."""
    for options, words in (
        ({"output_dir": "out", "quantize": "q8_0"}, "--quantize is for GGUF files: add --format gguf"),
        ({"output_dir": "a.gguf", "quantize": "q8_0", "dtype": "float16"}, "--quantize and --dtype say the same"),
        ({"output_dir": "a.gguf", "dtype": "float8_e4m3fn"}, "GGUF has no float8_e4m3fn"),
        ({"output_dir": "a.gguf", "quantize": "int8"}, "must be one of q8_0, q4_0, f16"),
    ):
        with pytest.raises(OptionError, match=words):
            hfkit.export(tiny, **options)
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = call(capfdbinary, "export", tiny, "--format", "gguf", "-o", tmp_path / "out")
    assert_fails(result, 1, "pip install 'hfkit[gguf]'")


# files


def test_files(tiny, tmp_path, monkeypatch, capfdbinary):
    """A folder, or a file by its name, with a Modelfile. Neither is replaced unasked, nor the model itself ever."""
    folder, file = tmp_path / "My model", tmp_path / "my.gguf"
    result = call(capfdbinary, "export", tiny, "--format", "gguf", "-o", folder)
    assert result.stdout.decode() == f"{folder / 'My model.gguf'}\n"
    assert f"or: ollama create 'my model' -f '{folder / 'Modelfile'}'" in result.stderr.decode()
    assert {path.name for path in folder.iterdir()} == {"My model.gguf", "Modelfile", ".hfkit.json"}
    result = call(capfdbinary, "export", tiny, "-o", file)
    assert (result.stdout.decode(), result.returncode) == (f"{file}\n", 0)
    assert f"or: ollama create my -f {tmp_path / 'my.Modelfile'}\n" in result.stderr.decode()
    file.unlink()
    monkeypatch.chdir(tmp_path)  # the same file, by a name with a dot
    assert (
        "or: ollama create my -f my.Modelfile\n"
        in call(capfdbinary, "export", tiny, "-o", "./my.gguf").stderr.decode()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"My model", "my.gguf", "my.Modelfile"}
    assert (tmp_path / "my.Modelfile").read_text().startswith("FROM ./my.gguf\n")
    for target in (folder, file):
        assert_fails(call(capfdbinary, "export", tiny, "--format", "gguf", "-o", target), 1, "exists: --overwrite")
        assert call(capfdbinary, "export", tiny, "--format", "gguf", "-o", target, "--overwrite").returncode == 0
    assert_fails(call(capfdbinary, "export", file, "-o", file, "--overwrite"), 1, "is the model itself")
    (tmp_path / "is-a-folder.gguf").mkdir()
    result = call(capfdbinary, "export", tiny, "-o", tmp_path / "is-a-folder.gguf", "--overwrite")
    assert_fails(result, 1, "is not a regular file")
    result = call(capfdbinary, "info", "-m", file, "--json")
    assert json.loads(result.stdout)["model"]["file_bytes"] == file.stat().st_size
    assert torch.equal(logits(hfkit.load(folder).model, [5, 6, 7]), logits(hfkit.load(file).model, [5, 6, 7]))
    data = bytearray((folder / "My model.gguf").read_bytes())
    data[-1] ^= 1
    (folder / "My model.gguf").write_bytes(data)
    with pytest.raises(HfkitError, match="the weights are not those that hfkit wrote"):
        hfkit.load(folder / "My model.gguf")


def test_full_disk(tiny, tmp_path, capfdbinary):
    """A full disk is one line, and the old file stays, alone."""
    file = Path(hfkit.export(tiny, output_dir=tmp_path / "my.gguf", quantize="f16"))
    before, limit = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        result = call(capfdbinary, "export", tiny, "-o", file, "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_fails(result, 1, f"cannot write {file}")
    assert file.read_bytes() == before and {path.name for path in tmp_path.iterdir()} == {"my.gguf", "my.Modelfile"}


# ollama


def ollama(template: str, system: str, *turns: str) -> str:
    """What ollama makes of a conversation, by its documentation: its template for each turn, the last cut."""
    text = ""
    for place in range(0, len(turns), 2):
        part = re.sub(r"{{ if .System }}(.*?){{ end }}", r"\1" if system else "", template, flags=re.DOTALL)
        if place + 1 == len(turns):
            part = part.partition("{{ .Response }}")[0]
        values = {".System": system, ".Prompt": turns[place], ".Response": "".join(turns[place + 1 : place + 2])}
        for name, value in values.items():
            part = part.replace(f"{{{{ {name} }}}}", value)
        text, system = text + part, ""
    return text


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% elif m.role == 'user' %}"
    "{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "stop", "answer"),
    [
        (CHAT_TEMPLATE, "", " Yes."),
        (CHATML, "<|im_end|>", "Yes."),
        (INSTRUCT, "", " Yes."),
        (DEFAULT_SYSTEM, "", None),
    ],
    ids=["hfkit", "chatml", "instruct", "default-system"],
)
def test_modelfile(template, stop, answer, tiny, tmp_path, capfd):
    """The TEMPLATE makes of a conversation what the chat template makes of it, if it can."""
    lm = hfkit.load(tiny, device="cpu")
    lm.tokenizer.chat_template = template
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    lines, _, rest = (tmp_path / "Modelfile").read_text().partition("TEMPLATE ")
    stops = [f'PARAMETER stop """{stop}"""'] if stop else []
    assert lines.splitlines() == ["FROM ./my.gguf", "PARAMETER num_ctx 64", *stops]
    if answer is None:
        assert not rest and "ollama's TEMPLATE cannot say what the chat template does" in capfd.readouterr().err
        return
    translated = rest.strip().removeprefix('"""').removesuffix('"""')
    for system in ("", "Be kind.") if template != INSTRUCT else ("",):
        for turns in (["Is it?"], ["Is it?", answer, "Why?"], ["a", answer, "b", answer, "c"]):
            messages = [{"role": "system", "content": system}] if system else []
            messages += [
                {"role": ("user", "assistant")[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)
            ]
            expected = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert ollama(translated, system, *turns) == expected


def test_modelfile_of_task_and_plain_model(tiny, tmp_path):
    """A model that learned a task gets its prompt, greedily; any other what the user wrote."""
    lm = hfkit.load(tiny, device="cpu")
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    assert (tmp_path / "Modelfile").read_text().endswith('64\nTEMPLATE """{{ .Prompt }}"""\n')
    lm.model.generation_config.update(do_sample=True, temperature=0.5, top_p=0.9, repetition_penalty=1.2)
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    sampling = "PARAMETER temperature 0.5\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.2\n"
    assert sampling in (tmp_path / "Modelfile").read_text()
    give_task(lm.tokenizer, Task("English: {en}\nFrench: {fr}"))
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    settings = 'PARAMETER temperature 0.0\nPARAMETER stop """\n"""\nTEMPLATE """English: {{ .Prompt }}\nFrench:"""\n'
    assert (tmp_path / "Modelfile").read_text().endswith(settings)
    lm.tokenizer.chat_template = None
    give_task(lm.tokenizer, Task("{question} in {text}: {answer}\n\n"))
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    assert (tmp_path / "Modelfile").read_text().endswith('"""\n\n"""\nTEMPLATE """{{ .Prompt }}"""\n')
    give_task(lm.tokenizer, Task("{question} in {text}: {{{answer}}}!"))
    write_modelfile(lm, tmp_path / "Modelfile", "my.gguf")
    assert 'PARAMETER stop """}!"""\n' in (tmp_path / "Modelfile").read_text()
