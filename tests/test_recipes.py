"""A recipe is YAML as people mean it, and can do nothing but set options."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.shell import assert_fails, call

from hfkit.declaration import Options, option
from hfkit.errors import OptionError
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.recipes import read_recipe, read_value, read_values


@dataclass(frozen=True, kw_only=True)
class FileOptions(Options):
    """What `generate` takes besides."""

    output: str | None = option(None, "")
    overwrite: bool = option(False, "")


GROUPS = (ModelOptions, GenerateOptions, FileOptions)


@pytest.fixture
def read(tmp_path):
    """What a recipe of this text sets."""

    def values(text: str | bytes):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_values(path, [*GenerateOptions.names(), *ModelOptions.names()])

    return values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5e-5", 5e-5), ("1E3", 1e3), ("1.e-3", 1e-3), ("-.5", -0.5), ("+2.5", 2.5), (".inf", float("inf"))),
        *(("010", 10), ("-3", -3), ("0", 0), ("true", True), ("False", False), ("[1, 2]", [1, 2]), ("'7'", "7")),
        # what YAML 1.1 would make 480, 90, 16, a date and False of
        *(("8:00", "8:00"), ("1:30", "1:30"), ("0x10", "0x10"), ("2026-01-01", "2026-01-01"), ("no", "no")),
        *((" rain", "rain"), ("' rain'", " rain"), ("END # of it", "END"), ("9" * 5000, "9" * 5000)),
    ],
)
def test_read_values_types(read, text, value):
    """A value has the type that a person means."""
    read_back = read(f"temperature: {text}")["temperature"]
    assert read_back == value and type(read_back) is type(value)
    assert read_value(text) == value


@pytest.mark.parametrize("text", ["", "# nothing\n", "top_p: null", "top_p: ~", "top_p:"])
def test_read_values_null(read, text):
    """Null means that an option is not set."""
    assert read(text) == {}


BOMB = "bad_words: &a [x, x]\n" + "".join(
    f"{name}: &{'bcdefg'[i]} [*{'abcdef'[i]}, *{'abcdef'[i]}]\n" for i, name in enumerate(GenerateOptions.names()[:6])
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\ntop_p: !!python/object/apply:os.system ['touch MARK']", "line 2): a tag"),
        ("top_p: !!python/name:os.system", "line 1): a tag"),
        ("!!python/object/new:os.system [touch MARK]", "line 1): a tag"),
        (BOMB, "line 2): an alias"),
        ("seed: &x 1\ntop_k: *x", "line 2): an alias"),
        ("<<: {seed: 1}", "unknown option '<<'"),
        ("seed: 1\ntop_p: 0.5\nseed: 2", "option 'seed' twice"),
        ("seed: 1\ntemprature: 1", "line 2): did you mean 'temperature'?"),
        ("top-p: 1", "line 1): did you mean 'top_p'?"),
        ("zzz: 1", "line 1): see --help"),
        ("? [a]\n: 1", "line 1): see --help"),
        ("1: 1", "unknown option '1'"),
        ("- seed", "does not list options"),
        ("seed", "does not list options"),
        ("top_p: [", "line 1): "),
        ("seed: 1\n\ttop_p: 1", "line 2): "),
        ("seed: 1\n---\nseed: 2", "line 2): "),
        ("stop_strings: " + "[" * 20_000, "recipe.yaml): "),
        (b"stop_strings: \xff", "byte 15"),
        (b"stop_strings: \x00", "not allowed"),
        ("#" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_read_values_refused(read, text, words, tmp_path, monkeypatch):
    """A bad recipe is refused in one sentence that names the line."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as error:
        read(text)
    assert words in str(error.value) and "recipe.yaml" in str(error.value)
    assert not Path("MARK").exists()


def test_read_values_missing_file(capfdbinary, tmp_path):
    """A recipe that does not exist is a usage error."""
    assert_fails(call(capfdbinary, "generate", "hi", "-c", tmp_path / "none.yaml"), 2, "none.yaml", "no recipe")
    assert_fails(call(capfdbinary, "generate", "hi", "-c", tmp_path), 2, "directory")


@pytest.mark.parametrize("text", ["model: [a, b]", "temperature: {a: 1}", "seed: 5e-5", "seed: [1]", "truncate: 7"])
def test_read_values_shape(capfdbinary, tmp_path, text):
    """A list or mapping where one value belongs is a usage error."""
    (tmp_path / "recipe.yaml").write_text(text)
    assert_fails(
        call(capfdbinary, "generate", "hi", "-c", tmp_path / "recipe.yaml"), 2, text.split(":")[0].replace("_", "-")
    )
    with pytest.raises(OptionError):
        read_recipe(tmp_path / "recipe.yaml", ModelOptions, GenerateOptions)


def test_read_values_lone_text(capfdbinary, tmp_path, tiny):
    """A lone text is a list of one, not a list of its letters."""
    (tmp_path / "recipe.yaml").write_text(f"model: {tiny}\nstop_strings: qz\nsequence_bias: [q=200, z=90]\n")
    result = call(capfdbinary, "generate", "hi", "-c", tmp_path / "recipe.yaml", "-n", 5, "--no-repeat-ngram-size", 2)
    assert result.stdout == b"hiq\n"


@pytest.mark.parametrize("value", ["true", "True", "'yes'", "1"])
def test_read_values_by_flag(tmp_path, capfdbinary, tiny, value):
    """A recipe that somebody else wrote neither runs a model's code nor replaces a file; a flag can, beside it."""
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "output.jsonl"
    recipe.write_text(
        f"model: {tiny}\nmax_new_tokens: 1\noutput: {output}\noverwrite: {value}\ntrust_remote_code: {value}\n"
    )
    output.write_text("ten years")
    result = call(capfdbinary, "generate", "hi", "-c", recipe)
    assert result.returncode == 1 and b"exists: --overwrite replaces it" in result.stderr
    for flag in (b"--overwrite", b"--trust-remote-code"):
        assert b"which only a flag may: it is ignored, add " + flag in result.stderr
    assert output.read_text() == "ten years"
    assert call(capfdbinary, "generate", "hi", "-c", recipe, "--overwrite").returncode == 0
    assert "ten years" not in output.read_text()
    assert not read_recipe(recipe, *GROUPS)[0].trust_remote_code


def test_read_values_flag_off(tmp_path, capfdbinary):
    """The recipe of a run says false, which needs no word."""
    (tmp_path / "recipe.yaml").write_text("trust_remote_code: false\ntop_p: 0.5")
    assert read_recipe(tmp_path / "recipe.yaml", *GROUPS)[1] == GenerateOptions(top_p=0.5)
    assert capfdbinary.readouterr() == (b"", b"")


def test_read_recipe_groups(tmp_path):
    """A recipe gives one instance for each group of options."""
    (tmp_path / "recipe.yaml").write_text("model: gpt2\ntop_p: 0.5\nstop_strings: END\n")
    model, how = read_recipe(tmp_path / "recipe.yaml", ModelOptions, GenerateOptions)
    assert model == ModelOptions(model="gpt2") and how == GenerateOptions(top_p=0.5, stop_strings=["END"])
