"""`evaluate`: how well a model predicts a text, by sliding windows over each document."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from hfkit.console import counted, detail, progress, with_error
from hfkit.corpus.documents import Corpora, Corpus, find_corpus, read_records
from hfkit.corpus.sequences import Item
from hfkit.errors import HfkitError
from hfkit.evaluation.metrics import find_metric
from hfkit.evaluation.tasks import Assessment, assess, find_task
from hfkit.evaluation.windows import WindowReader, batch_windows
from hfkit.inference.likelihood import Scores, exp, jsonable, ratio_stderr, score_batches
from hfkit.inference.twins import in_eval_mode, precise_head
from hfkit.models.architecture import computes_faster_in_bfloat16, head_of
from hfkit.models.loading import LanguageModel, loaded, split_options
from hfkit.models.quantization import bits_of
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions
from hfkit.reporting.templates import render

_WINDOW = 1024  # tokens, where the model sets no limit
_BATCH = {"cpu": 1024, "cuda": 16_384}  # tokens scored at once; their logits take most of the memory
_CLOSE = 1.5e-3  # nats per token that bfloat16 may change in the first batch; over more tokens it averages out


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well a model predicted a corpus. Every property is a figure that `to_dict` and `--json` contain."""

    model: str
    documents: int
    words: int  # separated by white space
    window: int
    stride: int
    dtype: str
    scores: Scores = field(repr=False)  # of each passage
    passages: np.ndarray = field(repr=False)  # bytes of each passage, (passages,)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.scores.loss

    @property
    def loss_stderr(self) -> float:
        return self.scores.loss_stderr

    @property
    def perplexity(self) -> float:
        return self.scores.perplexity

    @property
    def perplexity_stderr(self) -> float:
        return self.scores.perplexity_stderr

    @property
    def bits_per_byte(self) -> float:
        return float(self.scores.nll.sum() / math.log(2) / self.bytes)

    @property
    def bits_per_byte_stderr(self) -> float:
        return ratio_stderr(self.scores.nll, self.passages) / math.log(2)

    @property
    def word_perplexity(self) -> float:
        return exp(float(self.scores.nll.sum()) / max(1, self.words))

    @property
    def token_accuracy(self) -> float:
        """Share of the tokens that the model thought the likeliest."""
        return float(self.scores.top1.sum() / self.tokens)

    @property
    def top5_accuracy(self) -> float:
        """Share of the tokens that were among the model's five likeliest."""
        return float(self.scores.top5.sum() / self.tokens)

    @property
    def tokens(self) -> int:
        return self.scores.count

    @property
    def bytes(self) -> int:
        return int(self.passages.sum())

    def __str__(self) -> str:
        perplexity = with_error(self.perplexity, self.perplexity_stderr, ".2f")
        bits = with_error(self.bits_per_byte, self.bits_per_byte_stderr, ".4f")
        return (
            f"{self.model}: perplexity {perplexity}, {bits} bits per byte, token accuracy {self.token_accuracy:.1%} "
            f"({counted(self.documents, 'document')}, {counted(self.tokens, 'token')})"
        )

    __repr__ = __str__

    def describe(self) -> dict[str, str]:
        """Every figure with its name, to be read."""
        return {
            "model": self.model,
            "perplexity": with_error(self.perplexity, self.perplexity_stderr, ".3f"),
            "loss": with_error(self.loss, self.loss_stderr, ".4f") + " nats per token",
            "bits per byte": with_error(self.bits_per_byte, self.bits_per_byte_stderr, ".4f"),
            "token accuracy": f"{self.token_accuracy:.2%} (in the five likeliest: {self.top5_accuracy:.2%})",
            "corpus": ", ".join(
                counted(getattr(self, f"{noun}s"), noun) for noun in ("document", "token", "word", "byte")
            ),
            "how": f"windows of {counted(self.window, 'token')}, {self.stride:,} new in each, in {self.dtype}",
        }

    def verdict(self) -> str:
        """The perplexity in words."""
        choices = f"{self.perplexity:,.1f}"
        return (
            f"On average the model is as unsure as if it chose among {choices} equally likely tokens; lower is better."
        )

    def _repr_html_(self) -> str:
        return render("figures.html.jinja", head=(), rows=list(self.describe().items()), sentence=self.verdict())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; None where a figure is not known."""
        figures = [name for name, member in vars(type(self)).items() if isinstance(member, property)]
        facts = [each.name for each in fields(self) if each.repr]
        values: dict[str, Any] = jsonable({name: getattr(self, name) for name in facts + figures})
        return values

    def gain_over(self, other: "Evaluation") -> tuple[float, float]:
        """Bits per byte saved compared with `other` on the same corpus, and the standard error of that.

        Raises:
            HfkitError: `other` evaluated another corpus.
        """
        if not np.array_equal(self.passages, other.passages):
            raise HfkitError("only evaluations of the same corpus can be compared")
        saved = (other.scores.nll - self.scores.nll) / math.log(2)
        return float(saved.sum() / self.bytes), ratio_stderr(saved, self.passages)


def evaluate(
    corpus: Corpora | Corpus,
    *,
    model: str | ModelOptions | LanguageModel | None = None,
    read: CorpusOptions | None = None,
    options: EvaluateOptions | None = None,
    **overrides: Any,
) -> Evaluation | Assessment:
    """Score a model on a corpus, in constant memory. Where the corpus holds a task's rows, score the model's answers.

    Each document is scored from its first token on, after the token that begins a text. Every token is predicted from
    at least window - stride tokens before it, where the document has so many.

    Args:
        corpus: files, folders, globs or `hf://NAME`; of `prompt`/`completion` and `messages` rows the answers count.
        model: what `load` returned or takes.
        read, options: every field of `CorpusOptions`, `EvaluateOptions` and `ModelOptions` is a keyword, too.

    Raises:
        HfkitError: the corpus or the model cannot be read, or there is nothing to score.
    """
    model, read, options = split_options(model, overrides, (CorpusOptions, read), (EvaluateOptions, options))
    for name in read.metric or []:
        find_metric(name)  # a wrong name fails before anything is computed
    sources, lm = find_corpus(corpus), loaded(model, "text", "classification", "question-answering")
    is_text = head_of(lm.model.config) == "text"
    if (task := find_task(lm, sources, read) if is_text else None) or not is_text:
        return assess(lm, sources, read, task)
    if lm.model.config.is_encoder_decoder:
        raise HfkitError(f"{lm.name} has an encoder: a text alone has no perplexity under it")
    window = int(min(options.max_length or lm.context or _WINDOW, lm.context or math.inf))
    stride = min(options.stride or window, window)
    with progress(sources.size, "B", "evaluating") as bar:
        reader = WindowReader(lm.tokenizer, window, stride, bar)
        wants_float32 = isinstance(model, ModelOptions) and model.dtype == "float32"
        scores, dtype = _score_windows(lm, reader.windows(read_records(sources, read)), wants_float32)
    if not scores.count:
        raise HfkitError("there is nothing to score: the corpus holds no text")
    sizes = np.array(reader.bytes, float)
    scores.merge(Scores(*np.zeros((4, len(sizes)))))  # passages in which no token was a target
    return Evaluation(
        model=lm.name,
        documents=reader.documents,
        words=reader.words,
        window=window,
        stride=stride,
        dtype=dtype,
        scores=scores,
        passages=sizes,
    )


def _score_windows(lm: LanguageModel, windows: Iterator[Item], wants_float32: bool) -> tuple[Scores, str]:
    """Scores, and the precision used: bfloat16 where that is faster and does not change the first batch."""
    model, device = precise_head(in_eval_mode(lm).model), lm.model.device.type
    batches = batch_windows(windows, _BATCH.get(device, _BATCH["cpu"]))
    dtype = str(model.dtype).removeprefix("torch.")
    first = list(islice(batches, 2))
    batches = chain(first[1:], batches)
    may_halve = len(first) == 2 and not wants_float32 and model.dtype == torch.float32
    scores = score_batches(model, first[:1])
    if may_halve and computes_faster_in_bfloat16(device):
        with torch.autocast(device, torch.bfloat16):
            change = abs(score_batches(model, first[:1]).loss - scores.loss)
            detail(f"bfloat16 changes the loss of the first {scores.count} tokens by {change:.1e} nats per token")
            if change < _CLOSE:
                dtype = "bfloat16"
                scores.merge(score_batches(model, batches))
    scores.merge(score_batches(model, batches))  # nothing is left if bfloat16 was used
    return scores, bits_of(model) or dtype
