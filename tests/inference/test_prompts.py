"""A prompt is a text, a mapping or token ids, is encoded once, and anything else is one sentence."""

from pathlib import Path

import pytest
from support.shell import call
from transformers import NllbTokenizer, PreTrainedTokenizerBase

import hfkit
from hfkit.errors import HfkitError, OptionError
from hfkit.inference.text import ends_in_space, fit_prompt
from hfkit.models.loading import LanguageModel
from hfkit.options import GenerateOptions


@pytest.fixture(scope="module")
def lm(tiny) -> LanguageModel:
    return hfkit.load(tiny)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Texts that a tokenizer was given."""
    texts, encode = [], PreTrainedTokenizerBase.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "__call__",
        lambda self, text, *a, **k: texts.append(text) or encode(self, text, *a, **k),
    )
    return texts


@pytest.mark.parametrize("flags", [[], ["--json"], ["--num-return-sequences", 3], ["--num-beams", 2]])
def test_fit_prompt_is_called_once_for_a_prompt_at_a_shell(tiny, capfdbinary, encoded, flags):
    result = call(capfdbinary, "generate", "the cat", "-m", tiny, "-n", 3, "-s", 1, *flags)
    assert result.returncode == 0 and encoded.count("the cat") == 1


def test_fit_prompt_gives_a_request_that_generate_and_stream_take(lm, encoded):
    options = GenerateOptions(max_new_tokens=5, seed=3)
    request = fit_prompt("the cat", options, lm.tokenizer, lm.model.config, lm.name)
    expected = hfkit.generate("the cat", model=lm, options=options)
    encoded.clear()
    assert hfkit.generate(request, model=lm, options=options) == expected
    assert [*hfkit.generate([request], model=lm, options=options)] == [expected]
    assert "".join(hfkit.stream(request, model=lm, options=options)) == expected.completion
    assert encoded == []


WRONG = [None, 5, 2.5, Path("a.txt"), b"bytes", bytearray(b"x"), Ellipsis]


@pytest.mark.parametrize("wrong", [*WRONG, [], [1, "a"], ["a"], {"a"}], ids=repr)
def test_fit_prompt_takes_no_other_prompt_in_a_list(lm, wrong):
    with pytest.raises(HfkitError, match=rf"^prompt 1: a prompt is a str .*not {type(wrong).__name__}"):
        hfkit.generate(["a", wrong], model=lm)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_list_texts_takes_no_other_prompt_alone(lm, wrong):
    for function in (hfkit.generate, hfkit.stream):
        with pytest.raises(HfkitError, match=f"^a prompt is a str .*not {type(wrong).__name__}"):
            function(wrong, model=lm)
    with pytest.raises(HfkitError, match=f"^a text is a str .*not {type(wrong).__name__}"):
        hfkit.classify(wrong, model=lm, labels=["a", "b"])
    with pytest.raises(HfkitError, match=f"^text 1: a text is a str .*not {type(wrong).__name__}"):
        hfkit.classify(["a", wrong], model=lm, labels=["a", "b"])
    with pytest.raises(HfkitError, match=f"a text is a str, not {type(wrong).__name__}"):
        hfkit.inspect(wrong, model=lm)
    for pair in ((wrong, "text"), ("what?", wrong)):
        with pytest.raises(HfkitError, match=f"are a str, not {type(wrong).__name__}"):
            hfkit.answer(*pair, model=lm)


def test_list_texts_takes_tuples_and_iterators(lm):
    how = {"model": lm, "max_new_tokens": 3, "seed": 1}
    expected = hfkit.generate(["a", "b"], **how)
    assert hfkit.generate(("a", "b"), **how) == hfkit.generate(iter(["a", "b"]), **how) == expected
    assert hfkit.generate([], **how) == []


@pytest.mark.parametrize(
    ("prompt", "hinted"), [("Once upon a ", True), ("Once upon a", False), ("a\n", False), ("a ", True)]
)
def test_ends_in_space_is_told_at_a_shell(capfdbinary, prompt, hinted):
    result = call(capfdbinary, "generate", prompt, "-n", 2, "-s", 1)
    assert (b"the prompt ends in a space" in result.stderr) == hinted and result.returncode == 0
    lm = hfkit.load("bundled")
    assert (
        ends_in_space(fit_prompt(prompt, GenerateOptions(), lm.tokenizer, lm.model.config, ""), lm.tokenizer) == hinted
    )


def test_fit_prompt_marks_the_language_and_leaves_the_tokenizer_as_it_is(lm):
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁", "▁a", "b"])}
    tokenizer = NllbTokenizer(vocab=words, merges=[], additional_special_tokens=["eng_Latn", "fra_Latn", "deu_Latn"])

    class Config:
        model_type, is_encoder_decoder, max_position_embeddings = "m2m_100", True, 64

    def ids(**options) -> list[int]:
        return fit_prompt("a b", GenerateOptions(**options), tokenizer, Config, "nllb").ids

    usual = ids()
    for code in ("fra_Latn", "deu_Latn"):
        other = NllbTokenizer(vocab=words, merges=[], additional_special_tokens=["eng_Latn", "fra_Latn", "deu_Latn"])
        other.src_lang = code
        assert ids(src_lang=code) == other("a b")["input_ids"] != usual
    assert ids() == usual and tokenizer.src_lang == "eng_Latn"
    with pytest.raises(OptionError, match="no language 'xx'"):
        ids(src_lang="xx")
    other = hfkit.load(lm.name).tokenizer
    other.add_special_tokens({"additional_special_tokens": ["fra_Latn"]})
    with pytest.raises(OptionError, match="does not mark the language"):
        fit_prompt("a", GenerateOptions(src_lang="fra_Latn"), other, lm.model.config, "m")
