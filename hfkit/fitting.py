"""A job under transformers' Trainer: its loss put right, in less memory if need be, stopped when asked to."""

import contextlib
import ctypes
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from hfkit import console, processes, runs
from hfkit.checkpoints import Saving, Stop, diverged, find_newest
from hfkit.corpus.documents import Corpora
from hfkit.corpus.sequences import Collator, Endless, Examples, HeadCollator, TrainingData
from hfkit.declaration import set_fields
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.monitoring import Measuring, Progress, is_stale
from hfkit.optimizers import MuonFactory
from hfkit.options import DataOptions, TrainOptions
from hfkit.planning import Plan

# Options of ours that mean something else to Trainer, or that it gets in another form.
OWN = ("output_dir", "resume", "overwrite", "num_train_epochs", "max_steps", "optim", "eval_steps", "save_steps",
        "save_total_limit", "bf16", "fp16", "torch_compile", "load_best_model_at_end", "lr_scheduler_kwargs",
        "fsdp_config", "head", "dropout")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be trained, whichever command asks for it."""

    command: str
    name: str  # of the model it begins with
    corpus: Corpora
    folder: Path
    recipe: dict[str, Any]
    facts: dict[str, Any]  # that a resumed run must share
    tokenizer: PreTrainedTokenizerBase
    make_model: Callable[[], Any]  # anew, in float32
    material: TrainingData
    plan: Plan
    block_size: int
    data: DataOptions
    callbacks: Sequence[TrainerCallback] = ()


def is_done(state: TrainerState, plan: Plan) -> bool:
    """Whether all is trained, or enough."""
    return state.global_step >= plan.steps or is_stale(state.log_history, plan.options.early_stopping_patience)


def fit(job: Job, stop: Stop) -> TrainerState | None:
    """Train until the end, a stop, or an error; with less memory than a batch needs, in smaller ones.

    Returns:
        Trainer's state; None if it was left at once, in the middle of a step or a measurement.
    """
    folder, plan = job.folder / runs.CHECKPOINTS, job.plan
    rows, accumulation = plan.options.per_device_train_batch_size, plan.options.gradient_accumulation_steps
    while True:
        newest = processes.gather([find_newest(folder) if processes.rank == 0 else None])[0]
        if newest:
            state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            if is_done(state, plan):
                return state
        try:
            return _train(job, stop, rows, accumulation, newest)
        except KeyboardInterrupt:
            stop.signal = stop.signal or signal.SIGINT
            return None
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            if rows == 1 or processes.count > 1:
                raise HfkitError(
                    "out of memory: lower --block-size or --per-device-train-batch-size, or add "
                    "--activation-checkpointing or --lora"
                ) from error
        # The same sequences make a step, in more and smaller batches.
        smaller = next(count for count in range(rows // 2, 0, -1) if rows % count == 0)
        rows, accumulation = smaller, accumulation * (rows // smaller)
        console.note(f"out of memory: going on with {rows} sequences at a time, {accumulation} times a step")
        gc.collect()
        torch.cuda.empty_cache()


def _train(job: Job, stop: Stop, rows: int, accumulation: int, checkpoint: Path | None) -> TrainerState:
    with (
        _own_environment(job),
        _freed_memory_kept(job.plan),
        console.quiet_libraries(),
        _build(job, stop, rows, accumulation) as trainer,
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer.state


@contextlib.contextmanager
def _freed_memory_kept(plan: Plan) -> Iterator[None]:
    """On a CPU, keep what a step frees for the next step.

    The C library would give large blocks back to the system at once and get them anew, page by page; on a virtual
    machine that is a third of a step. Its other settings, and libraries without mallopt(3), are left alone.
    """
    libc = ctypes.CDLL(None) if plan.device.type == "cpu" and os.name == "posix" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(mmap_max, 0)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 128 * 1024)  # as glibc begins
        libc.mallopt(mmap_max, 65536)
        libc.malloc_trim(0)


@contextlib.contextmanager
def _own_environment(job: Job) -> Iterator[None]:
    """Variables that TrainingArguments sets for accelerate, and ours, are not for the next trainer of this process."""
    before = dict(os.environ)
    os.environ["HF_HUB_OFFLINE"] = "1"  # peft would ask for the base model at each save
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(job.folder / "tensorboard"))  # not into the checkpoints
    try:
        yield
    finally:
        for name in {*os.environ, *before}:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


class _Trainer(Trainer):
    def __init__(self, model: Any, **options: Any) -> None:
        self._use_cache = model.config.use_cache
        super().__init__(model=model, **options)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer would log a loss that is not a number as 0, and go on with such weights."""
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise diverged(f"the loss is {loss.item()}", self.state.global_step + 1, self.args.learning_rate)
        return result

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer turns the cache off while it trains; what it saves shall be as the model was."""
        config = self.model.config
        before, config.use_cache = config.use_cache, self._use_cache
        super().save_model(*args, **kwargs)
        config.use_cache = before


@contextlib.contextmanager
def _build(job: Job, stop: Stop, rows: int, accumulation: int) -> Iterator[Trainer]:
    plan, options, material = job.plan, job.plan.options, job.material
    pad = job.tokenizer.pad_token_id
    pad = pad if pad is not None else job.tokenizer.eos_token_id or 0
    is_static = plan.compile and not isinstance(material.train_set, Examples)
    collator: Any = Collator(pad, (rows, job.block_size) if is_static else None)
    padding: Any = Collator(pad)
    if material.head:
        collator = padding = HeadCollator(pad)
    prompt = None if material.head else options.sample_prompt or material.prompt
    measuring = Measuring(_sample(material.held_out, plan), padding, prompt, plan, stop)
    progress, saving = Progress(plan, measuring), Saving(job.folder / runs.CHECKPOINTS, measuring, options, stop)
    try:
        with saving.one_error():
            arguments = _arguments(job, rows, accumulation)  # before the model: DeepSpeed looks at how that is loaded
            set_seed(options.seed)  # an adapter, or a new model, begins with random numbers
            measuring.trainer = _Trainer(
                model=job.make_model(), args=arguments,
                train_dataset=Endless(material.train_set) if material.sequences == 0 else material.train_set,
                data_collator=collator, processing_class=job.tokenizer,
                callbacks=[progress, saving, *job.callbacks], optimizer_cls_and_kwargs=_optimizer(options),
            )  # fmt: skip
            measuring.trainer.remove_callback(PrinterCallback)
            yield measuring.trainer
    except (HfkitError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if saving.started:
            raise
        raise OptionError(f"Trainer does not take these options: {first_line(error)}") from error
    finally:
        progress.close()


def _sample(held_out: Any, plan: Plan) -> Any:
    """So much of the held-out part, evenly chosen, that measuring costs about a tenth of the training."""
    per_step = (plan.options.per_device_train_batch_size or 1) * plan.options.gradient_accumulation_steps
    most = max(32, int(0.3 * per_step * (plan.options.eval_steps or 1)))
    count = len(held_out)
    return held_out if count <= most else torch.utils.data.Subset(held_out, [i * count // most for i in range(most)])


def _arguments(job: Job, rows: int, accumulation: int) -> TrainingArguments:
    plan, options = job.plan, job.plan.options
    shared = {f.name for f in fields(TrainingArguments)} - set(OWN)
    given = {name: value for name, value in set_fields(options).items() if name in shared}
    if options.optim != "muon":
        given["optim"] = options.optim
    if options.lr_scheduler_kwargs:
        try:
            given["lr_scheduler_kwargs"] = json.loads(options.lr_scheduler_kwargs)
        except ValueError as error:
            raise OptionError(f"--lr-scheduler-kwargs is no JSON: {error}") from error
    if options.fsdp_config:
        given |= {"fsdp": True, "fsdp_config": options.fsdp_config}
    if processes.count > 1:
        given["ddp_find_unused_parameters"] = False
    own = {
        "output_dir": str(job.folder / runs.CHECKPOINTS),
        "max_steps": plan.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "report_to": options.report_to or "none",
        "use_cpu": plan.device.type == "cpu",
        "torch_compile": plan.compile,
        "dataloader_pin_memory": plan.device.type == "cuda",
        "remove_unused_columns": False,
        "label_names": ["start_positions", "end_positions"]
        if job.material.head == "question-answering"
        else ["labels"],
        "disable_tqdm": True,
        # When to save and to measure is for `Saving` to say; what a NaN means, for `_Trainer`.
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
    }
    if plan.device.type == "cuda" and processes.count == 1 and plan.device.index:
        number = plan.device.index
        raise OptionError(f"--device cuda:{number}: Trainer takes the first GPU, so set CUDA_VISIBLE_DEVICES={number}")
    arguments = TrainingArguments(**{**given, **plan.autocast, **own})
    if arguments.n_gpu > 1:  # one process drives one GPU; for several there are several processes
        arguments._n_gpu = 1
    return arguments


def _optimizer(options: TrainOptions) -> tuple[Any, dict[str, Any]] | None:
    if options.optim != "muon":
        return None
    betas = (options.adam_beta1 or 0.9, options.adam_beta2 or 0.95)
    adam = {"betas": betas, "eps": options.adam_epsilon or 1e-8}
    return MuonFactory, {"lr": options.learning_rate, "weight_decay": options.weight_decay, **adam}
