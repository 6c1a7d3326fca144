"""What is left open is decided by machine and work, said in a line, and is then an option like any other."""

import dataclasses
import math
import re
from types import SimpleNamespace

import pytest
import torch
from support import trials
from support.shell import call
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import hfkit
from hfkit.corpus.training_data import TrainingData
from hfkit.errors import OptionError
from hfkit.models import architecture
from hfkit.models.loading import load_tokenizer
from hfkit.models.sources import find_model
from hfkit.options import DataOptions, ModelOptions, TrainOptions
from hfkit.training import plan as plan_module
from hfkit.training.models import make_new, make_trainable
from hfkit.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("brisk")
CPU = torch.device("cpu")
CONFIG = GPT2Config(n_layer=2, n_embd=64, n_head=2)
COMPILERS = ("c++", "g++", "clang++")


def plan(parameters=10**6, sequences=1000, length=100.0, device=CPU, fresh=False, processes=1, **options):
    return make_plan(
        CONFIG, parameters, sequences, length, TrainOptions(**options), device, fresh=fresh, shared_by=processes
    )


@pytest.fixture
def machine(monkeypatch):
    """A machine with or without bfloat16 units and a compiler, that does `speed` tokens a second."""

    def make(units=True, compiler=True, speed=1e9):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": units})
        monkeypatch.setattr(architecture.shutil, "which", lambda name: f"/usr/bin/{name}" if compiler else None)
        monkeypatch.setattr(plan_module, "_speed", lambda *_: speed)

    return make


def test_plan_precision(machine):
    """The precision follows the units of the machine."""
    machine(units=True)
    assert plan().precision == "bfloat16" and "bfloat16: this processor has units for it" in plan().why
    machine(units=False)
    assert plan().precision == "float32" and "float32: this cpu has no units for less" in plan().why
    assert plan(bf16=True).precision == "bfloat16" and plan(fp16=True).precision == "float16"
    machine(units=True)
    assert plan(bf16=False).precision == "float32" and plan(fp16=False).precision == "float32"
    with pytest.raises(OptionError, match="exclude each other"):
        plan(bf16=True, fp16=True)


def test_plan_attention(machine):
    """A compiled run on a CPU has plain attention, which computes the same, while its memory is small."""
    machine()
    assert not plan().plain_attention and not plan(torch_compile=True, length=1e5).plain_attention
    chosen = plan(torch_compile=True)
    assert chosen.plain_attention and any("plain attention" in line for line in chosen.why)
    model, ids = make_new(CONFIG, chosen).eval(), torch.arange(40)[None]
    assert model.config._attn_implementation == "transformers.models.gpt2.modeling_gpt2.blocks"
    plain = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, plain)
    with_head = make_new(CONFIG, dataclasses.replace(chosen, options=TrainOptions(head="classification")))
    assert with_head.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("is_joined", "name"), [(True, "transformers.models.gpt2.modeling_gpt2.blocks"), (False, "eager")]
)
def test_plan_attention_of_examples(machine, tiny, is_joined, name):
    """Examples have lengths of their own, each of which would be compiled anew for attention in blocks."""
    machine()
    data = TrainingData(SimpleNamespace(is_joined=is_joined), [], 9, 9.0, None)
    source = find_model(tiny)
    model = make_trainable(source, ModelOptions(), plan(torch_compile=True), load_tokenizer(source), data)
    assert model.config._attn_implementation == name


def test_plan_float32(still, corpus, tmp_path, monkeypatch, machine):
    """Without units for bfloat16 a run is what Trainer would do."""
    machine(units=False)
    seen, forward = set(), GPT2LMHeadModel.forward

    def watch(self, *arguments, **keywords):
        seen.add((self.dtype, torch.is_autocast_enabled("cpu")))
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watch)
    run = hfkit.finetune(corpus, model=still, output_dir=tmp_path, max_steps=2, num_train_epochs=1)
    assert seen == {(torch.float32, False)}
    assert (run.metrics["precision"], run.metrics["compiled"]) == ("float32", False)


