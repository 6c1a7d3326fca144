"""How much of a text stands word for word in a corpus."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfkit.corpora import Corpora, Example, find_corpus, read_records
from hfkit.options import CorpusOptions

WORDS = 8  # in a row that count as copied
_MOST = 30_000_000  # words of a corpus that are looked at
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"  # Chinese and Japanese do not divide words: each of their signs is one
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of random bits: what a rolling hash is multiplied by


@dataclass(frozen=True)
class Copied:
    """What of a text is in a corpus."""

    longest: str  # the longest run of words; empty if none is as long as the index knows
    words: int  # in it
    share: float  # of all runs of the index's length, from 0 to 1


class Index:
    """All runs of `length` words of a corpus, as sorted 64-bit hashes: 8 bytes a word."""

    def __init__(self, texts: Iterable[str], length: int = WORDS) -> None:
        self.length = length
        parts, seen = [], 0
        for text in texts:
            ids = _word_hashes(_split(text))
            parts.append(_run_hashes(ids, length))
            seen += len(ids)
            if seen > _MOST:
                break
        self._hashes = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)

    def look_up(self, text: str) -> Copied:
        """What of `text` is in the corpus, whatever the case and the punctuation."""
        words = _split(text)
        runs = _run_hashes(_word_hashes(words), self.length)
        if not len(runs) or not len(self._hashes):
            return Copied("", 0, 0.0)
        places = np.searchsorted(self._hashes, runs).clip(max=len(self._hashes) - 1)
        found = self._hashes[places] == runs
        # So many found in a row, ending at each run: a longer stretch is copied where they follow one another.
        count, best, end = 0, 0, 0
        for at, hit in enumerate(found.tolist()):
            count = count + 1 if hit else 0
            if count > best:
                best, end = count, at
        size = best + self.length - 1 if best else 0
        start = end - best + 1
        return Copied(" ".join(words[start : start + size]) if best else "", size, float(found.mean()))


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _word_hashes(words: list[str]) -> np.ndarray:
    """(words,)"""
    return np.array([hash(word) for word in words], np.int64).astype(np.uint64)


def _run_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash of each run of `length` words, (words - length + 1,); sums and products of 64 bits that wrap around."""
    count = len(ids) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = (total * _FACTOR) ^ (ids[place : place + count] + np.uint64(place))
    return total


def index_corpus(corpus: Corpora, options: CorpusOptions | None = None, length: int = WORDS) -> Index:
    """The index of a corpus; of rows with an answer, of the answers."""
    return Index(_documents(read_records(find_corpus(corpus), options or CorpusOptions())), length)


def _documents(records: Iterable[Any]) -> Iterator[str]:
    """Whole documents: a run of words may go over the border of two pieces."""
    parts: list[str] = []
    for record in records:
        if isinstance(record, Example):
            turns = record.row.get("messages") or [{"role": "assistant", "content": record.row["completion"]}]
            yield "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
            continue
        parts.append(record.text)
        if record.last:
            yield "".join(parts)
            parts = []
