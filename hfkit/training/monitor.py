"""What is watched while a model trains: its held-out score, a sample, and a progress bar.

A measurement leaves two entries in Trainer's log: the scores, {"eval_loss": 3.2, ..., "step": 40}, and
{"measured": 40, "step": 40, "seconds": 61.5, "sample": " the river"}.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from hfkit import console, processes
from hfkit.corpus.sequences import Collator, HeadCollator, group
from hfkit.errors import HfkitError
from hfkit.inference.generation import generate
from hfkit.inference.likelihood import Scores, ratio_stderr, score_batches, score_items, shift
from hfkit.models.loading import LanguageModel
from hfkit.options import GenerateOptions
from hfkit.reporting.summaries import merit
from hfkit.training.accuracy import Answers
from hfkit.training.checkpoints import Stop
from hfkit.training.plan import Plan

_BATCH_TOKENS = 4096  # scored at a time
SAMPLE_TOKENS = 40

History = Sequence[dict[str, Any]]  # Trainer's log


def evaluations(history: History) -> list[dict[str, Any]]:
    """The entries of `history` with held-out scores, in order."""
    return [entry for entry in history if "eval_loss" in entry]


def best_step(history: History) -> int | None:
    """The step with the highest held-out accuracy, where that is measured, and of these the one with the lowest loss.

    None if nothing was measured after training began.
    """
    trained = [entry for entry in evaluations(history) if entry["step"]]
    ranked = sorted(trained, key=lambda entry: merit(entry.get("eval_accuracy"), entry["eval_loss"]))
    return int(ranked[0]["step"]) if ranked else None


def is_stale(history: History, patience: int | None) -> bool:
    """Whether the last `patience` measurements brought no progress."""
    steps = [entry["step"] for entry in evaluations(history) if entry["step"]]
    best = best_step(history)
    return bool(patience and best is not None and len(steps) - 1 - steps.index(best) >= patience)


def is_measured(history: History, step: int) -> bool:
    return any(entry.get("measured") == step for entry in history)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Scores of the held-out part, and the continuation of a fixed prompt."""

    scores: Scores
    sample: str | None
    accuracy: float | None  # share of the answers that are right, where the model chooses one
    baseline: dict[str, Any] | None  # the most frequent label, and the accuracy of always giving it
    gain: dict[str, float]  # how much lower the loss is than before the training, and the standard error of that
    seconds: float  # of training until now

    def figures(self) -> dict[str, float]:
        """The scores as Trainer logs them; empty if nothing is held out."""
        scores = self.scores
        figures = {
            "eval_loss": scores.loss,
            "eval_loss_stderr": scores.loss_stderr,
            "eval_perplexity": scores.perplexity,
            "eval_token_accuracy": scores.top1.sum() / max(1, scores.count),
            **({} if self.accuracy is None else {"eval_accuracy": self.accuracy}),
            **self.gain,
        }
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        return finite if "eval_loss" in finite else {}

    def entry(self, step: int) -> dict[str, Any]:
        entry = {"measured": step, "step": step, "seconds": self.seconds, "sample": self.sample}
        # Keep the loss of each sequence at step 0. Later gains are paired with them, since some sequences are harder
        # than others for every state of the model: the difference has a smaller error than either loss.
        return entry if step else entry | {"units": self.scores.nll.tolist(), "baseline": self.baseline}

    def __str__(self) -> str:
        """The scores in a few words; empty if nothing is held out."""
        scores = self.scores
        if not scores.count:
            return ""
        if self.accuracy is not None:
            always = "" if not self.baseline else " (always {label!r}: {accuracy:.1%})".format(**self.baseline)
            return f"held-out loss {scores.loss:.3f}, accuracy {self.accuracy:.1%}{always}"
        error = f" ± {scores.perplexity_stderr:.2f}" if math.isfinite(scores.perplexity_stderr) else ""
        return f"held-out perplexity {scores.perplexity:.2f}{error}"


