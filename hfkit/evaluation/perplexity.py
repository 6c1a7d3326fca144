"""`evaluate`: how well a model predicts a text, by sliding windows over each document."""

import math
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hfkit.console import detail, progress
from hfkit.corpus.documents import read_records
from hfkit.corpus.encoding import IGNORED
from hfkit.corpus.files import Corpora, Corpus, find_corpus
from hfkit.corpus.sequences import group
from hfkit.evaluation.figures import Evaluation, sum_up
from hfkit.evaluation.metrics import find_metric
from hfkit.evaluation.remote import evaluate_on
from hfkit.evaluation.tasks import Assessment, assess, find_task
from hfkit.evaluation.windows import Item, WindowReader
from hfkit.inference.likelihood import precise_head, score_batches
from hfkit.inference.remote import Server
from hfkit.inference.scores import Scores
from hfkit.models.architecture import check_causal, computes_faster_in_bfloat16, for_device, head_of
from hfkit.models.loading import LanguageModel, loaded, split_options
from hfkit.models.quantization import bits_of
from hfkit.options import CorpusOptions, EvaluateOptions, ModelOptions, ServerOptions

_WINDOW = 1024  # tokens, where the model sets no limit
_BATCH = {"cpu": 1024, "cuda": 16_384}  # tokens scored at once; their logits take most of the memory
_SORTED = 256  # windows that are sorted by length together
_CLOSE = 1.5e-3  # nats per token that bfloat16 may change in the first batch; over more tokens it averages out


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
    sources = find_corpus(corpus, read)
    if server.server:
        return evaluate_on(Server(server, model), sources, read, options)
    lm = loaded(model, "text", "classification", "question-answering")
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
    return sum_up(lm.name, reader, scores, window, stride, dtype)


def _score_windows(lm: LanguageModel, windows: Iterator[Item], wants_float32: bool) -> tuple[Scores, str]:
    """Scores, and the precision used: bfloat16 where that is faster and does not change the first batch."""
    model, device = precise_head(lm.model), lm.model.device.type
    batches = batch_windows(windows, for_device(_BATCH, device))
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


def batch_windows(windows: Iterator[Item], tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, np.ndarray]]:
    """Batches of windows of similar length, padded on the right, where a causal model does not look."""
    while nearby := list(islice(windows, _SORTED)):
        nearby.sort(key=lambda item: len(item["input_ids"]))
        for items in group(nearby, tokens):
            ids, targets, units = (
                pad_sequence([torch.tensor(item[name]) for item in items], batch_first=True, padding_value=padding)
                for name, padding in (("input_ids", 0), ("targets", IGNORED), ("units", 0))
            )
            yield ids, targets, units.numpy()
