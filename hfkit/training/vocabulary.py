"""New vocabularies: byte-level BPE as GPT-2 has it, with whole characters where that matters, and BERT's WordPiece."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hfkit.corpus.documents import END

# How GPT-2 divides a text before it merges bytes.
_WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_bytes(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE, which merges the most frequent pairs of bytes."""
    blank: Any = GPT2Tokenizer()
    tokenizer: PreTrainedTokenizerBase = blank.train_new_from_iterator(texts, vocabulary, show_progress=False)
    return tokenizer


def train_characters(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE that first merges the bytes of each character, and then the most frequent pairs of characters.

    A model that learns from such tokens hardly ever writes a part of a character. Characters take three quarters of
    the vocabulary at most; what is rarer is spelled byte by byte.
    """
    counts: Counter[str] = Counter()

    def counted() -> Iterator[str]:
        for text in texts:
            counts.update(text)
            yield text

    trained = Tokenizer(BPE())
    trained.pre_tokenizer = Split(_WORDS, "isolated")
    trainer = BpeTrainer(vocab_size=vocabulary, limit_alphabet=3 * vocabulary // 4, show_progress=False)
    trained.train_from_iterator(counted(), trainer)
    model = json.loads(trained.to_str())["model"]
    signs: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]

    def spell(text: str) -> str:
        return "".join(signs[byte] for byte in text.encode())

    words = [spell(character) for character, _ in counts.most_common() if character in model["vocab"]]
    pairs = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pairs += [(spell(left), spell(right)) for left, right in model["merges"]]
    tokens, merges = dict.fromkeys([END, *sorted(signs.values())]), []
    for left, right in pairs:
        if left + right not in tokens and len(tokens) < vocabulary:
            tokens[left + right] = None
            merges.append((left, right))
    vocab = {token: index for index, token in enumerate(tokens)}
    kind: Any = GPT2Tokenizer
    tokenizer: PreTrainedTokenizerBase = kind(vocab=vocab, merges=merges)
    return tokenizer


def train_wordpiece(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A lower-casing WordPiece tokenizer as BERT has it: [CLS] text [SEP], or [CLS] question [SEP] text [SEP]."""
    backend = BertTokenizer().backend_tokenizer
    texts = [backend.normalizer.normalize_str(text) for text in texts]
    words = {word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers the letters inside of words in the order of a hash table, which differs from process to
    # process. Numbered beforehand, they always give the same vocabulary.
    letters = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # in the order of their ids
    trainer = WordPieceTrainer(vocab_size=vocabulary, special_tokens=[*special, *letters], show_progress=False)
    trained = Tokenizer(WordPiece())
    trained.pre_tokenizer = backend.pre_tokenizer
    trained.train_from_iterator(texts, trainer)
    tokenizer: PreTrainedTokenizerBase = BertTokenizer(vocab=trained.get_vocab())
    return tokenizer
