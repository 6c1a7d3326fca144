"""Text is what transformers gives for the same seed: from a shell, in Python, alone, in a batch and as a stream."""

import copy
import json
import random
import subprocess
import sys
import threading
import timeit

import pytest
import torch
from support.shell import assert_fails, call
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Tokenizer,
    WatermarkDetector,
    WatermarkingConfig,
    set_seed,
)

import hfkit
from hfkit import console
from hfkit.errors import HfkitError, OptionError
from hfkit.inference import batches, controls
from hfkit.inference.decoding import Endings, complete
from hfkit.inference.text import Detokenizer, held_back, repeats
from hfkit.inference.text import cut_at_stop as cut
from hfkit.inference.text import fit_prompt as prepare
from hfkit.models import loading
from hfkit.options import SAMPLING, GenerateOptions

PROMPTS = ["the cat", "a", "what is it that you want", "no, no", "the the the"]
BOTH = pytest.mark.parametrize("name", ["gpt2", "llama"])


@pytest.fixture(scope="session")
def lms(tiny, tiny_llama, tiny_t5, tmp_path_factory):
    """Models by kind; BART's positions are absolute, T5's are not."""
    bart = tmp_path_factory.mktemp("models") / "tiny-bart"
    set_seed(4)
    config = BartConfig(
        vocab_size=257, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.5,
        pad_token_id=0, bos_token_id=256, eos_token_id=256, decoder_start_token_id=256, forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(bart)
    GPT2Tokenizer.from_pretrained(tiny).save_pretrained(bart)
    paths = {"gpt2": tiny, "llama": tiny_llama, "t5": tiny_t5, "bart": str(bart)}
    return {name: hfkit.load(path) for name, path in paths.items()}


@pytest.fixture
def steps(lms, monkeypatch):
    """Grows with every forward pass of the GPT-2."""
    forward, passes = lms["gpt2"].model.forward, []
    monkeypatch.setattr(lms["gpt2"].model, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    return passes


def broken(lm) -> list[int]:
    """Tokens that are no text by themselves."""
    return [token for token in range(len(lm.tokenizer)) if "\ufffd" in lm.tokenizer.decode([token])]


def reference(lm, prompt: str, seed: int = 0, tokens: int = 12, fields: dict | None = None, **arguments) -> list[str]:
    """The texts of `model.generate` as anyone would call it."""
    config = copy.deepcopy(lm.model.generation_config)
    for field, value in {"max_new_tokens": tokens, "do_sample": True, "pad_token_id": 0, **(fields or {})}.items():
        setattr(config, field, value)
    inputs = lm.tokenizer(prompt, return_tensors="pt")
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    torch.manual_seed(seed)
    rows = lm.model.generate(**inputs, generation_config=config, **arguments)
    if lm.model.config.is_encoder_decoder:
        return lm.tokenizer.batch_decode(rows, skip_special_tokens=True)
    begin = len(lm.tokenizer.decode(inputs["input_ids"][0]))
    return [text[begin:] for text in lm.tokenizer.batch_decode(rows, skip_special_tokens=True)]


# the same as transformers


@BOTH
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_p": 0.9}, {"do_sample": False}])
def test_generate_equals_transformers(lms, capfdbinary, name, fields):
    """A shell, --json, Python and transformers give the same text for the same seed."""
    lm, suppress = lms[name], broken(lms[name])
    given = fields | {"suppress_tokens": suppress}
    flags = [part for key, value in fields.items() if key != "do_sample" for part in (f"--{key}", value)]
    flags += [part for token in suppress for part in ("--suppress-tokens", token)]
    flags += ["--no-do-sample"] if "do_sample" in fields else []
    for seed, prompt in enumerate(PROMPTS[:2]):
        (expected,) = reference(lm, prompt, seed, fields=given)
        result = hfkit.generate(prompt, model=lm, seed=seed, max_new_tokens=12, **given)
        line = ["generate", prompt, "-m", lm.name, "-s", seed, "-n", 12, *flags]
        assert result.completion == expected and str(result) == prompt + expected
        assert call(capfdbinary, *line).stdout.decode() == prompt + expected + "\n"
        assert call(capfdbinary, *line, "--no-prompt").stdout.decode() == expected + "\n"
        assert json.loads(call(capfdbinary, *line, "--json").stdout) == result.to_dict()
        assert "".join(hfkit.stream(prompt, model=lm, seed=seed, max_new_tokens=12, **given)) == expected


CONTROLS = [
    *({"temperature": t} for t in (0.2, 3.0)),
    *({"top_k": k} for k in (1, 3)),
    *(
        {"top_p": 0.3},
        {"min_p": 0.3},
        {"top_h": 0.3},
        {"typical_p": 0.3},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.3},
    ),
    *({"repetition_penalty": 3.0}, {"encoder_repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}),
    *({"suppress_tokens": list(range(100))}, {"begin_suppress_tokens": list(range(100))}, {"guidance_scale": 3.0}),
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@BOTH
@pytest.mark.parametrize("fields", CONTROLS, ids=lambda fields: "-".join(fields))
def test_generate_sampling_controls(lms, name, fields):
    """Each sampling control does what it does in transformers."""
    lm, plain = lms[name], {"top_k": 0, "suppress_tokens": broken(lms[name])}
    if "suppress_tokens" in fields:
        fields = {"suppress_tokens": [*broken(lm), *fields["suppress_tokens"]]}
    changed = False
    for seed in (1, 2):
        found = hfkit.generate("the the cat", model=lm, seed=seed, max_new_tokens=12, **plain | fields).completion
        assert found == reference(lm, "the the cat", seed, fields=plain | fields)[0]
        changed |= found != reference(lm, "the the cat", seed, fields=plain)[0]
    assert changed


@BOTH
@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "length_penalty": -2.0, "early_stopping": True},
        {"num_beams": 4, "do_sample": True, "temperature": 2.0},
        {"num_beams": 2, "do_sample": False, "no_repeat_ngram_size": 2},
    ],
)
def test_generate_beams(lms, name, fields):
    """Beams are those of transformers."""
    lm, fields = lms[name], fields | {"suppress_tokens": broken(lms[name])}
    results = hfkit.generate("the cat", model=lm, seed=3, max_new_tokens=12, num_return_sequences=2, **fields)
    expected = reference(lm, "the cat", 3, fields=fields | {"num_return_sequences": 2})
    assert [result.completion for result in results] == expected
    assert "".join(hfkit.stream("the cat", model=lm, seed=3, max_new_tokens=12, **fields)) == expected[0]


def test_generate_negative_prompt(lms):
    """Guidance moves away from the negative prompt as in transformers."""
    lm, fields = lms["gpt2"], {"guidance_scale": 2.5, "suppress_tokens": broken(lms["gpt2"])}
    ids = lm.tokenizer("a dog", return_tensors="pt").input_ids
    found = hfkit.generate("the cat", model=lm, seed=1, max_new_tokens=12, negative_prompt="a dog", **fields)
    assert found.completion == reference(lm, "the cat", 1, fields=fields, negative_prompt_ids=ids)[0]
    assert found != hfkit.generate("the cat", model=lm, seed=1, max_new_tokens=12, **fields)


def test_draws_by_default(lms):
    """Sampling is the default; a temperature of 0 turns it off, any other sampling option turns it on."""
    lm = lms["gpt2"]
    texts = {hfkit.generate("a", model=lm, seed=seed, max_new_tokens=8).completion for seed in range(5)}
    assert len(texts) == 5
    greedy = {
        hfkit.generate("a", model=lm, seed=seed, max_new_tokens=8, temperature=0).completion for seed in range(5)
    }
    assert greedy == {reference(lm, "a", tokens=8, fields={"do_sample": False})[0]}
    first, second = (hfkit.generate("a", model=lm, max_new_tokens=8) for _ in range(2))
    assert first.seed != second.seed
    assert hfkit.generate("a", model=lm, max_new_tokens=8, seed=first.seed) == first
    assert hfkit.generate("a", model=lm, max_new_tokens=8, temperature=0).seed is None
    for option in SAMPLING:
        assert controls.is_sampled(lm, GenerateOptions(**{option: 1}))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_draws_with_an_encoder(lms, name):
    """A model with an encoder follows its own generation config."""
    lm = lms[name]
    fields = {"suppress_tokens": broken(lm), "do_sample": False}
    result = hfkit.generate("the cat", model=lm, max_new_tokens=9, suppress_tokens=broken(lm))
    assert [result.completion] == reference(lm, "the cat", tokens=9, fields=fields)
    assert str(result) == result.completion and result.seed is None
    before = lm.model.generation_config
    try:
        lm.model.generation_config = copy.deepcopy(before)
        lm.model.generation_config.update(num_beams=3, num_return_sequences=2, max_length=20, length_penalty=0.5)
        result = hfkit.generate("the cat", model=lm, max_new_tokens=9, suppress_tokens=broken(lm))
        own = {"num_return_sequences": 1, "max_length": None}
        assert [result.completion] == reference(lm, "the cat", tokens=9, fields=fields | own)
        lm.model.generation_config.update(num_beams=1, do_sample=True)
        result = hfkit.generate("the cat", model=lm, max_new_tokens=9, suppress_tokens=broken(lm), seed=3)
        assert [result.completion] == reference(lm, "the cat", 3, tokens=9, fields=fields | own | {"do_sample": True})
    finally:
        lm.model.generation_config = before


# batches


BATCHED = [
    *({}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.8}, {"repetition_penalty": 5.0, "temperature": 0}),
    *({"encoder_repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2, "temperature": 0}, {"min_new_tokens": 5}),
    *({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "negative_prompt": "a dog"}, {"stop_strings": ["e", "a"]}),
    # what is banned after a word must not be banned after the padding
    {"no_repeat_ngram_size": 2, "temperature": 0, "sequence_bias": ["t=90"]},
    *({"bad_words": ["e", "the"]}, {"sequence_bias": ["e=9"]}, {"watermark": True}, {"begin_suppress_tokens": [5]}),
]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize("fields", BATCHED, ids=str)
def test_run_batch_equals_alone(lms, name, fields):
    """A batch gives what each prompt gives alone."""
    if name in ("t5", "bart") and "guidance_scale" in fields:
        pytest.skip("transformers has no guidance for a model with an encoder")
    how = {"model": lms[name], "max_new_tokens": 8, **fields}
    together = hfkit.generate(PROMPTS, seed=4, **how)
    alone = [hfkit.generate(prompt, seed=4 + i, **how) for i, prompt in enumerate(PROMPTS)]
    assert [(one.completion, one.tokens, one.finish_reason) for one in together] == [
        (one.completion, one.tokens, one.finish_reason) for one in alone
    ]
    assert [one.logprob for one in together] == pytest.approx([one.logprob for one in alone], abs=1e-3)
    if name == "gpt2":
        assert [str(one) for one in hfkit.generate(PROMPTS, seed=4, batch_size=2, **how)] == [*map(str, together)]


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_return_sequences": 2, "length_penalty": -1.0, "early_stopping": True},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"bad_words": ["a", "e"], "sequence_bias": ["t=2.0"]},
    ],
    ids=str,
)
def test_beams_of_a_batch_equal_alone(lms, monkeypatch, name, how):
    """Prompts share a beam search, and each gets the beams that it would get alone."""
    sizes, run = [], batches.run_special
    monkeypatch.setattr(
        batches, "run_special", lambda lm, rows, options: sizes.append(len(rows)) or run(lm, rows, options)
    )
    how = {"model": lms[name], "num_beams": 3, "do_sample": False, "max_new_tokens": 8, **how}
    alone = [hfkit.generate(prompt, **how) for prompt in PROMPTS]
    together = hfkit.generate(PROMPTS, **how)
    given = {key: value for key, value in how.items() if key != "model"}
    # Where a control would see the padding, only prompts of one length share a search.
    assert sizes[5:] == ([1] * 5 if controls.needs_equal_lengths(lms[name], GenerateOptions(**given)) else [5])
    flat = [[one] if isinstance(one, hfkit.Generation) else one for one in (*together, *alone)]
    for ours, theirs in zip(flat[: len(PROMPTS)], flat[len(PROMPTS) :], strict=True):
        assert [(one.completion, one.finish_reason) for one in ours] == [
            (one.completion, one.finish_reason) for one in theirs
        ]
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-3)


