"""Texts that are written together: each as if it were alone, and as `hfkit generate` writes it."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from support.servers import Written, wait_until, write
from transformers import LogitsProcessor, LogitsProcessorList, MistralConfig, MistralForCausalLM, set_seed

import hfkit
from hfkit.errors import NotFiniteError
from hfkit.inference import batches
from hfkit.inference.text import fit_prompt
from hfkit.models.loading import LanguageModel
from hfkit.options import GenerateOptions
from hfkit.serving import engine as engines
from hfkit.serving.cache import SHORTEST_PREFIX, Window
from hfkit.serving.engine import SoloEngine
from hfkit.serving.reading import Prompts
from hfkit.serving.rows import UnavailableError, Wishes
from hfkit.serving.steps import StepEngine, make_engine

CONTROLS = [
    {}, {"temperature": 0}, {"temperature": 1.7, "top_k": 0}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.8},
    {"repetition_penalty": 1.4}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}, {"bad_words": ["a", "e"]},
    {"sequence_bias": ["th=4"]}, {"stop_strings": ["e", "ing"]}, {"temperature": 0, "stop_strings": ["t"]},
    {"guidance_scale": 1.5, "negative_prompt": "no"}, {"eta_cutoff": 0.01}, {"suppress_tokens": [5, 6]},
]  # fmt: skip
WORDS = "the cat and a house in the rain of old".split()


@pytest.fixture
def start():
    """Engines that end with the test."""
    started = []

    def make(lm, kind=make_engine):
        started.append(kind(lm))
        return started[-1]

    yield make
    for engine in started:
        engine.stop()


def draw(rng: random.Random, most: int = 10) -> tuple[str, GenerateOptions]:
    prompt = " ".join(rng.choices(WORDS, k=rng.randrange(1, 7)))
    return prompt, GenerateOptions(
        **rng.choice(CONTROLS), max_new_tokens=rng.randrange(6, most), seed=rng.randrange(99)
    )


def assert_same(result, expected) -> None:
    completion = result.completion
    assert (completion.text, completion.finish_reason, len(completion.tokens)) == (
        expected.completion, expected.finish_reason, expected.tokens,
    )  # fmt: skip
    assert completion.logprob == pytest.approx(expected.logprob, abs=1e-3)


LIMITS = [("lm", 16), ("llama", 16), ("story", 8), pytest.param("story", 200, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("model", "count"), LIMITS)
def test_texts_are_those_of_generate(request, start, model, count):
    """Whatever joins and leaves beside them: all controls, at random times."""
    lm, rng = request.getfixturevalue(model), random.Random(1)
    engine = start(lm)
    cases = [draw(rng) for _ in range(count)]
    texts = [Written(lm, prompt, options, Wishes(streams=True)) for prompt, options in cases]
    for begin in range(0, len(texts), 5):
        engine.submit([text.row for text in texts[begin : begin + 5]])
        wait_until(lambda: engine.waiting < 5)
    for text, (prompt, options) in zip(texts, cases, strict=True):
        result = text.result()
        assert_same(result, hfkit.generate(prompt, model=lm, options=options))
        assert "".join(piece.text for piece in text.pieces) == result.completion.text


def test_texts_of_other_architectures(start, tiny_t5, tmp_path_factory, lm):
    """A window that slides; an encoder, and beams, one after another."""
    set_seed(4)
    config = MistralConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    cases = [(LanguageModel(model, lm.tokenizer), {}, StepEngine), (hfkit.load(tiny_t5), {}, SoloEngine)]
    for lm, how, kind in cases:
        engine = start(lm)
        assert type(engine) is kind
        options = [GenerateOptions(max_new_tokens=12, seed=seed, **how) for seed in range(6)]
        prompts = ["the cat and the house in the rain"[: 5 + 4 * seed] for seed in range(6)]
        for result, prompt, each in zip(write(engine, lm, prompts, options), prompts, options, strict=True):
            assert_same(result, hfkit.generate(prompt, model=lm, options=each))


def test_a_prompt_is_computed_once(start, story):
    """For all samples of it, and as much of it as a later one begins with."""
    engine = start(story)
    prompt = "There was a house at the end of the road, and nobody lived in it. " * 4
    ids = story.tokenizer(prompt)["input_ids"]
    assert len(ids) > 2 * SHORTEST_PREFIX
    options = [GenerateOptions(max_new_tokens=4, seed=seed) for seed in range(5)]
    same = write(engine, story, [prompt] * 5, options)
    assert engine.prompt_tokens_read == len(ids) and engine.prompt_tokens == 5 * len(ids)
    longer = [prompt + "One night", prompt + "Then a light", prompt]
    more = write(engine, story, longer, options[:3])
    news = sum(len(story.tokenizer(text)["input_ids"]) - len(ids) for text in longer)
    assert engine.prompt_tokens_read - len(ids) <= news + 3  # the last token of each is always computed
    for result, text, each in zip(same + more, [prompt] * 5 + longer, options + options[:3], strict=True):
        assert_same(result, hfkit.generate(text, model=story, options=each))


def test_prompts_that_begin_alike_wait_for_the_first(start, story):
    """What they share is computed once even if they come together."""
    engine = start(story)
    common = "It was a dark night, and the wind was loud in the trees of the old garden by the river. " * 2
    prompts = [common + word for word in ("A dog", "The moon", "She said")]
    write(engine, story, prompts, [GenerateOptions(max_new_tokens=3, seed=1)] * 3)
    lengths = [len(story.tokenizer(text)["input_ids"]) for text in prompts]
    assert engine.prompt_tokens_read < sum(lengths) - min(lengths)


def test_prompts_that_come_together_are_read_together(start, lm, monkeypatch):
    """An idle engine waits for rows that are being made, but not for long; a busy one does not."""
    monkeypatch.setattr(engines, "_GATHER", 60)
    counts, advance = [], Prompts.advance
    monkeypatch.setattr(Prompts, "advance", lambda *args: counts.append(args[0].count) or advance(*args))
    submitted, step = threading.Event(), Window.step
    monkeypatch.setattr(Window, "step", lambda *args: submitted.wait(60) and step(*args))
    engine = start(lm)
    first, second, third, last = (
        Written(lm, text, GenerateOptions(max_new_tokens=30)) for text in ("a", "bc", "d", "e")
    )
    with engine.expecting():
        engine.submit([first.row])
        time.sleep(0.2)
        assert (engine.waiting, counts) == (1, [])
        engine.submit([second.row])
    wait_until(lambda: counts)
    assert counts == [3]
    with engine.expecting():
        engine.submit([third.row])
        submitted.set()
        third.result()
    first.result(), second.result()
    monkeypatch.setattr(engines, "_GATHER", 0.1)
    with engine.expecting():
        engine.submit([last.row])
        last.result()


def test_a_long_prompt_does_not_stop_what_is_being_written(start, story):
    """Between any two parts of it, the other texts get a token each."""
    engine, order = start(story), []
    emitted = Written(story, "Once", GenerateOptions(max_new_tokens=300, seed=1, min_new_tokens=300))
    take, advance = emitted.row.take, Prompts.advance
    emitted.row.take = lambda token: order.append("token") or take(token)

    def note_part(prompts, count):
        order.append("part" if len(prompts.rows[0].request.ids) > 300 else "short")
        return advance(prompts, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prompts, "advance", note_part)
        engine.submit([emitted.row])
        wait_until(lambda: len(emitted.row.tokens) > 3)
        long = Written(story, "and so on " * 130, GenerateOptions(max_new_tokens=2, seed=1))
        engine.submit([long.row])
        long.result()
    emitted.row.is_cancelled = True
    parts = [place for place, what in enumerate(order) if what == "part"]
    assert len(parts) > 4 and all("token" in order[a:b] for a, b in zip(parts, parts[1:], strict=False))


def test_rows_that_are_given_up_leave(start, story):
    engine = start(story)
    rows = [Written(story, "Once", GenerateOptions(max_new_tokens=400, min_new_tokens=400, seed=k)) for k in range(9)]
    engine.submit([text.row for text in rows])
    wait_until(lambda: engine.running == 9 and all(text.row.tokens for text in rows))
    for text in rows[::2]:
        text.row.is_cancelled = True
    wait_until(lambda: engine.running == 4)
    for text in rows:
        text.row.is_cancelled = True
    wait_until(lambda: engine.running == 0)
    assert engine._window.starts == [] and engine._window.cache.layers[0].keys is None
    assert all(text.events.empty() for text in rows)


def test_time_limit_ends_a_text_with_what_there_is(start, story):
    engine = start(story)
    options = GenerateOptions(max_new_tokens=400, min_new_tokens=400, seed=1)
    text = Written(story, "Once", options, seconds=0.1)
    engine.submit([text.row])
    result = text.result().completion
    assert result.finish_reason == "length" and 0 < len(result.tokens) < 400
    options = replace(options, max_new_tokens=len(result.tokens), min_new_tokens=None)
    alone = hfkit.generate("Once", model=story, options=options).completion
    assert alone.startswith(result.text[:-1])
    late = Written(story, "Once", options, seconds=-1)
    engine.submit([late.row])
    with pytest.raises(UnavailableError, match="no time"):
        late.result()


@pytest.mark.parametrize("model", ["lm", "tiny_t5"])
def test_stop_answers_all(request, model):
    lm = request.getfixturevalue(model)
    lm = hfkit.load(lm) if isinstance(lm, str) else lm
    engine = make_engine(lm)
    options = GenerateOptions(max_new_tokens=50, min_new_tokens=50, seed=1)
    texts = [Written(lm, "the", options) for _ in range(80)]
    engine.submit([text.row for text in texts])
    wait_until(lambda: engine.running)
    engine.stop()
    outcomes = []
    for text in texts:
        try:
            outcomes.append(type(text.result()).__name__)
        except UnavailableError:
            outcomes.append("told")
    assert len(outcomes) == 80 and "told" in outcomes
    with pytest.raises(UnavailableError, match="stopping"):
        engine.submit([texts[0].row])


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        raise ValueError("a control that fails")


def test_an_error_of_one_text_leaves_the_others(start, lm):
    engine = start(lm)
    options = [GenerateOptions(max_new_tokens=8, seed=k) for k in range(3)]
    texts = [Written(lm, "the cat", each) for each in options]
    texts[1].row.processors, texts[1].row.kind = LogitsProcessorList([Failing()]), texts[1].row
    engine.submit([text.row for text in texts])
    with pytest.raises(ValueError, match="a control that fails"):
        texts[1].result()
    for k in (0, 2):
        assert_same(texts[k].result(), hfkit.generate("the cat", model=lm, options=options[k]))


@pytest.mark.parametrize("name", ["step", "add"])
def test_an_error_of_a_step_ends_its_texts_and_no_more(start, lm, monkeypatch, name):
    engine, function = start(lm), getattr(Window, name)
    monkeypatch.setattr(Window, name, lambda *_: (_ for _ in ()).throw(RuntimeError("injected")))
    text = Written(lm, "the cat", GenerateOptions(max_new_tokens=8, seed=1))
    engine.submit([text.row])
    with pytest.raises(RuntimeError, match="injected"):
        text.result()
    monkeypatch.setattr(Window, name, function)
    options = GenerateOptions(max_new_tokens=8, seed=2)
    (result,) = write(engine, lm, ["the cat"], [options])
    assert_same(result, hfkit.generate("the cat", model=lm, options=options))
    assert engine.failure is None


def test_a_lost_device_is_told(start, lm, monkeypatch):
    engine = start(lm)
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(Window, "step", lambda *_: (_ for _ in ()).throw(lost))
    text = Written(lm, "the cat", GenerateOptions(max_new_tokens=8, seed=1))
    engine.submit([text.row])
    with pytest.raises(torch.AcceleratorError):
        text.result()
    assert "illegal memory access" in engine.failure
    with pytest.raises(UnavailableError, match="illegal memory"):
        engine.submit([Written(lm, "the", GenerateOptions(seed=1)).row])


def test_values_that_are_not_numbers(start, tiny):
    lm = hfkit.load(tiny)
    lm.model.transformer.ln_f.weight.data[0] = torch.nan
    with pytest.raises(NotFiniteError):
        write(start(lm), lm, ["the"], [GenerateOptions(temperature=0, max_new_tokens=3, seed=1)])


def test_scores_of_the_prompt(start, lm):
    """They are the model's own, computed here in one pass, in whatever parts the engine reads the prompt."""
    engine = start(lm)
    engine._busy_tokens = engine._idle_tokens = 7
    options, prompt = GenerateOptions(temperature=0, max_new_tokens=4, seed=1), "the cat and the house in the rain"
    (result,) = write(engine, lm, [prompt], [options], Wishes(top=3, scores_prompt=True))
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"] + result.completion.tokens])
    with torch.inference_mode():
        expected = lm.model(ids).logits[0].log_softmax(-1)
    tokens = [*result.prompt_tokens, *result.tokens]
    assert tokens[0] is None and len(tokens) == ids.shape[1]
    for place, token in enumerate(tokens[1:]):
        assert token.id == ids[0, place + 1]
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-4)
        values, best = expected[place].topk(3)
        assert [each for each, _ in token.top[:3]] == best.tolist()
        assert [value for _, value in token.top[:3]] == pytest.approx(values.tolist(), abs=1e-4)
        assert dict(token.top)[token.id] == token.logprob  # the very same number


