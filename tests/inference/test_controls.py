"""Options become what transformers takes, and nothing of a model's own config stands in the way."""

import copy

import pytest
from support.shell import assert_fails, call
from transformers import GenerationConfig

import hfkit
from hfkit.corpus.templates import Task, give_task
from hfkit.errors import OptionError
from hfkit.inference.controls import (
    check_controls,
    check_options,
    endings,
    generation_config,
    is_sampled,
    needs_equal_lengths,
)
from hfkit.models.loading import LanguageModel
from hfkit.options import SAMPLING, GenerateOptions

HOW = {"max_new_tokens": 6, "seed": 1}


@pytest.fixture(scope="module")
def lm(tiny) -> LanguageModel:
    return hfkit.load(tiny)


@pytest.fixture
def with_config(lm):
    """A function that gives the model with fields in its own generation config."""

    def change(**fields) -> LanguageModel:
        model = copy.copy(lm.model)
        model.generation_config = copy.deepcopy(model.generation_config)
        for name, value in fields.items():
            setattr(model.generation_config, name, value)
        return LanguageModel(model, lm.tokenizer)

    return change


# a model's own generation config

HARMLESS = {  # what else a file of 2023 to 2026 may hold: the text is that of the plain loop
    "token_healing": True, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    "output_attentions": True, "output_hidden_states": True, "num_return_sequences": 3, "max_length": 7,
    "prompt_lookup_num_tokens": 2, "penalty_alpha": 0.6, "dola_layers": "low", "num_beam_groups": 2,
    "diversity_penalty": 0.5, "constraints": [], "force_words_ids": [[1]], "is_assistant": True,
    "assistant_early_exit": 1, "use_mtp": True, "assistant_ensemble_weight": 0.5, "speculation_type": "dflash",
    "max_new_tokens": 3, "use_cache": False, "low_memory": True, "num_assistant_tokens": 7,
    "transformers_version": "4.0.0", "prefill_chunk_size": 8, "remove_invalid_values": True, "bos_token_id": 5,
    "assistant_confidence_threshold": 0.1, "max_matching_ngram_size": 3, "length_penalty": 2.0,
    "early_stopping": True, "renormalize_logits": True, "cache_implementation": "quantized",
    "cache_config": {"nbits": 4}, "max_cache_len": 3, "compile_config": {"mode": "default"},
    "encoder_no_repeat_ngram_size": 0, "made_up": 5,
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("name", HARMLESS)
def test_generation_config_lets_no_field_of_the_models_own_stop_or_change_a_text(lm, with_config, name, temperature):
    how = HOW | {"temperature": temperature}
    expected = hfkit.generate(["the", "a cat"], model=lm, **how)
    found = hfkit.generate(["the", "a cat"], model=with_config(**{name: HARMLESS[name]}), **how)
    assert [str(text) for text in found] == [str(text) for text in expected]


def test_generation_config_of_a_model_with_stop_strings_stops_there_and_not_at_the_prompt(lm, tiny, tmp_path):
    """transformers wants a tokenizer for them, and looks at the prompt, too."""
    text = hfkit.generate("the", model=lm, max_new_tokens=20, seed=3).completion
    stop = text[5]
    for fields in ({"stop_strings": [stop]}, {"stop_strings": stop}):
        model = copy.deepcopy(lm.model)
        model.generation_config = GenerationConfig(**model.generation_config.to_dict() | fields)
        model.save_pretrained(tmp_path / "model"), lm.tokenizer.save_pretrained(tmp_path / "model")
        for beams in (None, 2):
            found = hfkit.generate(
                "the" + stop, model=str(tmp_path / "model"), max_new_tokens=20, seed=3, num_beams=beams
            )
            assert stop not in found.completion
        found = hfkit.generate("the", model=str(tmp_path / "model"), max_new_tokens=20, seed=3)
        assert (found.completion, found.finish_reason) == (text[: text.index(stop)], "stop")


def test_generation_config_leaves_sampling_of_the_models_own_out_of_greedy_decoding(lm, with_config):
    own = with_config(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.2, typical_p=0.5)
    config = generation_config(own, GenerateOptions(temperature=0), 5)
    assert not config.do_sample and all(getattr(config, name) is None for name in SAMPLING)
    greedy = hfkit.generate("the", model=own, temperature=0, **HOW)
    assert greedy == hfkit.generate("the", model=lm, temperature=0, **HOW)


def test_draws_a_models_own_temperature_of_0_is_greedy(lm, with_config):
    own = with_config(do_sample=True, temperature=0.0)
    assert hfkit.generate("the", model=own, **HOW) == hfkit.generate("the", model=lm, temperature=0, **HOW)
    expected = hfkit.generate("the", model=lm, top_k=20, **HOW)
    assert hfkit.generate("the", model=own, top_k=20, **HOW) == expected


# what ends a text


@pytest.fixture(scope="module")
def chatty(tiny) -> LanguageModel:
    """A model with tokens of a chat, which are not its EOS, and that likes to say them."""
    lm = hfkit.load(tiny)
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|eot|>"]})
    lm.model.resize_token_embeddings(len(lm.tokenizer), mean_resizing=False)
    return lm


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_end|>\n", "\n<|eot|>", "<|endoftext|>"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_endings_a_special_token_as_stop_string_ends_a_text(chatty, stop, how):
    token = stop.strip()
    how = how | {"model": chatty, "max_new_tokens": 9, "sequence_bias": [f"{token}=200"], "min_new_tokens": 3}
    if token == "<|endoftext|>":
        how.pop("min_new_tokens")
    found = hfkit.generate("hi", stop_strings=[stop, "never"], **how)
    assert token not in found.completion and found.finish_reason == "stop" and found.tokens in (1, 4)
    assert token not in "".join(hfkit.stream("hi", stop_strings=[stop], **how))
    assert endings(chatty, GenerateOptions(stop_strings=[stop, "never"])).strings == ["never"]


def test_endings_are_the_tokenizers_where_the_model_has_none(lm, with_config):
    assert endings(with_config(eos_token_id=None), GenerateOptions()).tokens == {lm.tokenizer.eos_token_id}
    assert endings(with_config(eos_token_id=[3, 4]), GenerateOptions()).tokens == {3, 4}


@pytest.mark.parametrize("stop", ["\\n", "\\t", "\\n\\n"])
def test_endings_a_newline_may_be_typed_at_a_shell(lm, tiny, capfdbinary, stop):
    real = stop.replace("\\n", "\n").replace("\\t", "\t")
    how = {"model": lm, "max_new_tokens": 8, "temperature": 0, "sequence_bias": [f"{stop}=200", f"{real[0]}=100"]}
    assert endings(lm, GenerateOptions(stop_strings=[stop])).strings == [real]
    found = hfkit.generate("hi", stop_strings=[stop], **how)
    assert real not in found.completion and found.finish_reason == "stop"
    line = ["generate", "hi", "-m", tiny, "-n", 8, "-t", 0, "--no-prompt", "--stop", stop]
    flags = [part for bias in how["sequence_bias"] for part in ("--sequence-bias", bias)]
    assert call(capfdbinary, *line, *flags).stdout.decode() == found.completion + "\n"


def test_endings_of_the_models_own_config_are_literal(with_config):
    """It is JSON: there, a newline is spelled as one."""
    assert endings(with_config(stop_strings=["\\n", "\n"]), GenerateOptions()).strings == ["\\n", "\n"]


# what is random


def test_draws_a_model_that_learned_a_task_is_greedy_unless_told(tiny):
    lm = hfkit.load(tiny)
    lm.model.generation_config.update(do_sample=True, temperature=0.8)
    assert is_sampled(lm, GenerateOptions())
    give_task(lm.tokenizer, Task("English: {en}\nFrench: {fr}"))
    assert not is_sampled(lm, GenerateOptions())
    assert hfkit.generate("rain", model=lm, max_new_tokens=4).seed is None
    for wanted in ({"temperature": 0.7}, {"top_p": 0.9}, {"do_sample": True}, {"raw": True}):
        assert is_sampled(lm, GenerateOptions(**wanted))


# options without effect


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_assistant_tokens": 3}, "--assistant-model"),
        ({"novel_words": 5}, "--novel"),
        ({"temperature": 0, "do_sample": True}, "--do-sample"),
        ({"assistant_model": "bundled", "prompt_lookup_num_tokens": 2}, "exclude each other"),
        ({"tgt_lang": "fra_Latn", "forced_bos_token_id": 0}, "exclude each other"),
    ],
)
def test_check_options_refuses_what_has_no_effect_before_a_model_is_loaded(options, words, capfdbinary):
    with pytest.raises(OptionError, match=words):
        check_options(GenerateOptions(**options))
    for function in (hfkit.generate, hfkit.stream):
        with pytest.raises(OptionError, match=words):
            function("a", model="/nowhere/at/all", **options)
    flags = [
        part for name, value in options.items() for part in ([f"--{name}"] if value is True else [f"--{name}", value])
    ]
    assert_fails(call(capfdbinary, "generate", "a", *flags), 2, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative_prompt": "a dog"}, "--guidance-scale"),
        ({"negative_prompt": "a dog", "guidance_scale": 1.0}, "--guidance-scale"),
        ({"length_penalty": 2.0}, "--num-beams"),
        ({"length_penalty": 0.0}, "--num-beams"),
        ({"early_stopping": True}, "--num-beams"),
    ],
)
def test_check_controls_refuses_what_has_no_effect_with_this_model(lm, with_config, options, words):
    with pytest.raises(OptionError, match=words):
        hfkit.generate("a", model=lm, **options)
    check_controls(with_config(num_beams=2, guidance_scale=2.0), GenerateOptions(**options | {"guidance_scale": None}))