def test_beams_keep_few_logits(lms, monkeypatch):
    """A beam search keeps the logits of all its steps: their number limits a batch."""
    sizes, run = [], batches.run_special
    monkeypatch.setattr(
        batches, "run_special", lambda lm, rows, options: sizes.append(len(rows)) or run(lm, rows, options)
    )
    monkeypatch.setattr(batches, "_LOGITS_KEPT", 2 * 3 * 8 * 257)
    hfkit.generate(["a", "b", "c"], model=lms["gpt2"], num_beams=3, max_new_tokens=8)
    assert sizes == [2, 1]


def test_generate_seeds(lms):
    """Sample k of prompt i has a seed of its own, which gives it again."""
    how = {"model": lms["gpt2"], "max_new_tokens": 6}
    for i, samples in enumerate(hfkit.generate(PROMPTS[:3], seed=7, num_return_sequences=3, **how)):
        assert [sample.seed for sample in samples] == [7 + 3 * i + k for k in range(3)]
        alone = [hfkit.generate(PROMPTS[i], seed=sample.seed, **how) for sample in samples]
        assert [*map(str, samples)] == [*map(str, alone)]
    assert hfkit.generate("a", seed=7, num_return_sequences=1, **how) == [hfkit.generate("a", seed=7, **how)]


