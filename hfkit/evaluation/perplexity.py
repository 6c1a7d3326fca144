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
from hfkit.errors import HfkitError, OptionError
from hfkit.evaluation.metrics import find_metric
from hfkit.evaluation.remote import RemoteScorer
from hfkit.evaluation.tasks import Assessment, assess, find_task
from hfkit.evaluation.windows import WindowReader, batch_windows
from hfkit.inference.likelihood import Scores, exp, jsonable, precise_head, ratio_stderr, score_batches
from hfkit.inference.remote import Server
from hfkit.models.architecture import check_causal, computes_faster_in_bfloat16, head_of
from hfkit.models.loading import LanguageModel, loaded, split_options
from hfkit.models.quantization import bits_of
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions, ServerOptions
from hfkit.reporting.templates import render

_WINDOW = 1024  # tokens, where the model sets no limit
_BATCH = {"cpu": 1024, "cuda": 16_384}  # tokens scored at once; their logits take most of the memory
_CLOSE = 1.5e-3  # nats per token that bfloat16 may change in the first batch; over more tokens it averages out


@dataclass(frozen=True, repr=False)
class Evaluation:
    """How well a model predicted a corpus. Every field but the last two is a figure of `to_dict` and `--json`."""

    model: str
    documents: int
    words: int  # separated by white space
    tokens: int
    bytes: int
    window: int
    stride: int
    dtype: str
    loss: float  # nats per token
    loss_stderr: float
    perplexity: float
    perplexity_stderr: float
    word_perplexity: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    token_accuracy: float  # share of the tokens that the model thought the likeliest
    top5_accuracy: float  # share of the tokens that were among the model's five likeliest
    scores: Scores = field(repr=False)  # of each passage
    passages: np.ndarray = field(repr=False)  # bytes of each passage, (passages,)

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
        choice = f"it chose among {self.perplexity:,.1f} equally likely tokens"
        return f"On average the model is as unsure as if {choice}; lower is better."

    def _repr_html_(self) -> str:
        return render("figures.html.jinja", head=(), rows=list(self.describe().items()), sentence=self.verdict())

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; None where a figure is not known."""
        values: dict[str, Any] = jsonable({each.name: getattr(self, each.name) for each in fields(self) if each.repr})
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
        read, options: every field of these, of `ModelOptions` and of `ServerOptions` is a keyword, too.

    Raises:
        HfkitError: the corpus or the model cannot be read, or there is nothing to score.
    """
    groups = ((CorpusOptions, read), (EvaluateOptions, options), (ServerOptions, None))
    model, read, options, server = split_options(model, overrides, *groups)
    for name in read.metric or []:
        find_metric(name)  # a wrong name fails before anything is computed
    if server.server:
        return _evaluate_at(Server(server, model), find_corpus(corpus), read, options)
    sources, lm = find_corpus(corpus), loaded(model, "text", "classification", "question-answering")
    is_text = head_of(lm.model.config) == "text"
    if (task := find_task(lm, sources, read) if is_text else None) or not is_text:
        return assess(lm, sources, read, task)
    check_causal(lm.name, lm.model.config, "a text alone has no perplexity under it")
    window = int(min(options.max_length or lm.context or _WINDOW, lm.context or math.inf))
    stride = min(options.stride or window, window)
    with progress(sources.size, "B", "evaluating") as bar:
        reader = WindowReader(lm.tokenizer, window, stride, bar)
        wants_float32 = isinstance(model, ModelOptions) and model.dtype == "float32"
        scores, dtype = _score_windows(lm, reader.windows(read_records(sources, read)), wants_float32)
    return _sum_up(lm.name, reader, scores, window, stride, dtype)


def _evaluate_at(server: Server, sources: Corpus, read: CorpusOptions, options: EvaluateOptions) -> Evaluation:
    """`evaluate`, by the log-probabilities of a server."""
    # The prompt holds the last target, too, and a server wants room for another token.
    if not (most := server.context and server.context - 2 or options.max_length):
        raise OptionError("the server does not tell the context of its model: add --max-length, such as 1022")
    window = min(options.max_length or most, most)
    stride = min(options.stride or window, window)
    with progress(sources.size, "B", "evaluating") as bar:
        scorer = RemoteScorer(server, bar)
        scorer.score(read_records(sources, read), window, stride)
    return _sum_up(server.model, scorer, scorer.scores, window, stride, "the server's precision")


def _sum_up(
    name: str, reader: WindowReader | RemoteScorer, scores: Scores, window: int, stride: int, dtype: str
) -> Evaluation:
    if not scores.count:
        raise HfkitError("there is nothing to score: the corpus holds no text")
    sizes = np.array(reader.bytes, float)
    scores.merge(Scores(*np.zeros((4, len(sizes)))))  # passages in which no token was a target
    nats = float(scores.nll.sum())
    return Evaluation(
        model=name,
        documents=reader.documents,
        words=reader.words,
        tokens=scores.count,
        bytes=int(sizes.sum()),
        window=window,
        stride=stride,
        dtype=dtype,
        loss=scores.loss,
        loss_stderr=scores.loss_stderr,
        perplexity=scores.perplexity,
        perplexity_stderr=scores.perplexity_stderr,
        word_perplexity=exp(nats / max(1, reader.words)),
        bits_per_byte=nats / math.log(2) / float(sizes.sum()),
        bits_per_byte_stderr=ratio_stderr(scores.nll, sizes) / math.log(2),
        token_accuracy=float(scores.top1.sum() / scores.count),
        top5_accuracy=float(scores.top5.sum() / scores.count),
        scores=scores,
        passages=sizes,
    )


def _score_windows(lm: LanguageModel, windows: Iterator[Item], wants_float32: bool) -> tuple[Scores, str]:
    """Scores, and the precision used: bfloat16 where that is faster and does not change the first batch."""
    model, device = precise_head(lm.model), lm.model.device.type
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
