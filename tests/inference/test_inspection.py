"""What is shown of a text is what the model computes and transformers' own controls leave, in a form to be read."""

import io
import json
import math
import random
import re

import pytest
import torch
from matplotlib.image import imread
from support.pages import ATTENTION_SCRIPT, NASTY, Page
from support.shell import assert_fails, call
from transformers import AddedToken, AutoModelForCausalLM

import hfkit
from hfkit.cli import inspect
from hfkit.console import printable
from hfkit.errors import HfkitError
from hfkit.inference.inspection import Inspection, Token, readable
from hfkit.models.loading import LanguageModel
from hfkit.reporting import pictures

BOTH = pytest.mark.parametrize("name", ["gpt2", "llama"])
CONTROLS = [
    {"temperature": 0.7}, {"temperature": 2}, {"top_k": 5}, {"top_k": 100_000}, {"top_p": 0.5}, {"top_p": 1},
    {"min_p": 0.3}, {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]  # fmt: skip


@pytest.fixture(scope="module")
def lms(tiny, tiny_llama) -> dict[str, LanguageModel]:
    return {"gpt2": hfkit.load(tiny), "llama": hfkit.load(tiny_llama), "bundled": hfkit.load("bundled")}


# figures


@BOTH
@torch.inference_mode()
def test_inspect_equals_a_plain_pass(lms, name):
    """Surprise and rank are those of a plain forward pass."""
    lm = lms[name]
    for text in ("a", "the cat sat", "雨 über\n"):
        found = hfkit.inspect(text, model=lm)
        ids = lm.tokenizer(text)["input_ids"]
        assert [token.id for token in found.tokens] == ids
        whole = torch.tensor([[lm.tokenizer.bos_token_id, *ids]])
        rows = lm.model(whole).logits[0].double().log_softmax(-1)
        for at, (token, one) in enumerate(zip(found.tokens, ids, strict=True)):
            assert token.bits == pytest.approx(-rows[at, one].item() / math.log(2), rel=1e-4)
            assert token.rank == rows[at].argsort(descending=True).tolist().index(one)
        assert found.bits == pytest.approx(sum(token.bits for token in found.tokens))


def test_inspect_first_token(tiny):
    """A token with nothing before it has no surprise."""
    lm = hfkit.load(tiny)
    first, second = hfkit.inspect("<|endoftext|>a", model=lm).tokens
    assert (first.text, first.bits, first.rank) == ("<|endoftext|>", None, None)
    assert second.bits == hfkit.inspect("a", model=lm).tokens[0].bits
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    found = hfkit.inspect("ab", model=lm, attention=True)
    assert found.tokens[0].bits is None and found.tokens[1].bits > 0 and found.bits == found.tokens[1].bits
    assert found.words == ["a", "b"] and found.attention.shape[-2:] == (2, 2)


def controlled(lm: LanguageModel, text: str, **controls) -> torch.Tensor:
    """The probabilities that transformers would draw the next token from."""
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text)["input_ids"]]])
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    controls = neutral | {name: type(neutral.get(name, 0.0))(value) for name, value in controls.items()}
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=1, output_scores=True, pad_token_id=0,
        return_dict_in_generate=True, **controls,
    )  # fmt: skip
    return output.scores[0][0]


@pytest.mark.parametrize("controls", CONTROLS, ids=str)
@BOTH
def test_inspect_controls(lms, name, controls):
    """What a control leaves is what transformers would sample from."""
    lm = lms[name]
    found = hfkit.inspect("the cat", model=lm, top=60, **controls)
    plain = controlled(lm, "the cat").softmax(-1)
    assert [row["id"] for row in found.following] == plain.argsort(descending=True).tolist()[:60]
    assert [row["probability"] for row in found.following] == pytest.approx(
        plain.sort(descending=True)[0][:60].tolist(), rel=1e-5
    )
    columns = {key: {key.split()[0]: controls[key.split()[0]]} for key in found.left if key != "together"}
    assert len(columns) == len(controls) and ("together" in found.left) == (len(controls) > 1)
    for key, some in (columns | ({"together": controls} if len(controls) > 1 else {})).items():
        expected = controlled(lm, "the cat", **some)
        assert found.left[key] == expected.isfinite().sum()
        shares = [expected.softmax(-1)[row["id"]].item() for row in found.following]
        assert [row[key] for row in found.following] == pytest.approx(shares, abs=1e-6), key


