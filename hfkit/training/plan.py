"""What a training run will be on this machine, what it will cost, and the job that comes of it."""

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hfkit import console, processes
from hfkit.console import counted, duration, note
from hfkit.corpus.cache import Report, corpus_lines
from hfkit.corpus.documents import Corpora, Corpus
from hfkit.corpus.sequences import TrainingData
from hfkit.errors import OptionError
from hfkit.models.architecture import has_bfloat16_units
from hfkit.options import DataOptions, TrainOptions
from hfkit.training import run_folder

_COMPILE_SECONDS = {"cpu": 600, "cuda": 300}  # estimated length of a run from which compiling pays
_UTILIZATION = {"cpu": 0.35, "cuda": 0.35}  # share of the speed of a matrix product of the model's size
_CONTEXT = 1024
# Fine-tuning makes 3 epochs; over a small text as many as make up these tokens, at most 30, since the names and the
# voice of three pages are learned then, not before. Such a run stops when the held-out part gets worse.
_TOKENS, _MOST_EPOCHS, _PATIENCE = 60_000, 30.0, 3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, decided: options without a None that matters, and how it is computed."""

    options: TrainOptions
    device: torch.device
    precision: str  # float32, bfloat16, float16
    compile: bool
    attention_dropout: bool
    steps: int
    tokens: int  # in all steps
    parameters: int
    memory: int  # bytes, estimated
    seconds: float  # estimated
    why: tuple[str, ...]  # lines for --verbose

    @property
    def autocast(self) -> dict[str, Any]:
        """The precision as TrainingArguments have it."""
        return {"bf16": self.precision == "bfloat16", "fp16": self.precision == "float16"}

    @property
    def rows(self) -> int:
        """Sequences at a time, in each process."""
        return self.options.per_device_train_batch_size or 1

    @property
    def eval_steps(self) -> int:
        return self.options.eval_steps or self.steps


def block_size_for(context: int | None, wanted: int | None) -> int:
    """Tokens of a sequence: as wanted, else the model's context, at most 1,024.

    Raises:
        OptionError: the model does not take so many.
    """
    if wanted and context and wanted > context:
        raise OptionError(f"--block-size is {wanted}: the model takes at most {context} tokens")
    return wanted or min(context or _CONTEXT, _CONTEXT)


def make_plan(
    config: Any,
    parameters: int,
    sequences: int,
    length: float,
    options: TrainOptions,
    device: torch.device,
    *,
    fresh: bool = False,
    processes: int = 1,
) -> Plan:
    """Decide what `options` leave open.

    Args:
        config: the model's configuration.
        parameters: number of the model's parameters.
        sequences: sequences in an epoch; 0 for a stream, where they are not known.
        length: tokens of a sequence, on average.
        options: the user's options.
        device: where the model is trained.
        fresh: the model is new, not trained before.
        processes: how many share the work.
    """
    options = _decide(options, parameters, sequences, length, fresh, processes)
    batch = (options.per_device_train_batch_size or 1) * processes
    per_epoch = math.ceil(math.ceil(sequences / batch) / options.gradient_accumulation_steps)
    steps = options.max_steps or max(1, math.ceil((options.num_train_epochs or 1) * per_epoch))
    precision, why = _choose_precision(options, device)
    tokens = int(steps * batch * options.gradient_accumulation_steps * length)
    seconds = tokens / _speed(config, parameters, precision, device) / processes
    compiled, reason = _choose_compilation(options, device, seconds)
    # Record machine-dependent choices as options, so that the recipe reproduces the run elsewhere.
    options = replace(
        options, eval_steps=options.eval_steps or math.ceil(steps / 10), bf16=precision == "bfloat16",
        fp16=precision == "float16", torch_compile=compiled,
    )  # fmt: skip
    reasons = [why, reason]
    dropout = device.type != "cpu" or not getattr(config, "attn_pdrop", 0)
    if not dropout:
        reasons.append("no attention dropout: a CPU has no fast attention with it")
    if device.type == "cuda" and processes == 1 and (count := torch.cuda.device_count()) > 1:
        reasons.append(f"one of {count} GPUs: --num-processes {count} uses all of them")
    return Plan(
        options=options, device=device, precision=precision, compile=compiled, attention_dropout=dropout, steps=steps,
        tokens=tokens, parameters=parameters, seconds=seconds, why=tuple(reasons),
        memory=_estimate_memory(config, parameters, batch / processes * length, options),
    )  # fmt: skip


def _decide(
    options: TrainOptions, parameters: int, sequences: int, length: float, fresh: bool, processes: int
) -> TrainOptions:
    """`options` with a value for everything that makes a difference to the result."""
    chosen: dict[str, Any] = {
        # Trainer's 8, but a short corpus gets smaller batches: enough for some 30 steps an epoch.
        "per_device_train_batch_size": max(1, min(8, sequences // (30 * processes))) if sequences else 8,
        "learning_rate": _learning_rate(parameters, fresh, options.lora),
        "optim": "muon" if fresh else "adamw_torch_fused",
        "weight_decay": 0.1 if fresh else 0.01,
    }
    if not options.max_steps:
        tokens, most = (20 * parameters, 20.0) if fresh else (_TOKENS, _MOST_EPOCHS)  # a new model: 20 for a parameter
        epochs = min(most, max(3.0, math.ceil(tokens / max(1, sequences * length))))
        chosen["num_train_epochs"] = epochs
        if not fresh and epochs > 3 and options.num_train_epochs is None:
            chosen["early_stopping_patience"] = _PATIENCE
    if options.lora:
        chosen["lora_alpha"] = 2 * options.lora_r
    return replace(options, **{name: value for name, value in chosen.items() if getattr(options, name) is None})


def _learning_rate(parameters: int, fresh: bool, lora: bool) -> float:
    """For GPT-2-small's size 6e-4 if new, else 5e-5; more for smaller models; four times as much for an adapter."""
    peak, limit = (6e-4, 3e-3) if fresh else (5e-5, 5e-4)
    rate = min(limit, peak * math.sqrt(124e6 / parameters)) * (4 if lora else 1)
    return float(f"{rate:.1e}")