def test_run_all_out_of_memory(lms, monkeypatch, capfdbinary):
    """A batch that is too large for the memory runs in halves."""
    lm, expected = lms["gpt2"], hfkit.generate(PROMPTS, model=lms["gpt2"], seed=1, max_new_tokens=5)
    whole, most = lm.model.generate, 2

    def small(**arguments):
        if len(arguments["input_ids"]) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return whole(**arguments)

    monkeypatch.setattr(lm.model, "generate", small)
    found = hfkit.generate(PROMPTS, model=lm, seed=1, max_new_tokens=5)
    assert [*map(str, found)] == [*map(str, expected)]
    assert b"going on with 2" in capfdbinary.readouterr().err
    most = 0
    for how in ({}, {"num_beams": 2}):
        with pytest.raises(HfkitError, match="out of memory"):
            hfkit.generate("a", model=lm, max_new_tokens=5, **how)
        with pytest.raises(HfkitError, match="out of memory"):
            list(hfkit.stream("a", model=lm, max_new_tokens=5, **how))


def test_run_all_groups_by_length(lms, monkeypatch):
    """Rows are grouped by length, within the number of tokens that the device is good for."""
    seen = []
    run = batches.run_batch
    monkeypatch.setattr(
        batches, "run_batch", lambda lm, requests, options: seen.append(requests) or run(lm, requests, options)
    )
    monkeypatch.setitem(batches.TOKENS_AT_ONCE, "cpu", 60)
    hfkit.generate([word * n for n in (1, 9, 3, 30, 2, 8) for word in "ab"], model=lms["gpt2"], max_new_tokens=4)
    assert [sorted(len(r.ids) for r in rows) for rows in seen] == [[30], [30], [8, 8, 9, 9], [1, 1, 2, 2, 3, 3]]