def test_check_controls_says_once_what_greedy_decoding_ignores(lm, capfd):
    how = {"model": lm, "max_new_tokens": 2, "temperature": 0}
    for _ in range(3):
        hfkit.generate("a", top_h=0.83, min_p=0.1, **how)
    assert capfd.readouterr().err == "hfkit: greedy decoding ignores --min-p, --top-h\n"
    hfkit.generate("a", top_k=0, repetition_penalty=2.0, **how)
    assert capfd.readouterr().err == ""


# padding


CONTEXTUAL = [
    {"sequence_bias": [" very very very=100"]},
    {"sequence_bias": ["tt=100", "e=3"]},
    {"no_repeat_ngram_size": 2, "sequence_bias": ["t=90"]},
    {"bad_words": ["tt", "ee"], "sequence_bias": ["t=20", "e=20"]},
    {"forced_bos_token_id": 70},
    {"encoder_repetition_penalty": 3.0},
    {"repetition_penalty": 3.0},
    {"watermark": True},
]
PROMPTS = [" very", "t", "tt", "e", "a much longer line of text", " very very", "the the"]


@pytest.mark.parametrize("fields", CONTEXTUAL, ids=str)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_needs_equal_lengths_a_text_does_not_depend_on_its_batch(lm, fields, temperature):
    how = {"model": lm, "max_new_tokens": 8, "temperature": temperature, **fields}
    together = hfkit.generate(PROMPTS, seed=4, **how)
    alone = [hfkit.generate(prompt, seed=4 + number, **how) for number, prompt in enumerate(PROMPTS)]
    assert [text.completion for text in together] == [text.completion for text in alone]


