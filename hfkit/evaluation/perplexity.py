"""`evaluate`: how well a model predicts a text, by sliding windows over each document."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hfkit.console import detail, progress, with_error
from hfkit.corpus.documents import Corpora, Example, Piece, find_corpus, read_records
from hfkit.corpus.encoding import IGNORED, encode_documents, encode_examples, first_tokens, number_documents
from hfkit.corpus.sequences import Item, group
from hfkit.errors import HfkitError
from hfkit.evaluation.metrics import find_metric
from hfkit.evaluation.tasks import Assessment, assess, find_task
from hfkit.inference.likelihood import Scores, exp, jsonable, ratio_stderr, score_batches
from hfkit.inference.twins import in_eval_mode, precise_head
from hfkit.models.architecture import computes_faster_in_bfloat16, head_of
from hfkit.models.loading import LanguageModel, loaded, split_options
from hfkit.models.quantization import bits_of
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions

_WINDOW = 1024  # tokens, where the model sets no limit
_BATCH = {"cpu": 1024, "cuda": 16_384}  # tokens scored at once; their logits take most of the memory
_SORTED = 256  # windows that are sorted by length together
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
            f"({self.documents:,} documents, {self.tokens:,} tokens)"
        )

    __repr__ = __str__

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
    corpus: Corpora,
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
    if (task := find_task(lm, corpus, read) if is_text else None) or not is_text:
        return assess(lm, corpus, read, task)
    if lm.model.config.is_encoder_decoder:
        raise HfkitError(f"{lm.name} has an encoder: a text alone has no perplexity under it")
    window = int(min(options.max_length or lm.context or _WINDOW, lm.context or math.inf))
    stride = min(options.stride or window, window)
    with progress(sources.size, "B", "evaluating") as bar:
        reader = _Reader(lm.tokenizer, window, stride, bar)
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


class _Reader:
    """Cuts a corpus into windows, and counts what it reads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, stride: int, bar: Any) -> None:
        self._tokenizer, self._window, self._stride, self._bar = tokenizer, window, stride, bar
        begin = first_tokens(tokenizer)
        # What stands before the first token, unless the tokenizer writes it itself.
        self._begin = [] if tokenizer("a")["input_ids"][:1] == begin else begin
        self.documents, self.words = 0, 0
        self.bytes: list[int] = []  # of each passage

    def windows(self, records: Iterator[Piece | Example]) -> Iterator[Item]:
        """`input_ids`, `targets`, and `units` (the passage that each target belongs to); (length,) each."""
        first = next(records, None)
        records = chain([first] if first else [], records)
        if isinstance(first, Example):
            yield from self._answers(records)
            return
        rows = enumerate(encode_documents(self._counted(records), self._tokenizer, close=False))
        for number, passages in groupby(rows, key=lambda row: row[1]["document"]):
            self.documents = number + 1
            texts = (_passage(row["input_ids"], row["input_ids"], unit) for unit, row in passages)
            yield from slide(texts, self._begin, self._window, self._stride)

    def _counted(self, pieces: Iterable[Any]) -> Iterator[Piece]:
        for _, _, piece in number_documents(pieces):
            self._count([piece.text])
            self._bar.update(self.bytes[-1])
            yield piece

    def _answers(self, examples: Iterable[Any]) -> Iterator[Item]:
        for unit, example in enumerate(examples):
            rows = list(encode_examples([example], self._tokenizer))  # several where each answer has its own text
            self.documents += 1
            self._count(example.answers)
            self._bar.update(sum(row["bytes"] for row in rows))
            for row in rows:
                text = _passage(row["input_ids"], row["labels"], unit)
                has_no_prompt = len(text[0]) and text[1, 0] != IGNORED
                yield from slide([text], self._begin if has_no_prompt else [], self._window, self._stride)

    def _count(self, texts: list[str]) -> None:
        self.words += sum(len(text.split()) for text in texts)
        self.bytes.append(sum(len(text.encode()) for text in texts))


def _passage(ids: np.ndarray, labels: np.ndarray, unit: int) -> np.ndarray:
    """Token ids, labels (IGNORED where a token does not count) and the passage's number, (3, tokens)."""
    return np.stack([ids, labels, np.full(len(ids), unit)]).astype(np.int64)


def slide(passages: Iterable[np.ndarray], begin: list[int], window: int, stride: int) -> Iterator[Item]:
    """Cut one document, which comes in passages, (3, tokens) each, into windows; the token ids `begin` precede it.

    Every token that counts is a target exactly once: all tokens of the first window, then `stride` new ones in each.
    The last window reaches back to be full.
    """
    text = _passage(np.array(begin, np.int64), np.full(len(begin), IGNORED), 0)
    offset = 0  # the document's position of text[:, 0]
    done = 0  # the position of the last token that was a target

    def cut(end: int) -> Iterator[Item]:
        start = max(0, end - window)
        _, labels, units = text[:, start + 1 - offset : end + 1 - offset]
        targets = np.where(np.arange(start + 1, end + 1) > done, labels, IGNORED)
        if (targets != IGNORED).any():
            yield {"input_ids": text[0, start - offset : end - offset], "targets": targets, "units": units}

    for passage in passages:
        keep = max(0, done - window - offset)
        offset += keep
        text = np.concatenate([text[:, keep:], passage], 1)
        while offset + text.shape[1] - 1 >= (end := done + stride if done else window):
            yield from cut(end)
            done = end
    if offset + text.shape[1] - 1 > done:
        yield from cut(offset + text.shape[1] - 1)


def _batches(windows: Iterator[Item], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """Batches of windows of similar length, padded on the right, where a causal model does not look."""
    while nearby := list(islice(windows, _SORTED)):
        nearby.sort(key=lambda item: len(item["input_ids"]))
        for items in group(nearby, tokens):
            ids, targets, units = (
                pad_sequence([torch.tensor(item[name]) for item in items], batch_first=True, padding_value=padding)
                for name, padding in (("input_ids", 0), ("targets", IGNORED), ("units", 0))
            )
            yield ids, targets, units.numpy()


def _score_windows(lm: LanguageModel, windows: Iterator[Item], wants_float32: bool) -> tuple[Scores, str]:
    """Scores, and the precision used: bfloat16 where that is faster and does not change the first batch."""
    model, device = precise_head(in_eval_mode(lm).model), lm.model.device.type
    batches = _batches(windows, _BATCH.get(device, _BATCH["cpu"]))
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
