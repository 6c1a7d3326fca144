"""`evaluate`: how well a model predicts a text, by sliding windows over each document."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hfkit.console import detail, progress
from hfkit.corpus.documents import Corpora, Example, Piece, find_corpus, read_records
from hfkit.corpus.encoding import IGNORED, encode_documents, encode_examples, first_tokens, number_documents
from hfkit.corpus.sequences import Item, group
from hfkit.declaration import divide
from hfkit.errors import HfkitError
from hfkit.evaluation.metrics import load_metric
from hfkit.evaluation.tasks import Assessment, assess, find_task
from hfkit.inference.likelihood import Scores, exp, jsonable, precise_head, ratio_stderr, score_batches
from hfkit.models.architecture import computes_faster_in_bfloat16, head_of
from hfkit.models.loading import LanguageModel, loaded
from hfkit.models.quantization import bits_of
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions

_WINDOW = 1024  # tokens, where the model sets no limit
_BATCH = {"cpu": 1024, "cuda": 16_384}  # tokens that are scored at a time: their logits are what takes memory
_SORTED = 256  # windows that are sorted by length together
_CLOSE = 1.5e-3  # nats a token that half precision may change in the first batch; over more tokens it averages out


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicted a corpus."""

    model: str
    loss: float  # nats a token
    loss_stderr: float
    perplexity: float
    perplexity_stderr: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    word_perplexity: float  # a word is what white space separates
    token_accuracy: float
    top5_accuracy: float
    tokens: int
    bytes: int
    words: int
    documents: int
    window: int
    stride: int
    dtype: str
    scores: Scores  # of each passage
    passages: np.ndarray  # their sizes in bytes, (passages,)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; None where a figure is not known."""
        return jsonable({name: value for name, value in vars(self).items() if name not in ("scores", "passages")})

    def gain_over(self, other: "Evaluation") -> tuple[float, float]:
        """How many bits per byte fewer than `other` on the same corpus, and the standard error of that.

        Raises:
            HfkitError: it is another corpus.
        """
        if not np.array_equal(self.passages, other.passages):
            raise HfkitError("only evaluations of the same corpus can be compared")
        saved = (other.scores.nll - self.scores.nll) / math.log(2)
        return float(saved.sum() / self.passages.sum()), ratio_stderr(saved, self.passages)


def evaluate(
    corpus: Corpora,
    *,
    model: str | ModelOptions | LanguageModel | None = None,
    read: CorpusOptions | None = None,
    options: EvaluateOptions | None = None,
    **overrides: Any,
) -> Evaluation | Assessment:
    """Score a model on a corpus; memory does not grow with it. Rows of a task are answered, and the answers scored.

    Each document is scored from its first token on, after the token that begins a text. A token is predicted from at
    least window - stride tokens before it, if the document has so many; the last window reaches back to be full.

    Args:
        corpus: files, folders, globs or `hf://NAME`; of `prompt`/`completion` and `messages` rows the answers count.
        model: what `load` returned or takes.
        read, options: every field of `CorpusOptions` and `EvaluateOptions` is a keyword, too.

    Raises:
        HfkitError: the corpus or the model cannot be read, or there is nothing to score.
    """
    read, options = divide(overrides, (CorpusOptions, read), (EvaluateOptions, options))
    for name in read.metric or []:
        load_metric(name)  # a wrong name is told before anything is computed
    found, lm = find_corpus(corpus), loaded(model, "text", "classification", "question-answering")
    is_text = head_of(lm.model.config) == "text"
    if (task := find_task(lm, corpus, read) if is_text else None) or not is_text:
        return assess(lm, corpus, read, task)
    if lm.model.config.is_encoder_decoder:
        raise HfkitError(f"{lm.name} has an encoder: a text alone has no perplexity under it")
    window = int(min(options.max_length or lm.context or _WINDOW, lm.context or math.inf))
    stride = min(options.stride or window, window)
    with progress(found.size, "B", "evaluating") as bar:
        text = _Reader(lm.tokenizer, window, stride, bar)
        is_exact = isinstance(model, ModelOptions) and model.dtype == "float32"
        scores, dtype = _score(lm, text.windows(read_records(found, read)), is_exact)
    if not scores.count:
        raise HfkitError("there is nothing to score: the corpus holds no text")
    sizes = np.array(text.bytes, float)
    scores.merge(Scores(*np.zeros((4, len(sizes)))))  # passages of which nothing was a target
    nll, bits = scores.nll.sum(), 1 / math.log(2)
    return Evaluation(
        lm.name, scores.loss, scores.loss_stderr, scores.perplexity, scores.perplexity_stderr,
        nll * bits / sizes.sum(), ratio_stderr(scores.nll, sizes) * bits, exp(nll / max(1, text.words)),
        scores.top1.sum() / scores.count, scores.top5.sum() / scores.count, scores.count, int(sizes.sum()),
        text.words, text.documents, window, stride, dtype, scores, sizes,
    )  # fmt: skip


