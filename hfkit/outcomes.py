"""What came of a run, for metrics.json: scores before and after, samples, and what these took from the corpus."""

import contextlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from hfkit import runs
from hfkit.checkpoints import step_of
from hfkit.corpus.documents import is_prepared
from hfkit.corpus.overlap import MOST, WORDS, index_corpus
from hfkit.corpus.templates import task_of
from hfkit.errors import HfkitError
from hfkit.fitting import Job
from hfkit.inference.generation import generate
from hfkit.monitoring import evaluations

_SAMPLES, _TOKENS = 4, 80


def make_metrics(job: Job, state: TrainerState, kept: Path) -> dict[str, Any]:
    """All that is known of a finished run whose checkpoint `kept` is its result."""
    plan, history = job.plan, [_jsonable(entry) for entry in state.log_history]
    facts = json.loads((job.folder / runs.FACTS).read_text("utf-8"))
    task = task_of(job.tokenizer)
    seconds = max((entry.get("seconds", 0.0) for entry in history), default=0.0)
    tokens = int(plan.tokens * state.global_step / plan.steps)
    samples = _draw(job, kept)
    return {
        "model": job.name,
        "folder": str(job.folder),
        "from_nothing": job.command == "pretrain",
        "library": "peft" if plan.options.lora else "transformers",
        "head": job.material.head,
        "task": asdict(task) if task else None,
        "corpus": job.recipe["corpus"],
        "step": step_of(kept),
        "steps": state.global_step,
        **scores(history, step_of(kept), job.material.head),
        "parameters": plan.parameters,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "optim": plan.options.optim,
        "learning_rate": plan.options.learning_rate,
        "device": torch.cuda.get_device_name() if plan.device.type == "cuda" else plan.device.type,
        "precision": plan.precision,
        "compiled": plan.compile,
        "seed": plan.options.seed,
        "versions": facts["versions"],
        "command": facts["command"],
        "prompt": plan.options.sample_prompt or job.material.prompt,
        "samples": samples,
        "copied": _copied(job, samples) if samples and not task else None,
        "history": history,
    }


def scores(history: list[dict[str, Any]], step: int, head: str | None = None) -> dict[str, float | None]:
    """Held-out scores at `step` and before the training, and the gain with its error; accuracies for a head."""
    found = {entry["step"]: entry for entry in evaluations(history)}
    before, after = found.get(0, {}), found.get(step, {})
    accuracy = "accuracy" if head else "token_accuracy"
    figures = {
        "loss_before": before.get("eval_loss"),
        "loss": after.get("eval_loss"),
        "loss_stderr": after.get("eval_loss_stderr"),
        "loss_gain": after.get("eval_loss_gain"),
        "loss_gain_stderr": after.get("eval_loss_gain_stderr"),
        f"{accuracy}_before": before.get("eval_token_accuracy"),
        accuracy: after.get("eval_token_accuracy"),
    }
    if not head:
        figures |= {"perplexity_before": before.get("eval_perplexity"), "perplexity": after.get("eval_perplexity")}
    return figures


def _draw(job: Job, kept: Path) -> list[str]:
    """Samples of the result, from the run's prompt; none of a head, or where the prompt does not fit."""
    prompt = job.plan.options.sample_prompt or job.material.prompt
    if job.material.head or not prompt:
        return []
    with contextlib.suppress(HfkitError):
        drawn = generate(
            prompt, model=str(kept), seed=job.plan.options.seed, num_return_sequences=_SAMPLES, temperature=1.0,
            max_new_tokens=min(_TOKENS, max(1, job.block_size // 2)), raw=True,
        )  # fmt: skip
        return [prompt + one.completion for one in drawn]
    return []


def _copied(job: Job, samples: list[str]) -> dict[str, Any] | None:
    """What of the samples, without their prompt, stands in the corpus."""
    corpus = job.recipe["corpus"]
    if job.data.streaming or any(is_prepared(Path(source)) for source in corpus):  # there is no text to look at
        return None
    index = index_corpus(corpus, job.data)
    prompt = job.plan.options.sample_prompt or job.material.prompt or ""
    found = [index.look_up(sample.removeprefix(prompt)) for sample in samples]
    longest = max(found, key=lambda one: one.words)
    share = sum(one.share for one in found) / len(found)
    return {"longest": longest.longest, "words": longest.words, "share": share, "is_whole": index.is_whole,
            "run": WORDS, "limit": MOST}  # fmt: skip


def _jsonable(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: the gradient of a step that float16 skips is one."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items() if k != "units"}
