"""Scores of a corpus by a server, over the windows that a model on this machine would get. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

import numpy as np

from hfkit.console import progress
from hfkit.corpus.documents import Example, Piece, read_records
from hfkit.corpus.encoding import IGNORED, number_documents
from hfkit.corpus.files import Corpus
from hfkit.errors import HfkitError, OptionError
from hfkit.evaluation.figures import Evaluation, sum_up
from hfkit.evaluation.windows import Item, slide
from hfkit.inference.connection import MISSING
from hfkit.inference.remote import Server, run_ahead
from hfkit.inference.scores import Scores
from hfkit.options import CorpusOptions, EvaluateOptions

_LIKELIEST = 20  # tokens that the server sends with each, more than five because it may write two of them alike


@dataclass
class RemoteScorer:
    """Scores documents by a server, and counts what it reads."""

    server: Server
    bar: Any
    documents: int = 0
    words: int = 0
    scores: Scores = field(default_factory=Scores)
    bytes: list[int] = field(default_factory=list)  # of each passage

    def score(self, records: Iterator[Piece | Example], window: int, stride: int) -> None:
        """Score all documents, as `perplexity.evaluate` does with windows of these sizes.

        Raises:
            HfkitError: the server does not tell the log-probabilities of a prompt.
            OptionError: the corpus has answers, which need a tokenizer and a template.
        """
        for units, nll, rank in run_ahead(self._score_window, self._windows(records, window, stride)):
            self.scores.add(units, nll, rank)

    def _windows(self, records: Iterator[Any], window: int, stride: int) -> Iterator[Item]:
        begin = self._tokenize("", True) or self._first_token()
        for number, pieces in groupby(number_documents(_checked(records)), key=lambda row: row[0]):
            self.documents = number + 1
            yield from slide(self._passages(piece.text for *_, piece in pieces), begin, window, stride)

    def _passages(self, texts: Iterator[str]) -> Iterator[np.ndarray]:
        for text in texts:
            unit = len(self.bytes)
            self.words += len(text.split())
            self.bytes.append(len(text.encode()))
            self.bar.update(self.bytes[-1])
            ids = self._tokenize(text, False)
            yield np.stack([ids, ids, np.full(len(ids), unit)]).astype(np.int64)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        body = {"model": self.server.model, "prompt": text, "add_special_tokens": add_special_tokens}
        ids: list[int] = self.server.connection.post("/tokenize", body)["tokens"]
        return ids

    def _first_token(self) -> list[int]:
        """What stands before the first token of a text, see `encoding.first_tokens`; empty if the server hides it."""
        response = self.server.connection.send(
            f"/tokenizer_info?{urlencode({'model': self.server.model})}", returned=MISSING
        )
        tokens = response.json() if response.is_success else {}
        name = tokens.get("bos_token") or tokens.get("eos_token")
        return self._tokenize(name, False) if name else []

    def _score_window(self, item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Units, negative log-likelihoods in nats and ranks of the targets that count, (targets,) each."""
        counts = item["targets"] != IGNORED
        ids = [*item["input_ids"].tolist(), *item["targets"][-1:].tolist()]
        body = {"model": self.server.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": _LIKELIEST}
        with self.server.connection.named_errors():
            (choice,) = self.server.connection.post("completions", body)["choices"]
            if not (scores := choice.get("logprobs")) or len(scores["token_logprobs"]) != len(ids):
                what = f"the server returns no log-probabilities of a prompt for {self.server.model}"
                raise HfkitError(f"{what}: use hfkit's own, or vLLM")
            values, likeliest = scores["token_logprobs"][1:], scores["top_logprobs"][1:]
            ranks = [
                sum(other > value for other in top.values()) for value, top in zip(values, likeliest, strict=True)
            ]
        return item["units"][counts], -np.array(values, float)[counts], np.array(ranks)[counts]


def _checked(records: Iterator[Piece | Example]) -> Iterator[Piece]:
    for record in records:
        if isinstance(record, Example):
            raise OptionError("a server scores texts, not answers: leave --server out for this corpus")
        yield record


def evaluate_on(server: Server, sources: Corpus, read: CorpusOptions, options: EvaluateOptions) -> Evaluation:
    """`perplexity.evaluate`, by the log-probabilities of a server."""
    # The prompt holds the last target, too, and a server wants room for another token.
    if not (most := server.context and server.context - 2 or options.max_length):
        raise OptionError("the server does not tell the context of its model: add --max-length, such as 1022")
    window = min(options.max_length or most, most)
    stride = min(options.stride or window, window)
    with progress(sources.size, "B", "evaluating") as bar:
        scorer = RemoteScorer(server, bar)
        scorer.score(read_records(sources, read), window, stride)
    return sum_up(server.model, scorer, scorer.scores, window, stride, "the server's precision")
