"""A run is what a plain loop would do, whatever is trained on whatever; what it leaves anybody can load."""

import ctypes
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import trials
from support.shell import assert_fails, call
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, Trainer, TrainerCallback

import hfkit
from hfkit.errors import HfkitError, OptionError
from hfkit.reporting.pages import make_files
from hfkit.training.checkpoints import find_fault

pytestmark = pytest.mark.usefixtures("brisk")
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def train(corpus, model, folder, **options):
    """A small run in float32."""
    return hfkit.finetune(corpus, model=model, output_dir=str(folder), **{**trials.SMALL, **options})


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> str:
    """Rows of prompt and completion, of unequal lengths."""
    path = tmp_path_factory.mktemp("corpus") / "answers.jsonl"
    rows = [{"prompt": f"{'say ' * (i % 4)}{i}:", "completion": " yes" * (1 + i % 5)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> str:
    """Conversations."""
    path = tmp_path_factory.mktemp("corpus") / "talks.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes " * (1 + i % 3)}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def batches(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """Every batch that Trainer learns from, in order."""
    seen, step = [], Trainer.training_step

    def watch(self, model, inputs, *arguments, **keywords):
        seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return step(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "training_step", watch)
    return seen


def cross_entropy(model, batch) -> torch.Tensor:
    """Nats in all over the labels of a batch, written out."""
    logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")


def count(batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


# the loss


@pytest.mark.parametrize("kind", ["text", "answers"])
def test_loop_losses(still, corpus, answers, tmp_path, batches, kind):
    """The losses are those of a plain loop."""
    run = train(corpus if kind == "text" else answers, still, tmp_path, warmup_steps=2, weight_decay=0.1)
    model = GPT2LMHeadModel.from_pretrained(still).train()
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )
    half = torch.pi / (6 - 2)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / 2 if step < 2 else 0.5 * (1 + torch.cos(torch.tensor(half * (step - 2))).item())
    )
    expected = []
    for batch in batches:
        loss = cross_entropy(model, batch) / count(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), rate.step(), optimizer.zero_grad()
        expected.append(loss.item())
    assert len(expected) == 6 and (kind == "text" or len({count(batch) for batch in batches}) > 1)
    assert trials.losses(run.metrics) == pytest.approx(expected, rel=1e-6)
    # Not the weights: where a gradient is nothing but rounding, as of the keys' bias, Adam makes much of it.
    ids, saved = batches[0]["input_ids"], GPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_loop_accumulation(still, answers, tmp_path):
    """Small batches that are accumulated equal a large one."""
    large = train(
        answers, still, tmp_path / "large", per_device_train_batch_size=4, num_train_epochs=1, max_steps=None
    )
    small = train(
        answers, still, tmp_path / "small", gradient_accumulation_steps=2, num_train_epochs=1, max_steps=None
    )
    assert len(trials.losses(large.metrics)) == large.metrics["steps"] >= 9
    assert trials.losses(small.metrics) == pytest.approx(trials.losses(large.metrics), rel=1e-5)


def test_monitor_losses(still, corpus, tmp_path):
    """The held-out losses are those of a plain loop."""
    held = Path(trials.write_corpus(tmp_path / "held.txt", documents=5, seed=1))
    run = train(corpus, still, tmp_path / "run", eval_file=[str(held)], learning_rate=3e-3)
    tokenizer, nats, tokens = AutoTokenizer.from_pretrained(still), {}, 0
    ids = [i for text in held.read_text().split("<|endoftext|>") for i in [*tokenizer(text)["input_ids"], 256]]
    for name in (still, tmp_path / "run"):
        model = AutoModelForCausalLM.from_pretrained(name).eval()
        nats[name] = tokens = 0
        for block in (torch.tensor([ids[i : i + 64]]) for i in range(0, len(ids), 64)):
            with torch.no_grad():
                nats[name] += cross_entropy(model, {"input_ids": block, "labels": block}).item()
            tokens += block.shape[1] - 1
    assert run.metrics["loss_before"] == pytest.approx(nats[still] / tokens, rel=1e-5)
    assert run.metrics["loss"] == pytest.approx(nats[tmp_path / "run"] / tokens, rel=1e-5)
    assert run.perplexity == pytest.approx(float(torch.tensor(run.metrics["loss"]).exp()), rel=1e-5)
    assert run.perplexity < run.metrics["perplexity_before"]


def test_fit_without_memory(still, corpus, tmp_path, monkeypatch, capfd):
    """Where memory does not suffice for a batch, the steps stay the same."""
    whole = train(corpus, still, tmp_path / "whole", per_device_train_batch_size=6)
    forward, most = GPT2LMHeadModel.forward, 2
    errors = {6: torch.OutOfMemoryError("CUDA out of memory."),
              3: RuntimeError("DefaultCPUAllocator: can't allocate memory")}  # fmt: skip

    def limited(self, input_ids, *arguments, **keywords):
        if self.training and len(input_ids) > most:
            raise errors[len(input_ids)]
        return forward(self, input_ids, *arguments, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "forward", limited)
    capfd.readouterr()
    halved = train(corpus, still, tmp_path / "halved", per_device_train_batch_size=6)
    assert trials.losses(halved.metrics) == pytest.approx(trials.losses(whole.metrics), rel=1e-5)
    notes = [line for line in capfd.readouterr().err.splitlines() if "out of memory" in line]
    assert [note.split("going on with ")[1] for note in notes] == ["3 sequences at a time, 2 times a step",
                                                                  "1 sequence at a time, 6 times a step"]  # fmt: skip
    most, errors = 0, {1: errors[6]}
    with pytest.raises(HfkitError, match="out of memory: lower"):
        train(corpus, still, tmp_path / "none", per_device_train_batch_size=1)


# every kind of run

KINDS = {
    "full": {},
    "prepared": {"seed": 7},
    "lora": {"lora": True, "lora_r": 4},
    "answers": {"gradient_accumulation_steps": 2},
    "talks": {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 1.0},
    "streaming": {"streaming": True},
    "activations": {"activation_checkpointing": True, "train_sampling_strategy": "group_by_length"},
    "precision": {"bf16": True},
    "llama": {"lora": True, "lora_target_modules": "q_proj"},
    "muon": {"optim": "muon", "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-5}'},
}


def flags(options) -> list[str]:
    """Options as a person types them."""
    typed = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        typed += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return typed


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_every_kind(tiny, tiny_llama, corpus, answers, talks, tmp_path, capfdbinary, monkeypatch, kind):
    """A run leaves a model that transformers loads, and a recipe that gives the same model."""
    if kind == "full":
        monkeypatch.setattr("hfkit.training.runs.make_files", make_files)
    base = tiny_llama if kind == "llama" else tiny
    source, folder = {"answers": answers, "talks": talks}.get(kind, corpus), tmp_path / "run"
    if kind == "prepared":
        source = hfkit.prepare(corpus, model=tiny, output_dir=tmp_path / "prepared").folder
    eval_file = ["--eval-file", trials.write_corpus(tmp_path / "held.txt", 4, 1)] if kind == "streaming" else []
    typed = [*flags({**trials.SMALL, **KINDS[kind]}), *eval_file]
    result = call(capfdbinary, "finetune", source, "-m", base, "-o", folder, *typed)
    assert (result.returncode, result.stdout.decode()) == (0, f"{folder}\n"), result.stderr
    assert all(line.startswith("hfkit: ") for line in result.stderr.decode().splitlines()), result.stderr

    # plain transformers, or peft, loads it and says the same
    lora = "lora" in KINDS[kind]
    if lora:
        from peft import AutoPeftModelForCausalLM as Loader
    else:
        Loader = AutoModelForCausalLM
    model, tokenizer = Loader.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the rain", return_tensors="pt")
    expected, ours = (
        m.generate(**ids, **GREEDY, pad_token_id=0)[0] for m in (model, hfkit.load(folder, device="cpu").model)
    )
    assert ours.tolist() == expected.tolist()
    if base == tiny:
        text = str(hfkit.generate("the rain", model=hfkit.load(folder, device="cpu"), **GREEDY))
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    for name in () if lora else ("config.json", "generation_config.json"):
        before, after = (json.loads((Path(where) / name).read_text()) for where in (tiny, folder))
        assert before | after == before, name

    # what is in the folder
    found = {path.name for path in folder.iterdir()}
    assert {
        "recipe.yaml",
        "metrics.json",
        "tokenizer.json",
        *(["README.md", "loss.png"] if kind == "full" else []),
    } < found
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pth", ".tmp", ".pkl"))]
    assert not {"checkpoints", ".staging"} & found
    metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert [entry["step"] for entry in metrics["history"] if "loss" in entry] == list(range(1, 7))
    assert [step for step, *_ in trials.scores(metrics)] == [0, 3, 6]
    assert metrics["loss"] == min(loss for step, loss, _ in trials.scores(metrics) if step) < metrics["loss_before"]

    # the recipe, from anywhere, gives the same to the bit
    os.chdir(tmp_path)
    again = call(capfdbinary, "finetune", "--config", folder / "recipe.yaml", "-o", "again", "--json")
    assert trials.outcome("again") == trials.outcome(folder)
    assert json.loads(again.stdout)["loss"] == metrics["loss"]


def test_finetune_stops_early(tiny, corpus, tmp_path, capfd):
    """A run that does not get better stops early and keeps its best state."""
    options = {"max_steps": 12, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.1}
    run = train(corpus, tiny, tmp_path / "run", **options, lr_scheduler_type="constant", warmup_steps=0)
    measured = {step: loss for step, loss, _ in trials.scores(run.metrics) if step}
    best = min(measured, key=measured.get)
    assert run.metrics["steps"] == max(measured) == best + 2 < 12 and run.metrics["step"] == best
    assert "no progress in 2 measurements: stopping early" in capfd.readouterr().err
    assert run.metrics["loss"] == measured[best]

    # what was kept is what scored so
    again = train(corpus, str(tmp_path / "run"), tmp_path / "again", max_steps=1, eval_steps=1)
    assert again.metrics["loss_before"] == pytest.approx(measured[best], rel=1e-6)
    last = train(corpus, tiny, tmp_path / "last", **options, lr_scheduler_type="constant", warmup_steps=0,
                 load_best_model_at_end=False)  # fmt: skip
    assert last.metrics["step"] == last.metrics["steps"] == max(measured)
    assert last.metrics["loss"] == measured[max(measured)]


def test_progress_bar(tiny, corpus, tmp_path, monkeypatch):
    """On a terminal a bar shows loss, speed and time left."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run = train(corpus, tiny, tmp_path)
    shown = [line for line in terminal.getvalue().replace("\r", "\n").split("\n") if "training:" in line]
    assert " 6/6 [" in shown[-1] and "tokens/s]" in shown[-1] and "<00:00, " in shown[-1]
    assert f"loss {trials.losses(run.metrics)[-2]:.3f}" in shown[-1]  # Trainer tells it when the step is over
    assert "\nhfkit: step 6 of 6: held-out perplexity" in terminal.getvalue().replace("\r", "\n")


# Python


class Watch(TrainerCallback):
    """What Trainer calls, and whether a checkpoint is whole when it says so."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls, self.saved, self.stop_at = [], [], stop_at

    def on_step_end(self, args, state, control, **kwargs):
        self.calls.append(state.global_step)
        control.should_training_stop |= state.global_step == self.stop_at

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(find_fault(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


def test_finetune_calls_callbacks(tiny, corpus, tmp_path):
    """Callbacks of transformers are called."""
    watch = Watch()
    run = train(corpus, tiny, tmp_path, callbacks=[watch])
    assert (watch.calls, watch.saved) == ([1, 2, 3, 4, 5, 6], [None, None])
    assert run == hfkit.Run(str(tmp_path), json.loads((tmp_path / "metrics.json").read_text()))


def test_finetune_stopped_by_a_callback(tiny, corpus, tmp_path):
    """A callback may stop a run once something is saved."""
    run = train(corpus, tiny, tmp_path / "some", callbacks=[Watch(stop_at=4)])
    assert (run.metrics["steps"], run.metrics["step"]) == (4, 3)
    with pytest.raises(HfkitError, match="before anything was saved: lower --save-steps"):
        train(corpus, tiny, tmp_path / "nothing", callbacks=[Watch(stop_at=2)])


def test_finetune_options(tiny, tiny_t5, corpus, tmp_path):
    """Options are keywords or objects, and errors name the bad one."""
    both = {"output_dir": tmp_path / "run", "dry_run": True}
    objects = {"train": hfkit.TrainOptions(max_steps=3), "data": hfkit.DataOptions(eval_fraction=0.1)}
    assert hfkit.finetune(corpus, model=hfkit.ModelOptions(model=tiny), **objects, **both) is None
    assert hfkit.finetune([Path(corpus)], model=Path(tiny), max_steps=3, eval_fraction=0.1, **both) is None
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="unknown option 'max_step': did you mean 'max_steps'"):
        hfkit.finetune(corpus, model=tiny, max_step=3, **both)
    for options, words in {
        ("max_steps", 0): "--max-steps is 0",
        ("streaming", True): "add --max-steps",
        ("quantize", "int8"): "--quantize trains with --lora and on a GPU",
    }.items():
        with pytest.raises(OptionError, match=words):
            hfkit.finetune(corpus, model=tiny, **{options[0]: options[1]}, **both)
    with pytest.raises(HfkitError, match="has an encoder: choose a causal model"):
        hfkit.finetune(corpus, model=tiny_t5, **both)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim": "adamm"}, "adamm"),
        ({"lr_scheduler_kwargs": "{min_lr}"}, "--lr-scheduler-kwargs is not valid JSON"),
        ({"report_to": "nothing-of-the-kind"}, "nothing-of-the-kind"),
        ({"lora": True, "lora_target_modules": "nothing"}, "--lora-target-modules"),
        ({"fp16": True, "bf16": True}, "fp16"),
    ],
)
def test_finetune_refused_options(tiny, corpus, tmp_path, capfdbinary, options, words):
    """What Trainer does not accept is a usage error, and the folder stays free."""
    common = ["finetune", corpus, "-m", tiny, "-o", tmp_path / "run", "-q", *flags(trials.SMALL | options)]
    for _ in range(2):
        assert_fails(call(capfdbinary, *common), 2, words)


@pytest.mark.parametrize("name", ["bundled", "folder"])
def test_base_of_an_adapter_has_changed(tiny, corpus, tmp_path, monkeypatch, copy, name):
    """An adapter says so where its base is no longer what it was trained on."""
    base, folder = copy(tiny), tmp_path / "adapter"
    monkeypatch.setattr("hfkit.models.sources.BUNDLED", base)
    train(corpus, "bundled" if name == "bundled" else str(base), folder, lora=True, max_steps=1)
    hfkit.load(folder)
    weights = load_file(base / "model.safetensors")
    embeddings = weights["transformer.wte.weight"]
    save_file(weights | {"transformer.wte.weight": embeddings * 2}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(HfkitError, match="the base of the adapter has changed since it was trained .*: train"):
        hfkit.load(folder)
    run = json.loads((folder / "run.json").read_text())
    assert run.pop("model_sha256")  # as an old version wrote it, on a base of another size
    (folder / "run.json").write_text(json.dumps(run | {"model_bytes": 17_816_112}))
    with pytest.raises(HfkitError, match="the base of the adapter has changed since it was trained .*: train"):
        hfkit.load(folder)
    (folder / "run.json").write_text(json.dumps(run))  # of this size
    hfkit.load(folder)


def test_finetune_refuses_nested_adapters(tiny, corpus, tmp_path):
    """An adapter is not trained on top of an adapter."""
    train(corpus, tiny, tmp_path / "adapter", lora=True, max_steps=1)
    with pytest.raises(HfkitError, match="is an adapter: 'hfkit export' merges it"):
        train(corpus, str(tmp_path / "adapter"), tmp_path / "second", lora=True)
    whole = train(corpus, str(tmp_path / "adapter"), tmp_path / "whole", max_steps=1)
    assert AutoModelForCausalLM.from_pretrained(whole.output_dir)


def test_finetune_gguf(tiny_llama, corpus, tmp_path):
    """A GGUF file can be trained further and becomes a plain model."""
    from support.models import write_gguf

    lm = hfkit.load(tiny_llama, device="cpu")
    file = write_gguf(lm.model, lm.tokenizer, tmp_path / "model.gguf")
    run = train(corpus, file, tmp_path / "run")
    assert run.metrics["parameters"] == lm.model.num_parameters() and run.metrics["loss"] < run.metrics["loss_before"]
    assert AutoModelForCausalLM.from_pretrained(run.output_dir).dtype == torch.float32
    with pytest.raises(HfkitError, match="an adapter would not find it: 'hfkit export' makes a folder of it"):
        train(corpus, file, tmp_path / "adapter", lora=True)


def test_finetune_adapter_of_a_hub_model(tiny, corpus, tmp_path, monkeypatch):
    """The adapter of a Hub model names the model, and the run never asks the Hub for it."""
    commit, cache = "a" * 40, tmp_path / "hub"
    shutil.copytree(tiny, cache / "models--owner--name" / "snapshots" / commit)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network"))
    run = train(corpus, "owner/name", tmp_path / "run", lora=True, revision="v1")
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "v1")
    assert run.metrics["model"] == "owner/name" and hfkit.load(run.output_dir)


def test_finetune_leaves_no_state(tiny, corpus, tmp_path):
    """One run leaves nothing behind for the next."""
    before = dict(os.environ)
    first = train(corpus, tiny, tmp_path / "1", bf16=True)
    train(corpus, tiny, tmp_path / "2", lora=True)
    with pytest.raises(OptionError):
        train(corpus, tiny, tmp_path / "3", optim="nonsense")
    assert dict(os.environ) == before
    assert train(corpus, tiny, tmp_path / "4", bf16=True).metrics["loss"] == first.metrics["loss"]


@pytest.mark.slow
def test_finetune_compiled(still, corpus, tmp_path):
    """A compiled run learns the same, and the next one is not compiled."""
    plain = train(corpus, still, tmp_path / "plain")
    before = dict(os.environ)
    compiled = train(corpus, still, tmp_path / "compiled", torch_compile=True)
    assert compiled.metrics["compiled"] and dict(os.environ) == before
    assert trials.losses(compiled.metrics) == pytest.approx(trials.losses(plain.metrics), rel=1e-4)
    again = train(corpus, still, tmp_path / "again")
    assert trials.outcome(again.output_dir) == trials.outcome(plain.output_dir)
    loaded = AutoModelForCausalLM.from_pretrained(compiled.output_dir)  # no _orig_mod in the names
    assert loaded.state_dict().keys() == AutoModelForCausalLM.from_pretrained(still).state_dict().keys()


@pytest.mark.slow
def test_finetune_compiled_examples(still, answers, tmp_path):
    """Examples of many lengths are compiled twice: for the first length, and for any."""
    from torch._dynamo.utils import counters

    counters.clear()
    torch.compiler.reset()
    options = {"per_device_train_batch_size": 1, "max_steps": 20, "eval_fraction": 0}
    assert train(answers, still, tmp_path / "run", torch_compile=True, **options).metrics["compiled"]
    assert counters["stats"]["unique_graphs"] == 2


FAULTS = """
import resource, torch
from types import SimpleNamespace
from hfkit.training import arguments

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with arguments.freed_memory_kept(SimpleNamespace(device=torch.device("cpu"))):
    faults(10)  # the heap takes some steps to settle
    print(faults(10))
print(faults(10))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_kept():
    """A step gets the memory that the last one freed; afterwards the system has it again."""
    # In a process of its own: an allocation that ever failed in this one would have changed the heap.
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, after = map(int, told.split())
    assert 10 * kept < after


@pytest.mark.parametrize("call", [hfkit.finetune, hfkit.pretrain, hfkit.tune, hfkit.prepare, hfkit.evaluate])
def test_no_corpus(tmp_path, monkeypatch, call):
    """An empty list of files is one sentence."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HfkitError, match=r"^no corpus: name a file, a folder or hf://NAME$"):
        call([])
