"""The figures and samples of the bundled model's card: `python tests/benchmarks/bundled.py books.jsonl unseen.jsonl`.

books.jsonl holds what the model was trained on, unseen.jsonl what it never saw: a JSON object with a `text` a line.
Prints Markdown: bits per byte by `hfkit evaluate`, by a plain loop, by a 5-gram model of the same tokens, by gzip and
xz; then thirty samples, as they come, and what can be counted in them. Takes some minutes and 6 GB of memory.
"""

import argparse
import gzip
import json
import lzma
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
OPENINGS = (
    "Once upon a time",
    "Long ago, in a village by the sea,",
    "There was once a king who",
    "In the middle of the forest",
    "The old woman opened the door and",
    "One winter evening",
    "The little girl had never seen",
    "Far away in the north",
    "Jack was the youngest of three brothers,",
    "The ship had been at sea for",
    '"Who is there?" said',
    "The dog and the cat",
    "It was the first day of spring, and",
    "Nobody in the town knew why",
    "A poor tailor",
)
EVERYDAY = (
    "Hello, my name is",
    "Yesterday I went to",
    "My favourite food is",
    "The best way to learn",
    "Dear Mother,",
    "The weather today is",
    "I have always wanted to",
    "When I woke up this morning",
    "The train was late, so",
    "She looked at her phone and",
    "The news came on Monday that",
    "In my opinion,",
    "The teacher asked",
    "We are going to the shop to",
    "The meaning of life is",
)
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def plain_bits(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Bits of all texts by a loop over windows, each as long as the context and the last one reaching back."""
    import torch
    from torch.nn.functional import cross_entropy

    total, window = 0.0, model.config.n_positions
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
        done = 0
        with torch.inference_mode():
            while done < len(ids) - 1:
                end = min(done + window, len(ids) - 1)
                start = max(0, end - window)
                logits = model(torch.tensor([ids[start:end]])).logits[0, done - start :]
                total += cross_entropy(logits, torch.tensor(ids[done + 1 : end + 1]), reduction="sum").item()
                done = end
    return total / math.log(2)


class KneserNey:
    """An interpolated n-gram model with Chen and Goodman's three discounts for each length.

    An n-gram is a number: its place among the sorted pairs of (n-1)-gram and last token.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._keys, occurrences = [], []  # of each n-gram
        suffixes = []  # of each n-gram: the (n-1)-gram without its first token
        ends = np.zeros(len(tokens), np.int64)  # the (n-1)-gram that ends at each token; for n = 1, the empty one
        for _ in range(order):
            keys, places, grams, counts = np.unique(
                self._follow(ends, 0, tokens), return_index=True, return_inverse=True, return_counts=True
            )
            self._keys.append(keys)
            occurrences.append(counts)
            suffixes.append(ends[places])
            ends = grams
        self._levels = []
        for level, keys in enumerate(self._keys):
            # The longest n-grams are counted; of a shorter one, the different tokens before it.
            last = level == order - 1
            counts = occurrences[level] if last else np.bincount(suffixes[level + 1], minlength=len(keys))
            of = [max(1, np.count_nonzero(counts == times)) for times in (1, 2, 3, 4)]
            base = of[0] / (of[0] + 2 * of[1])
            discounts = np.array([0, *(n - (n + 1) * base * of[n] / of[n - 1] for n in (1, 2, 3))])
            taken = discounts[counts.clip(max=3)]
            contexts = keys // vocabulary
            self._levels.append((counts - taken, np.bincount(contexts, counts), np.bincount(contexts, taken)))

    def _follow(self, ends: np.ndarray, first: int, tokens: np.ndarray) -> np.ndarray:
        """The n-grams that end at each token. first: the (n-1)-gram before the first token."""
        return np.concatenate([[first], ends[:-1]]) * self._vocabulary + tokens

    def bits(self, tokens: np.ndarray) -> float:
        """Bits of a text whose first token is given."""
        chances = np.full(len(tokens), 1 / self._vocabulary)
        ends = np.zeros(len(tokens), np.int64)  # the (n-1)-gram that ends at each token; -1 if it was never seen
        for keys, (counts, totals, spare) in zip(self._keys, self._levels, strict=True):
            wanted = self._follow(ends, 0 if keys is self._keys[0] else -1, tokens)
            contexts = wanted // self._vocabulary
            grams = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            ends = np.where((contexts >= 0) & (keys[grams] == wanted), grams, -1)
            total = np.where((contexts >= 0) & (contexts < len(totals)), totals[contexts.clip(0, len(totals) - 1)], 0)
            shares = np.where(ends >= 0, counts[ends], 0) + spare[contexts.clip(0, len(spare) - 1)] * chances
            chances = np.where(total > 0, shares / total.clip(min=1), chances)
        return float(-np.log2(chances[1:]).sum())


def gram_bits(tokenizer: Any, books: list[str], texts: list[str], order: int = 5) -> float:
    """Bits of all texts by an n-gram model of the books' tokens."""

    def tokens_of(text: str) -> list[int]:
        return [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]

    model = KneserNey(np.concatenate([tokens_of(book) for book in books]), order, len(tokenizer))
    return sum(model.bits(np.array(tokens_of(text))) for text in texts)


def thread(prompt: str, text: str, common: set[str]) -> list[str]:
    """Words of the first three sentences, the prompt among them, that come again after these.

    Without the most frequent words of the books these are persons and things, mostly.
    """
    sentences = re.split(r"(?<=[.!?])[\"']?\s+", prompt + text)
    early, late = (WORD.findall(" ".join(part).lower()) for part in (sentences[:3], sentences[3:]))
    return sorted({word for word in early if word in late and word not in common and len(word) > 2})


def quotes(text: str) -> tuple[int, int]:
    """Paragraphs of a sample that hold quotation marks, and those of them in which every one is closed.

    The last paragraph is left out: the sample ends somewhere in it.
    """
    marked = [part for part in text.split("\n")[:-1] if '"' in part]
    return len(marked), sum(part.count('"') % 2 == 0 for part in marked)


def print_scores(model: str, books: list[str], texts: list[str], unseen: Path) -> None:
    import hfkit

    whole = "".join(texts).encode()
    lm = hfkit.load(model, device="cpu", dtype="float32")
    result = hfkit.evaluate(unseen, model=lm, text_column="text")
    print("| | bits per byte |\n|---|---|")
    print(f"| `hfkit evaluate` | {result.bits_per_byte:.4f} ± {result.bits_per_byte_stderr:.4f} |")
    print(f"| a plain loop | {plain_bits(*lm, texts) / len(whole):.4f} |", flush=True)
    print(f"| 5-gram Kneser-Ney, same tokens and books | {gram_bits(lm.tokenizer, books, texts) / len(whole):.4f} |")
    print(f"| xz -9e | {8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole):.4f} |")
    print(f"| gzip -9 | {8 * len(gzip.compress(whole, 9)) / len(whole):.4f} |")
    print(
        f"\nPerplexity {result.perplexity:.1f} a token, {result.word_perplexity:.0f} a word; next token "
        f"right {result.token_accuracy:.1%}, among the five likeliest {result.top5_accuracy:.1%}.\n",
        flush=True,
    )


def print_samples(model: str, books: list[str], corpus: Path, tokens: int) -> None:
    import hfkit
    from hfkit.corpus.overlap import index_corpus
    from hfkit.options import CorpusOptions

    prompts = [*OPENINGS, *EVERYDAY]
    samples = hfkit.generate(prompts, model=hfkit.load(model, device="cpu"), max_new_tokens=tokens, seed=1)
    counts = Counter(word for book in books for word in WORD.findall(book.lower()))
    common = {word for word, _ in counts.most_common(300)}
    index = index_corpus(str(corpus), CorpusOptions(text_column="text"))
    words = real = marked = closed = kept = 0
    copies = []
    for number, (prompt, sample) in enumerate(zip(prompts, samples, strict=True), 1):
        text = sample.completion
        whole_words = WORD.findall(text.lower())[:-1]  # the last one may be cut
        words, real = words + len(whole_words), real + sum(counts[word] > 1 for word in whole_words)
        has, closes = quotes(prompt + text)
        marked, closed = marked + has, closed + closes
        copies.append(index.look_up(text))
        again = thread(prompt, text, common)
        kept += bool(again)
        shown = (prompt + text).replace("\n", "\n> ")
        print(f"{number}. again after three sentences: {', '.join(again) or 'nobody and nothing'}\n\n> {shown}\n")
    longest = max(copies, key=lambda copy: copy.words)
    print(
        f"Real words (twice or more in the books): {real / words:.1%} of {words:,}. Quotation marks closed: "
        f"{closed} of {marked} whole paragraphs that have any. A word of the first three sentences, rarer than "
        f"the 300 most frequent ones, comes again: {kept} of {len(prompts)}. Runs of {index.length} words that stand "
        f"in the books: {np.mean([copy.share for copy in copies]):.2%}; the longest copy: {longest.words} words, "
        f'"{longest.longest}".'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books", type=Path)
    parser.add_argument("unseen", type=Path)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--tokens", type=int, default=150, help="of a sample")
    options = parser.parse_args()
    books, texts = read_texts(options.books), read_texts(options.unseen)
    print_scores(options.model, books, texts, options.unseen)
    print_samples(options.model, books, options.books, options.tokens)


if __name__ == "__main__":
    main()