# tokens to text


def pieces(tokenizer, context, tokens) -> list[str]:
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


TEXTS = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🇫🇷",
    "e\u0301 a\u0308",
    "  two  spaces \n\n tabs\t",
    "the the",
]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bundled"])
def test_detokenizer_any_cut(lms, name):
    """Streamed text is the whole text, wherever the prompt ends."""
    tokenizer = hfkit.load("bundled").tokenizer if name == "bundled" else lms[name].tokenizer
    draw = random.Random(name)
    for _ in range(1500):
        text = " ".join(draw.sample(TEXTS, 2))
        ids = tokenizer(text)["input_ids"]
        start, end = sorted(draw.sample(range(len(ids) + 1), 2))
        # a prompt is whole text; what follows may be cut within a character
        while "\ufffd" in tokenizer.decode(ids[:start]):
            start -= 1
        shown, whole = pieces(tokenizer, ids[:start], ids[start:end]), tokenizer.decode(ids[:end])
        said = tokenizer.decode(ids[:start]) + "".join(shown)
        assert not any("\ufffd" in piece for piece in shown[:-1])
        if name != "llama" or "\ufffd" not in whole:
            assert said == whole
        else:  # SentencePiece gives up the characters before a broken one as well; they have been shown by then
            assert text.startswith(said.rstrip("\ufffd"))


