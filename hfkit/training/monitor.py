"""What is watched while a model trains: its held-out scores, a sample, and a progress bar.

A measurement leaves two entries in Trainer's log: the scores, {"eval_loss": 3.2, ..., "step": 40}, and
{"measured": 40, "step": 40, "seconds": 61.5, "sample": " the river"}.
"""

import contextlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback

from hfkit import console, processes
from hfkit.corpus.encoding import IGNORED, encode_answers
from hfkit.corpus.sequences import group
from hfkit.corpus.templates import task_of
from hfkit.corpus.training_data import TrainingData
from hfkit.errors import HfkitError
from hfkit.inference.classification import label_ids, label_scores
from hfkit.inference.generation import generate
from hfkit.inference.likelihood import score_batches, score_items, shift
from hfkit.inference.scores import Scores, ratio_stderr
from hfkit.models.loading import LanguageModel
from hfkit.reporting.summaries import merit
from hfkit.training.checkpoints import Stop
from hfkit.training.plan import Job, Plan

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
    best = min(trained, key=lambda entry: merit(entry.get("eval_accuracy"), entry["eval_loss"]), default=None)
    return int(best["step"]) if best else None


def is_stale(history: History, patience: int | None) -> bool:
    """Whether the last `patience` measurements brought no progress."""
    steps = [entry["step"] for entry in evaluations(history) if entry["step"]]
    return bool(patience and steps and steps[::-1].index(best_step(history)) >= patience)


def seconds_of(history: History) -> float:
    """How long the training took until the last measurement."""
    return max((entry.get("seconds", 0.0) for entry in history), default=0.0)


@dataclass(frozen=True)
class Answers:
    """The right answers to held-out examples, as numbers of labels."""

    names: Sequence[str]
    right: Sequence[int]
    prompts: Sequence[list[int]] = ()  # token ids; none for a model with a head
    labels: Sequence[list[int]] = ()  # token ids of each label

    @property
    def baseline(self) -> dict[str, Any]:
        """The most frequent answer, and the accuracy of always giving it."""
        label, count = Counter(self.right).most_common(1)[0]
        return {"label": self.names[label], "accuracy": count / len(self.right)}

    def count_right(self, lm: LanguageModel, share: slice) -> int:
        """How many prompts in a share of them the model answers right."""
        count, labels = 0, list(self.labels)
        right = iter(self.right[share])
        for batch in group(
            ({"input_ids": np.array(ids)} for ids in self.prompts[share]), _BATCH_TOKENS // len(labels)
        ):
            chosen = label_scores(lm, [item["input_ids"].tolist() for item in batch], labels).argmax(-1)
            count += sum(label == next(right) for label in chosen.tolist())
        return count


def find_right_answers(
    dataset: TrainingData, held_out: Any, tokenizer: PreTrainedTokenizerBase, length: int
) -> Answers | None:
    """The answers to `held_out`; None where nothing is held out, or any text may be an answer.

    length: tokens that the model takes: prompts that do not fit with every label are left out.
    """
    task = task_of(tokenizer)
    if not len(held_out) or not (dataset.head == "classification" or (task and task.labels)):
        return None
    items = [held_out[number] for number in range(len(held_out))]
    if dataset.head or not task:
        return Answers(dataset.labels, [item["labels"] for item in items])
    whole = [task.complete(label) for label in task.labels]
    endings = encode_answers(whole, tokenizer)
    prompts, right, room = [], [], length - max(map(len, endings))
    for item in items:
        ids, start = item["input_ids"].tolist(), int((item["labels"] != IGNORED).argmax())
        matches = [number for number, ending in enumerate(endings) if ids[start : start + len(ending)] == ending]
        if matches and 0 < start <= room:
            prompts.append(ids[:start])
            right.append(matches[0])
    return Answers(task.labels, right, prompts, label_ids(task, tokenizer)) if right else None


