"""Every option is declared once: with transformers' name, a type and a range that hold wherever it is given."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import yaml
from support.shell import assert_fails, call

from hfkit.errors import OptionError
from hfkit.options import SAMPLING, GenerateOptions, ModelOptions, TrainOptions
from hfkit.recipes import read_recipe

HUGE = 10**9
NAN, INF = float("nan"), float("inf")

# name -> values that are refused by flag, recipe and Python alike, however they are written
BAD = {
    "temperature": [-1, -0.1, NAN, INF, -INF, 1e-45, 1e-9, 101, "hot"],
    "top_k": [-1, 2.5, "many"],
    "top_p": [0, -0.1, 1.5, NAN, INF],
    "min_p": [-0.1, 1.5, NAN],
    "top_h": [0, 1.1, NAN],
    "typical_p": [0, 2],
    "epsilon_cutoff": [-1, 2],
    "eta_cutoff": [-1, NAN],
    "repetition_penalty": [0, -1, INF],
    "encoder_repetition_penalty": [0],
    "no_repeat_ngram_size": [-1],
    "max_new_tokens": [0, -1, 1.5],
    "min_new_tokens": [-1],
    "num_beams": [0],
    "length_penalty": [NAN, INF],
    "num_return_sequences": [0, -1, 10**5],
    "guidance_scale": [0, NAN],
    "max_time": [0, -1, INF, NAN],
    "seed": [-1, 2**70, 1.5, "one"],
    "stop_strings": [""],
    "bad_words": [""],
    "suppress_tokens": ["a"],
    "dtype": ["float8"],
    "quantize": ["int2"],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_value_out_of_range_is_refused_by_flag_recipe_and_python(tmp_path, capfdbinary, name, value):
    flag, recipe = "--" + name.replace("_", "-"), tmp_path / "recipe.yaml"
    assert_fails(call(capfdbinary, "generate", "hi", f"{flag}={value}"), 2, flag)
    recipe.write_text(yaml.dump({name: value}))
    assert_fails(call(capfdbinary, "generate", "hi", "-c", recipe), 2, flag)
    group = ModelOptions if name in ModelOptions.names() else GenerateOptions
    with pytest.raises(OptionError, match=flag):
        group(**{name: value})
    with pytest.raises(OptionError, match=flag):
        read_recipe(recipe, ModelOptions, GenerateOptions)


GOOD = {
    "temperature": [0, 0.001, 1, 100, np.float32(0.5)],
    "top_k": [0, HUGE, np.int64(3)],
    "top_p": [1e-9, 1],
    "seed": [0, 2**63 - 1],
    "length_penalty": [-2.5, 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_the_ends_of_a_range_are_in_it(name, value):
    assert getattr(GenerateOptions(**{name: value}), name) == value


def test_a_whole_number_is_a_float_where_that_is_wanted():
    options = GenerateOptions(temperature=2, repetition_penalty=2, top_k=2)
    assert [type(value) for value in (options.temperature, options.repetition_penalty, options.top_k)] == [
        float, float, int,
    ]  # fmt: skip
    with pytest.raises(OptionError, match="learning-rate"):
        TrainOptions(learning_rate=10**400)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", True), ("do_sample", 1), ("do_sample", "yes"), ("truncate", None), ("seed", "7")]
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(OptionError, match=name.replace("_", "-")):
        GenerateOptions(**{name: value})


def test_a_lone_value_is_a_list_of_one():
    options = GenerateOptions(stop_strings="END", suppress_tokens=3)
    assert (options.stop_strings, options.suppress_tokens) == (["END"], [3])


def test_an_unknown_option_is_a_type_error_that_suggests_the_name(tiny):
    import hfkit

    with pytest.raises(TypeError, match="'temprature': did you mean 'temperature'"):
        hfkit.generate("hi", model=tiny, temprature=1)
    with pytest.raises(TypeError, match="'quantise': did you mean 'quantize'"):
        hfkit.load(tiny, quantise="int8")
    with pytest.raises(TypeError):
        GenerateOptions(temprature=1)


def test_overrides_replace_options_which_never_change():
    options = GenerateOptions(top_p=0.5, seed=1)
    assert GenerateOptions.make(options, {"top_p": 0.9}) == GenerateOptions(top_p=0.9, seed=1)
    assert options.top_p == 0.5
    with pytest.raises(FrozenInstanceError):
        options.top_p = 1


def test_an_option_with_transformers_name_exists_there():
    from transformers import GenerationConfig

    from hfkit.inference.controls import OWN

    assert set(OWN) <= set(GenerateOptions.names()) and set(SAMPLING) <= set(GenerateOptions.names())
    assert set(GenerateOptions.names()) - set(OWN) <= set(vars(GenerationConfig()))


def test_every_option_has_a_help_text_and_nothing_is_set_by_default():
    for field in fields(GenerateOptions) + fields(ModelOptions):
        assert field.metadata["help"]
    assert {field.default for field in fields(GenerateOptions)} == {None, False}


@pytest.mark.parametrize(
    "values",
    [
        {"min_new_tokens": 9, "max_new_tokens": 8},
        {"num_beams": 2, "prompt_lookup_num_tokens": 2},
        {"num_return_sequences": 2, "assistant_model": "gpt2"},
        *({"sequence_bias": bias} for bias in ("rain", "=1", "rain=", "rain=wet", "rain=nan", "rain=inf")),
    ],
)
def test_what_cannot_go_together_or_be_read_is_refused_before_a_model_is_loaded(values):
    with pytest.raises(OptionError, match="--" + list(values)[0].replace("_", "-")):
        GenerateOptions(**values)


def test_a_bias_may_be_for_a_text_with_an_equals_sign():
    assert GenerateOptions(sequence_bias=["a=b=-2.5", " c=1"]).biases() == [("a=b", -2.5), (" c", 1)]