def test_inspect_example(lms):
    """Without a control an example of all four is shown."""
    found = hfkit.inspect("the cat", model=lms["bundled"])
    assert [name.split()[0] for name in found.left] == ["temperature", "top_k", "top_p", "min_p"]
    assert found.left["temperature 0.7"] == lms["bundled"].model.config.vocab_size and found.left["top_k 50"] == 50
    assert len(found.following) == 10


@BOTH
def test_inspect_attention(lms, name, tiny, tiny_llama):
    """Attention is what the model computes eagerly; the model itself stays as it is."""
    lm = lms[name]
    before = lm.model.config._attn_implementation
    found = hfkit.inspect("the cat sat", model=lm, attention=True)
    assert lm.model.config._attn_implementation == before != "eager"
    plain = AutoModelForCausalLM.from_pretrained(tiny if name == "gpt2" else tiny_llama, attn_implementation="eager")
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer("the cat sat")["input_ids"]]
    with torch.inference_mode():
        expected = torch.cat(plain.eval()(torch.tensor([ids]), output_attentions=True).attentions)
    assert found.attention.shape == (2, plain.config.num_attention_heads, len(ids), len(ids))
    assert torch.equal(found.attention, expected)
    assert len(found.words) == len(ids) and found.words[1:] == [token.text for token in found.tokens]
    assert hfkit.inspect("the cat sat", model=lm).attention is None


# to be read


@pytest.mark.parametrize("name", ["gpt2", "llama", "bundled"])
def test_readable_loses_nothing(lms, name):
    """Any token is readable, and nothing of the text is lost. Its signs and bytes, taken back, are the text."""
    draw = random.Random(0)
    signs = {"·": " ", "↵": "\n", "⇥": "\t", "␍": "\r"}
    for _ in range(30):
        text = "a" + "".join(draw.choices(" \n\t\raé雨你🙂\x00ſwind", k=15))
        raw = b""
        for token in hfkit.inspect(text, model=lms[name]).tokens:
            assert token.text and not set(token.text) & set(" \n\t\r▁ĠĊ") and "<0x" not in token.text
            part = re.fullmatch(r"⟨((?:[0-9a-f]{2} ?)+)⟩", token.text)
            raw += bytes.fromhex(part[1]) if part else "".join(signs.get(c, c) for c in token.text).encode()
        assert raw.decode().removeprefix(" ") == text  # SentencePiece puts a space before it


def test_readable_parts_of_characters(lms):
    """A part of a character is shown as its bytes, a whole one as itself."""
    for name in ("gpt2", "llama"):
        assert [token.text for token in hfkit.inspect("雨", model=lms[name]).tokens][-3:] == ["⟨e9⟩", "⟨9b⟩", "⟨a8⟩"]
    assert readable(lms["bundled"].tokenizer, lms["bundled"].tokenizer(" the")["input_ids"][0]) == "·the"


def test_readable_added_tokens(tiny_llama):
    """A letter that was added to a SentencePiece tokenizer is not taken for a byte."""
    lm = hfkit.load(tiny_llama)
    lm.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in ("é", "▁über")])
    lm.model.resize_token_embeddings(len(lm.tokenizer) + 1, mean_resizing=False)
    size = len(lm.tokenizer)
    assert [readable(lm.tokenizer, size - back) for back in (2, 1)] == ["é", "·über"]
    # The model has an output more than the tokenizer has tokens: it may be among the likeliest.
    following = hfkit.inspect("a", model=lm, top=1000).following
    assert f"⟨token {size}⟩" in [row["text"] for row in following]


# at a shell


def test_inspect_json(tiny, capfdbinary):
    """--json has every number."""
    result = call(capfdbinary, "inspect", "a 雨\n", "-m", tiny, "--top-k", 3, "--json")
    assert result.returncode == 0 and result.stderr == b""
    row = json.loads(result.stdout, parse_constant=pytest.fail)
    found = hfkit.inspect("a 雨\n", model=tiny, top_k=3)
    assert row == found.to_dict() and row["left"] == {"top_k 3": 3}
    assert [token["text"] for token in row["tokens"]][:2] == ["a", "·"]
    assert {"text", "id", "bits", "rank"} == set(row["tokens"][0]) and len(row["next"]) == 10


