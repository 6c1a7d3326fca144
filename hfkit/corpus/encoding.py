"""A corpus as tokens: encoded once, kept on disk by content, found again."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hfkit.corpus.documents import Example, Piece
from hfkit.errors import HfkitError, OptionError, first_line

IGNORED = -100  # label of a token that is neither learned nor counted
# For conversations with a tokenizer that has no template of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
BATCH = 512  # pieces that are encoded together
_PROCESS = os.getpid()


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides which tokens a text becomes."""
    vocabulary = (
        _clean_backend(tokenizer).to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    return sha256_of(f"{vocabulary}{tokenizer.chat_template or CHAT_TEMPLATE}")


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def texts_of(row: dict[str, Any]) -> list[str]:
    return [m["content"] for m in row["messages"]] if "messages" in row else [row["prompt"], row["completion"]]


def encode_records(records: Iterator[Piece | Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """`encode_documents` or `encode_examples`, whichever these records are for."""
    first = next(records, None)
    encode: Any = encode_examples if isinstance(first, Example) else encode_documents
    return encode(chain([first] if first else [], records), tokenizer)


def number_documents(pieces: Iterable[Piece]) -> Iterator[tuple[int, bool, Piece]]:
    """Each piece with the number of its document and whether it begins it; empty documents are left out."""
    document, first = 0, True
    for piece in pieces:
        if is_empty(piece, first):
            continue
        yield document, first, piece
        document, first = document + piece.last, piece.last


def is_empty(piece: Piece, first: bool) -> bool:
    return first and piece.last and not piece.text.strip()


def encode_documents(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, *, close: bool = True
) -> Iterator[dict[str, Any]]:
    """Token ids of each piece; a document begins as the tokenizer begins a text, and ends with EOS if it is closed."""
    begin, end = frame_tokens(tokenizer)
    space = _space(tokenizer)
    numbered = number_documents(pieces)
    while batch := list(islice(numbered, BATCH)):
        texts = [piece.text if first or not space else piece.text.removeprefix(" ") for _, first, piece in batch]
        for (document, first, piece), text, ids in zip(batch, texts, _ids(tokenizer, texts), strict=True):
            if not first and text == piece.text and ids[:1] == space:
                ids = ids[1:]
            ids = (begin if first else []) + ids + (end if piece.last and close else [])
            yield {"input_ids": np.array(ids, np.int32), "document": document, "bytes": len(piece.text.encode())}


def frame_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer begins a text with, and the token that ends one."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    begin = whole[: whole.index(bare[0])] if bare else []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _space(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The token of a space, if the tokenizer writes one before each text: within a document it is one too many."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
    return [tokenizer.convert_tokens_to_ids("▁")] if first and first[0].startswith("▁") else None


def _clean_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer`, without what an earlier call may have left in it."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """What tokenizer(texts) gives, without the offsets and masks that nobody needs here; on all cores."""
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    # Its threads do not live on in a process that was forked off, such as a DataLoader's: that would wait for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if os.getpid() == _PROCESS else "false"
    try:
        encodings = _clean_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def encode_answers(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts that follow a prompt, without the space that some tokenizers write before any text."""
    space = _space(tokenizer)
    rows = zip(texts, _ids(tokenizer, [text.removeprefix(" ") if space else text for text in texts]), strict=True)
    return [ids[ids[:1] == space and text[:1] != " " :] for text, ids in rows]


def encode_examples(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Token ids of each example, with the labels IGNORED outside of its answers."""
    begin, end = frame_tokens(tokenizer)
    for document, (row, where) in enumerate(examples):
        if "messages" in row:
            ids, labels = _encode_chat(row["messages"], tokenizer, where)
        else:
            prompt = begin + _ids(tokenizer, [row["prompt"]])[0]
            answer = encode_answers([row["completion"]], tokenizer)[0] + end
            ids, labels = prompt + answer, [IGNORED] * len(prompt) + answer
        size = sum(len(text.encode()) for text in texts_of(row))
        arrays = {"input_ids": np.array(ids, np.int32), "labels": np.array(labels, np.int32)}
        yield {**arrays, "document": document, "bytes": size}


def set_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the CHAT_TEMPLATE if it has none, so that it is saved with the model that learns it."""
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE


def _encode_chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[list[int], list[int]]:
    """A conversation in the tokenizer's chat template; labels are what the assistant says."""
    set_template(tokenizer)
    if not tokenizer.is_fast:
        raise HfkitError(f"this tokenizer does not say where its tokens stand ({where}): give prompt and completion")

    def render(turns: list[Any], **kwargs: Any) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        except Exception as error:  # whatever a template raises
            raise HfkitError(
                f"the chat template does not take this conversation ({where}): {first_line(error)}"
            ) from error

    text, spans = render(messages), []
    prompt = render(messages, add_generation_prompt=True).removeprefix(text).lstrip()
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            after = render(messages[: turn + 1])
            before = after.partition(prompt)[0] + prompt
            if turn:  # of no turns there is nothing to render
                before = render(messages[:turn], add_generation_prompt=True)
            if not (after.startswith(before) and text.startswith(after)):
                raise HfkitError(f"the chat template changes earlier turns ({where}): give prompt and completion")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token with the space before an answer is the first of the answer, whichever part of it counts the space.
    inside = [any(a < stop and start < b for a, b in spans) for start, stop in encoded["offset_mapping"]]
    ids = encoded["input_ids"]
    return ids, [i if learned else IGNORED for i, learned in zip(ids, inside, strict=True)]


def language_token(tokenizer: PreTrainedTokenizerBase, code: str) -> int:
    """The token of a language code, such as NLLB's eng_Latn. OptionError if the model has no such language."""
    token = tokenizer.convert_tokens_to_ids(code)
    if token is None or token == tokenizer.unk_token_id or token not in tokenizer.all_special_ids:
        raise OptionError(f"the model has no language {code!r}: see its card for the codes, such as eng_Latn")
    return token


def encode(text: str, tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    """Token ids of a prompt; of an empty one the token that begins a text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError(f"the prompt is not UTF-8 text (character {error.start + 1}): convert it") from error
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids:
        return ids
    if not (begin := first_tokens(tokenizer)):
        raise HfkitError(f"{name} has no token that begins a text: give a prompt")
    return begin


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the first token of a text: BOS, or the EOS of another; empty if there is neither."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [] if begin is None else [begin]
