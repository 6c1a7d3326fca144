"""Every option is declared once: with transformers' name, a type and a range that hold wherever it is given."""

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import yaml
from support.shell import assert_fails, call

from hfkit.declaration import divide
from hfkit.errors import OptionError
from hfkit.options import SAMPLING, GenerateOptions, ModelOptions, TrainOptions
from hfkit.recipes import read_values

HUGE = 10**9
NAN, INF = float("nan"), float("inf")

# name -> values that are refused by flag, recipe and Python alike, however they are written
BAD = {
    "temperature": [-1, -0.1, NAN, INF, -INF, 1e-45, 1e-9, 101, "hot"],
    "top_k": [-1, 2.5, "many", 2**63, 10**30],
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
def test_range_refused(tmp_path, capfdbinary, name, value):
    """A value out of range is refused by flag, recipe and Python alike."""
    flag, recipe = "--" + name.replace("_", "-"), tmp_path / "recipe.yaml"
    assert_fails(call(capfdbinary, "generate", "hi", f"{flag}={value}"), 2, flag)
    recipe.write_text(yaml.dump({name: value}))
    assert_fails(call(capfdbinary, "generate", "hi", "-c", recipe), 2, flag)
    group = ModelOptions if name in ModelOptions.names() else GenerateOptions
    with pytest.raises(OptionError, match=flag):
        group(**{name: value})
    with pytest.raises(OptionError, match=flag):
        group.read(read_values(recipe, [name]))


GOOD = {
    "temperature": [0, 0.001, 1, 100, np.float32(0.5)],
    "top_k": [0, HUGE, np.int64(3)],
    "top_p": [1e-9, 1],
    "seed": [0, 2**63 - 1],
    "length_penalty": [-2.5, 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD.items() for value in values])
def test_range_includes_its_ends(name, value):
    """The ends of a range belong to it."""
    assert getattr(GenerateOptions(**{name: value}), name) == value


def test_type_whole_number_as_float():
    """A whole number becomes a float where the option is one."""
    options = GenerateOptions(temperature=2, repetition_penalty=2, top_k=2)
    assert [type(value) for value in (options.temperature, options.repetition_penalty, options.top_k)] == [
        float, float, int,
    ]  # fmt: skip
    with pytest.raises(OptionError, match="learning-rate"):
        TrainOptions(learning_rate=10**400)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", True), ("do_sample", 1), ("do_sample", "yes"), ("truncate", None), ("seed", "7")]
)
def test_type_refused(name, value):
    """A value of another type is refused."""
    with pytest.raises(OptionError, match=name.replace("_", "-")):
        GenerateOptions(**{name: value})


def test_type_lone_value():
    """A lone value is a list of one."""
    options = GenerateOptions(stop_strings="END", suppress_tokens=3)
    assert (options.stop_strings, options.suppress_tokens) == (["END"], [3])


def test_divide_unknown_name(tiny):
    """An unknown option is a TypeError that suggests the right name."""
    import hfkit

    with pytest.raises(TypeError, match="'temprature': did you mean 'temperature'"):
        hfkit.generate("hi", model=tiny, temprature=1)
    with pytest.raises(TypeError, match="'quantise': did you mean 'quantize'"):
        hfkit.load(tiny, quantise="int8")
    with pytest.raises(TypeError):
        GenerateOptions(temprature=1)


def test_make_overrides():
    """Overrides replace options, which never change."""
    options = GenerateOptions(top_p=0.5, seed=1)
    assert GenerateOptions.make(options, {"top_p": 0.9}) == GenerateOptions(top_p=0.9, seed=1)
    assert options.top_p == 0.5
    with pytest.raises(FrozenInstanceError):
        options.top_p = 1


def test_make_from_a_name(tmp_path):
    """A text or path stands for the options of the model of that name."""
    assert ModelOptions.make("gpt2") == ModelOptions(model="gpt2") and ModelOptions.make(None) == ModelOptions()
    assert ModelOptions.make(tmp_path, {"dtype": "bfloat16"}) == ModelOptions(model=str(tmp_path), dtype="bfloat16")
    model, how = divide({"top_p": 0.5, "device": "cpu"}, (ModelOptions, "gpt2"), (GenerateOptions, None))
    assert model == ModelOptions(model="gpt2", device="cpu") and how == GenerateOptions(top_p=0.5)


def test_generate_options_upstream():
    """An option with transformers' name exists there."""
    from transformers import GenerationConfig

    from hfkit.inference.controls import NOT_IN_CONFIG

    assert set(NOT_IN_CONFIG) <= set(GenerateOptions.names()) and set(SAMPLING) <= set(GenerateOptions.names())
    assert set(GenerateOptions.names()) - set(NOT_IN_CONFIG) <= set(vars(GenerationConfig()))


def test_options_help_and_defaults():
    """Every option has a help text, and none that generates is set by default."""
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
def test_generate_options_conflicts(values):
    """Options that exclude each other, or cannot be read, are refused before a model is loaded."""
    with pytest.raises(OptionError, match="--" + list(values)[0].replace("_", "-")):
        GenerateOptions(**values)


def test_biases_equals_sign():
    """The text of a bias may contain an equals sign."""
    assert GenerateOptions(sequence_bias=["a=b=-2.5", " c=1"]).biases() == [("a=b", -2.5), (" c", 1)]
