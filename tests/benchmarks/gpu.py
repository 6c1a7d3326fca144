"""Training and generation on one GPU, beside plain Trainer and plain generate: `python tests/benchmarks/gpu.py`.

A GPT-2 of 124 million parameters with random weights: first the machine's own limits, then generation, then training.
All of it runs in one process. Each row is printed when it is measured, and all of them as a Markdown table at the end.
`--dry` does everything on a CPU at tiny sizes, to see that it runs.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import generation
import torch
import training
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import hfkit
from hfkit import console
from hfkit.corpus.sequences import Collator
from hfkit.corpus.training_data import gather_training_data
from hfkit.options import DataOptions

PROMPT = generation.PROMPT
SKIPPED = 4  # steps that compile, and settle


class Bench:
    """Sizes, the device, and the rows of the table."""

    def __init__(self, dry: bool, seconds: float, file: Path | None) -> None:
        self.dry, self.device, self._file = dry, "cpu" if dry else "cuda", file
        self.card = "a CPU, at tiny sizes: the figures mean nothing" if dry else torch.cuda.get_device_name()
        self.rows: list[dict[str, Any]] = []
        self._end = time.perf_counter() + seconds
        self.synchronize: Callable[[], None] = (lambda: None) if dry else torch.cuda.synchronize

    def add(self, what: str, plain: float | None, ours: float | None, unit: str, goal: str = "", **more: Any) -> None:
        """A row: the plain way, hfkit, and how many times faster hfkit is."""
        ratio = ours / plain if ours and plain else None
        self.rows.append(
            {"what": what, "plain": plain, "hfkit": ours, "ratio": ratio, "unit": unit, "goal": goal, **more}
        )
        print(line(self.rows[-1]), flush=True)
        if self._file:
            facts = {"card": self.card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
            self._file.write_text(json.dumps({**facts, "rows": self.rows}, indent=1))

    @property
    def has_time(self) -> bool:
        return time.perf_counter() < self._end

    def part(self, run: Callable[["Bench"], None]) -> bool:
        """Run a part of the benchmark; a failure is printed, and the next part goes on. Whether it was run whole."""
        if not self.has_time:
            print(f"-- {run.__name__}: no time left", flush=True)
            return False
        started = time.perf_counter()
        print(f"-- {run.__name__}", flush=True)
        try:
            run(self)
        except Exception:  # noqa: BLE001, the other parts are worth having
            traceback.print_exc()
            return False
        finally:
            gc.collect()
            if not self.dry:
                torch.cuda.empty_cache()
            print(f"-- {run.__name__}: {time.perf_counter() - started:.0f} s", flush=True)
        return True

    def peak(self, measure: Callable[[], float]) -> tuple[float, float]:
        """What `measure` returns, and the most GB of the GPU's memory that it held."""
        gc.collect()
        if self.dry:
            return measure(), 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return measure(), torch.cuda.max_memory_allocated() / 1e9


def line(row: dict[str, Any]) -> str:
    cells = [f"{row[name]:,.0f}" if row[name] else "" for name in ("plain", "hfkit")]
    memory = " / ".join(f"{row[name]:.1f}" for name in ("plain_gb", "hfkit_gb") if row.get(name))
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
    return f"| {row['what']} | {' | '.join(cells)} | {row['unit']} | {ratio} | {memory} | {row['goal']} |"


# the machine


def limits(bench: Bench) -> None:
    """How fast the GPU copies, bytes read and written counted, and multiplies matrices of random bfloat16 numbers."""
    size, width = (1 << 20, 256) if bench.dry else (1 << 32, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    matrices = [torch.randn(width, width, device=bench.device, dtype=torch.bfloat16) for _ in range(2)]

    def rate(run: Callable[[], Any], amount: float) -> float:
        times = []
        for number in range(13):
            bench.synchronize()
            started = time.perf_counter()
            run()
            bench.synchronize()
            if number >= 3:
                times.append(time.perf_counter() - started)
        return amount / statistics.median(times)

    copied = rate(lambda: target.copy_(source), 2 * size)
    multiplied = rate(lambda: matrices[0] @ matrices[1], 2.0 * width**3)
    bench.add("limit: copy", None, copied / 1e9, "GB/s")
    bench.add("limit: bf16 matrices", None, multiplied / 1e12, "TFLOP/s")


# generation


def generate(bench: Bench) -> None:
    """One stream and 64, greedy and sampled, in bfloat16."""
    tokens, many, rounds = (12, 4, 1) if bench.dry else (400, 64, 3)
    with tempfile.TemporaryDirectory() as folder:
        if bench.dry:
            training.make_model(Path(folder), True, 0.0)
        else:
            generation.make_small(Path(folder))
        lm = hfkit.load(folder, device=bench.device, dtype="bfloat16")
        model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype="bfloat16").to(bench.device).eval()
    # Nothing ends a text early.
    lm.tokenizer.eos_token = lm.model.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    one = lm.tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(bench.device)

    def plain(rows: int, **options: Any) -> None:
        ids = one.expand(rows, -1)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=0, **options)

    def ours(rows: int, **options: Any) -> None:
        prompts: Any = PROMPT if rows == 1 else [PROMPT] * rows
        texts = hfkit.generate(prompts, model=lm, max_new_tokens=tokens, **options)
        assert sum(text.tokens for text in (texts if rows > 1 else [texts])) == rows * tokens

    def rate(run: Callable[..., None], rows: int, **options: Any) -> float:
        bench.synchronize()
        started = time.perf_counter()
        run(rows, **options)
        bench.synchronize()
        return rows * tokens / (time.perf_counter() - started)

    single = 0.0
    for rows in (1, many):
        for way, theirs, own in (
            ("greedy", {"do_sample": False}, {"temperature": 0}),
            ("sampled", {"do_sample": True}, {"seed": 1}),
        ):
            rate(plain, rows, **theirs), rate(ours, rows, **own)
            pairs = [(rate(plain, rows, **theirs), rate(ours, rows, **own)) for _ in range(rounds)]
            before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
            goal = ">= 1,000 and >= 3 ×" if rows == 1 else f">= 10 × one stream: {after / (single or after):.1f}"
            single = single or after
            name = "1 stream" if rows == 1 else f"{rows} streams"
            bench.add(f"{name}, {way}", before, after, "tokens/s", goal)

    def streamed(rows: int) -> None:
        for _ in hfkit.stream(PROMPT, model=lm, max_new_tokens=tokens, seed=1):
            pass

    rate(streamed, 1)
    bench.add("1 stream, shown as it comes", None, rate(streamed, 1), "tokens/s")


