"""Tokens write what the tokenizer decodes them to, and a banned text never comes, however it is divided."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hfkit
from hfkit.inference.decoding import BannedTexts
from hfkit.inference.text import is_byte_level, special_token_ids, token_writer


@pytest.fixture(scope="module")
def lms(tiny, tiny_llama) -> dict:
    return {"gpt2": hfkit.load(tiny), "llama": hfkit.load(tiny_llama), "bundled": hfkit.load("bundled")}


def word_pieces() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "king", "##king", "##dom", "k", "##ing", "的", "雨"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bundled", "word pieces"])
def test_token_writer_writes_what_the_tokenizer_decodes(lms, name):
    tokenizer = word_pieces() if name == "word pieces" else lms[name].tokenizer
    write, special, draw = token_writer(tokenizer), set(special_token_ids(tokenizer).values()), random.Random(0)
    usual = [token for token in range(len(tokenizer)) if token not in special]
    for _ in range(300):
        ids = usual[3:4] + draw.choices(usual, k=8)  # of word pieces a text begins with a whole word
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        raw = b"".join(write(word) for word in tokenizer.convert_ids_to_tokens(ids)).decode(errors="replace")
        if "\ufffd" not in text:  # SentencePiece shows more of them
            assert raw.lstrip(" ") == text.lstrip(" ")
    assert is_byte_level(tokenizer) == (name in ("gpt2", "bundled"))


BANNED = ["?", ",", "king", "e", "the ", "é", "雨 the", ".\n", " a", "st", "<|endoftext|>"]


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bundled"])
def test_banned_texts_never_come(lms, name, how):
    lm, draw = lms[name], random.Random(name)
    samples = {} if how else {"num_return_sequences": 10}
    for seed in range(3):
        words = draw.sample(BANNED, 4)
        found = hfkit.generate(
            "The king said, the", model=lm, seed=seed, max_new_tokens=30, temperature=1.2, bad_words=words,
            **samples, **how,
        )  # fmt: skip
        for text in found if samples else [found]:
            assert not any(word in text.completion for word in words)


def test_banned_texts_come_without_the_option(lms):
    """So that the test above says something."""
    texts = hfkit.generate("The king said, \"the", model=lms["bundled"], seed=1, max_new_tokens=30, temperature=1.2,
                           num_return_sequences=20)  # fmt: skip
    for word in ("?", ",", "e", " a", "st"):
        assert any(word in text.completion for text in texts)


def test_banned_texts_may_begin_in_the_prompt_and_never_after_it(lms):
    """The prompt's letters do not count: what is generated is free of the text."""
    how = {"model": lms["gpt2"], "max_new_tokens": 3, "temperature": 0, "sequence_bias": ["b=100"]}
    assert hfkit.generate("a", bad_words=["ab"], **how).completion == "bbb"
    assert hfkit.generate("a", bad_words=["bb"], **how).completion.startswith("b")
    assert "bb" not in hfkit.generate("a", bad_words=["bb"], **how).completion


def test_banned_texts_ban_a_special_token_by_its_whole_name_only(lms):
    lm = lms["gpt2"]
    how = {"model": lm, "max_new_tokens": 5, "sequence_bias": ["<|endoftext|>=100"], "temperature": 0}
    assert hfkit.generate("a", **how).tokens == 1 == hfkit.generate("a", bad_words=["end", "text"], **how).tokens
    assert hfkit.generate("a", bad_words=["<|endoftext|>"], **how).finish_reason == "length"


def test_banned_texts_are_found_by_brute_force(lms):
    """A token is banned exactly where the text would have a banned one that it had not before."""
    tokenizer, draw = lms["bundled"].tokenizer, random.Random(3)
    write = token_writer(tokenizer)
    words = [write(word) for word in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    special = set(special_token_ids(tokenizer).values())
    for text in ("king", " the", "雨", "aa"):
        raw, banned = text.encode(), BannedTexts(tokenizer, [text], start=1)
        for _ in range(5):
            ids = draw.choices([t for t in range(len(words)) if t not in special], k=4)
            ids += tokenizer(text, add_special_tokens=False)["input_ids"][: draw.randint(0, 2)]
            before = b"".join(words[token] for token in ids)
            scores = banned(torch.tensor([[0, *ids]]), torch.zeros(1, len(words)))[0]
            expected = [t for t in range(len(words)) if t not in special
                        and (before + words[t]).count(raw) > before.count(raw) and raw not in before]  # fmt: skip
            if raw not in before:
                assert scores.isinf().nonzero().flatten().tolist() == expected