def test_inspect_to_a_pipe(tiny, capfdbinary):
    """Without a terminal there are plain columns."""
    lines = call(capfdbinary, "inspect", "a b\n", "-m", tiny, "--top", 3).stdout.decode().splitlines()
    found = hfkit.inspect("a b\n", model=tiny, top=3)
    assert lines.pop(0).split() == ["bits", "rank", "token"]
    for line, token in zip(lines, found.tokens, strict=False):
        assert line.split() == [f"{token.bits:.2f}", str(token.rank), token.text]
    rest = "\n".join(lines[len(found.tokens) :])
    assert f"{found.bits:.1f} bits in 4 tokens" in rest and "\x1b" not in rest
    assert all(f"{row['probability']:.2%}" in rest for row in found.following)
    assert call(capfdbinary, "inspect", "-m", tiny).returncode == 1  # stdin is empty


def test_characters_join_the_parts_of_one(lms):
    """A model without the character reads its bytes; a reader sees the character, with their surprise together."""
    found = hfkit.inspect("a雨🙂b\x00é", model=lms["gpt2"])
    assert [part.text for part in found.characters] == ["a", "雨", "🙂", "b", "\x00", "é"]
    assert [len(part.tokens) for part in found.characters] == [1, 3, 4, 1, 1, 2]
    assert [token for part in found.characters for token in part.tokens] == found.tokens
    assert found.characters[1].bits == pytest.approx(sum(token.bits for token in found.tokens[1:4]))
    lines = str(found).splitlines()
    assert [line.split()[2:] for line in lines[2:5]] == [["⟨e9⟩"], ["⟨9b⟩"], ["⟨a8⟩", "雨"]]
    page = Page(found._repr_html_())
    assert "雨" in page.text and "⟨" not in page.text.partition("bits in")[0]


@pytest.mark.parametrize("raw", [b"\xe9\x9b", b"\x9b\xa8", b"\xe9a", b"\xf0\x9f\x99", b"\xff"])
def test_characters_keep_bytes_that_make_no_character(lms, raw):
    """Where a character is cut off, its bytes stay as they are."""
    vocabulary = lms["llama"].tokenizer.get_vocab()
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in raw]
    tokens = [Token(readable(lms["llama"].tokenizer, token), token, 1.0, 0) for token in ids]
    found = Inspection(model="m", tokens=tokens, following=[], left={}, words=[])
    assert [part.text for part in found.characters] == [token.text for token in tokens]
    assert [part.tokens for part in found.characters] == [[token] for token in tokens]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_inspect_on_a_terminal(tiny, monkeypatch):
    """On a terminal tokens are coloured, and control characters are harmless."""
    from hfkit.options import InspectOptions, ModelOptions

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    inspect.inspect.__wrapped__(ModelOptions(model=tiny), InspectOptions(), "a cat \x1b[2J[red]b\nc", json=False)
    raw = screen.getvalue()
    shown = re.sub(r"\x1b\[[0-9;]*m", "", raw)
    assert "\x1b" not in shown and len(shown) < len(raw)
    lines = [line.rstrip() for line in shown.splitlines()]
    assert lines[0] == "a cat \\x1b[2J[red]b↵" and lines[1] == "c"