@pytest.mark.parametrize(
    "own", [{"min_length": 12}, {"bad_words_ids": [[116, 116]]}, {"no_repeat_ngram_size": 1}], ids=str
)
def test_needs_equal_lengths_looks_at_the_models_own_config(with_config, own):
    """min_length counts the padding, too."""
    lm = with_config(**own)
    assert needs_equal_lengths(lm, GenerateOptions())
    how = {"model": lm, "max_new_tokens": 8, "temperature": 0, "sequence_bias": ["<|endoftext|>=30", "t=30"]}
    together = hfkit.generate(PROMPTS, **how)
    assert [text.completion for text in together] == [hfkit.generate(p, **how).completion for p in PROMPTS]


def test_needs_equal_lengths_of_an_encoder_is_about_its_input(tiny_t5):
    """Its padding would be an n-gram of the input; the output is never padded."""
    lm = hfkit.load(tiny_t5)
    assert not needs_equal_lengths(lm, GenerateOptions(no_repeat_ngram_size=2, forced_bos_token_id=3))
    lm.model.generation_config.encoder_no_repeat_ngram_size = 2
    how = {"model": lm, "max_new_tokens": 9, "sequence_bias": ["t=30", "e=29"]}
    together = hfkit.generate(PROMPTS, **how)
    assert [text.completion for text in together] == [hfkit.generate(p, **how).completion for p in PROMPTS]


def test_needs_equal_lengths_lets_other_prompts_share_a_batch(lm):
    """A word of one token cannot be mistaken for padding."""
    assert needs_equal_lengths(hfkit.load("bundled"), GenerateOptions(sequence_bias=[" the old=1"]))
    assert not needs_equal_lengths(hfkit.load("bundled"), GenerateOptions(sequence_bias=[" the=1"]))
    assert not needs_equal_lengths(lm, GenerateOptions(top_k=3, repetition_penalty=2.0))
    assert not needs_equal_lengths(lm, GenerateOptions(bad_words=["the cat"], watermark=True))
