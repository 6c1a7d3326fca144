"""The training loop: what happens in a run and in a step, in order. transformers' Trainer drives it.

A run, `fit`:
    1. Find the newest whole checkpoint; a run that is complete ends here.
    2. Build the trainer: arguments, seed, model, data.
    3. Restore the checkpoint, measure the held-out part if this step was not measured yet, and make the steps.
    4. Out of memory: go back to 1 with half as many sequences at a time and twice as many batches a step.

A step, by Trainer, with the places where hfkit steps in:
    1. Forward and backward pass of each batch       _Trainer.compute_loss: on a CPU, stop where the loss is not finite
    2. Clip the gradient; step optimizer and learning rate
    3. End of the step                               StepCallback.on_step_end: measure the last step; decide whether to
                                                     save and stop; check the weights and the space on disk
    4. Log the loss                                  _Trainer.log: on other devices, stop where it is not finite
    5. If due: write a checkpoint                    StepCallback.on_save: commit it, delete old ones, measure
A checkpoint is safe before its step is measured: a run that was interrupted in between measures first. Only the last
step is measured before it is saved, so that the last checkpoint has all scores.
"""

import contextlib
import gc
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import PrinterCallback

from hfkit import console, processes
from hfkit.console import counted
from hfkit.errors import DivergedError, HfkitError, OptionError, first_line
from hfkit.options import TrainOptions
from hfkit.storage import check_space
from hfkit.training.arguments import (
    attention_kernels,
    freed_memory_kept,
    optimizer_class,
    private_environment,
    training_arguments,
)
from hfkit.training.checkpoints import Stop, commit, find_newest, list_checkpoints, rotate
from hfkit.training.monitor import HeldOutMonitor, ProgressCallback, best_step, is_stale
from hfkit.training.plan import Job, Plan


def is_done(state: TrainerState, plan: Plan) -> bool:
    """Whether all steps are made, or early stopping has ended the run."""
    return state.global_step >= plan.steps or is_stale(state.log_history, plan.options.early_stopping_patience)


