"""What is watched while a model is trained: held-out perplexity, a sample, the loss, the time left."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback

from hfkit import console, processes
from hfkit.corpus.sequences import Collator, HeadCollator, group
from hfkit.errors import HfkitError, first_line
from hfkit.inference.generation import generate
from hfkit.inference.likelihood import Scores, ratio_stderr, score_batches, score_items, shift
from hfkit.models.loading import LanguageModel
from hfkit.options import TrainOptions
from hfkit.storage import check_space, folder_size
from hfkit.training.checkpoints import Stop, commit, diverged, list_checkpoints, rotate
from hfkit.training.plan import Plan

_TOKENS = 4096  # that are scored at a time
_SAMPLE = 40  # tokens


def evaluations(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measurements in Trainer's log, in order."""
    return [entry for entry in history if "eval_loss" in entry]


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step with the lowest held-out loss, if anything was measured after training began."""
    found = [entry for entry in evaluations(history) if entry["step"]]
    return min(found, key=lambda entry: entry["eval_loss"])["step"] if found else None


def is_stale(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` measurements brought nothing."""
    steps = [entry["step"] for entry in evaluations(history) if entry["step"]]
    return bool(patience and steps and len(steps) - 1 - steps.index(best_step(history)) >= patience)  # type: ignore[arg-type]