def test_write_inspection_without_colours_shows_the_figures(tiny, monkeypatch):
    """NO_COLOR must not lose the surprise."""
    from hfkit.options import InspectOptions, ModelOptions

    monkeypatch.setattr("sys.stdout", screen := Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    inspect.inspect.__wrapped__(ModelOptions(model=tiny), InspectOptions(), "a b", json=False)
    lines = screen.getvalue().splitlines()
    found = hfkit.inspect("a b", model=tiny)
    assert [line.split()[0] for line in lines[:4]] == ["bits", *(f"{token.bits:.2f}" for token in found.tokens)]


def test_to_page_is_alone(tiny, tmp_path, capfdbinary):
    """A page needs no network and runs no script of the text."""
    lm = hfkit.load(tiny)
    lm.tokenizer.add_tokens(["<script>"])
    lm.model.resize_token_embeddings(len(lm.tokenizer), mean_resizing=False)
    lm.model.lm_head.weight.data[257] = lm.model.lm_head.weight.data[:257].mean(0)
    lm.model.save_pretrained(tmp_path / "<script>model"), lm.tokenizer.save_pretrained(tmp_path / "<script>model")
    line = ["inspect", NASTY[:50], "-m", tmp_path / "<script>model", "--top", 258]
    result = call(capfdbinary, *line, "--attention", "-o", tmp_path / "page.html")
    assert result.returncode == 0 and result.stderr.decode() == f"hfkit: written: {tmp_path / 'page.html'}\n"
    page = Page((tmp_path / "page.html").read_text())
    page.assert_alone(script=ATTENTION_SCRIPT)
    found = hfkit.inspect(NASTY[:50], model=str(tmp_path / "<script>model"), top=258)
    assert "<script>" in [token.text for token in found.tokens]  # one token
    assert "".join(token.text for token in found.tokens) in page.text
    cells = page.tables[0][1:]
    assert [row[0] for row in cells] == [printable(row["text"]) for row in found.following]
    assert ["<script>" in row for row in cells].count(True) == 1
    for token in found.tokens:  # a finger on it tells the figures
        assert ("title", f"token {token.id}: {token.bits:.2f} bits, rank {token.rank}") in page.attributes


def test_inspection_repr_html(lms):
    """A notebook shows the same as the page."""
    found = hfkit.inspect(NASTY[:50], model=lms["gpt2"], temperature=0.5)
    part = Page(found._repr_html_())
    part.assert_alone()
    assert NASTY[:50].replace(" ", "·") in part.text and f"{found.bits:.1f} bits" in part.text
    head, *rows = part.tables[0]
    assert len(head) == 3 and "temperature 0.5" in head[2] and len(rows) == 10
    assert [row[1] for row in rows] == [f"{row['probability']:.2%}" for row in found.following]
    strengths = [float(v[26:-1]) for n, v in part.attributes if n == "style" and v.startswith("background:rgba(220,")]
    by_surprise = sorted(zip([token.bits for token in found.tokens], strengths, strict=True))
    assert [strength for _, strength in by_surprise] == sorted(strengths) and max(strengths) <= 0.8


def test_inspection_str(lms):
    """It prints as a table, and its repr has no arrays."""
    found = hfkit.inspect("the cat", model=lms["gpt2"], attention=True)
    lines = str(found).splitlines()
    assert lines.pop(0).split() == ["bits", "rank", "token"]
    for line, token in zip(lines, found.tokens, strict=False):
        assert line.split() == [f"{token.bits:.2f}", str(token.rank), token.text]
    assert lines[len(found.tokens)] == f"{found.bits:.1f} bits in 7 tokens under {found.model}"
    assert [line.split()[-1] for line in lines[-10:]] == [row["text"] for row in found.following]
    assert "tensor" not in repr(found) and "attention" not in repr(found)


def test_language_model_repr(lms):
    """A language model is shown on one line."""
    name = lms["gpt2"].name
    assert repr(lms["gpt2"]) == f"LanguageModel({name!r}: 35,744 parameters, float32 on cpu)"
    model, tokenizer = lms["gpt2"]
    assert model is lms["gpt2"].model and tokenizer is lms["gpt2"].tokenizer


def test_inspection_control_characters(lms):
    """Control characters are shown as escapes on a page."""
    page = hfkit.inspect("a\x1b\x00b", model=lms["gpt2"])._repr_html_()
    assert "\x1b" not in page and "\x00" not in page and "\\x1b" in page


# pictures


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn."""
    drawn, draw = [], pictures.to_png
    monkeypatch.setattr(pictures, "to_png", lambda figure: drawn.append(figure) or draw(figure))
    return drawn


@pytest.mark.parametrize("layer", [None, 1])
def test_draw_attention_heads(lms, figures, layer):
    """Every head is drawn with its number and the tokens along it."""
    found = hfkit.inspect("the cat", model=lms["llama"], attention=True)
    png = pictures.draw_attention(found.attention, found.words, layer)
    assert imread(io.BytesIO(png)).ndim == 3
    heads = [axes for axes in figures[0].axes if axes.images and axes.get_title()]
    expected = [(one, head) for one in ([0, 1] if layer is None else [1]) for head in range(4)]
    assert [axes.get_title() for axes in heads] == [f"layer {one}, head {head}" for one, head in expected]
    for axes, (one, head) in zip(heads, expected, strict=True):
        assert torch.equal(torch.tensor(axes.images[0].get_array().data), found.attention[one, head])
        assert axes.images[0].get_clim() == (0, 1)  # one scale for all
    assert [label.get_text() for label in heads[0].get_yticklabels()] == found.words
    assert [label.get_text() for label in heads[-1].get_xticklabels()] == found.words


def test_draw_attention_tokens(lms, figures, recwarn):
    """Any token is drawn, and of many only some are named.

    matplotlib takes $...$ for a formula, and lacks most scripts.
    """
    found = hfkit.inspect("$x$", model=lms["gpt2"], attention=True)
    words = ["$\\nonsense{$", "雨", "\x00", "🙂"]
    pictures.draw_attention(found.attention, words, None)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == [
        *map(printable, words)
    ] and not recwarn.list
    long = hfkit.inspect("the cat sat " * 5, model=lms["gpt2"], attention=True)
    pictures.draw_attention(long.attention, long.words, None)
    labels = [label.get_text() for label in figures[1].axes[0].get_yticklabels()]
    assert len(long.words) > 48 and labels == [printable(word) for word in long.words[::2]]  # room for every second


def test_inspect_output(tiny, tmp_path, capfdbinary, monkeypatch):
    """A page is written unless a picture is asked for, and neither over another file."""
    monkeypatch.chdir(tmp_path)
    line = ["inspect", "the cat", "-m", tiny, "--attention"]
    result = call(capfdbinary, *line)
    assert (result.returncode, result.stderr) == (0, b"hfkit: written: attention.html\n")
    assert (tmp_path / "attention.html").read_text().lstrip().startswith("<!doctype html>")
    assert_fails(call(capfdbinary, *line), 1, "attention.html exists", "--overwrite")
    line += ["-o", "attention.png"]
    assert call(capfdbinary, *line).returncode == 0
    first = (tmp_path / "attention.png").read_bytes()
    assert imread(io.BytesIO(first)).size
    assert_fails(call(capfdbinary, *line), 1, "attention.png exists", "--overwrite")
    assert call(capfdbinary, *line, "--layer", 1, "--overwrite").returncode == 0
    assert (tmp_path / "attention.png").read_bytes() != first
    assert call(capfdbinary, *line, "-o", "new/page.html").returncode == 0 and (tmp_path / "new/page.html").exists()
    assert not list(tmp_path.glob("**/.*"))


# bad input


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--top-p", 2], 2, "--top-p"),
        (["--temperature", 0], 2, "--temperature"),
        (["--top", 0], 2, "--top"),
        (["--layer", 1], 2, "--attention"),
        (["-o", "a.jpg"], 2, ".png or .html"),
        (["-o", "a.png"], 2, "--attention"),
        (["-o", "/proc/none/a.html"], 1, "cannot write"),
    ],
)
def test_check_output(tiny, capfdbinary, monkeypatch, flags, code, words):
    """A bad option is one line before a model is loaded."""
    monkeypatch.setattr("hfkit.inference.inspection.inspect", None)
    assert_fails(call(capfdbinary, "inspect", "a", "-m", tiny, *flags), code, words)


def test_inspect_errors(tiny, tiny_t5, capfdbinary, tmp_path):
    """What cannot be inspected is one line."""
    assert_fails(call(capfdbinary, "inspect", "", "-m", tiny), 2, "give a text to inspect")
    with pytest.raises(HfkitError, match="nothing to inspect"):
        hfkit.inspect("", model=tiny)
    assert_fails(call(capfdbinary, "inspect", "a" * 64, "-m", tiny), 1, "65 tokens", "64")
    assert_fails(call(capfdbinary, "inspect", "a\udcff", "-m", tiny), 2, "UTF-8")
    assert_fails(call(capfdbinary, "inspect", "a", "-m", tiny_t5), 1, "encoder")
    assert_fails(call(capfdbinary, "inspect", "a", "-m", tmp_path / "none"), 1, "none")
    line = ["inspect", "a", "-m", tiny, "--attention", "--layer", 2, "-o", tmp_path / "a.png"]
    assert_fails(call(capfdbinary, *line), 2, "--layer is 2", "0 to 1")
    assert not (tmp_path / "a.png").exists()


def test_inspect_attention_of_mamba(tmp_path, tiny):
    """A model without attention says so."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=1, expand=1)
    lm = LanguageModel(MambaForCausalLM(config).eval(), hfkit.load(tiny).tokenizer)
    assert len(hfkit.inspect("ab", model=lm).tokens) == 2
    with pytest.raises(HfkitError, match="attention"):
        hfkit.inspect("ab", model=lm, attention=True)
