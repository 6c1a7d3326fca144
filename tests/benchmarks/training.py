"""Training, side by side with what a user would write instead: `python tests/benchmarks/training.py`.

A GPT-2 of the small size with random weights learns blocks of 512 tokens of random text. Three parts, at most a
quarter of an hour each on two cores: `defaults`, by Trainer and by `hfkit finetune` with GPT-2's own dropout, of
which hfkit leaves that of the attention out on a CPU; `bfloat16`, by both and by a loop written by hand with bf16
autocast and torch.compile; `float32`, by both as on a machine without units for bfloat16. They take turns, each time
in a process of their own as they would be run, and see the same batches; in the last two parts there is no dropout,
so that their losses can be compared as well. Only steps are timed, not compiling, measuring or saving. For figures
leave the machine alone.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hfkit import console
from hfkit.models import architecture

os.environ["HF_HUB_OFFLINE"] = "1"
ROWS, RATE, SKIPPED = 8, 5e-5, 3  # batch and learning rate are Trainer's own; the first steps compile


def make_model(folder: Path, fast: bool, dropout: float) -> str:
    """Random weights, a token for each byte; the vocabulary has GPT-2's size."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "<|endoftext|>"]
    words += [f"w{i}" for i in range((1000 if fast else 50257) - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=words[256], eos_token=words[256]).save_pretrained(folder)
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4} if fast else {}
    shape |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    set_seed(0)
    config = GPT2Config(vocab_size=len(words), bos_token_id=256, eos_token_id=256, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def make_corpus(path: Path, tokens: int) -> str:
    """Text of words that were drawn at random, a token for each character; its end is one more."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    text = " ".join(draw.choices(words, k=tokens // 6))
    path.write_text(text[:tokens])
    return str(path)


def watcher(times: list[float], losses: list[float]) -> Any:
    """A callback that notes when each step begins, and its loss."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    return Watch()


def rate(times: list[float], block: int) -> float:
    """Tokens a second between the beginnings of steps."""
    steps = [after - before for before, after in zip(times[SKIPPED:], times[SKIPPED + 1 :], strict=False)]
    return ROWS * block / statistics.median(steps)


def train_plainly(model: str, corpus: str, steps: int, block: int) -> tuple[float, list[float], list[Any]]:
    """Trainer as it comes; also the batches that it saw."""
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from hfkit.corpus.sequences import Collator
    from hfkit.corpus.training_data import gather_training_data as gather_material
    from hfkit.models.loading import load_tokenizer
    from hfkit.models.sources import find_model as find
    from hfkit.options import DataOptions, ModelOptions

    console.configure(quiet=True, verbose=False, debug=False)
    options = DataOptions(block_size=block, eval_fraction=0.0)
    material = gather_material(corpus, load_tokenizer(find(ModelOptions(model=model))), options, block, 42)
    times: list[float] = []
    losses: list[float] = []
    batches: list[Any] = []

    class Watched(Trainer):
        def training_step(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            batches.append(inputs)
            return super().training_step(model, inputs, *arguments, **keywords)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Watched(
            GPT2LMHeadModel.from_pretrained(model, dtype="float32"), arguments, train_dataset=material.train_set,
            data_collator=Collator(0), callbacks=[watcher(times, losses)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # Its loss of a GPT-2 is counted over one label more than there is, unless `model.loss_type` is set.
    return rate(times, block), [loss * block / (block - 1) for loss in losses], batches


def train_with_hfkit(model: str, corpus: str, steps: int, block: int, units: bool) -> tuple[float, list[float]]:
    """hfkit's own choices, but for the schedule, which is Trainer's.

    units: compile as if the run was a long one; else choose as on a machine without units for bfloat16.
    """
    import hfkit

    console.configure(quiet=True, verbose=False, debug=False)
    if not units:
        architecture.has_bfloat16_units = lambda: False
    times: list[float] = []
    losses: list[float] = []
    options = {"block_size": block, "eval_fraction": 0.0, "max_steps": steps, "eval_steps": steps}
    same = {"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "learning_rate": RATE}
    with tempfile.TemporaryDirectory() as folder:
        hfkit.finetune(
            corpus, model=model, output_dir=folder, per_device_train_batch_size=ROWS, torch_compile=units or None,
            **options, **same, callbacks=[watcher(times, losses)],
        )  # fmt: skip
    return rate(times, block), losses


def apart(train: Callable[..., Any], *arguments: Any) -> Any:
    """What `train` returns in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, *arguments).result()


def train_by_hand(model: str, batches: list[Any], block: int) -> tuple[float, list[float]]:
    """The loop of a person who knows how to be fast."""
    import torch
    from transformers import GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpt2 = GPT2LMHeadModel.from_pretrained(model, dtype="float32").to(device).train()
    compiled = torch.compile(gpt2)
    optimizer = torch.optim.AdamW(gpt2.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    times, losses = [], []
    for batch in batches:
        times.append(time.perf_counter())
        ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
        with torch.autocast(device, torch.bfloat16):
            logits = compiled(input_ids=ids, use_cache=False).logits
        targets = labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt2.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return rate(times, block), losses


def take_turns(trainings: dict[str, Callable[[], Any]], goals: dict[str, str], rounds: int, at: list[int]) -> None:
    """Let all train, `rounds` times; print their speeds beside hfkit's, and their losses at the steps `at`, if any."""
    rates: dict[str, list[float]] = {name: [] for name in trainings}
    losses: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, train in trainings.items():
            speed, losses[name], *_ = train()
            rates[name].append(speed)
    print("| | tokens/s | hfkit beside it | goal |\n|---|---|---|---|")
    for name, found in rates.items():
        ratio = statistics.median(ours / other for ours, other in zip(rates["hfkit"], found, strict=True))
        print(f"| {name} | {statistics.median(found):.0f} | {ratio:.2f} | {goals.get(name, '')} |")
    if not at:
        print(flush=True)
        return
    print(f"\n| loss at step | {' | '.join(losses)} |\n|---|{'---|' * len(losses)}")
    for step in at:
        print(f"| {step} | " + " | ".join(f"{each[step - 1]:.4f}" for each in losses.values()) + " |")
    for name, other in losses.items():
        if name != "hfkit":
            worst = max(abs(a - b) for a, b in zip(losses["hfkit"], other, strict=True))
            print(f"\nhfkit and {name} differ by {worst:.4f} nats at most.", end="")
    print("\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", help="defaults, bfloat16, float32; all if none is named")
    parser.add_argument("--fast", action="store_true", help=argparse.SUPPRESS)  # a small model, to see that it runs
    parser.add_argument("--rounds", type=int, default=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    block, steps, rounds = (128, 6, 1) if given.fast else (512, 7, given.rounds)

    import torch

    units = [name for name, has in torch.cpu.get_capabilities().items() if has and "bf16" in name]
    print(f"{os.cpu_count()} cores, units for bfloat16: {', '.join(units) or 'none'}; torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = temporary
        model = make_model(Path(temporary) / "model", given.fast, 0.0)
        corpus = make_corpus(Path(temporary) / "corpus.txt", steps * ROWS * block - 1)
        batches: list[Any] = []

        def plainly(model: str = model) -> Any:
            speed, losses, batches[:] = apart(train_plainly, model, corpus, steps, block)
            return speed, losses

        def ours(model: str = model, units: bool = True) -> Any:
            return apart(train_with_hfkit, model, corpus, steps, block, units)

        def by_hand() -> Any:
            return apart(train_by_hand, model, batches, block)

        at = [1, steps // 2, steps]
        if "defaults" in (given.part or ["defaults"]):
            print("## GPT-2 as it is, with dropout\n")
            own = make_model(Path(temporary) / "own", given.fast, 0.1)
            both = {"Trainer's defaults": lambda: plainly(own), "hfkit": lambda: ours(own)}
            take_turns(both, {"Trainer's defaults": ">= 3"}, rounds, [])
        if "bfloat16" in (given.part or ["bfloat16"]):
            print("## As on this machine, compiled as if the run was a long one\n")
            all_three = {"Trainer's defaults": plainly, "hfkit": ours, "a loop by hand": by_hand}
            take_turns(all_three, {"a loop by hand": ">= 0.95"}, rounds, at)
        if "float32" in (given.part or ["float32"]):
            print("## As on a machine without units for bfloat16\n")
            both = {"Trainer's defaults": plainly, "hfkit": lambda: ours(units=False)}
            take_turns(both, {"Trainer's defaults": ">= 1"}, rounds, at)


if __name__ == "__main__":
    main()