def fit(job: Job, stop: Stop) -> TrainerState | None:
    """Train until the end, a stop or an error; in smaller batches where memory runs out.

    Returns:
        Trainer's state; None if the run was left at once, in the middle of a step or a measurement.
    """
    rows, accumulation = job.plan.rows, job.plan.options.gradient_accumulation_steps
    while True:
        newest = find_newest(job.checkpoints) if processes.rank == 0 else None
        newest = processes.gather([newest])[0]
        if newest:
            state: TrainerState = TrainerState.load_from_json(str(newest / "trainer_state.json"))
            if is_done(state, job.plan):
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
        # A step keeps its sequences: fewer at a time, in more batches.
        smaller = next(count for count in range(rows // 2, 0, -1) if rows % count == 0)
        rows, accumulation = smaller, accumulation * (rows // smaller)
        size, count = counted(rows, "sequence"), counted(accumulation, "time")
        console.note(f"out of memory: going on with {size} at a time, {count} a step")
        gc.collect()
        torch.cuda.empty_cache()


def _train(job: Job, stop: Stop, rows: int, accumulation: int, checkpoint: Path | None) -> TrainerState:
    """One attempt at a run: build the trainer, and make the steps that are left."""
    progress = ProgressCallback(job.plan)
    with (
        contextlib.closing(progress),
        private_environment(job),
        freed_memory_kept(job.plan),
        attention_kernels(job.plan),
        console.quiet_libraries(),
        _option_errors(progress),
    ):
        # The arguments come before the model: loading it for DeepSpeed depends on them.
        arguments = training_arguments(job, rows, accumulation)
        set_seed(job.plan.options.seed)  # a new model or adapter begins with random numbers
        # A compiled model is compiled anew for each shape of a batch.
        is_static = job.plan.compile and job.dataset.is_joined
        trainer = _Trainer(
            job,
            stop,
            progress,
            model=job.make_model(),
            args=arguments,
            data_collator=job.collator((rows, job.block_size) if is_static else None),
            train_dataset=job.dataset.train_set,
            processing_class=job.tokenizer,
            optimizer_cls_and_kwargs=optimizer_class(job.plan.options),
        )
        with trainer.steps.save_errors():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer.state


class _Trainer(Trainer):
    """transformers' Trainer, with a loss that must be finite and with hfkit's measurements."""

    def __init__(self, job: Job, stop: Stop, progress: ProgressCallback, *, model: Any, **options: Any) -> None:
        self._monitor, self._tell = HeldOutMonitor(job, stop, progress.tell), progress.tell
        self._patience, self._use_cache = job.plan.options.early_stopping_patience, model.config.use_cache
        self.steps = StepCallback(job.checkpoints, job.plan.options, stop, self.measure)
        super().__init__(model=model, callbacks=[progress, self.steps, *job.callbacks], **options)
        self.remove_callback(PrinterCallback)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer would log a loss that is not finite as 0, and train on."""
        result = super().compute_loss(*args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        # To look at a GPU's loss is to wait for it: `log` does, every few steps.
        if loss.device.type == "cpu" and not torch.isfinite(loss).all():
            raise _diverged(f"the loss is {loss.item()}", self.state.global_step + 1, self.args.learning_rate)
        return result

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not math.isfinite(loss := logs.get("loss", 0.0)):
            raise _diverged(f"the loss is {loss}", self.state.global_step, self.args.learning_rate)
        super().log(logs, *args, **kwargs)

    def measure(self) -> None:
        """Measure the model at this step, once, and log it.

        Raises:
            KeyboardInterrupt: the run was asked to stop meanwhile; when it is resumed it measures first.
        """
        history, step = self.state.log_history, self.state.global_step
        if any(entry.get("measured") == step for entry in history):
            return
        measurement = self._monitor.measure(self.model, self.processing_class, history, step)
        if measurement is None:
            raise KeyboardInterrupt
        figures, entry = measurement
        if figures:
            self.log(figures)
        history.append(entry)
        if is_stale(history, self._patience):
            self._tell(f"no progress in {counted(self._patience or 0, 'measurement')}: stopping early")
            self.control.should_training_stop = True

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer turns the model's cache off while it trains: save the model with the setting it had."""
        config: Any = self.model.config  # type: ignore[union-attr]  # a Trainer without a model is never saved
        before, config.use_cache = config.use_cache, self._use_cache
        super().save_model(*args, **kwargs)
        config.use_cache = before


class StepCallback(TrainerCallback):
    """Decides when to measure, to save and to stop."""

    def __init__(self, folder: Path, options: TrainOptions, stop: Stop, measure: Callable[[], None]) -> None:
        self._folder, self._options, self._stop, self._measure = folder, options, stop, measure
        self._unfinished: Path | None = None  # the checkpoint that is being written

    def _is_due(self, state: Any) -> bool:
        return bool(state.global_step % self._options.eval_steps == 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due(state):
            self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Save only at the end of a step: a checkpoint from here resumes bit-identically.
        last = state.global_step == state.max_steps
        if last:
            self._measure()
            control.should_log = True  # logging the measurement cleared this flag
        asked = self._stop.asked()
        is_save_step = self._options.save_steps and state.global_step % self._options.save_steps == 0
        control.should_training_stop |= asked
        control.should_save = bool(last or asked or is_save_step or self._is_due(state))
        if control.should_save:
            self._check_before_save(model, state, args.learning_rate)

    def _check_before_save(self, model: Any, state: Any, learning_rate: float) -> None:
        """See that the weights are finite and that the disk has room for them."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # One pass over the memory: a sum is not finite where a term is not.
        if not all(parameter.detach().sum().isfinite() for parameter in trained):
            raise _diverged("the weights are not finite", state.global_step, learning_rate)
        self._unfinished = self._folder / f"checkpoint-{state.global_step}"
        if processes.rank == 0:
            earlier = next(iter(list_checkpoints(self._folder)), None)
            files = [path for path in earlier.rglob("*") if path.is_file()] if earlier else []
            size = sum(path.stat().st_size for path in files) or sum(4 * parameter.numel() for parameter in trained)
            check_space(self._folder, int(1.1 * size))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.gather([])  # Trainer does not wait for what the other processes write
        if processes.rank == 0:
            commit(self._folder / f"checkpoint-{state.global_step}")
        self._unfinished = None
        if processes.rank == 0:
            rotate(self._folder, self._options.save_total_limit, best_step(state.log_history))
        processes.gather([])
        if self._is_due(state):
            self._measure()

    @contextlib.contextmanager
    def save_errors(self) -> Iterator[None]:
        """Report a full or broken disk in one line, whatever the library that met it makes of it."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, HfkitError) as error:
            if not self._unfinished:
                raise
            shutil.rmtree(self._unfinished, ignore_errors=True)  # free its space
            if isinstance(error, HfkitError):
                raise
            free = shutil.disk_usage(self._folder).free
            raise HfkitError(
                f"cannot save ({self._unfinished}): {first_line(error)}, {free:,} bytes are free: fix that, then "
                "--resume"
            ) from error


def _diverged(what: str, step: int, learning_rate: float) -> DivergedError:
    """The error of a training that cannot recover."""
    return DivergedError(
        f"{what} at step {step}: lower --learning-rate (it is {learning_rate:g}) and --overwrite; "
        "the last checkpoint is kept"
    )


@contextlib.contextmanager
def _option_errors(progress: ProgressCallback) -> Iterator[None]:
    """What Trainer raises before its first step is the fault of an option."""
    try:
        yield
    except (HfkitError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if progress.begun:
            raise
        raise OptionError(f"Trainer does not take these options: {first_line(error)}") from error
