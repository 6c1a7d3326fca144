"""Text to token ids: documents, examples with labels, and prompts."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import Tokenizer

from hfkit.corpus.documents import Example, Piece
from hfkit.corpus.rows import row_error
from hfkit.corpus.templates import CHAT_TEMPLATE, RenderedChat, enclosing_tokens, render_chat
from hfkit.errors import HfkitError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not learned and does not count in a score
BATCH = 512  # records that are encoded together

# The threads of `tokenizers` do not survive a fork. A forked process that expects them, such as a DataLoader worker,
# would wait for ever.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which tokens a text becomes."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # left there by the last call
    else:
        state = sorted(tokenizer.get_vocab().items())
    return sha256_of(f"{json.dumps(state)}{tokenizer.chat_template or CHAT_TEMPLATE}")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(text: str) -> int:
    """A 64-bit hash of a text without its case and white space: copies have the same."""
    letters = "".join(text.split()).casefold().encode()
    return int.from_bytes(hashlib.blake2b(letters, digest_size=8).digest(), "big", signed=True)


def encode_records(records: Iterator[Piece | Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """`encode_examples` or `encode_documents`, by the kind of the first record."""
    first = next(records, None)
    encode: Any = encode_examples if isinstance(first, Example) else encode_documents
    yield from encode(chain([first] if first else [], records), tokenizer)


def number_documents(pieces: Iterable[Piece]) -> Iterator[tuple[int, bool, Piece]]:
    """Each piece with the number of its document and whether it begins it. Empty documents are left out."""
    document, first = 0, True
    for piece in pieces:
        if is_empty(piece, first):
            continue
        yield document, first, piece
        document, first = document + piece.last, piece.last


def is_empty(piece: Piece, first: bool) -> bool:
    """Whether a piece is a whole document without text."""
    return first and piece.last and not piece.text.strip()


def encode_documents(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, close: bool = True
) -> Iterator[dict[str, Any]]:
    """A row for each piece: `input_ids`, `document` (its number), `content` (a hash) and `bytes`.

    A document begins as the tokenizer begins a text, and ends with EOS if `close`.
    """
    (begin, _), end = enclosing_tokens(tokenizer), _end_tokens(tokenizer)
    numbered = number_documents(pieces)
    while batch := list(islice(numbered, BATCH)):
        firsts = iter(_encode_plain([piece.text for _, first, piece in batch if first], tokenizer))
        others = iter(encode_answers([piece.text for _, first, piece in batch if not first], tokenizer))
        for document, first, piece in batch:
            ids = begin + next(firsts) if first else next(others)
            ids = ids + end if piece.last and close else ids
            yield {"input_ids": np.array(ids, np.int32), **_origin(document, piece.texts)}


def encode_examples(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """A row for each example: as `encode_documents`, and `labels`, which are IGNORED outside the answers.

    A conversation has several rows if its template needs a text for each answer: see `render_chat`.
    """
    (begin, _), end = enclosing_tokens(tokenizer), _end_tokens(tokenizer)
    for document, example in enumerate(examples):
        row, where = example
        if "messages" in row:
            if not tokenizer.is_fast:
                raise row_error("this tokenizer cannot locate tokens in a text", where, "give prompt and completion")
            chats = render_chat(row["messages"], tokenizer, where, row.get("tools"))
            encoded = [_encode_chat(chat, tokenizer) for chat in chats]
        else:
            prompt = begin + _encode_plain([row["prompt"]], tokenizer)[0]
            answer = encode_answers([row["completion"]], tokenizer)[0] + end
            encoded = [(prompt + answer, [IGNORED] * len(prompt) + answer)]
        for ids, labels in encoded:
            if all(label == IGNORED for label in labels):
                raise row_error("nothing is learned from this example", where)
            arrays = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
            yield {**arrays, **_origin(document, example.texts, parts=len(encoded))}


def _origin(document: int, texts: list[str], parts: int = 1) -> dict[str, int]:
    """A row's document, the hash of its content, and its bytes: those of the texts, divided among `parts` rows."""
    size = sum(len(text.encode()) for text in texts) // parts
    return {"document": document, "content": content_of("\0".join(texts)), "bytes": size}


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a document, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]


def encode_answers(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that follow another text: without the space that some tokenizers write before any text."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not tokens or not tokens[0].startswith(("▁", "Ġ")):
        return _encode_plain(texts, tokenizer)
    if tokenizer.is_fast and (backend := _backend_within_text(tokenizer, len(tokenizer))):
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    # Where a text begins with a space, the tokenizer's own space replaces it. Elsewhere its token is removed.
    space = tokenizer.convert_tokens_to_ids("▁")
    rows = _encode_plain([text.removeprefix(" ") for text in texts], tokenizer)
    return [
        ids[1:] if ids[:1] == [space] and not text.startswith(" ") else ids
        for text, ids in zip(texts, rows, strict=True)
    ]


@functools.lru_cache(maxsize=2)
def _backend_within_text(tokenizer: PreTrainedTokenizerBase, size: int) -> Tokenizer | None:
    """The tokenizer without the space that it writes before a text; None if that is the space of every word.

    size: of the vocabulary, which may grow.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    parts: list[dict[str, Any]] = []
    for part in filter(None, (state["normalizer"], state["pre_tokenizer"])):
        parts += part.get("normalizers") or part.get("pretokenizers") or [part]
    for part in parts:
        match part["type"]:
            case "WhitespaceSplit" | "Whitespace":
                return None
            case "Prepend":
                part["prepend"] = ""
            case "Metaspace":
                part["prepend_scheme"] = "never"
            case "ByteLevel":
                part["add_prefix_space"] = False
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


def _encode_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text without special tokens, on all cores."""
    if not tokenizer.is_fast:
        return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    # Unlike tokenizer(texts), this makes no offsets and no masks.
    encoded = backend_of(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encoded]


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The part of a fast tokenizer that is written in Rust, without truncation and padding."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    # Only where a caller's own truncating call left them: a change fails while another thread encodes.
    if backend.truncation:
        backend.no_truncation()
    if backend.padding:
        backend.no_padding()
    return backend


def _encode_chat(chat: RenderedChat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and their labels: what the assistant says."""
    encoded = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # The token that carries the leading space belongs to the answer, even if its offset starts one character early.
    inside = [any(a < stop and start < b for a, b in chat.answers) for start, stop in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [token if learned else IGNORED for token, learned in zip(ids, inside, strict=True)]


def language_token(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """The token of a language code, such as NLLB's eng_Latn. OptionError if the model has no such language."""
    token = tokenizer.convert_tokens_to_ids(code)
    if token is None or token == tokenizer.unk_token_id or token not in tokenizer.all_special_ids:
        raise OptionError(f"the model has no language {code!r}: see its card for the codes, such as eng_Latn")
    return token


def encode(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a prompt; of an empty prompt the token that begins a text. name: the model's, for messages."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"the prompt is not UTF-8 text (character {error.start + 1}): convert it") from error
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"] or first_tokens(tokenizer)
    if not ids:
        raise HfkitError(f"{name} has no token that begins a text: give a prompt")
    return ids


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a text: BOS, or else the EOS of the text before; empty without both."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if begin is None else [cast(int, begin)]