def test_scores_of_a_prompt_are_those_that_each_row_asked_for(start, lm):
    """Rows with one prompt, which is read once for all of them."""
    engine, prompt = start(lm), "the cat and the house"
    wishes = [Wishes(top=3, scores_prompt=True), Wishes(top=5), Wishes(top=1, scores_prompt=True),
              Wishes(top=0, scores_prompt=True), Wishes(top=3, scores_prompt=True)]  # fmt: skip
    options = GenerateOptions(temperature=0, max_new_tokens=2, seed=1)
    alone = [write(engine, lm, [prompt], [options], each)[0] for each in wishes]
    read = engine.prompt_tokens_read
    texts = [Written(lm, prompt, options, each) for each in wishes]
    engine.submit([text.row for text in texts])
    results = [text.result() for text in texts]
    assert engine.prompt_tokens_read - read == len(lm.tokenizer(prompt)["input_ids"])
    for result, expected in zip(results, alone, strict=True):
        assert [token and (token.id, [each for each, _ in token.top]) for token in result.prompt_tokens] == [
            token and (token.id, [each for each, _ in token.top]) for token in expected.prompt_tokens
        ]
        assert [len(token.top) for token in result.tokens] == [len(token.top) for token in expected.tokens]


def test_openai_penalties(start, lm):
    """As OpenAI defines them: of the scores, for each token that was written, by how often."""
    engine, ids = start(lm), lm.tokenizer("the cat")["input_ids"]
    wishes = Wishes(presence_penalty=1.5, frequency_penalty=0.7, logit_bias={104: 6.0, 101: -100.0})
    options = GenerateOptions(temperature=0, max_new_tokens=20, seed=1)
    (result,) = write(engine, lm, ["the cat"], [options], wishes)
    written: list[int] = []
    with torch.inference_mode():
        while len(written) < 20:
            scores = lm.model(torch.tensor([ids + written])).logits[0, -1].clone()
            scores[104] += 6
            scores[101] -= 100
            for token in set(written):
                scores[token] -= 1.5 + 0.7 * written.count(token)
            written.append(int(scores.argmax()))
    assert result.completion.tokens == written and 104 in written and 101 not in written


