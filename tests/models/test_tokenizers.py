"""A tokenizer gives the tokens that it gave when it was saved, whatever the type of its model."""

import json
from pathlib import Path

import pytest
from support import trials
from support.models import byte_vocabulary
from support.shell import edit_json
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

import hfkit

TEXTS = ["The rain falls.", "the RAIN  42 times", " wind\n\nand\tstone", "déjà-vu <|endoftext|>", "_x'll"]
LETTERS = " ".join([*trials.WORDS, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,'é\n"])


def build(kind: str) -> Tokenizer:
    """A tokenizer of a kind that is not GPT-2's, of at most 257 tokens."""
    model, trainer = models.BPE(unk_token="<unk>"), trainers.BpeTrainer  # noqa: S106
    if kind == "word":
        model, trainer = models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer  # noqa: S106
    elif kind == "wordpiece":
        model, trainer = models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer  # noqa: S106
    elif kind == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind in ("word", "wordpiece"):
        tokenizer.normalizer = normalizers.Lowercase()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind == "letters":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"special_tokens": ["<|endoftext|>", "<unk>"], "vocab_size": 250, "show_progress": False}
    more = {"unk_token": "<unk>"} if kind == "unigram" else {}
    tokenizer.train_from_iterator([LETTERS] * 9, trainer(**special, **more))
    return tokenizer


KINDS = ["word", "wordpiece", "unigram", "whitespace", "metaspace", "digits", "letters"]


@pytest.mark.parametrize("declared", ["as saved", "GPT2TokenizerFast", None])
@pytest.mark.parametrize("kind", KINDS)
def test_read_tokenizer_kinds(copy, tiny, tmp_path, kind, declared):
    """tokenizer.json decides, not the model's type nor a class that does not fit; export writes the same tokenizer."""
    folder, backend = copy(tiny), build(kind)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    if declared != "as saved":
        edit_json(folder / "tokenizer_config.json", tokenizer_class=declared)
    expected = [backend.encode(text).ids for text in TEXTS]
    for model in (folder, hfkit.export(folder, output_dir=tmp_path / "export")):
        tokenizer = hfkit.load(model).tokenizer
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == expected
        assert tokenizer.eos_token == "<|endoftext|>"  # noqa: S105


def test_read_tokenizer_post_processor(copy, tiny):
    """A token that tokenizer.json puts before each text is kept."""
    folder = copy(tiny)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    assert (
        hfkit.load(folder).tokenizer("a")["input_ids"]
        == backend.encode("a").ids
        == [256, *backend.encode("a").ids[1:]]
    )


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", "no settings"])
def test_read_tokenizer_gpt2(copy, tiny, files):
    """GPT-2's own tokenizer is a GPT2Tokenizer, in each layout of its files, with tokens that were added."""
    folder, expected = copy(tiny), GPT2Tokenizer.from_pretrained(tiny)
    edit_json(folder / "config.json", vocab_size=257)
    if files == "vocab.json":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()))
        (folder / "merges.txt").write_text("#version: 0.2\n")
    elif files == "no settings":
        (folder / "tokenizer_config.json").unlink()
    tokenizer = hfkit.load(folder).tokenizer
    assert type(tokenizer) is GPT2Tokenizer
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [expected(text)["input_ids"] for text in TEXTS]


def test_read_tokenizer_prefix_space(copy, tiny):
    """The setting add_prefix_space holds, although tokenizer.json says otherwise."""
    folder = copy(tiny)
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    tokenizer = hfkit.load(folder).tokenizer
    assert tokenizer("a")["input_ids"] == tokenizer(" a", add_special_tokens=False)["input_ids"][-2:]


@pytest.mark.parametrize("declared", ["tokenizer_config.json", "config.json", None])
def test_read_tokenizer_vocab_txt(copy, tiny, capsys, declared):
    """A GPT-2 with BERT's vocab.txt, as the Chinese ones have it; if no file names its class, a note does."""
    folder = copy(tiny)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *trials.WORDS]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(words))
    if declared:
        path = Path(folder / declared)
        path.write_text(
            json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"tokenizer_class": "BertTokenizer"})
        )
    ids = hfkit.load(folder).tokenizer("rain and wind", add_special_tokens=False)["input_ids"]
    assert ids == [words.index(word) for word in ("rain", "and", "wind")]
    assert ("vocab.txt is read as" in capsys.readouterr().err) == (declared is None)
