"""A recipe is YAML as people mean it, and can do nothing but set options."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from support.shell import assert_fails, call

from hfkit.declaration import Options, option
from hfkit.errors import OptionError
from hfkit.options import GenerateOptions, ModelOptions
from hfkit.recipes import read_values


@dataclass(frozen=True, kw_only=True)
class Everything(Options):
    """An option of each kind."""

    rate: float | None = option(None, "")
    count: int | None = option(None, "")
    text: str | None = option(None, "")
    chosen: bool | None = option(None, "")
    counts: list[int] | None = option(None, "")
    texts: list[str] | None = option(None, "")


@pytest.fixture
def read(tmp_path):
    """What a recipe of this text sets."""

    def values(text: str | bytes, group: type[Options] = GenerateOptions):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_values(path, [*group.names(), *ModelOptions.names()])

    return values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("rate", text, float(text)) for text in ("5e-5", "1E3", "1.e-3", "-.5", "+2.5", "3")),
        *(("count", "010", 10), ("count", "-3", -3), ("count", "0", 0), ("count", "'7'", 7), ("text", "7", "7")),
        *(("chosen", "true", True), ("chosen", "False", False), ("chosen", "null", None), ("text", "~", None)),
        *(("counts", "[1, 2]", [1, 2]), ("counts", "3", [3]), ("texts", "[1, b]", ["1", "b"]), ("texts", "3", ["3"])),
        # what YAML 1.1 would make 480, 90, 16, a date and False of
        *(("text", text, text) for text in ("8:00", "1:30", "0x10", "2026-01-01", "no", "9" * 5000, ".inf")),
        *(("text", " rain", "rain"), ("text", "' rain'", " rain"), ("text", "END # of it", "END")),
    ],
)
def test_read_values_types(read, name, text, value):
    """A value has the type that a person means."""
    read_back = getattr(Everything.read(read(f"{name}: {text}", Everything)), name)
    assert read_back == value and type(read_back) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        *(("rate", text, "a number") for text in ("8:00", "hot", "true", "[1, 2]", "{a: 1}")),
        *(("rate", text, "finite") for text in ("inf", "nan")),
        *(("count", text, "a whole number") for text in ("5e-5", "1.0", "0x10", "x")),
        *(("text", text, "a text") for text in ("[a]", "{a: b}")),
        *(("chosen", text, "true or false") for text in ("no", "1", "yes")),
        *(("counts", text, "a list, each a whole number") for text in ("[1, a]", "x", "[[1]]")),
        *(("texts", text, "a list, each a text") for text in ("{a: 1}", "[[a]]", "[{a: 1}]")),
        *(("texts", text, "not be empty") for text in ("['']", "''")),
        *(("text", text, why) for text, why in (("''", "not be empty"), (r'"\ud800"', "not UTF-8 text"))),
    ],
)
def test_read_refuses_other_types(read, name, text, wanted):
    """A value of another type is one sentence that says what the option takes."""
    with pytest.raises(OptionError, match=rf"--{name} is .*: it (must be|must|is) {wanted}"):
        Everything.read(read(f"{name}: {text}", Everything))


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
    group = ModelOptions if text.startswith("model") else GenerateOptions
    with pytest.raises(OptionError):
        group.read(read_values(tmp_path / "recipe.yaml", group.names()))


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
    assert not read_values(recipe, [*ModelOptions.names(), "max_new_tokens", "output", "overwrite"]).keys() & {
        "trust_remote_code",
        "overwrite",
    }


def test_read_values_flag_off(tmp_path, capfdbinary):
    """The recipe of a run says false, which needs no word."""
    (tmp_path / "recipe.yaml").write_text("trust_remote_code: false\ntop_p: 0.5")
    values = read_values(tmp_path / "recipe.yaml", ["top_p", "trust_remote_code"])
    assert GenerateOptions.read(values) == GenerateOptions(top_p=0.5)
    assert capfdbinary.readouterr() == (b"", b"")


def test_read_groups(read):
    """A recipe sets options of several groups."""
    values = read("model: gpt2\ntop_p: 0.5\nstop_strings: END\n")
    assert ModelOptions.read({"model": values.pop("model")}) == ModelOptions(model="gpt2")
    assert GenerateOptions.read(values) == GenerateOptions(top_p=0.5, stop_strings=["END"])
