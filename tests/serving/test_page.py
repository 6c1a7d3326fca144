"""The page at /, in a real browser: type, generate, watch the stream, ask for probabilities, compare two."""

import json
import math

import httpx2
import pytest
import torch
from support.browser import CHROMIUM, Browser
from support.servers import serving

import hfkit

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
PROMPT = "The 🙂 old house"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    """The page, open at the size of a desk, with a prompt and a seed."""
    browser.said, browser.asked = [], []
    browser.open(server[0], 1280, 800)
    browser.wait("models.length")
    browser.type("#prompt", PROMPT)
    set_field(browser, "seed", 7)
    set_field(browser, "max_tokens", 12)
    yield browser
    assert not browser.said, "the page has no errors, and breaks no rule of its policy"
    assert all(address.startswith((server[0], "data:")) for address in browser.asked)


def set_field(page, name, value, side=0):
    script = "(field => { field.value = %s; field.oninput() })(document.querySelectorAll('[name=%s]')[%d])"
    page.run(script % (json.dumps(value), name, side))


def generate(page, sides=1):
    """Press the button, wait for the end, and return the text of each side."""
    page.click("#generate")
    page.wait(
        f"document.querySelectorAll('.facts:not([hidden])').length == {sides} && !document.querySelector('.busy')"
    )
    return page.run("[...document.querySelectorAll('.text')].map(text => text.textContent)")


def test_generate(page, story):
    """The text is that of `hfkit generate`, with the prompt in a colour of its own, and it came in a stream."""
    page.run("new MutationObserver(() => (globalThis.steps = (globalThis.steps || 0) + 1))"
             ".observe(document.querySelector('.text'), {subtree: true, childList: true}), 0")  # fmt: skip
    expected = hfkit.generate(PROMPT, model=story, seed=7, max_new_tokens=12)
    assert generate(page) == [str(expected)]
    assert page.run("document.querySelector('.prompt').textContent") == PROMPT
    colours = page.run("['.prompt', '.token'].map(name => getComputedStyle(document.querySelector(name)).color)")
    assert colours[0] != colours[1]
    assert page.run("steps") > 4
    facts = page.run("document.querySelector('.facts').textContent")
    assert facts.startswith("12 tokens · ") and "seed 7" in facts and "cut at the limit" in facts


def test_probabilities(page, story):
    """A click on a token shows what the model thought likely there; a click on another one goes on with that."""
    generate(page)
    tokens = page.run("[...document.querySelectorAll('.token')].map(token => token.textContent)")
    assert len(tokens) == 12
    page.run("document.querySelectorAll('.token')[3].click()")
    before = PROMPT + "".join(tokens[:3])
    words = [token.replace(" ", "Ġ").replace("\n", "Ċ") for token in tokens[:3]]
    ids = story.tokenizer(PROMPT)["input_ids"] + story.tokenizer.convert_tokens_to_ids(words)
    best = story.model(torch.tensor([ids])).logits[0, -1].softmax(-1).topk(10)
    likeliest = dict(zip(map(story.tokenizer.decode, best.indices), best.values.tolist(), strict=True))
    row = "row => [row.children[0].textContent, row.children[1].value]"
    rows = page.run(f"[...document.querySelectorAll('.next button')].map({row})")
    shown = {text.replace("␣", " ").replace("⏎", "\n"): value for text, value in rows}
    assert likeliest.keys() <= shown.keys() and tokens[3] in shown
    assert all(math.isclose(shown[token], likeliest[token], rel_tol=1e-3) for token in likeliest)
    page.click(".next button:not(.chosen)")
    page.wait("document.querySelector('.facts:not([hidden])') && !document.querySelector('.busy')")
    begun = page.run("document.querySelector('#prompt').value")
    assert begun.startswith(before) and begun != before + tokens[3]
    expected = hfkit.generate(begun, model=story, seed=7, max_new_tokens=12)
    assert page.run("document.querySelector('.text').textContent") == str(expected)