class HeldOutMonitor:
    """Scores the held-out part and continues a fixed prompt, without touching the random numbers of the training."""

    def __init__(self, job: Job, stop: Stop, tell: Callable[[str], None]) -> None:
        """tell: shows a line to the user."""
        self._job, self._stop, self._tell, self._clock = job, stop, tell, time.monotonic()
        self._collate, self._held_out = job.collator(), _sample(job.dataset.held_out, job.plan)
        self._answers = find_right_answers(job.dataset, self._held_out, job.tokenizer, job.block_size)
        self._baseline = self._answers.baseline if self._answers else None

    def measure(
        self, model: Any, tokenizer: Any, history: History, step: int
    ) -> tuple[dict[str, float], dict[str, Any]] | None:
        """Measure `model`.

        Returns:
            The scores as Trainer logs them, empty if nothing is held out, and the other entry of its log; None if the
            run was asked to stop meanwhile.
        """
        was_training, plan, lm = model.training, self._job.plan, LanguageModel(model, tokenizer)
        model.eval()
        try:
            with torch.autocast(plan.device.type, getattr(torch, plan.precision), enabled=plan.precision != "float32"):
                scores = self._score(model)
                if self._stop.asked():
                    return None
                accuracy, sample = self._accuracy(scores, lm), self._continue_prompt(lm)
        finally:
            model.train(was_training)
        now = time.monotonic()
        seconds, self._clock = seconds_of(history) + now - self._clock, now
        figures = self._figures(scores, accuracy, history)
        score = self._describe(figures)
        self._tell(f"step {step} of {plan.steps}{': ' if score else ''}{score}")
        if sample:
            shown = " ".join(console.printable(f"{self._job.prompt}{sample}").split())
            self._tell(f"    {shown[:200]}")
        entry = {"measured": step, "step": step, "seconds": seconds, "sample": sample}
        # Keep the loss of each sequence at step 0. Later gains are paired with them, since some sequences are harder
        # than others for every state of the model: the difference has a smaller error than either loss.
        return figures, entry if step else entry | {"units": scores.nll.tolist(), "baseline": self._baseline}

    def _score(self, model: Any) -> Scores:
        """Score this process's share and add up the shares of all."""
        is_head = self._job.dataset.head is not None
        scores = score_items(model, self._batches()) if is_head else score_batches(model, self._targets())
        total = Scores()
        for part in processes.gather([vars(scores)]):
            total.join(Scores(**part))
        return total

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        # No DataLoader: it would draw from the random numbers of the training.
        share = range(processes.rank, len(self._held_out), processes.count)
        items = (self._held_out[index] for index in share if self._stop.signal is None)
        return (self._collate(batch) for batch in group(items, _BATCH_TOKENS))

    def _targets(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
        """Input ids, targets and the number of each target's sequence."""
        done = 0
        for batch in self._batches():
            targets = shift(batch["labels"])
            numbers = np.arange(done, done + len(targets))[:, None]
            yield batch["input_ids"], targets, np.broadcast_to(numbers, targets.shape)
            done += len(targets)

    def _accuracy(self, scores: Scores, lm: LanguageModel) -> float | None:
        """The share of the examples that are answered right, where the model chooses an answer."""
        if self._job.dataset.head and scores.count:
            return float(scores.top1.sum() / scores.count)
        if not self._answers:
            return None
        counts = processes.gather([self._answers.count_right(lm, slice(processes.rank, None, processes.count))])
        return float(sum(counts) / len(self._answers.right))

    def _continue_prompt(self, lm: LanguageModel) -> str | None:
        prompt = self._job.prompt
        if not prompt or processes.count > 1:  # one process alone cannot ask a model that is split over several
            return None
        tokens = min(SAMPLE_TOKENS, (lm.context or _BATCH_TOKENS) // 2)
        with contextlib.suppress(HfkitError):
            sample = generate(prompt, model=lm, seed=self._job.plan.options.seed, max_new_tokens=tokens, truncate=True)
            return sample.completion
        return None

    def _figures(self, scores: Scores, accuracy: float | None, history: History) -> dict[str, float]:
        figures = {
            "eval_loss": scores.loss,
            "eval_loss_stderr": scores.loss_stderr,
            "eval_perplexity": scores.perplexity,
            "eval_token_accuracy": scores.top1.sum() / max(1, scores.count),
        }
        if accuracy is not None:
            figures["eval_accuracy"] = accuracy
        before = np.array(next((entry["units"] for entry in history if "units" in entry), []))
        if len(before) == len(scores.nll) > 0:
            saved = before - scores.nll  # nats that each sequence takes less than at step 0
            figures |= {
                "eval_loss_gain": saved.sum() / scores.count,
                "eval_loss_gain_stderr": ratio_stderr(saved, scores.tokens),
            }
        finite = {name: float(value) for name, value in figures.items() if math.isfinite(value)}
        return finite if "eval_loss" in finite else {}

    def _describe(self, figures: dict[str, float]) -> str:
        """The scores in a few words; empty if nothing is held out."""
        if "eval_accuracy" in figures:
            always = " (always {label!r}: {accuracy:.1%})".format(**self._baseline) if self._baseline else ""
            return f"held-out loss {figures['eval_loss']:.3f}, accuracy {figures['eval_accuracy']:.1%}{always}"
        if not figures:
            return ""
        perplexity, error = figures["eval_perplexity"], figures.get("eval_loss_stderr")
        return f"held-out perplexity {console.with_error(perplexity, error and perplexity * error, '.2f')}"


def _sample(held_out: Any, plan: Plan) -> Any:
    """As many of the held-out items, evenly spaced, as make measuring cost about a tenth of the training."""
    per_step = plan.rows * plan.options.gradient_accumulation_steps
    limit, count = max(32, int(0.3 * per_step * plan.eval_steps)), len(held_out)
    return held_out if count <= limit else Subset(held_out, [number * count // limit for number in range(limit)])


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
