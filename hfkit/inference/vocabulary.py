"""What a tokenizer's tokens write into a text, and which of them would complete a text that must not come."""

import bisect
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES: dict[str, int] = {sign: byte for byte, sign in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are written in GPT-2's alphabet, one sign for each byte."""
    return "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are left out of a text, by name."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def token_writer(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary spells it, to the bytes that it writes into a text."""
    byte_level = is_byte_level(tokenizer)
    word_pieces = "WordPiece" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))

    def write(word: str) -> bytes:
        if byte_level and all(sign in _BYTES for sign in word):
            return bytes(_BYTES[sign] for sign in word)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", word):  # SentencePiece's
            return bytes.fromhex(byte[1])
        if word_pieces:
            return (word[2:] if word.startswith("##") else f" {word}").encode()
        return word.replace("▁", " ").encode()

    return write


@functools.lru_cache(maxsize=1)
def _written(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each token writes, by id; nothing for special tokens."""
    write, special = token_writer(tokenizer), set(special_tokens(tokenizer).values())
    words = cast(list[str | None], tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    return [b"" if word is None or index in special else write(word) for index, word in enumerate(words)]


@functools.lru_cache(maxsize=1)
def _sorted_by_bytes(tokenizer: PreTrainedTokenizerBase) -> list[tuple[bytes, int]]:
    return sorted((part, index) for index, part in enumerate(_written(tokenizer)))


@functools.lru_cache(maxsize=128)
def _completing(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[bytes, torch.Tensor]:
    """Tokens that complete `text`, by the part of it that must come directly before them; ids: (tokens,)."""
    whole, written = text.encode(errors="replace"), _written(tokenizer)
    completing = {b"": [index for index, part in enumerate(written) if whole in part]}
    completing[b""] += [index for name, index in special_tokens(tokenizer).items() if name == text]
    ordered = _sorted_by_bytes(tokenizer)
    for length in range(1, len(whole)):
        rest = whole[length:]
        # Those that begin with the rest. The byte 0xFF is in no text.
        first, end = bisect.bisect_left(ordered, (rest, 0)), bisect.bisect_left(ordered, (rest + b"\xff\xff", 0))
        completing[whole[:length]] = [index for _, index in ordered[first:end]]
    return {before: torch.tensor(ids) for before, ids in completing.items() if ids}


class BannedTexts(LogitsProcessor):
    """Bans every token that would complete one of `texts` in what is generated, however it is divided into tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], start: int) -> None:
        """start: position of a row's first generated token."""
        self._written, self._start = _written(tokenizer), start
        self._completing = [_completing(tokenizer, text) for text in texts]
        self._longest = max(len(text.encode(errors="replace")) for text in texts)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self._start :].tolist()):
            end = self._end_of(ids)
            for completing in self._completing:
                for before, tokens in completing.items():
                    if end.endswith(before):
                        scores[row, tokens.to(scores.device)] = -torch.inf
        return scores

    def _end_of(self, ids: Sequence[int]) -> bytes:
        """The last bytes that `ids` write, as many as may begin a banned text."""
        end = b""
        for token in reversed(ids):
            if len(end) >= self._longest:
                break
            end = (self._written[token] if token < len(self._written) else b"") + end
        return end
