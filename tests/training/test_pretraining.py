"""A tokenizer and a GPT-2 from nothing: any text goes in and comes out, a resumed run has the same tokenizer."""

import json
import os
import random
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import trials
from support.shell import assert_fails, call
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    TrainerCallback,
)

import hfkit
from hfkit.errors import OptionError, StoppedError
from hfkit.options import DataOptions, SizeOptions
from hfkit.training.arguments import Muon, MuonFactory
from hfkit.training.models import make_gpt2, shape_of
from hfkit.training.pretraining import train_tokenizer

pytestmark = pytest.mark.usefixtures("brisk")
SHAPE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 300}
SMALL = {**SHAPE, **trials.SMALL}


def pretrain(corpus, folder, **options):
    return hfkit.pretrain(corpus, output_dir=folder, **{**SMALL, **options})


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("optim", ["muon", "adamw_torch_fused"])
def test_pretrain_leaves_a_gpt2(corpus, tmp_path, capfdbinary, optim):
    """A new model is a GPT-2 that transformers loads, with a recipe that gives the same model."""
    typed = [word for name, value in SMALL.items() if name != "bf16" for word in (f"--{name}", value)]
    result = call(capfdbinary, "pretrain", corpus, "-o", tmp_path / "run", "--no-bf16", "--optim", optim, *typed)
    assert (result.returncode, result.stdout.decode()) == (0, f"{tmp_path / 'run'}\n"), result.stderr
    assert all(line.startswith("hfkit: ") for line in result.stderr.decode().splitlines()), result.stderr

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path / "run"), model.config
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE and len(tokenizer) == config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0 and config.use_cache
    greedy = {"do_sample": False, "max_new_tokens": 9}
    ids = model.generate(**tokenizer("the rain", return_tensors="pt"), **greedy, pad_token_id=0)[0]
    ours = hfkit.load(tmp_path / "run", device="cpu")
    assert str(hfkit.generate("the rain", model=ours, **greedy)) == tokenizer.decode(ids, skip_special_tokens=True)

    recipe, metrics = tmp_path / "run" / "recipe.yaml", json.loads((tmp_path / "run" / "metrics.json").read_text())
    again = call(capfdbinary, "pretrain", "-c", recipe, "-o", tmp_path / "again", "-q", "--json")
    assert json.loads(again.stdout)["loss"] == metrics["loss"]
    assert trials.outcome(tmp_path / "again") == trials.outcome(tmp_path / "run")
    assert all(sample for *_, sample in trials.scores(metrics))
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


def test_pretrain_learns(corpus, tmp_path):
    """A new model learns."""
    run = pretrain(corpus, tmp_path, max_steps=60, eval_steps=20, learning_rate=1e-2)
    assert run.metrics["perplexity_before"] > 250 and run.perplexity < 30  # of 300 tokens, and 14 words


@pytest.mark.parametrize("text", ["naïve café", "空 空", "\x00\x01\x7f", "🙂🏽‍🚀", " \n\t ", "<|endoftext|>", "ﬁ Å"])
def test_train_tokenizer_takes_any_text(corpus, text):
    """Any text goes through a new tokenizer unchanged."""
    tokenizer = train_tokenizer(corpus, SizeOptions(vocab_size=300), DataOptions(), 0)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the rain falls over the river")["input_ids"]) < 20  # it has learned words


@pytest.mark.parametrize(("size", "least"), [(300, 10), (420, 60), (600, 92)])
def test_train_tokenizer_whole_characters(tmp_path, size, least):
    """Of Chinese, the most frequent characters are tokens, then pairs of them; any other text still goes through."""
    signs = [*(chr(0x4E00 + 97 * i) for i in range(90)), "，", "。"]
    text = "".join(random.Random(0).choices(signs, [1 / i for i in range(1, 93)], k=9000))
    (tmp_path / "corpus.txt").write_text(text, "utf-8")
    options = DataOptions(eval_fraction=0.0)
    tokenizer = train_tokenizer(str(tmp_path / "corpus.txt"), SizeOptions(vocab_size=size), options, 0)
    whole = {sign for sign in signs if len(tokenizer(sign)["input_ids"]) == 1}
    assert len(tokenizer) == size and len(whole) >= least
    assert {sign for sign, _ in Counter(text).most_common(len(whole) - 2)} <= whole
    for other in (text[:300], "naïve 猫 🙂🏽 <|endoftext|> \n\tx"):
        assert tokenizer.decode(tokenizer(other)["input_ids"]) == other
    tokens = tokenizer.batch_decode([[token] for token in tokenizer(text)["input_ids"]])
    assert any("\ufffd" in token for token in tokens) == (len(whole) < 92)
    assert any(len(token) > 1 for token in tokens) == (size == 600)


def test_train_tokenizer_holds_out(tmp_path):
    """A tokenizer does not learn from what is held out."""
    corpus = tmp_path / "corpus.txt"
    # Each document has a word of its own, often enough to become a token.
    corpus.write_text("<|endoftext|>".join(f" {chr(97 + i) * 2}{chr(98 + i) * 2}zz" * 50 for i in range(24)))
    whole = train_tokenizer(str(corpus), SizeOptions(vocab_size=700), DataOptions(eval_fraction=0.0), 0)
    part = train_tokenizer(str(corpus), SizeOptions(vocab_size=700), DataOptions(eval_fraction=0.2), 0)
    words = [f" {chr(97 + i) * 2}{chr(98 + i) * 2}zz" for i in range(24)]
    assert all(len(whole(word)["input_ids"]) == 1 for word in words)
    assert 1 <= sum(len(part(word)["input_ids"]) > 1 for word in words) <= 12