def test_compare(page, story, lm):
    """Two models, or two settings of one, side by side."""
    page.click("#compare")
    set_field(page, "temperature", 0, side=1)
    sampled = str(hfkit.generate(PROMPT, model=story, seed=7, max_new_tokens=12))
    greedy = str(hfkit.generate(PROMPT, model=story, temperature=0, max_new_tokens=12))
    assert generate(page, 2) == [sampled, greedy]
    page.run(f"document.querySelectorAll('select')[1].value = {json.dumps(lm.name)}")
    assert generate(page, 2) == [sampled, str(hfkit.generate(PROMPT, model=lm, temperature=0, max_new_tokens=12))]
    page.click("#compare")
    assert page.run("sides.length") == 1


def test_encoder(browser, tiny_t5):
    """A translator, whose tokens have no probabilities here, writes all the same."""
    translator = hfkit.load(tiny_t5)
    with serving(translator) as (address, _):
        browser.open(address)
        browser.wait("models.length")
        set_field(browser, "max_tokens", 6)
        expected = hfkit.generate("Once upon a time", model=translator, max_new_tokens=6)
        assert generate(browser) == ["Once upon a time" + expected.completion]


def test_stop(page):
    """Stop ends the text and keeps what there is."""
    set_field(page, "max_tokens", 400)
    page.click("#generate")
    page.wait("document.querySelectorAll('.token').length > 3")
    page.click("#stop")
    page.wait("document.querySelector('.facts').textContent == 'stopped'")
    assert page.run("document.querySelector('#stop').hidden") and page.run("sides[0].tokens.length") < 400


@pytest.mark.parametrize("dark", [False, True])
def test_phone(browser, server, dark):
    """On a phone nothing is wider than the screen, what is pressed is large enough, and the colours have contrast."""
    browser.open(server[0], 390, 844, dark)
    browser.wait("models.length")
    set_field(browser, "max_tokens", 8)
    generate(browser)
    browser.run("document.querySelector('.token').click()")
    browser.click("#compare")
    assert browser.run("document.documentElement.scrollWidth") == 390
    heights = browser.run(
        "[...document.querySelectorAll('.bar:not([hidden]) button:not([hidden])')].map(e => e.offsetHeight)"
    )
    assert min(heights) >= 44
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) < 0.2) == dark
    for name in (".token:not(.chosen)", ".prompt", ".facts"):
        colour = browser.run(f"getComputedStyle(document.querySelector('{name}')).color")
        card = browser.run("getComputedStyle(document.querySelector('.side')).backgroundColor")
        light, shade = sorted((luminance(colour), luminance(card)), reverse=True)
        assert (light + 0.05) / (shade + 0.05) >= 4.5, name


def luminance(colour: str) -> float:
    """Relative luminance, from 0 to 1, as WCAG defines it, of rgb(r, g, b)."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_key_and_errors(browser, lm):
    """The page asks for a key where one is needed, and shows what the server refuses. A text cannot run code."""
    with serving(lm, api_key="sesame") as (address, _):
        browser.open(address)
        browser.wait("!document.querySelector('#login').hidden")
        browser.type("#key", "sesame")
        browser.click("#login button")
        browser.wait("models.length && document.querySelector('#login').hidden")
        set_field(browser, "max_tokens", 5000)
        generate(browser)
        assert "5000 new ones do not fit" in browser.run("document.querySelector('.facts.error').textContent")
        nasty = "<img src=x onerror=globalThis.bad=1>"
        browser.type("#prompt", nasty)
        set_field(browser, "max_tokens", 8)
        assert generate(browser)[0].startswith(nasty) and browser.run("globalThis.bad") is None
        browser.run(
            "document.body.append(Object.assign(document.createElement('script'), {text: 'globalThis.bad = 1'}))"
        )
        assert browser.run("globalThis.bad") is None, "the policy lets no other script run"


def test_policy(server):
    """The page fetches nothing from elsewhere, and the policy that comes with it allows no more."""
    response = httpx2.get(server[0])
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert all("unsafe" not in value and "http" not in value for value in policy.values())
    assert "http" not in response.text.replace("HTTP", "") and " on" + "click=" not in response.text