def test_plan_compilation(machine):
    """A long run is compiled where there is a compiler."""
    machine(speed=10)
    assert plan().compile and plan(torch_compile=False).compile is False
    machine(speed=1e9)
    assert not plan().compile and "not compiled: the run is too short to gain" in plan().why
    assert plan(torch_compile=True).compile
    machine(speed=10, compiler=False)
    assert not plan().compile and "not compiled: no C++ compiler" in plan().why
    asked = plan(torch_compile=True)
    assert not asked.compile and "not compiled, though asked for: no C++ compiler" in asked.why


def test_plan_without_a_compiler(still, corpus, tmp_path, capfdbinary, monkeypatch):
    """A run that asks to be compiled where there is no compiler says so and works."""
    monkeypatch.setattr(architecture.shutil, "which", lambda name: None)
    typed = ["--torch-compile", "--max-steps", 1, "--no-bf16"]
    result = call(capfdbinary, "finetune", corpus, "-m", still, "-o", tmp_path / "run", *typed)
    assert result.returncode == 0 and b"not compiled, though asked for: no C++ compiler" in result.stderr


def test_plan_options_are_in_effect(machine):
    """What was chosen is an option in effect."""
    machine(units=True, speed=10)
    first = plan()
    machine(units=False, compiler=True, speed=1e9)
    again = make_plan(CONFIG, 10**6, 1000, 100.0, first.options, CPU)
    assert (again.precision, again.compile, again.steps) == (first.precision, first.compile, first.steps)
    assert again.options == first.options
    assert None not in [
        getattr(first.options, name) for name in ("learning_rate", "optim", "weight_decay", "eval_steps")
    ]


@pytest.mark.parametrize(
    ("sequences", "processes", "batch"),
    [(1, 1, 1), (29, 1, 1), (60, 1, 2), (239, 1, 7), (10**6, 1, 8), (480, 2, 8), (240, 4, 2)],
)
def test_plan_batch_size(machine, sequences, processes, batch):
    """A short corpus gets smaller batches, so that there are steps to learn in."""
    machine()
    found = plan(sequences=sequences, processes=processes)
    assert found.options.per_device_train_batch_size == batch
    epochs = found.options.num_train_epochs
    assert found.steps == math.ceil(epochs * math.ceil(sequences / (batch * processes)))
    assert plan(sequences=sequences, per_device_train_batch_size=5).options.per_device_train_batch_size == 5
    assert 9 <= math.ceil(found.steps / found.options.eval_steps) <= 10 or found.steps < 10


def test_plan_steps(tiny, corpus, tmp_path):
    """The steps are those that Trainer makes of epochs and accumulation."""
    options = {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1.5,
        "bf16": False,
    }
    run = hfkit.finetune(corpus, model=tiny, output_dir=tmp_path, **options)
    history = [entry for entry in run.metrics["history"] if "loss" in entry]
    assert run.metrics["steps"] == len(history) and 1.4 < history[-1]["epoch"] <= 1.7


def test_plan_learning_rate(machine):
    """Smaller models, adapters and new models learn at higher rates."""
    machine()
    rates = [plan(parameters=size).options.learning_rate for size in (10**5, 10**7, 124 * 10**6, 10**9)]
    assert rates == sorted(rates, reverse=True) and rates[0] == 5e-4 and rates[2] == 5e-5
    small = {"parameters": 124 * 10**6}
    assert plan(**small, lora=True).options.learning_rate == 2e-4 and plan(lora=True).options.lora_alpha == 32
    fresh = plan(**small, fresh=True).options
    assert (fresh.learning_rate, fresh.optim, fresh.weight_decay) == (6e-4, "muon", 0.1)
    assert plan(**small, learning_rate=1e-3).options.learning_rate == 1e-3