class _Reader:
    """Windows of a corpus, and a count of what was read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, stride: int, bar: Any) -> None:
        self._tokenizer, self._window, self._stride, self._bar = tokenizer, window, stride, bar
        self.documents, self.words = 0, 0
        self.bytes: list[int] = []  # of each passage

    def windows(self, records: Iterator[Piece | Example]) -> Iterator[Item]:
        """`input_ids`, `targets` and `units`, which passage a target is of; (length,) each."""
        first = next(records, None)
        records = chain([first] if first else [], records)
        if isinstance(first, Example):
            yield from self._answers(records)
            return
        begin = self._begin()
        rows = enumerate(encode_documents(self._counted(records), self._tokenizer, close=False))
        for number, passages in groupby(rows, key=lambda row: row[1]["document"]):
            self.documents = number + 1
            texts = (_passage(row["input_ids"], row["input_ids"], unit) for unit, row in passages)
            yield from slide(texts, begin, self._window, self._stride)

    def _begin(self) -> list[int]:
        """What stands before the first token; nothing if the tokenizer writes it itself."""
        begin = first_tokens(self._tokenizer)
        return [] if self._tokenizer("a")["input_ids"][:1] == begin else begin

    def _counted(self, pieces: Iterable[Any]) -> Iterator[Piece]:
        for _, _, piece in number_documents(pieces):
            self.words += len(piece.text.split())
            self.bytes.append(len(piece.text.encode()))
            self._bar.update(self.bytes[-1])
            yield piece

    def _answers(self, examples: Iterable[Any]) -> Iterator[Item]:
        begin = self._begin()
        for unit, example in enumerate(examples):
            rows = list(encode_examples([example], self._tokenizer))  # several where each answer has its own text
            self.documents += 1
            self.words += sum(len(answer.split()) for answer in example.answers)
            self.bytes.append(sum(len(answer.encode()) for answer in example.answers))
            self._bar.update(sum(row["bytes"] for row in rows))
            for row in rows:
                text = _passage(row["input_ids"], row["labels"], unit)
                alone = len(text[0]) and text[1, 0] != IGNORED  # an answer to nothing
                yield from slide([text], begin if alone else [], self._window, self._stride)


def _passage(ids: np.ndarray, labels: np.ndarray, unit: int) -> np.ndarray:
    """(3, tokens): token ids, what counts of them, and the number of the passage."""
    return np.stack([ids, labels, np.full(len(ids), unit)]).astype(np.int64)


def slide(passages: Iterable[np.ndarray], begin: list[int], window: int, stride: int) -> Iterator[Item]:
    """Windows over one document, which comes in passages, (3, tokens) each, after the token ids `begin`.

    Every token that counts is a target once: in the first window all, then `stride` new ones each; the last one
    reaches back.
    """
    text = _passage(np.array(begin, np.int64), np.full(len(begin), IGNORED), 0)
    offset, done = 0, 0  # of the document's token at text[:, 0]; of the last one that was a target

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
    """Windows of like length together, padded on the right, where a causal model does not look."""
    while some := list(islice(windows, _SORTED)):
        some.sort(key=lambda item: len(item["input_ids"]))
        for items in group(some, tokens):
            shape = len(items), len(items[-1]["input_ids"])
            ids, units = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
            targets = np.full(shape, IGNORED)
            for row, item in enumerate(items):
                size = len(item["input_ids"])
                ids[row, :size], targets[row, :size], units[row, :size] = item.values()
            yield torch.from_numpy(ids), torch.from_numpy(targets), units


def _score(lm: LanguageModel, windows: Iterator[Item], is_exact: bool) -> tuple[Scores, str]:
    """Scores, and the precision that they were computed in: half where it is faster and changes nothing."""
    model, device = lm.model, lm.model.device.type
    batches = _batches(windows, _BATCH.get(device, _BATCH["cpu"]))
    dtype = str(model.dtype).removeprefix("torch.")
    first = list(islice(batches, 2))
    batches = chain(first[1:], batches)
    with precise_head(model):
        exact = score_batches(model, first[:1])
        if len(first) == 2 and not is_exact and model.dtype == torch.float32 and computes_faster_in_bfloat16(device):
            with torch.autocast(device, torch.bfloat16):
                moved = abs(score_batches(model, first[:1]).loss - exact.loss)
                detail(f"bfloat16 changes the loss of the first {exact.count} tokens by {moved:.1e} nats a token")
                if moved < _CLOSE:
                    dtype = "bfloat16"
                    exact.merge(score_batches(model, batches))
        exact.merge(score_batches(model, batches))  # what is left
    return exact, bits_of(model) or dtype
