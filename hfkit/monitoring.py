"""What is watched while a model is trained: held-out perplexity, a sample, the loss, the time left."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hfkit import console, processes
from hfkit.checkpoints import Stop
from hfkit.corpus.sequences import Collator, HeadCollator, group
from hfkit.errors import HfkitError
from hfkit.inference.generation import generate
from hfkit.inference.likelihood import Scores, ratio_stderr, score_batches, score_items, shift
from hfkit.models.loading import LanguageModel
from hfkit.planning import Plan

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


class Measuring:
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


class Progress(TrainerCallback):
    """A bar with loss, speed and time left; on a terminal only."""

    def __init__(self, plan: Plan, measuring: Measuring) -> None:
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
