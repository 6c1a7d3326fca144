"""Training, side by side with what a user would write instead: `python tests/benchmarks/training.py`.

A GPT-2 of the small size with random weights learns blocks of 512 tokens of random text: by Trainer with its defaults,
by `hfkit finetune` and by a loop written by hand with bf16 autocast and torch.compile. They take turns in this one
process, see the same batches, and have no dropout, so that their losses can be compared as well. Only steps are timed,
not compiling, measuring or saving. `--fast` takes a small model and fewer steps; for figures leave the machine alone.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROWS, RATE, SKIPPED = 8, 5e-5, 3  # batch and learning rate are Trainer's own; the first steps compile


def make_model(folder: Path, fast: bool) -> str:
    """Random weights, a token for each byte; the vocabulary has GPT-2's size."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = [*bytes_to_unicode().values(), "<|endoftext|>"]
    words += [f"w{i}" for i in range((1000 if fast else 50257) - len(words))]
    vocabulary = {word: i for i, word in enumerate(words)}
    GPT2Tokenizer(vocab=vocabulary, merges=[], unk_token=words[256], eos_token=words[256]).save_pretrained(folder)
    shape = {"n_layer": 2, "n_embd": 128, "n_head": 4} if fast else {}
    still = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    set_seed(0)
    config = GPT2Config(vocab_size=len(words), bos_token_id=256, eos_token_id=256, **shape, **still)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return str(folder)


def make_corpus(path: Path, tokens: int) -> str:
    """Text of words that were drawn at random, a token for each character."""
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


def train_plainly(model: str, material: Any, steps: int, block: int) -> tuple[float, list[float], list[Any]]:
    """Trainer as it comes; also the batches that it saw."""
    from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from hfkit.sequences import Collator

    times: list[float] = []
    losses: list[float] = []
    batches: list[Any] = []

    class Watched(Trainer):
        def training_step(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            batches.append(inputs)
            return super().training_step(model, inputs, *arguments, **keywords)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True
        )
        trainer = Watched(
            GPT2LMHeadModel.from_pretrained(model, dtype="float32"), arguments, train_dataset=material.train_set,
            data_collator=Collator(0), callbacks=[watcher(times, losses)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return rate(times, block), losses, batches


def train_with_hfkit(model: str, corpus: str, steps: int, block: int) -> tuple[float, list[float]]:
    """hfkit's own choices, but for the schedule, which is Trainer's, and compiling, which a long run would choose."""
    import hfkit

    times: list[float] = []
    losses: list[float] = []
    options = {"block_size": block, "eval_fraction": 0.0, "max_steps": steps, "eval_steps": steps}
    same = {"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "learning_rate": RATE}
    with tempfile.TemporaryDirectory() as folder:
        hfkit.finetune(
            corpus, model=model, output_dir=folder, per_device_train_batch_size=ROWS, torch_compile=True, **options,
            **same, callbacks=[watcher(times, losses)],
        )  # fmt: skip
    return rate(times, block), losses


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a small model, one round")
    fast = parser.parse_args().fast
    block, steps, rounds = (128, 8, 1) if fast else (512, 10, 2)

    from hfkit import console
    from hfkit.models import load_tokenizer
    from hfkit.options import DataOptions, ModelOptions
    from hfkit.sequences import gather_material
    from hfkit.sources import find

    console.configure(quiet=True, verbose=False, debug=False)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = temporary
        model = make_model(Path(temporary) / "model", fast)
        corpus = make_corpus(Path(temporary) / "corpus.txt", steps * ROWS * block + 1)
        options = DataOptions(block_size=block, eval_fraction=0.0)
        material = gather_material(corpus, load_tokenizer(find(ModelOptions(model=model))), options, block, 42)
        rates: dict[str, list[float]] = {"Trainer's defaults": [], "`hfkit finetune`": [], "a loop by hand": []}
        for _ in range(rounds):
            plain, losses_plain, batches = train_plainly(model, material, steps, block)
            ours, losses_ours = train_with_hfkit(model, corpus, steps, block)
            hand, losses_hand = train_by_hand(model, batches, block)
            for found, each in zip(rates.values(), (plain, ours, hand), strict=True):
                found.append(each)

    finetune = rates["`hfkit finetune`"]
    print("| | tokens/s | `hfkit finetune` beside it | goal |\n|---|---|---|---|")
    for (name, found), goal in zip(rates.items(), ("≥ 3", "", "≥ 0.95"), strict=True):
        ratio = statistics.median(ours / other for ours, other in zip(finetune, found, strict=True))
        print(f"| {name} | {statistics.median(found):.0f} | {ratio:.2f} | {goal} |")
    print("\n| step | Trainer | hfkit | by hand |\n|---|---|---|---|")
    for step in sorted({1, steps // 2, steps}):
        row = [losses[step - 1] for losses in (losses_plain, losses_ours, losses_hand)]
        print(f"| {step} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |")
    worst = max(abs(a - b) for a, b in zip(losses_ours, losses_hand, strict=True))
    print(f"\nhfkit and the loop differ by {worst:.4f} nats at most. Trainer's own loss of a GPT-2 is too small")
    print(f"by the factor {(block - 1) / block:.4f} unless `model.loss_type` is set.")


if __name__ == "__main__":
    main()