class HeldOutMonitor:
    """Scores the held-out part and continues a fixed prompt, without touching the random numbers of the training."""

    def __init__(
        self,
        held_out: Any,
        *,
        collator: Collator | HeadCollator,
        prompt: str | None,
        plan: Plan,
        stop: Stop,
        tell: Callable[[str], None],
        answers: Answers | None = None,
    ) -> None:
        """held_out: items to score, possibly none. tell: shows a line to the user. answers: those of `held_out`."""
        self._answers, self._is_head = answers, isinstance(collator, HeadCollator)
        self._held_out, self._collator, self._prompt, self._plan = held_out, collator, prompt, plan
        self._stop, self._tell, self._clock = stop, tell, time.monotonic()

    def measure(self, model: Any, tokenizer: Any, history: History, step: int) -> Measurement | None:
        """Measure `model`; None if the run was asked to stop meanwhile."""
        training = model.training
        model.eval()
        try:
            with autocast(self._plan):
                scores = self._score(model)
                if self._stop.asked():
                    return None
                accuracy = self._measure_accuracy(scores, LanguageModel(model, tokenizer))
                sample = self._sample(model, tokenizer)
        finally:
            model.train(training)
        now = time.monotonic()
        seconds = max((entry.get("seconds", 0.0) for entry in history), default=0.0) + now - self._clock
        self._clock = now
        measurement = Measurement(
            scores=scores, sample=sample, accuracy=accuracy,
            baseline=self._answers.baseline if self._answers else None, gain=_gain(history, scores), seconds=seconds,
        )  # fmt: skip
        score = str(measurement)
        self._tell(f"step {step} of {self._plan.steps}{': ' if score else ''}{score}")
        if sample:
            shown = " ".join(console.printable(f"{self._prompt}{sample}").split())
            self._tell(f"    {shown[:200]}")
        return measurement

    def _score(self, model: Any) -> Scores:
        """Score this process's share and add up the shares of all."""
        scores = score_items(model, self._batches()) if self._is_head else score_batches(model, self._targets())
        total = Scores()
        for part in processes.gather([vars(scores)]):
            total.join(Scores(**part))
        return total

    def _measure_accuracy(self, scores: Scores, lm: LanguageModel) -> float | None:
        if self._is_head and scores.count:
            return float(scores.top1.sum() / scores.count)
        if not self._answers:
            return None
        counts = processes.gather([self._answers.count_right(lm, slice(processes.rank, None, processes.count))])
        return float(sum(counts) / len(self._answers.right))

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        # No DataLoader: it would draw from the random numbers of the training.
        share = range(processes.rank, len(self._held_out), processes.count)
        items = (self._held_out[index] for index in share if self._stop.signal is None)
        return (self._collator(batch) for batch in group(items, _BATCH_TOKENS))

    def _targets(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """Input ids, targets and the number of each target's sequence."""
        done = 0
        for batch in self._batches():
            targets = shift(batch["labels"])
            numbers = np.arange(done, done + len(targets))[:, None]
            yield batch["input_ids"], targets, np.broadcast_to(numbers, targets.shape)
            done += len(targets)

    def _sample(self, model: Any, tokenizer: Any) -> str | None:
        if not self._prompt or processes.count > 1:  # one process alone cannot ask a model that is split over several
            return None
        lm = LanguageModel(model, tokenizer)
        tokens = min(SAMPLE_TOKENS, (lm.context or _BATCH_TOKENS) // 2)
        options = GenerateOptions(seed=self._plan.options.seed, max_new_tokens=tokens, truncate=True)
        with contextlib.suppress(HfkitError):
            return str(generate(self._prompt, model=lm, options=options).completion)
        return None


def _gain(history: History, scores: Scores) -> dict[str, float]:
    """How many nats a token the loss is lower than at step 0, and the standard error; empty at step 0."""
    before = np.array(next((entry["units"] for entry in history if "units" in entry), []))
    if not len(before) or len(before) != len(scores.nll):
        return {}
    saved = before - scores.nll
    return {
        "eval_loss_gain": float(saved.sum() / scores.count),
        "eval_loss_gain_stderr": ratio_stderr(saved, scores.tokens),
    }


def autocast(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    """The precision of the training, for a model that is used outside of Trainer."""
    if plan.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(plan.device.type, getattr(torch, plan.precision))


class ProgressCallback(TrainerCallback):
    """A bar with loss, tokens a second and time left; on a terminal only."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._loss = plan, math.nan
        self.begun = False  # Trainer has accepted its options
        self._bar: tqdm[Any] | None = None

    def tell(self, text: str) -> None:
        """Show a line above the bar."""
        if processes.rank == 0 and not console.state.quiet:
            tqdm.write(f"hfkit: {text}", file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True
        if processes.rank == 0:
            self._bar = console.progress(state.max_steps, "step", "training", initial=state.global_step)

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