def generate_compiled(bench: Bench) -> None:
    """What a user gets from transformers' own static cache, which compiles the model: a minute of waiting first."""
    tokens = 12 if bench.dry else 400
    with tempfile.TemporaryDirectory() as folder:
        training.make_model(Path(folder), bench.dry, 0.0)
        model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype="bfloat16").to(bench.device).eval()
    ids = torch.arange(17, device=bench.device)[None]
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def seconds() -> float:
        bench.synchronize()
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
        bench.synchronize()
        return time.perf_counter() - started

    first, _ = seconds(), seconds()
    rate = tokens / seconds()
    bench.add(f"1 stream, transformers' static cache ({first:.0f} s to compile)", rate, None, "tokens/s")


# training


class Clock(TrainerCallback):
    """Times the steps between the first ones and the last one, and waits for the GPU before and after them only."""

    def __init__(self, bench: Bench) -> None:
        self._synchronize, self._started, self.seconds = bench.synchronize, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SKIPPED:
            self._synchronize()
            self._started = time.perf_counter()
        elif state.global_step == state.max_steps - 1:
            self._synchronize()
            self.seconds = (time.perf_counter() - self._started) / (state.max_steps - 1 - SKIPPED)


def train(bench: Bench) -> None:
    """hfkit compiled, Trainer's defaults, and Trainer with bf16 as well: the same batches."""
    rows, block, steps = (2, 64, 6) if bench.dry else (16, 1024, 24)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HF_DATASETS_CACHE"] = temporary
        model = training.make_model(Path(temporary) / "model", bench.dry, 0.0)
        corpus = training.make_corpus(Path(temporary) / "corpus.txt", (steps + 1) * rows * block)

        def ours(batch: int, count: int) -> float:
            clock = Clock(bench)
            hfkit.finetune(
                corpus, model=model, device=bench.device, output_dir=f"{temporary}/run-{batch}", block_size=block,
                eval_fraction=0.0, max_steps=count, eval_steps=count, logging_steps=10, torch_compile=not bench.dry,
                per_device_train_batch_size=batch, callbacks=[clock],
            )  # fmt: skip
            return batch * block / clock.seconds

        data = DataOptions(block_size=block, eval_fraction=0.0)
        dataset = gather_training_data(corpus, hfkit.load(model, device="cpu").tokenizer, data, block, 42).train_set

        def plainly(count: int, **options: Any) -> float:
            clock = Clock(bench)
            arguments = TrainingArguments(
                f"{temporary}/plain", max_steps=count, per_device_train_batch_size=rows, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=bench.dry, **options,
            )  # fmt: skip
            trainer = Trainer(
                GPT2LMHeadModel.from_pretrained(model, dtype="float32"), arguments, train_dataset=dataset,
                data_collator=Collator(0), callbacks=[clock],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return rows * block / clock.seconds

        size = f"{rows} × {block}"
        goal = ">= 400,000 and >= 1.5 ×"
        fast, fast_gb = bench.peak(lambda: ours(rows, steps))
        bench.add(f"training, {size}", None, fast, "tokens/s", goal, hfkit_gb=fast_gb)
        for name, options in (("Trainer's defaults", {}), ("Trainer with bf16", {"bf16": True})):
            speed, memory = bench.peak(lambda options=options: plainly(SKIPPED + 6, **options))
            bench.add(f"{name}, {size}", speed, fast, "tokens/s", goal, plain_gb=memory, hfkit_gb=fast_gb)
        if bench.has_time and not bench.dry:  # more rows, as a person with this GPU would
            larger, memory = bench.peak(lambda: ours(2 * rows, steps // 2))
            bench.add(f"training, {2 * rows} × {block}", None, larger, "tokens/s", ">= 400,000", hfkit_gb=memory)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=600, help="begin no part after this many")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    given = parser.parse_args()
    console.configure(quiet=True, verbose=False, debug=False)
    if not given.dry and not torch.cuda.is_available():
        print("there is no GPU: --dry runs everything on a CPU at tiny sizes")
        return 1
    bench = Bench(given.dry, given.seconds, given.json)
    print(f"{bench.card}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}", flush=True)
    done = [bench.part(run) for run in (limits, generate, train, generate_compiled)]
    print("\n| what | plain | hfkit | unit | times | peak GB | goal |\n|---|---|---|---|---|---|---|")
    for row in bench.rows:
        print(line(row))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