def test_plan_epochs_of_a_new_model(machine):
    """A new model sees twenty tokens for each parameter, within three to twenty epochs."""
    machine()
    epochs = [plan(parameters=size, fresh=True).options.num_train_epochs for size in (10**3, 10**4, 5 * 10**4, 10**9)]
    assert epochs == [3, 3, 10, 20]
    assert plan(parameters=10**9, fresh=True, num_train_epochs=1).options.num_train_epochs == 1


def test_plan_epochs_of_a_small_corpus(machine):
    """Three pages of text are seen as often as it takes to learn them; such a run stops when it gets worse."""
    machine()
    found = {tokens: plan(sequences=4, length=tokens / 4).options for tokens in (1000, 2000, 6000, 20_000, 10**6)}
    epochs = [options.num_train_epochs for options in found.values()]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] == epochs[1] >= 15 and epochs[-2:] == [3, 3]
    assert [options.early_stopping_patience for options in found.values()] == [3, 3, 3, None, None]
    chosen = plan(sequences=4, num_train_epochs=2).options
    assert (chosen.num_train_epochs, chosen.early_stopping_patience) == (2, None)
    assert plan(sequences=4, early_stopping_patience=9).options.early_stopping_patience == 9
    assert plan(sequences=4, max_steps=5).options.early_stopping_patience is None


def test_plan_attention_dropout(tiny, corpus, tmp_path, monkeypatch, machine):
    """Attention dropout is off on a CPU only, and only while the model trains."""
    machine()
    assert not plan().attention_dropout and "no attention dropout" in plan().why[-1]
    assert plan(device=torch.device("meta")).attention_dropout
    seen = []
    forward = GPT2LMHeadModel.forward

    def watch(self, *arguments, **keywords):
        if self.training:
            block = self.transformer.h[0]
            seen.append((block.attn.attn_dropout.p, block.attn.resid_dropout.p, block.mlp.dropout.p))
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", watch)
    run = hfkit.finetune(corpus, model=tiny, output_dir=tmp_path, **trials.SMALL)
    assert set(seen) == {(0.0, 0.1, 0.1)}
    assert GPT2LMHeadModel.from_pretrained(run.output_dir).config.attn_pdrop == 0.1


def test_loss_type():
    """What `loss_type` is set for: without it, Trainer's loss of this model is too small."""
    assert GPT2LMHeadModel(CONFIG).loss_type != "ForCausalLM"  # else hfkit need not


def test_options_upstream():
    """Every option that carries an upstream name exists upstream and gets there."""
    upstream = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = set(TrainOptions.names())
    from peft import LoraConfig

    lora = {name: name.removeprefix("lora_") for name in ours if name.startswith("lora_")}
    config = {field.name for field in dataclasses.fields(LoraConfig)}
    assert all(name in config or short in config for name, short in lora.items())
    own = {"lora", "resume", "overwrite", "sample_prompt", "early_stopping_patience", "head", "dropout"}
    assert ours - upstream - set(lora) - own == set()
    assert not own & upstream


def test_options_groups_are_disjoint():
    """A group of options has no name of another."""
    groups = [set(group.names()) for group in (ModelOptions, DataOptions, TrainOptions)]
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])


def test_plan_memory(machine):
    """The estimate of memory grows with everything that takes memory."""
    machine()
    base = plan().memory
    assert plan(parameters=2 * 10**6).memory > base and plan(length=200.0).memory > base
    assert plan(lora=True).memory < base > plan(activation_checkpointing=True).memory
    assert plan(per_device_train_batch_size=1).memory < plan(per_device_train_batch_size=8).memory


def test_lines_count_in_the_singular(tiny, tmp_path):
    """What is there once is not said to be there "1 times"."""
    (tmp_path / "a.txt").write_text("one line")
    found = hfkit.prepare(str(tmp_path / "a.txt"), model=tiny)
    said = "\n".join([*found.lines(), *plan(sequences=1, max_steps=1).lines()])
    assert "1 document," in said and "1 sequence of at most" in said and "1 step of 1 sequence," in said
    assert not re.search(r"(?<![\d,.])1 \w+s\b", said), said