@pytest.mark.parametrize("name", ["gpt2", "bundled"])
def test_detokenizer_any_tokens(lms, name):
    """Any tokens at all stream to what they decode to."""
    tokenizer = hfkit.load("bundled").tokenizer if name == "bundled" else lms[name].tokenizer
    draw = random.Random(name)
    for _ in range(3000):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randint(1, 30))]
        assert "".join(pieces(tokenizer, [], ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@BOTH
def test_complete_equals_stream(lms, name):
    """A whole text and a stream agree on bytes that are not text."""
    tokenizer, draw = lms[name].tokenizer, random.Random(name)
    context, halves = tokenizer("the é")["input_ids"], broken(lms[name])
    for _ in range(1500):
        ids = [draw.choice(halves if draw.random() < 0.7 else range(200, 256)) for _ in range(12)]
        whole = complete(tokenizer, context, ids, Endings(), torch.zeros(12))
        assert whole.text == "".join(pieces(tokenizer, context, ids))


@BOTH
def test_stream_equals_generate(lms, name):
    """A stream joins to what generate gives, and returns it."""

    def both(prompt, **how):
        stream, said = hfkit.stream(prompt, model=lms[name], **how), []
        try:
            while True:
                said.append(next(stream))
        except StopIteration as stop:
            return "".join(said), stop.value, hfkit.generate(prompt, model=lms[name], **how)

    for seed in range(5):
        said, returned, whole = both("the cat", seed=seed, max_new_tokens=20)
        assert said == whole.completion and returned == whole


def test_stream_close_ends_the_work(lms, steps):
    """Closing a stream ends its thread and the forward passes."""
    stream = hfkit.stream("a", model=lms["gpt2"], max_new_tokens=60, sequence_bias=["a=100"])
    before = threading.active_count()
    next(stream)
    stream.close()
    assert threading.active_count() == before and len(steps) < 50


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("del pieces; import gc; gc.collect()", 0),
        pytest.param("raise ValueError", 1, marks=pytest.mark.slow),
        pytest.param("sys.exit(3)", 3, marks=pytest.mark.slow),
    ],
)
def test_stream_may_be_unfinished_when_python_exits(ending, code):
    """A thread that is inside torch then would abort it."""
    program = (
        "import sys, hfkit\n"
        "streams = [hfkit.stream('Once upon a time', seed=i, max_new_tokens=200) for i in range(2)]\n"
        "pieces = streams[0]\n"
        f"print(next(pieces), next(streams[1]), flush=True)\n{ending.replace('del pieces', 'del pieces, streams')}\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == code and result.stdout
    assert "Exception ignored" not in result.stderr and "terminate" not in result.stderr


def test_stream_that_nobody_reads_leaves_no_thread(lms):
    before = threading.active_count()
    stream = hfkit.stream("a", model=lms["gpt2"], max_new_tokens=60)
    assert threading.active_count() == before
    next(stream)
    del stream
    assert threading.active_count() == before


def test_stream_errors(lms, monkeypatch):
    """What is wrong with the arguments is raised at the call; an error while generating reaches the reader."""
    with pytest.raises(HfkitError, match="do not fit"):
        hfkit.stream("a" * 99, model=lms["gpt2"])
    with pytest.raises(OptionError, match="one text"):
        hfkit.stream("a", model=lms["gpt2"], num_return_sequences=2)
    monkeypatch.setattr(lms["gpt2"].model, "forward", lambda **arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(hfkit.stream("a", model=lms["gpt2"]))


# stop strings


@BOTH
def test_cut_at_stop_in_texts_and_streams(lms, name):
    """A stop string is cut off, and a stream never shows its beginning."""
    lm, suppress, draw = lms[name], broken(lms[name]), random.Random(name)
    for seed in range(8):
        how = {"model": lm, "seed": seed, "max_new_tokens": 16, "suppress_tokens": suppress}
        text = hfkit.generate("the", **how).completion
        at = draw.randrange(len(text))
        stops = [text[at : at + draw.randint(1, 4)], "never to be seen"]
        expected = text[: text.find(stops[0])]
        stopped = hfkit.generate("the", stop_strings=stops, **how)
        assert (stopped.completion, stopped.finish_reason) == (expected, "stop")
        shown = ""
        for piece in hfkit.stream("the", stop_strings=stops, **how):
            shown += piece
            assert expected.startswith(shown)
        assert shown == expected
        # the tokens end with the one that completes the stop string
        ids = lm.tokenizer("the")["input_ids"] + lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert stopped.tokens <= len(ids)


def test_cut_at_stop_first_one_counts():
    """The first stop string counts, and what may be its beginning is held back."""
    assert cut("a stop and more", ["more", "stop", "op"]) == ("a ", True)
    assert cut("nothing", ["stop"]) == ("nothing", False)
    assert [held_back(text, ["stop", "##"]) for text in ("a s", "a sto", "a #", "stop", "x", "")] == [1, 3, 1, 0, 0, 0]
    assert held_back("ababab", ["babx", "ababx", "b"]) == 4


def test_held_back_of_many_long_stop_strings_takes_no_time():
    """It runs at every token: twenty microseconds, where all beginnings of all of them took fifty milliseconds."""
    text, stops = "the quick brown " * 250, ["lorem ipsum the quick " * 180] * 64
    assert min(timeit.repeat(lambda: held_back(text, stops), number=1)) < 0.01


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_stop_texts_ignore_the_prompt(lms, how, steps):
    """A stop string ends the work, in all loops, and does not match the prompt."""
    how = {"model": lms["gpt2"], "sequence_bias": ["i=100", " =-100"], "max_new_tokens": 50, "temperature": 0, **how}
    found = hfkit.generate("hii", stop_strings=["iii"], **how)
    assert (found.completion, found.tokens, found.finish_reason) == ("", 3, "stop")
    assert len(steps) < 10


def test_complete_end_of_text_token(lms):
    """An end-of-text token ends a text and is counted, but not shown."""
    how = {"model": lms["gpt2"], "max_new_tokens": 9, "sequence_bias": ["<|endoftext|>=100"]}
    for fields in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        found = hfkit.generate("hi", **how, **fields)
        assert (found.completion, found.tokens, found.finish_reason) == ("", 1, "stop")
    found = hfkit.generate("hi", min_new_tokens=4, **how)
    assert found.tokens == 5 and found.finish_reason == "stop"


# words


def test_generation_config_words(lms):
    """A bad word never comes, and a bias makes a word more or less likely."""
    lm = lms["gpt2"]
    how = {"model": lm, "max_new_tokens": 20, "suppress_tokens": broken(lm)}
    texts = [hfkit.generate("the", seed=seed, **how).completion for seed in range(8)]
    word = max(
        {pair for text in texts for pair in zip(text, text[1:], strict=False)},
        key=lambda p: "".join(texts).count("".join(p)),
    )
    word = "".join(word)
    again = [hfkit.generate("the", seed=seed, bad_words=[word], **how).completion for seed in range(8)]
    assert any(word in text for text in texts) and not any(word in text for text in again)
    assert hfkit.generate("the", sequence_bias=["z=100"], **how).completion == "z" * 20
    fewer = [
        hfkit.generate("the", seed=seed, sequence_bias=[f"{word[0]}=-100"], **how).completion for seed in range(8)
    ]
    assert not any(word[0] in text for text in fewer)


def test_generation_config_watermark(lms):
    """transformers' detector finds the watermark."""
    lm = lms["gpt2"]
    text = [token for token in range(256) if len(lm.tokenizer.decode([token]).encode()) == 1]
    how = {"model": lm, "max_new_tokens": 60, "suppress_tokens": sorted({*range(257)} - set(text)), "top_k": 0}
    detector = WatermarkDetector(lm.model.config, "cpu", WatermarkingConfig())

    def scores(**fields):
        found = hfkit.generate("a", seed=0, num_return_sequences=8, temperature=5.0, **how, **fields)
        return [detector(lm.tokenizer([one.completion], return_tensors="pt").input_ids)[0] for one in found]

    assert sum(scores(watermark=True)) >= 7 and sum(scores()) <= 1


@pytest.mark.parametrize(
    "fields", [{"suppress_tokens": [257]}, {"begin_suppress_tokens": [-1]}, {"forced_bos_token_id": 999}]
)
def test_check_controls_token_ids(lms, fields):
    """A token id that the model does not have is refused."""
    with pytest.raises(OptionError, match="0 to 256"):
        hfkit.generate("a", model=lms["gpt2"], **fields)


# speculation


@BOTH
def test_run_special_guesses(lms, tiny, tiny_llama, name, monkeypatch):
    """Speculation changes the speed and not the text."""
    lm = lms[name]
    how = {"model": lm, "max_new_tokens": 8, "temperature": 0}
    expected = hfkit.generate("the the the", **how)
    for guess in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny}, {"assistant_model": tiny_llama}):
        found = hfkit.generate("the the the", **how, **guess)
        assert found.completion == expected.completion
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_run_special_assistant_tokens(lms, tiny, monkeypatch):
    """An assistant is loaded once and guesses --num-assistant-tokens at a time.

    Its own config stays as it is, for calls that say nothing.
    """
    loads, load, assistants, whole = [], loading.load, [], lms["gpt2"].model.generate
    monkeypatch.setattr(batches, "load", lambda *a, **k: loads.append(load(*a, **k)) or loads[-1])
    monkeypatch.setattr(
        lms["gpt2"].model, "generate", lambda **k: assistants.append(k["assistant_model"]) or whole(**k)
    )
    batches._assistant.cache_clear()
    options = GenerateOptions(assistant_model=tiny, num_assistant_tokens=3, max_new_tokens=8, temperature=0)
    before = copy.deepcopy(load(tiny).model.generation_config)
    hfkit.generate(["a", "b"], model=lms["gpt2"], options=options)
    assert len(loads) == 1 and [a.generation_config.num_assistant_tokens for a in assistants] == [3, 3]
    assert loads[0].model.generation_config == before


