"""The page of `inspect`: where each token looks, to be explored by layer and head, without a request to anywhere."""

import base64

import numpy as np
import pytest
import torch
from support.pages import ATTENTION_SCRIPT, NASTY, Page
from support.shell import call

import hfkit
from hfkit.inference import inspection
from hfkit.inference.inspection import to_page


def weights_of(page: Page) -> tuple[list[int], np.ndarray]:
    """The layers on a page and their weights, (layers, heads, lower triangle), as its script reads them."""
    known = dict(page.attributes)
    layers = [int(layer) for layer in known["data-layers"].split()]
    values = np.frombuffer(base64.b64decode(known["value"]), np.uint8)
    return layers, (values.reshape(len(layers), int(known["data-heads"]), -1) / 255) ** 2


@pytest.mark.parametrize("layer", [None, 1])
def test_to_page_holds_the_weights_of_the_model(tiny_llama, layer):
    found = hfkit.inspect("the cat sat", model=tiny_llama, attention=True)
    page = Page(to_page(found, layer))
    page.assert_alone(script=ATTENTION_SCRIPT)
    page.assert_policy()
    layers, weights = weights_of(page)
    assert layers == ([0, 1] if layer is None else [1])
    for number, name in enumerate(layers):
        for head in range(weights.shape[1]):
            lower = [
                weight for row in range(len(found.words)) for weight in found.attention[name, head, row, : row + 1]
            ]
            assert weights[number, head] == pytest.approx(np.array(lower), abs=1 / 255)


def test_to_page_without_attention_runs_nothing(tiny):
    page = Page(to_page(hfkit.inspect("the cat", model=tiny)))
    page.assert_alone()
    page.assert_policy()
    assert "Where each token looks" not in page.text


def test_to_page_shows_tokens_to_the_letter(tiny):
    found = hfkit.inspect(NASTY[:50], model=tiny, attention=True)
    source = to_page(found)
    page = Page(source)
    page.assert_alone(script=ATTENTION_SCRIPT)
    assert page.text.count(NASTY[:50].replace(" ", "·")) == 2  # by surprise, and to be pointed at
    assert NASTY[:50] in page.text  # the title


def test_to_page_of_a_text_that_is_too_long_says_what_to_do(tiny, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setattr(inspection, "_MOST_WEIGHTS", 100)
    line = ["inspect", "the cat sat", "-m", tiny, "--attention", "-o", tmp_path / "a.html"]
    result = call(capfdbinary, *line)
    assert result.returncode == 1 and b"too many for a page: choose one --layer" in result.stderr
    assert not (tmp_path / "a.html").exists()


def test_probabilities_stand_on_the_right_with_bars(tiny):
    found = hfkit.inspect("the cat", model=tiny, temperature=0.5)
    page = Page(to_page(found))
    bars = [value for name, value in page.attributes if name == "style" and "linear-gradient" in value]
    assert len(bars) == 2 * len(found.following) and all(value.startswith("text-align:right") for value in bars)
    for row, bar in zip(found.following, bars[::2], strict=True):
        assert f" {round(100 * row['probability'])}%,transparent" in bar


def test_draw_attention_of_a_long_text_shows_small_weights(tiny):
    """Under a square-root scale a weight of a hundredth has a tenth of the scale, not a hundredth."""
    from hfkit.reporting import pictures

    drawn = []
    save = pictures.to_png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "to_png", lambda figure: drawn.append(figure) or save(figure))
        pictures.draw_attention(torch.full((1, 1, 3, 3), 0.01), ["a", "b", "c"], None)
    (image,) = drawn[0].axes[0].images
    assert image.norm(0.01) == pytest.approx(0.1) and image.norm(1.0) == 1.0
