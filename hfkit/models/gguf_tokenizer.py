"""Write a tokenizer into a GGUF file, as llama.cpp reads it."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfkit.console import note
from hfkit.errors import HfkitError
from hfkit.models.loading import LanguageModel


def tokenizer_kind(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """llama.cpp's names of a tokenizer's algorithm and of how it cuts a text before that.

    Raises:
        HfkitError: it has none. `name` is what the message calls the model.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if tokenizer.eos_token is None:  # llama.cpp would take another token for it
        raise HfkitError(f"the tokenizer of {name} has no eos_token, which GGUF needs: set it, or leave --format out")
    state: Any = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    if state["model"]["type"] == "BPE" and state["model"]["byte_fallback"]:
        return "llama", "default"
    cutter = state.get("pre_tokenizer") or {}
    *first, last = cutter.get("pretokenizers", [cutter])
    if state["model"]["type"] == "BPE" and last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if not first and last["use_regex"]:
            return "gpt2", "gpt-2"
        if len(first) == 1 and last["use_regex"] and first[0] == {"type": "Digits", "individual_digits": True}:
            return "gpt2", "smollm"
        known = {pattern: kind for kind, pattern in reversed(GGUF_PRE_TOKENIZER_SPLITS.items())}
        kind = known.get(first[0].get("pattern", {}).get("Regex")) if len(first) == 1 else None
        if kind and not last["use_regex"]:
            return "gpt2", kind
    what = f"a {state['model']['type']} that cuts texts by {cutter.get('type')}"
    raise HfkitError(f"llama.cpp has no tokenizer like that of {name} ({what}): leave --format out")


def add_tokenizer(file: Any, lm: LanguageModel) -> None:
    """Add a tokenizer that `tokenizer_kind` accepts to a GGUFWriter."""
    from gguf import TokenType

    tokenizer, state = lm.tokenizer, json.loads(lm.tokenizer.backend_tokenizer.to_str())
    model, pre = tokenizer_kind(lm.name, tokenizer)
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    ends = lm.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    types = {}
    for index, word in words.items():
        added = tokenizer.added_tokens_decoder.get(index)
        types[index] = TokenType.NORMAL if added is None else TokenType.USER_DEFINED
        if model == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", word):
            types[index] = TokenType.BYTE
        elif model == "llama" and word == state["model"]["unk_token"]:
            types[index] = TokenType.UNKNOWN
        elif (added and added.special) or index in ends:
            types[index] = TokenType.CONTROL
    size = lm.model.config.vocab_size  # rows of the embedding, of which some may have no token
    file.add_tokenizer_model(model)
    file.add_tokenizer_pre(pre)
    file.add_token_list([words.get(index, f"[PAD{index}]") for index in range(size)])
    file.add_token_types([types.get(index, TokenType.UNUSED) for index in range(size)])
    file.add_token_merges([" ".join(merge) for merge in merges] or [""])  # llama.cpp asks for one at least
    if model == "llama":
        _add_scores(file, words, merges, size)
        scheme = (state["pre_tokenizer"] or {}).get("prepend_scheme", "never")
        file.add_add_space_prefix("Prepend" in str(state["normalizer"]) or scheme != "never")
    for kind in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(file, f"add_{kind}_token_id")(index)
    if others := [index for index in ends if index not in (None, tokenizer.eos_token_id)]:
        file.add_eot_token_id(others[0])
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    file.add_add_bos_token(whole[:1] == [tokenizer.bos_token_id] != bare[:1])
    file.add_add_eos_token(whole[-1:] == [tokenizer.eos_token_id] != bare[-1:])
    if tokenizer.chat_template:
        file.add_chat_template(tokenizer.get_chat_template())
    # The GGUF specification has a place for the original, which hfkit reads back.
    file.add_string("tokenizer.huggingface.json", tokenizer.backend_tokenizer.to_str())
    if task := tokenizer.init_kwargs.get("task"):
        file.add_string("hfkit.task", json.dumps(task))


def _add_scores(file: Any, words: dict[int, str], merges: list[tuple[str, ...]], size: int) -> None:
    """llama.cpp joins two pieces by the score of the word that they make, not by the rank of the pair."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(merge), -float(rank))
    file.add_token_scores([scores.get(words.get(index, ""), 0.0) for index in range(size)])
    known, pairs = set(words.values()), set(merges)
    splits = ((word[:place], word[place:]) for word in scores for place in range(1, len(word)))
    if any(known.issuperset(split) and split not in pairs for split in splits):
        note("llama.cpp reads the tokenizer as SentencePiece's, and may cut some words into other tokens")