def test_submitted_from_many_threads(start, lm):
    engine = start(lm)
    options = [GenerateOptions(max_new_tokens=6, seed=k) for k in range(12)]
    texts = [Written(lm, "the cat", each) for each in options]
    threads = [threading.Thread(target=engine.submit, args=([text.row],)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for text, each in zip(texts, options, strict=True):
        assert_same(text.result(), hfkit.generate("the cat", model=lm, options=each))


def test_window_moves_its_rows(lm):
    """Rows of any length join and leave in any order; logits stay those of the row alone."""
    rng, window, rows = random.Random(3), Window(2), []
    with torch.inference_mode():
        for _ in range(30):
            if rows and rng.random() < 0.3:
                place = rng.randrange(len(rows))
                window.remove(place)
                rows[place] = rows[-1]
                rows.pop()
            if not rows or rng.random() < 0.5:
                ids = [rng.randrange(256) for _ in range(rng.randrange(1, 30))]
                cache = lm.model(torch.tensor([ids]), use_cache=True).cache
                window.add(cache, [0], [len(ids)])
                rows.append(ids)
            rows = [[*ids, rng.randrange(256)] for ids in rows]
            while long := next((place for place, ids in enumerate(rows) if len(ids) > 60), None):
                window.remove(long)
                rows[long] = rows[-1]
                rows.pop()
            if rows:
                logits = window.step(lm, [ids[-1] for ids in rows])
                for ids, row in zip(rows, logits, strict=True):
                    assert torch.allclose(row, lm.model(torch.tensor([ids])).logits[0, -1], atol=1e-3)


def test_requests_keep_within_the_device(start, lm):
    """No more rows at a time than the device is good for; the others wait."""
    engine = start(lm)
    engine._most = 3
    options = GenerateOptions(max_new_tokens=20, min_new_tokens=20, seed=1)
    request = fit_prompt("the", options, lm.tokenizer, lm.model.config, lm.name)
    texts = [Written(lm, replace(request), options) for _ in range(10)]
    most = 0
    engine.submit([text.row for text in texts])
    while any(text.events.empty() for text in texts):
        most = max(most, engine.running)
    assert most <= 3 and {text.result().completion.text for text in texts} != {""}


def test_time_limit_of_beams(start, story):
    engine = start(story)
    options = GenerateOptions(max_new_tokens=400, min_new_tokens=400, num_beams=4, temperature=0, seed=1)
    text = Written(story, "Once", options, seconds=0.5)
    engine.submit([text.row])
    assert 0 < len(text.result().completion.tokens) < 400


BEAMS = GenerateOptions(max_new_tokens=1000, min_new_tokens=1000, num_beams=4, temperature=0, seed=1)


@pytest.mark.parametrize("how", ["cancelled", "stopped"])
def test_beams_end_before_their_last_step(start, story, how):
    """They hold up the beams of every model, so they must not outlive their client."""
    engine = start(story)
    text, waiting = Written(story, "Once", BEAMS), Written(story, "Once", BEAMS)
    engine.submit([text.row, waiting.row])
    wait_until(lambda: (engine.running, engine.waiting) == (1, 1))
    if how == "cancelled":
        text.row.is_cancelled = waiting.row.is_cancelled = True
        wait_until(lambda: (engine.running, engine.waiting) == (0, 0))
        (after,) = write(engine, story, ["Once"], [replace(BEAMS, max_new_tokens=5, min_new_tokens=None)])
        assert_same(after, hfkit.generate("Once", model=story, temperature=0, num_beams=4, max_new_tokens=5))
    else:
        engine.stop()
        with pytest.raises(UnavailableError, match="no time"):
            waiting.result()
    result = text.result().completion
    assert result.finish_reason == "length" and 0 < len(result.tokens) < 1000


def test_beams_that_wait_for_their_turn_can_end(start, story):
    """Another model has the turn, for as long as its beams take."""
    engine, stopped = start(story), start(story)
    given_up, late, told = (Written(story, "Once", BEAMS, seconds=seconds) for seconds in (1000, 0.2, 1000))
    with batches._special_loops:
        engine.submit([given_up.row])
        wait_until(lambda: engine.running)
        given_up.row.is_cancelled = True
        wait_until(lambda: not engine.running)
        engine.submit([late.row])
        stopped.submit([told.row])
        wait_until(lambda: stopped.running)
        stopped.stop()
        for text in (late, told):
            with pytest.raises(UnavailableError, match="no time"):
                text.result()
