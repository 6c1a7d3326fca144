"""What a training run will be on this machine, what it will cost, and the job that comes of it."""

import math
import os
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
from hfkit.corpus.files import Corpora, Corpus
from hfkit.corpus.labelled import gather_labelled_data
from hfkit.corpus.sequences import Collator
from hfkit.corpus.training_data import TrainingData, gather_training_data
from hfkit.errors import OptionError
from hfkit.models.architecture import computes_faster_in_bfloat16, find_compiler
from hfkit.options import DataOptions, TrainOptions
from hfkit.training.run_folder import CHECKPOINTS
from hfkit.training.schedule import complete_schedule

_COMPILE_SECONDS = {"cpu": 600, "cuda": 300}  # estimated length of a run from which compiling pays
_UTILIZATION = 0.35  # share of the speed of a matrix product of the model's size
_MOST_SCORES = 1e9  # bytes of attention scores to keep in memory for speed
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
    plain_attention: bool  # instead of torch's fused one
    steps: int
    tokens: int  # in all steps
    parameters: int
    memory: int  # bytes, estimated
    seconds: float  # estimated
    why: tuple[str, ...]  # lines for --verbose

    @property
    def rows(self) -> int:
        """Sequences at a time, in each process."""
        return self.options.per_device_train_batch_size or 1

    @property
    def eval_steps(self) -> int:
        return self.options.eval_steps or self.steps

    def lines(self) -> list[str]:
        """What the training will be and cost, a line each."""
        times = self.options.gradient_accumulation_steps
        batch = (f"{times} × " if times > 1 else "") + counted(self.rows, "sequence")
        return [
            f"{self.parameters:,} parameters, {counted(self.steps, 'step')} of {batch}, "
            f"{counted(self.tokens, 'token')}, {self.options.optim} at {self.options.learning_rate:g}",
            f"about {duration(self.seconds)} and {self.memory / 1e9:.1f} GB on this {self.device.type}, "
            f"in {self.precision}{', compiled' if self.compile else ''}",
        ]

    def describe(self, report: Report | None) -> None:
        """Say on stderr what is about to be trained on what."""
        if processes.rank == 0:
            for line in (corpus_lines(report) if report else []) + self.lines():
                console.note(line)
            for line in self.why:
                console.detail(line)


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
    # Writes what a resumed run will need into the folder of a new one.
    keep: Callable[[Path], Any] = lambda folder: None
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def prompt(self) -> str | None:
        """What samples continue; None for a model that does not write text."""
        return None if self.dataset.head else self.plan.options.sample_prompt or self.dataset.prompt

    def collator(self, shape: tuple[int, int] | None = None) -> Collator:
        """What makes batches of items, all of them (rows, tokens) of this shape if one is given."""
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.tokenizer.eos_token_id or 0
        return Collator(pad, has_mask=True) if self.dataset.head else Collator(pad, shape)


def gather_data(
    files: Corpora | Corpus,
    tokenizer: PreTrainedTokenizerBase,
    data: DataOptions,
    train: TrainOptions,
    block_size: int,
    labels: list[str] | None,
) -> TrainingData:
    """Tokenize a corpus for a model of text, or for its head. labels: those that the head has; None for a new one."""
    with processes.first_one_first():
        if train.head:
            return gather_labelled_data(files, tokenizer, data, train.head, block_size, train.seed, labels)
        return gather_training_data(files, tokenizer, data, block_size, train.seed)