def test_run_special_assistant_context(lms, tiny, monkeypatch):
    """An assistant whose context is too short is one sentence."""

    def run(new):
        with pytest.raises(HfkitError, match="does not fit .*tiny: lower --max-new-tokens"):
            hfkit.generate("a" * 10, model=lms["llama"], max_new_tokens=new, assistant_model=tiny, temperature=0)

    run(40)  # too long in the assistant's own tokens: nobody can know before
    monkeypatch.setattr(lms["llama"].model, "generate", None)
    run(90)


# lengths


@pytest.mark.parametrize(
    ("prompt", "new", "fits"),
    [(62, 1, True), (63, 1, True), (64, 1, False), (54, 10, True), (55, 10, False), (1, 63, True), (1, 64, False)]
    + [(1, 10**9, False), (10**5, 1, False), (64, None, False), (63, None, True)],
)
def test_fit_prompt_context(lms, tiny, capfdbinary, monkeypatch, prompt, new, fits):
    """What does not fit the context is refused before anything is computed."""
    if fits:
        result = hfkit.generate("a" * prompt, model=lms["gpt2"], max_new_tokens=new, sequence_bias=["a=100"])
        assert result.tokens == (new or 1) and result.finish_reason == "length"
        return
    monkeypatch.setattr(lms["gpt2"].model, "generate", None)
    with pytest.raises(HfkitError, match=f"prompt .: {prompt} tokens of prompt .* takes 64 together"):
        hfkit.generate(["a", "a" * prompt], model=lms["gpt2"], max_new_tokens=new)
    monkeypatch.setattr("hfkit.models.loading.load_weights", None)
    flags = ["-n", new] if new else []
    assert_fails(call(capfdbinary, "generate", "a" * prompt, "-m", tiny, *flags), 1, str(prompt), "64")


