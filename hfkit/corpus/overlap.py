"""How much of a text stands word for word in a corpus."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hfkit.console import note
from hfkit.corpus.documents import Example, Piece, read_records
from hfkit.corpus.files import Corpora, Corpus, find_corpus
from hfkit.options import CorpusOptions

WORDS = 8  # in a row that count as copied
MOST = 20_000_000  # words of a corpus that are indexed
# Chinese and Japanese do not separate words: each of their characters counts as one.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # of the rolling hash: odd, with random bits


@dataclass(frozen=True)
class Copied:
    """What part of a text stands in a corpus."""

    longest: str  # the longest copied run of words; empty if it is shorter than the index's length
    words: int  # in `longest`
    share: float  # of all runs of the index's length in the text, from 0 to 1


class Index:
    """All runs of `length` words of a corpus as sorted 64-bit hashes, and their places: 12 bytes a word."""

    def __init__(self, pieces: Iterable[Piece], length: int = WORDS) -> None:
        self.length, self.is_whole = length, True
        hashes, places, seen = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], 0
        rest = hashes[0]  # words at the end of a document so far, from which a run may go on into its next piece
        for piece in pieces:
            if seen > MOST:
                self.is_whole = False
                break
            ids = np.concatenate([rest, _word_hashes(_split(piece.text))])
            runs = _run_hashes(ids, length)
            hashes.append(runs)
            places.append(np.arange(seen, seen + len(runs), dtype=np.int32))
            # Consecutive runs have consecutive places. Between two documents one place is left empty.
            rest, seen = (rest[:0], seen + len(runs) + 1) if piece.last else (ids[len(runs) :], seen + len(runs))
        whole = np.concatenate(hashes)
        del hashes
        order = np.argsort(whole, kind="stable")
        self._hashes, self._places = whole[order], np.concatenate(places)[order]

    def look_up(self, text: str) -> Copied:
        """What part of `text` stands in the corpus; case and punctuation do not matter."""
        words = _split(text)
        runs = _run_hashes(_word_hashes(words), self.length)
        if not len(runs):
            return Copied("", 0, 0.0)
        starts, ends = (np.searchsorted(self._hashes, runs, side) for side in ("left", "right"))
        best, end = 0, 0  # the longest sequence of runs that are consecutive in both, and its last run
        before, counts = np.array([-2]), np.array([0])  # places of the previous run; length of the sequence up to it
        for number, (low, high) in enumerate(zip(starts, ends, strict=True)):
            places = self._places[low:high]
            previous = np.searchsorted(before, places - 1).clip(max=len(before) - 1)
            counts = np.append(0, np.where(before[previous] == places - 1, counts[previous], 0) + 1)
            before = np.append(-2, places)
            if counts.max() > best:
                best, end = int(counts.max()), number
        size = best + self.length - 1 if best else 0
        start = end - best + 1
        return Copied(" ".join(words[start : start + size]), size, float((ends > starts).mean()))


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _word_hashes(words: list[str]) -> np.ndarray:
    """A 64-bit hash of each word, (words,)."""
    return np.array([hash(word) for word in words], np.int64).astype(np.uint64)


def _run_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Hash of each run of `length` words, (words - length + 1,). 64-bit arithmetic wraps around."""
    count = len(ids) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total = (total * _FACTOR) ^ (ids[place : place + count] + np.uint64(place))
    return total


def index_corpus(corpus: Corpora | Corpus, options: CorpusOptions | None = None, length: int = WORDS) -> Index:
    """The index of a corpus; of examples, only their answers."""
    options = options or CorpusOptions()
    records = read_records(find_corpus(corpus, options), options)
    index = Index((Piece("\n".join(r.answers), True) if isinstance(r, Example) else r for r in records), length)
    if not index.is_whole:
        note(f"copies are looked for only in the first {MOST:,} words of the corpus")
    return index