def block_size_for(context: int | None, wanted: int | None) -> int:
    """Tokens of a sequence: as wanted, else the model's context, at most 1,024. OptionError if it takes fewer."""
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
    shared_by: int = processes.count,
) -> Plan:
    """Decide what the user's options leave open.

    sequences: in an epoch; 0 for a stream, where they are not known. length: tokens of a sequence, on average.
    fresh: the model is new, not trained before. shared_by: processes that share the work.
    """
    if options.full_determinism:  # CUDA reads it at its first matrix product, in `_speed`
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    options = _decide(complete_schedule(options), parameters, sequences, length, fresh, shared_by)
    batch = (options.per_device_train_batch_size or 1) * shared_by
    per_epoch = math.ceil(math.ceil(sequences / batch) / options.gradient_accumulation_steps)
    steps = options.max_steps or max(1, math.ceil((options.num_train_epochs or 1) * per_epoch))
    tokens = int(steps * batch * options.gradient_accumulation_steps * length)
    precision, *why = _choose_precision(options, device)
    seconds = tokens / _speed(config, parameters, precision, device) / shared_by
    compiled, reason = _choose_compilation(options, device, seconds)
    why.append(reason)
    dropout = device.type != "cpu" or not getattr(config, "attn_pdrop", 0)
    if not dropout:
        why.append("no attention dropout: a CPU has no fast attention with it")
    # On a CPU torch's fused attention takes twice as long as the plain one, compiled. What it saves is memory.
    plain = compiled and device.type == "cpu" and _attention_memory(config, batch / shared_by, length) < _MOST_SCORES
    if plain:
        why.append("plain attention: compiled, it is faster on a CPU than a fused one")
    if device.type == "cuda" and shared_by == 1 and (count := torch.cuda.device_count()) > 1:
        why.append(f"one of {count} GPUs: --num-processes {count} uses all of them")
    return Plan(
        # Record machine-dependent choices as options, so that the recipe reproduces the run elsewhere.
        options=replace(
            options,
            eval_steps=options.eval_steps or math.ceil(steps / 10),
            bf16=precision == "bfloat16",
            fp16=precision == "float16",
            torch_compile=compiled,
            logging_steps=options.logging_steps or _logging_steps(steps, device),
        ),
        device=device,
        precision=precision,
        compile=compiled,
        attention_dropout=dropout,
        plain_attention=plain,
        steps=steps,
        tokens=tokens,
        parameters=parameters,
        memory=_estimate_memory(config, parameters, batch / shared_by * length, options),
        seconds=seconds,
        why=tuple(why),
    )


def _decide(
    options: TrainOptions, parameters: int, sequences: int, length: float, fresh: bool, shared_by: int
) -> TrainOptions:
    """`options` with a value for everything that makes a difference to the result."""
    chosen: dict[str, Any] = {
        # Trainer's 8, but a short corpus gets smaller batches: enough for some 30 steps an epoch.
        "per_device_train_batch_size": max(1, min(8, sequences // (30 * shared_by))) if sequences else 8,
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


def _logging_steps(steps: int, device: torch.device) -> int:
    """On a GPU a loss is read for every tenth step of a long run: to read it is to wait for it."""
    return max(1, min(10, steps // 100)) if device.type == "cuda" else 1


def _learning_rate(parameters: int, fresh: bool, lora: bool) -> float:
    """For GPT-2-small's size 6e-4 if new, else 5e-5; more for smaller models; four times as much for an adapter."""
    peak, limit = (6e-4, 3e-3) if fresh else (5e-5, 5e-4)
    rate = min(limit, peak * math.sqrt(124e6 / parameters)) * (4 if lora else 1)
    return float(f"{rate:.1e}")


def _choose_precision(options: TrainOptions, device: torch.device) -> tuple[str, str]:
    """The precision, and why."""
    asked = [name for name, flag in (("bfloat16", options.bf16), ("float16", options.fp16)) if flag]
    if len(asked) == 2:
        raise OptionError("--bf16 and --fp16 exclude each other: leave one of them out")
    if asked or False in (options.bf16, options.fp16):
        precision = asked[0] if asked else "float32"
        return precision, f"{precision}: asked for"
    if computes_faster_in_bfloat16(device.type):
        return "bfloat16", f"bfloat16: this {'processor' if device.type == 'cpu' else 'GPU'} has units for it"
    if device.type == "cuda":
        return "float16", "float16: this GPU has no units for bfloat16"
    return "float32", f"float32: this {device.type} has no units for less"


def _choose_compilation(options: TrainOptions, device: torch.device, seconds: float) -> tuple[bool, str]:
    """Whether to compile a run that takes so many seconds, and why."""
    asked = options.torch_compile
    if asked is False:
        return False, "not compiled: asked for"
    if not find_compiler():
        reason = f"not compiled{', though asked for' if asked else ''}: no C++ compiler"
        if asked:
            note(reason)
        return False, reason
    if asked:
        return True, "compiled: asked for"
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
    return _UTILIZATION * flops / (6 * parameters)


def _estimate_memory(config: Any, parameters: int, tokens: float, options: TrainOptions) -> int:
    """Bytes of weights, gradients, Adam's two moments, and of what `tokens` keep for the backward pass."""
    layers, width = getattr(config, "num_hidden_layers", 12), getattr(config, "hidden_size", 768)
    state = parameters * (4 if options.lora else 16)
    activations = layers * width * (8 if options.activation_checkpointing else 40) * tokens
    return int(state + activations + 10 * tokens * getattr(config, "vocab_size", 50257))


def _attention_memory(config: Any, rows: float, length: float) -> float:
    """Bytes of the attention scores that plain attention keeps for the backward pass."""
    layers, heads = getattr(config, "num_hidden_layers", 12), getattr(config, "num_attention_heads", 12)
    return 4 * layers * heads * rows * length**2