@pytest.mark.parametrize("new", [None, 1, 10, 63])
def test_fit_prompt_truncate(lms, new):
    """--truncate keeps the end of the prompt."""
    text = "".join(random.Random(0).choices("abcdefgh", k=200))
    kept = 64 - (new or 32)
    long = hfkit.generate(text, model=lms["gpt2"], seed=1, truncate=True, max_new_tokens=new)
    short = hfkit.generate(text[-kept:], model=lms["gpt2"], seed=1, max_new_tokens=new)
    assert long.completion == short.completion and long.prompt == text
    with pytest.raises(HfkitError, match="do not fit"):
        hfkit.generate(text, model=lms["gpt2"], truncate=True, max_new_tokens=64)


def test_fit_prompt_truncate_keeps_bos(lms):
    """--truncate keeps the token that begins a text."""
    options, lm = GenerateOptions(truncate=True, max_new_tokens=100), lms["llama"]
    assert prepare([1, *range(50, 150)], options, lm.tokenizer, lm.model.config, "").ids == [1, *range(123, 150)]
    assert prepare([*range(50, 150)], options, lm.tokenizer, lm.model.config, "").ids == [*range(122, 150)]


def test_fit_prompt_with_an_encoder(lms):
    """With an encoder, the text may be as long as the context, and so may its translation."""

    class Config:
        model_type, is_encoder_decoder, max_position_embeddings = "t5", True, 300

    def new(length, **options):
        return prepare([7] * length, GenerateOptions(**options), lms["t5"].tokenizer, Config, "m")

    assert [new(n).new_tokens for n in (1, 50, 120, 300)] == [100, 100, 240, 300]
    assert new(999, truncate=True).ids == [7] * 300
    for wrong in ((301, {}), (1, {"max_new_tokens": 301})):
        with pytest.raises(HfkitError, match="300|301"):
            new(wrong[0], **wrong[1])


def test_generate_max_time(lms):
    """--max-time ends a text."""
    found = hfkit.generate("a", model=lms["gpt2"], max_time=1e-9, max_new_tokens=60, sequence_bias=["a=100"])
    assert found.tokens < 3 and found.finish_reason == "length"


# prompts


@BOTH
@pytest.mark.parametrize("prompt", ["", " ", "\n\n", "\x00", "\ufeff", "é", "👩‍👩‍👧‍👦", "<|endoftext|>", "a\r\nb"])
def test_generate_any_text(lms, name, prompt):
    """Any text can be continued."""
    result = hfkit.generate(prompt, model=lms[name], seed=1, max_new_tokens=3)
    assert result.prompt == prompt and 1 <= result.tokens <= 3


def test_generate_empty_prompt(lms):
    """After an empty prompt the model begins by itself."""
    lm = lms["gpt2"]
    how = {"max_new_tokens": 5, "temperature": 0, "model": lm}
    expected = lm.model.generate(torch.tensor([[256]]), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert hfkit.generate("", **how).completion == lm.tokenizer.decode(expected[0, 1:])


def test_generate_text_that_is_not_utf8(lms, tiny, capfdbinary, monkeypatch):
    """A text that is not UTF-8 is a usage error."""
    with pytest.raises(OptionError, match="character 2"):
        hfkit.generate("a\ud800", model=lms["gpt2"])
    assert_fails(call(capfdbinary, "generate", "a\udcff", "-m", tiny), 2, "not UTF-8")


# what a result says


def plain_logprob(lm, prompt: str, completion: str) -> float:
    """The sum over one forward pass."""
    start = len(lm.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([lm.tokenizer(prompt + completion)["input_ids"]])
    logprobs = lm.model(ids).logits[0].double().log_softmax(-1)
    return sum(logprobs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0}, {"temperature": 3.0, "top_p": 0.5}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2},
     {"stop_strings": ["e", "t"]}],
    ids=str,
)  # fmt: skip
def test_generation_logprob(lms, fields):
    """The log-probability is that of a plain forward pass."""
    lm = lms["gpt2"]
    ascii_only = [token for token in range(256) if not lm.tokenizer.decode([token]).isascii()]
    found = hfkit.generate(PROMPTS, model=lm, seed=1, max_new_tokens=20, suppress_tokens=[*ascii_only, 256], **fields)
    for one in found:
        if "stop_strings" in fields:
            # the stop string's token is generated, too, but not in the text
            assert one.tokens == len(one.completion) + (one.finish_reason == "stop")
            continue
        assert one.tokens == len(one.completion) == 20
        assert one.logprob == pytest.approx(plain_logprob(lm, one.prompt, one.completion), rel=1e-5, abs=1e-4)