def _choose_precision(options: TrainOptions, device: torch.device) -> tuple[str, str]:
    """The precision, and why."""
    if options.bf16 and options.fp16:
        raise OptionError("--bf16 and --fp16 exclude each other: leave one of them out")
    if options.bf16:
        return "bfloat16", "bfloat16: asked for"
    if options.fp16:
        return "float16", "float16: asked for"
    if options.bf16 is False or options.fp16 is False:
        return "float32", "float32: asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "bfloat16: this GPU has units for it"
        return "float16", "float16: this GPU has no units for bfloat16"
    if device.type == "cpu" and has_bfloat16_units():
        return "bfloat16", "bfloat16: this processor has units for it"
    return "float32", f"float32: this {device.type} has no units for less"


def _choose_compilation(options: TrainOptions, device: torch.device, seconds: float) -> tuple[bool, str]:
    """Whether to compile a run that takes so many seconds, and why."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if options.torch_compile is not None:
        if options.torch_compile and not compiler:
            note(reason := "not compiled, though asked for: there is no C++ compiler")
            return False, reason
        return options.torch_compile, "compiled: asked for" if options.torch_compile else "not compiled: asked for"
    if not compiler:
        return False, "not compiled: no C++ compiler"
    if device.type not in _COMPILE_SECONDS:
        return False, f"not compiled: not done on {device.type}"
    if seconds < _COMPILE_SECONDS[device.type]:
        return False, "not compiled: the run is too short to gain"
    return True, "compiled: the run is long enough to gain"


def _speed(config: Any, parameters: int, precision: str, device: torch.device) -> float:
    """Tokens a second, roughly: from a matrix product of the model's size, timed now."""
    width, dtype = getattr(config, "hidden_size", 768), getattr(torch, precision)
    inputs = torch.randn(2048, width, device=device, dtype=dtype)
    weights = torch.randn(4 * width, width, device=device, dtype=dtype)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds_of(times: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            torch.nn.functional.linear(inputs, weights)
        synchronize()
        return (time.perf_counter() - start) / times

    once = max(seconds_of(2), 1e-6)
    flops = 2 * inputs.numel() * len(weights) / seconds_of(max(2, int(0.1 / once)))
    return _UTILIZATION.get(device.type, 0.3) * flops / (6 * parameters)


def _estimate_memory(config: Any, parameters: int, tokens: float, options: TrainOptions) -> int:
    """Bytes of weights, gradients, Adam's two moments, and of what `tokens` keep for the backward pass."""
    layers, width = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    state = parameters * (4 if options.lora else 16)
    activations = layers * width * (8 if options.activation_checkpointing else 40) * tokens
    return int(state + activations + 10 * tokens * getattr(config, "vocab_size", 50257))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, whichever command asks for it."""

    command: str  # finetune or pretrain
    name: str  # of the model it begins with
    files: Corpora | Corpus  # that it is trained on
    folder: Path  # of the run
    recipe: dict[str, Any]
    facts: dict[str, Any]  # that a resumed run must share
    tokenizer: PreTrainedTokenizerBase
    make_model: Callable[[], Any]  # a new one each time, in float32
    dataset: TrainingData
    plan: Plan
    block_size: int
    data: DataOptions
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def checkpoints(self) -> Path:
        return self.folder / run_folder.CHECKPOINTS

    @property
    def prompt(self) -> str | None:
        """What samples continue; None for a model that does not write text."""
        return None if self.dataset.head else self.plan.options.sample_prompt or self.dataset.prompt


def plan_lines(plan: Plan) -> list[str]:
    """What a training will be and cost, a line each."""
    options = plan.options
    batch = counted(plan.rows, "sequence")
    if options.gradient_accumulation_steps > 1:
        batch = f"{options.gradient_accumulation_steps} × {batch}"
    return [
        f"{plan.parameters:,} parameters, {counted(plan.steps, 'step')} of {batch}, {counted(plan.tokens, 'token')}, "
        f"{options.optim} at {options.learning_rate:g}",
        f"about {duration(plan.seconds)} and {plan.memory / 1e9:.1f} GB on this {plan.device.type}, "
        f"in {plan.precision}{', compiled' if plan.compile else ''}",
    ]


def describe_plan(report: Report | None, plan: Plan) -> None:
    """Say on stderr what is about to be trained."""
    if processes.rank:
        return
    for line in (corpus_lines(report) if report else []) + plan_lines(plan):
        console.note(line)
    for line in plan.why:
        console.detail(line)
