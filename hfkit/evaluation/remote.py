"""`evaluate` by the log-probabilities of a server, over the windows that a model here would get. Imports no torch."""

from collections.abc import Iterator
from functools import partial
from urllib.parse import urlencode

import numpy as np

from hfkit.console import progress
from hfkit.corpus.documents import Example, Piece, read_records
from hfkit.corpus.encoding import IGNORED, number_documents
from hfkit.corpus.files import Corpus
from hfkit.errors import HfkitError, OptionError
from hfkit.evaluation.figures import Evaluation, Item, WindowReader
from hfkit.inference.connection import MISSING
from hfkit.inference.remote import Server, run_ahead
from hfkit.inference.scores import Scores
from hfkit.options import CorpusOptions, EvaluateOptions

_LIKELIEST = 20  # tokens that the server sends with each, more than five because it may write two of them alike


def evaluate_on(server: Server, sources: Corpus, read: CorpusOptions, options: EvaluateOptions) -> Evaluation:
    """`perplexity.evaluate` of a model on a server.

    Raises:
        HfkitError: the server does not tell the log-probabilities of a prompt.
        OptionError: the corpus has answers, which need a tokenizer and a template.
    """
    # The prompt holds the last target, too, and a server wants room for another token.
    if not (most := server.context and server.context - 2 or options.max_length):
        raise OptionError("the server does not tell the context of its model: add --max-length, such as 1022")
    window = min(options.max_length or most, most)
    begin, scores = _tokenize(server, "", True) or _first_token(server), Scores()
    with progress(sources.size, "B", "evaluating") as bar:
        reader = WindowReader(window, options.stride or window, bar)
        pieces = number_documents(reader.counted(_check_texts(read_records(sources, read))))
        windows = reader.cut(((number, _tokenize(server, piece.text)) for number, _, piece in pieces), begin)
        for units, nll, rank in run_ahead(partial(_score_window, server), windows):
            scores.add(units, nll, rank)
    return reader.sum_up(server.model, scores, "the server's precision")


def _check_texts(records: Iterator[Piece | Example]) -> Iterator[Piece]:
    for record in records:
        if isinstance(record, Example):
            raise OptionError("a server scores texts, not answers: leave --server out for this corpus")
        yield record


def _tokenize(server: Server, text: str, add_special_tokens: bool = False) -> list[int]:
    body = {"model": server.model, "prompt": text, "add_special_tokens": add_special_tokens}
    ids: list[int] = server.connection.post("/tokenize", body)["tokens"]
    return ids


def _first_token(server: Server) -> list[int]:
    """What stands before the first token of a text, see `encoding.first_tokens`; empty if the server hides it."""
    response = server.connection.send(f"/tokenizer_info?{urlencode({'model': server.model})}", returned=MISSING)
    tokens = response.json() if response.is_success else {}
    name = tokens.get("bos_token") or tokens.get("eos_token")
    return _tokenize(server, name) if name else []


def _score_window(server: Server, item: Item) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units, negative log-likelihoods in nats and ranks of the targets that count, (targets,) each."""
    counts = item["targets"] != IGNORED
    ids = [*item["input_ids"].tolist(), *item["targets"][-1:].tolist()]
    body = {"model": server.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": _LIKELIEST}
    with server.connection.named_errors():
        (choice,) = server.connection.post("completions", body)["choices"]
        if not (scores := choice.get("logprobs")) or len(scores["token_logprobs"]) != len(ids):
            raise HfkitError(f"{server.model} tells no log-probabilities of a prompt: hfkit and vLLM do")
        values, likeliest = scores["token_logprobs"][1:], scores["top_logprobs"][1:]
        ranks = [sum(other > value for other in top.values()) for value, top in zip(values, likeliest, strict=True)]
    return item["units"][counts], -np.array(values, float)[counts], np.array(ranks)[counts]