def test_generation_to_dict(lms):
    """The JSON of a result has the documented names."""
    found = hfkit.generate("a", model=lms["gpt2"], seed=1, max_new_tokens=3)
    assert list(found.to_dict()) == ["prompt", "completion", "finish_reason", "tokens", "logprob", "seed", "model"]
    assert found.model == lms["gpt2"].name and found.logprob < 0


def test_repeats_is_noted_at_a_shell(lms, tiny, capfdbinary):
    """A note says that a text repeats itself."""
    line = ["generate", "hi", "-m", tiny, "-n", 40, "-s", 1]
    looping = call(capfdbinary, *line, "--sequence-bias", "a=100")
    assert b"begun to repeat itself" in looping.stderr and looping.returncode == 0
    assert b"repeat" not in call(capfdbinary, *line, "--sequence-bias", "a=100", "-q").stderr
    assert b"repeat" not in call(capfdbinary, *line).stderr


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        *(
            ([1] * 24, True),
            ([1] * 23, False),
            ([*range(30)], False),
            ([9, 8, *[1, 2, 3] * 8], True),
            ([1, 2] * 9, False),
        ),
        *(
            ([*range(40)] * 3, True),
            ([*range(41)] * 3, False),
            ([*range(20)] * 2, False),
            ([1] * 24 + [2], False),
            ([], False),
        ),
    ],
)
def test_repeats(tokens, loops):
    """A loop is a run of tokens that comes three times."""
    assert repeats(tokens) is loops


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0}, {"num_beams": 2}])
def test_not_finite_error(lms, how, monkeypatch):
    """Values that are not numbers are one sentence."""
    lm = lms["gpt2"]
    monkeypatch.setattr(lm.model.transformer.ln_f.weight, "data", torch.full((32,), float("nan")))
    with pytest.raises(HfkitError, match="not numbers: try --dtype float32"):
        hfkit.generate("a", model=lm, max_new_tokens=3, **how)


def test_check_controls_samples(lms):
    """More samples than there are beams are refused in one sentence."""
    with pytest.raises(HfkitError, match="greedy decoding has one result"):
        hfkit.generate("a", model=lms["gpt2"], temperature=0, num_return_sequences=2)
    with pytest.raises(HfkitError, match="at most --num-beams"):
        hfkit.generate("a", model=lms["gpt2"], num_beams=2, num_return_sequences=3)


def test_sweep_of_samples(tiny, capfdbinary):
    """A sweep shows every text, also where another value gives fewer; its option may be called as its flag."""
    line = ["generate", "ab", "-m", tiny, "-n", 3, "-s", 1, "--sweep"]
    table = call(capfdbinary, *line, "num_return_sequences=1,3").stdout.decode()
    texts = [hfkit.generate("ab", model=tiny, max_new_tokens=3, seed=1 + k).completion.strip() for k in range(3)]
    shown = console.printable(table)
    assert all(console.printable(text).split("\n")[0] in shown for text in texts)
    rows = call(capfdbinary, *line, "stop=x,y", "--json").stdout.splitlines()
    assert [json.loads(row)["stop_strings"] for row in rows] == ["x", "y"]


def test_sweep_refuses_a_file(tiny, tmp_path, capfdbinary):
    """A sweep has no file of its own."""
    line = ["generate", "ab", "-m", tiny, "--sweep", "top_k=1,2", "-o", tmp_path / "out"]
    assert_fails(call(capfdbinary, *line), 2, "--sweep prints a table, or with --json lines: leave --output out")


def test_sweep(tiny, capfdbinary):
    """--sweep shows the texts of one seed under several values."""
    line = ["generate", "hi", "-m", tiny, "-s", 4, "-n", 6]
    rows = [
        json.loads(row)
        for row in call(capfdbinary, *line, "--sweep", "temperature=0.3,1,2.5", "--json").stdout.splitlines()
    ]
    assert [row["temperature"] for row in rows] == [0.3, 1, 2.5] and {row["seed"] for row in rows} == {4}
    for row in rows:
        assert (
            row["completion"]
            == hfkit.generate("hi", model=tiny, seed=4, max_new_tokens=6, temperature=row["temperature"]).completion
        )
    table = call(capfdbinary, *line, "--sweep", "top_k=1,5").stdout.decode()
    assert "top_k 1" in table and "top_k 5" in table
    for wrong in ("temprature=1", "temperature", "temperature=hot", "top_p=0.5,2"):
        assert_fails(call(capfdbinary, *line, "--sweep", wrong), 2)