class HeldOutMonitor:
    """Score the held-out part and continue a fixed prompt; the random numbers of the training stay as they are."""

    def __init__(
        self, held_out: Any, collator: Collator | HeadCollator, prompt: str | None, plan: Plan, stop: Stop
    ) -> None:
        """held_out: items to score, maybe none. The trainer is set when there is one."""
        self.held_out, self.collator, self.prompt, self.plan, self.stop = held_out, collator, prompt, plan, stop
        self.trainer: Any = None
        self.tell: Callable[[str], None] = console.note if processes.rank == 0 else lambda text: None
        self._started, self._before = time.monotonic(), 0.0

    def begin(self, history: list[dict[str, Any]]) -> None:
        """Start the clock; a resumed run goes on from its time."""
        self._started, self._before = (
            time.monotonic(),
            max((entry.get("seconds", 0.0) for entry in history), default=0),
        )

    def has_measured(self, state: Any) -> bool:
        return any(entry.get("measured") == state.global_step for entry in state.log_history)

    def best(self, state: Any) -> int | None:
        return best_step(state.log_history)

    def measure(self, state: Any, control: Any) -> None:
        """Measure the model at the step of `state`, once; leave it unmeasured if asked to stop meanwhile."""
        if self.has_measured(state):
            return
        model, step = self.trainer.model, state.global_step
        training = model.training
        model.eval()
        try:
            with autocast(self.plan):
                found = self._score(model)
                if self.stop.asked():
                    return
                sample = self._sample(model)
        finally:
            model.train(training)
        measured = {
            "eval_loss": found.loss,
            "eval_loss_stderr": found.loss_stderr,
            "eval_perplexity": found.perplexity,
            "eval_token_accuracy": found.top1.sum() / max(1, found.count),
            **_gain(state.log_history, found),
        }
        if math.isfinite(found.loss):
            self.trainer.log({name: value for name, value in measured.items() if math.isfinite(value)})
        seconds = self._before + time.monotonic() - self._started
        entry = {"measured": step, "step": step, "seconds": seconds, "sample": sample}
        # What the model was at first, sequence by sequence: the same ones are easier or harder for all states of it.
        state.log_history.append(entry if step else entry | {"units": found.nll.tolist()})
        self._report(found, sample, step)
        patience = self.plan.options.early_stopping_patience
        if is_stale(state.log_history, patience):
            self.tell(f"no progress in {patience} measurements: stopping early")
            control.should_training_stop = True

    def _score(self, model: Any) -> Scores:
        """Each process scores its share. A DataLoader would draw from the random numbers of the training."""

        def share() -> Iterator[Any]:
            for index in range(processes.rank, len(self.held_out), processes.count):
                if self.stop.signal is not None:
                    return
                yield self.held_out[index]

        def scored() -> Scores:
            if isinstance(self.collator, HeadCollator):
                return score_items(model, (self.collator(items) for items in group(share(), _TOKENS)))
            return score_batches(model, batches())

        def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
            done = 0
            for items in group(share(), _TOKENS):
                batch = self.collator(items)
                numbers = np.arange(done, done := done + len(items))[:, None]
                yield batch["input_ids"], shift(batch["labels"]), np.broadcast_to(numbers, batch["labels"].shape)

        total = Scores()
        for part in processes.gather([vars(scored())]):
            total.join(Scores(**part))
        return total

    def _sample(self, model: Any) -> str | None:
        if not self.prompt or processes.count > 1:  # a model in parts cannot be asked by one process alone
            return None
        with contextlib.suppress(HfkitError):
            lm = LanguageModel(model, self.trainer.processing_class)
            most = min(_SAMPLE, (lm.context or _TOKENS) // 2)
            options = {"seed": self.plan.options.seed, "max_new_tokens": most, "truncate": True}
            return generate(self.prompt, model=lm, **options).completion
        return None

    def _report(self, found: Scores, sample: str | None, step: int) -> None:
        score = f": held-out perplexity {found.perplexity:.2f}" if found.count else ""
        error = f" ± {found.perplexity_stderr:.2f}" if math.isfinite(found.perplexity_stderr) else ""
        if found.count and isinstance(self.collator, HeadCollator):
            score, error = f": held-out loss {found.loss:.3f}", f", accuracy {found.top1.sum() / found.count:.1%}"
        self.tell(f"step {step} of {self.plan.steps}{score}{error}")
        if sample:
            shown = " ".join(console.printable(f"{self.prompt}{sample}").split())
            self.tell(f"    {shown[:200]}")


def _gain(history: list[dict[str, Any]], found: Scores) -> dict[str, float]:
    """How many nats a token less than before the training, and the standard error of that."""
    before = np.array(next((entry["units"] for entry in history if "units" in entry), []))
    if not len(before) or len(before) != len(found.nll):
        return {}
    saved = before - found.nll
    return {
        "eval_loss_gain": float(saved.sum() / found.count),
        "eval_loss_gain_stderr": ratio_stderr(saved, found.tokens),
    }


def autocast(plan: Plan) -> Any:
    """The precision of the training, for a model that is asked outside of it."""
    if plan.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(plan.device.type, getattr(torch, plan.precision))


class ProgressCallback(TrainerCallback):
    """A bar with loss, speed and time left; on a terminal only."""

    def __init__(self, plan: Plan, measuring: HeldOutMonitor) -> None:
        self._plan, self._bar, self._loss, self._measuring = plan, None, math.nan, measuring

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measuring.begin(state.log_history)
        if processes.rank == 0:
            self._bar = console.progress(state.max_steps, "step", "training", initial=state.global_step)
            self._measuring.tell = self._tell

    def _tell(self, text: str) -> None:
        if not console.state.quiet:
            self._bar.write(f"hfkit: {text}", file=sys.stderr)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(state.global_step - self._bar.n)
        rate = self._bar.format_dict["rate"] or 0.0
        per_step = self._plan.tokens / max(1, self._plan.steps)
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {rate * per_step:,.0f} tokens/s", refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands, however the training ended."""
        if self._bar is not None:
            self._bar.close()


class CheckpointCallback(TrainerCallback):
    """Checkpoint and measure at the steps that are due.

    A checkpoint is safe before its step is measured, and a run that was interrupted in between measures first. The
    last step alone is measured before it is saved, so that the last checkpoint has all scores.
    """

    def __init__(self, folder: Path, measuring: Any, options: TrainOptions, stop: Stop) -> None:
        """measuring: has `measure(state, control)`, `has_measured(state)` and `best(state)`."""
        self.folder, self.measuring, self.options, self.stop = folder, measuring, options, stop
        self.started = False  # Trainer has taken its options
        self._begun: Path | None = None  # the checkpoint that is being written

    def _is_due(self, state: Any) -> bool:
        return state.global_step % self.options.eval_steps == 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = True
        if self._is_due(state):
            self._measure(state, control)

    def _measure(self, state: Any, control: Any) -> None:
        """Measure, or leave the run if asked to stop meanwhile: where it is resumed it measures first."""
        self.measuring.measure(state, control)
        if not self.measuring.has_measured(state):
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # Here and at no other point of a step is what Trainer saves exact: it goes on to the bit.
        last = state.global_step == state.max_steps
        if last:
            self._measure(state, control)
            control.should_log = True  # which what was measured, when it was logged, took back
        asked = self.stop.asked()
        extra = self.options.save_steps and state.global_step % self.options.save_steps == 0
        control.should_training_stop |= asked
        control.should_save = bool(last or asked or extra or self._is_due(state))
        if not control.should_save:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A sum is one pass over the memory, and is no number where a term is none.
        if not all(parameter.detach().sum().isfinite() for parameter in trained):
            raise diverged("the weights are no numbers", state.global_step, args.learning_rate)
        self._begun = self.folder / f"checkpoint-{state.global_step}"
        if processes.rank == 0:
            earlier = next(iter(list_checkpoints(self.folder)), None)
            size = folder_size(earlier) if earlier else sum(4 * parameter.numel() for parameter in trained)
            check_space(self.folder, int(1.1 * size))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.gather([])  # Trainer does not wait for what the other processes write
        if processes.rank == 0:
            commit(self.folder / f"checkpoint-{state.global_step}")
        self._begun = None
        if processes.rank == 0:
            rotate(self.folder, self.options.save_total_limit, self.measuring.best(state))
        processes.gather([])
        if self._is_due(state):
            self._measure(state, control)

    @contextlib.contextmanager
    def one_error(self) -> Iterator[None]:
        """What a full or broken disk makes of a save, an error of another kind in each library, is one line."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError, HfkitError) as error:
            if not self._begun:
                raise
            shutil.rmtree(self._begun, ignore_errors=True)  # it would fill the disk for nothing
            if isinstance(error, HfkitError):
                raise
            free = shutil.disk_usage(self.folder).free
            raise HfkitError(
                f"cannot save ({self._begun}): {first_line(error)}, {free:,} bytes are free: mend that, then --resume"
            ) from error
