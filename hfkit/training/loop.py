"""A job under transformers' Trainer: its loss put right, in less memory if need be, stopped when asked to."""

import contextlib
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer, TrainerState, set_seed
from transformers.trainer_callback import PrinterCallback

from hfkit import console, processes
from hfkit.corpus.sequences import Collator, Examples, HeadCollator
from hfkit.errors import HfkitError, OptionError, first_line
from hfkit.training import run_folder
from hfkit.training.arguments import freed_memory_kept, make_optimizer, own_environment, training_arguments
from hfkit.training.callbacks import CheckpointCallback, HeldOutMonitor, ProgressCallback, is_stale
from hfkit.training.checkpoints import Stop, diverged, find_newest
from hfkit.training.plan import Job, Plan


def is_done(state: TrainerState, plan: Plan) -> bool:
    """Whether all is trained, or enough."""
    return state.global_step >= plan.steps or is_stale(state.log_history, plan.options.early_stopping_patience)


def fit(job: Job, stop: Stop) -> TrainerState | None:
    """Train until the end, a stop, or an error; with less memory than a batch needs, in smaller ones.

    Returns:
        Trainer's state; None if it was left at once, in the middle of a step or a measurement.
    """
    folder, plan = job.folder / run_folder.CHECKPOINTS, job.plan
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
        own_environment(job),
        freed_memory_kept(job.plan),
        console.quiet_libraries(),
        _build(job, stop, rows, accumulation) as trainer,
    ):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer.state


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
    measuring = HeldOutMonitor(_sample(material.held_out, plan), padding, prompt, plan, stop)
    progress = ProgressCallback(plan, measuring)
    saving = CheckpointCallback(job.folder / run_folder.CHECKPOINTS, measuring, options, stop)
    try:
        with saving.one_error():
            # Before the model: DeepSpeed looks at how that is loaded.
            arguments = training_arguments(job, rows, accumulation)
            set_seed(options.seed)  # an adapter, or a new model, begins with random numbers
            measuring.trainer = _Trainer(
                model=job.make_model(), args=arguments,
                train_dataset=material.train_set,
                data_collator=collator, processing_class=job.tokenizer,
                callbacks=[progress, saving, *job.callbacks], optimizer_cls_and_kwargs=make_optimizer(options),
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