def test_pretrain_resumed(corpus, tmp_path, monkeypatch):
    """A resumed run is bit-identical to the uninterrupted one and has its tokenizer."""
    whole = pretrain(corpus, tmp_path / "whole", resid_pdrop=0.1)
    with pytest.raises(StoppedError):
        pretrain(corpus, tmp_path / "run", resid_pdrop=0.1, callbacks=[Stop()])
    monkeypatch.setattr("hfkit.training.pretraining.train_tokenizer", lambda *_: pytest.fail("another tokenizer"))
    for _ in range(2):  # the second time it is finished, and its tokenizer is with the model
        pretrain(corpus, tmp_path / "run", resid_pdrop=0.1, resume=True)
        assert trials.outcome(tmp_path / "run") == trials.outcome(whole.output_dir)


def test_pretrain_overwritten(corpus, tmp_path):
    """A run that is overwritten with another corpus has another tokenizer."""
    pretrain(corpus, tmp_path / "run", max_steps=1)
    other = Path(trials.write_corpus(tmp_path / "other.txt", seed=3))
    other.write_text(other.read_text().upper())
    pretrain(str(other), tmp_path / "run", max_steps=1, overwrite=True)
    assert "ĠRAIN" in AutoTokenizer.from_pretrained(tmp_path / "run").get_vocab()


def test_pretrain_dry_run(corpus, tmp_path, capfd):
    """A small corpus gets a small vocabulary, and a dry run trains nothing."""
    assert hfkit.pretrain(corpus, size="tiny", output_dir=tmp_path / "run", dry_run=True) is None
    assert "training a tokenizer of 512 tokens" in capfd.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "medium", "large", "xl"])
def test_shape_of_size(size):
    """A size has as many parameters as its help says."""
    text = SizeOptions.__dataclass_fields__["size"].metadata["help"]  # tiny 1 million parameters, mini 9, ...
    tokens = {"tiny": 2048, "mini": 4096}.get(size, 50257)
    vocabulary = {str(token): token for token in range(tokens - 1)} | {"<|endoftext|>": tokens - 1}
    with torch.device("meta"):
        config = make_gpt2(shape_of(SizeOptions(size=size)), GPT2Tokenizer(vocab=vocabulary, merges=[]))
        parameters = GPT2LMHeadModel(config).num_parameters()
    assert round(parameters / 1e6) == int(re.search(rf"{size} (\d+)", text)[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_head": 3}, "--n-embd is 16: it must be a multiple of --n-head, 3"),
        ({"lora": True}, "leave --lora and --streaming out"),
        ({"streaming": True}, "leave --lora and --streaming out"),
        ({"size": "huge"}, "--size is 'huge'"),
        ({"vocab_size": 10}, "--vocab-size is 10"),
    ],
)
def test_pretrain_bad_options(corpus, tmp_path, options, words):
    """Options that exclude each other are a usage error."""
    with pytest.raises(OptionError, match=words):
        pretrain(corpus, tmp_path, **options)


def test_pretrain_refuses_examples(tmp_path, capfdbinary):
    """A new model learns from texts only."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    result = call(capfdbinary, "pretrain", tmp_path / "rows.jsonl", "-o", tmp_path / "run", "-q")
    assert_fails(result, 1, "a new model learns from texts, not from examples")


# Muon


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_layer=1, n_embd=16, n_head=2, n_positions=32))


def test_muon_parameters():
    """Muon gets the matrices of the layers, AdamW everything else."""
    gpt2 = model()
    names = {id(parameter): name for name, parameter in gpt2.named_parameters()}
    optimizer = MuonFactory()(gpt2, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    muon, adam = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert sorted(muon + adam) == sorted(names.values())
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert set(muon) == {f"transformer.h.0.{part}.weight" for part in parts}
    assert "transformer.wte.weight" in adam


def test_muon_state(tmp_path):
    """Muon resumes bit-identically from its state and obeys a scheduler."""

    def steps(gpt2, optimizer, schedule, count):
        for _ in range(count):
            ids = torch.arange(20)[None] * (schedule.last_epoch + 1) % 300
            gpt2(ids, labels=ids).loss.backward()
            optimizer.step(), schedule.step(), optimizer.zero_grad()

    def make(gpt2):
        optimizer = MuonFactory()(gpt2.eval(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    whole = model()
    steps(whole, *make(whole), 6)
    first = model()
    optimizer, schedule = make(first)
    steps(first, optimizer, schedule, 3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 4] * 2
    torch.save([first.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "state")
    second = model()
    optimizer, schedule = make(second)
    states = torch.load(tmp_path / "state", weights_only=True)
    for part, state in zip((second, optimizer, schedule), states, strict=True):
        part.load_state_dict(state)
    steps(second, optimizer, schedule, 3)
    assert isinstance(optimizer, Muon)
    for (name, a), b in zip(second.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
