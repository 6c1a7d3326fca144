"""Clients that were written for OpenAI, unchanged: each gets what `hfkit generate` gives."""

import random
import subprocess
import sys

import openai
import pytest
import yaml

import hfkit
from hfkit.corpus.templates import CHAT_TEMPLATE
from hfkit.inference.text import token_writer
from hfkit.serving.replies import Writer

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def as_generate(story, prompt=PROMPT, **options) -> str:
    return hfkit.generate(prompt, model=story, **options).completion


# openai


def test_completion_is_the_text_of_generate(client, story):
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=7, max_tokens=12, top_p=0.9)
    expected = hfkit.generate(PROMPT, model=story, seed=7, max_new_tokens=12, top_p=0.9)
    assert reply.choices[0].text == expected.completion and reply.choices[0].seed == 7
    assert reply.usage.completion_tokens == expected.tokens and reply.usage.prompt_tokens == 4
    assert reply.choices[0].finish_reason == expected.finish_reason and reply.object == "text_completion"


def test_completion_without_a_seed_tells_it(client, story):
    choice = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=8).choices[0]
    assert choice.text == as_generate(story, seed=choice.seed, max_new_tokens=8)
    greedy = client.completions.create(model="bundled", prompt=PROMPT, max_tokens=8, temperature=1e-8).choices[0]
    assert greedy.seed is None and greedy.text == as_generate(story, temperature=0, max_new_tokens=8)


def test_completion_has_sixteen_tokens_by_default(client):
    assert client.completions.create(model="bundled", prompt=PROMPT, seed=1).usage.completion_tokens == 16


def test_completion_of_lists(client, story):
    """Choices are ordered prompt by prompt; the seeds are those of `hfkit generate` for the same list."""
    prompts = ["Once upon", "The house", "He said"]
    expected = hfkit.generate(prompts, model=story, seed=5, max_new_tokens=5, num_return_sequences=2)
    for given in (prompts, [story.tokenizer(text)["input_ids"] for text in prompts]):
        reply = client.completions.create(model="bundled", prompt=given, n=2, seed=5, max_tokens=5, echo=True)
        assert [choice.text for choice in reply.choices] == [str(text) for texts in expected for text in texts]
        assert [choice.index for choice in reply.choices] == list(range(6))


def test_best_of_gives_the_likeliest(client, story):
    samples = hfkit.generate(PROMPT, model=story, seed=3, max_new_tokens=6, num_return_sequences=5)
    best = sorted(samples, key=lambda sample: sample.logprob / sample.tokens, reverse=True)[:2]
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=3, max_tokens=6, n=2, best_of=5)
    assert [choice.text for choice in reply.choices] == [sample.completion for sample in best]


@pytest.mark.parametrize("stop", [None, [" the", "a"]])
def test_streams_join_to_the_whole(client, stop):
    asked = {"model": "bundled", "prompt": ["Once", "He said"], "seed": 4, "max_tokens": 20, "n": 2, "stop": stop}
    whole = client.completions.create(**asked, logprobs=2)
    usage = None
    texts, reasons, tokens = [""] * 4, [None] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, logprobs=2, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices] and usage == whole.usage
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert not stop or not any(word in text for word in stop for text in texts)


def test_log_probabilities(client, story):
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=2, max_tokens=6, logprobs=3, echo=True)
    choice, expected = reply.choices[0], hfkit.generate(PROMPT, model=story, seed=2, max_new_tokens=6)
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text == str(expected)
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert sum(scores.token_logprobs[4:]) == pytest.approx(expected.logprob, abs=1e-3)
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[offset : offset + len(token)] == token
    for token, logprob, top in zip(scores.tokens[1:], scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert top[token] == logprob and 3 <= len(top) <= 4


def places_of(parts: list[bytes]) -> list[int]:
    """The number of the character in which each part begins, where bytes that are none are U+FFFD."""
    data, places, number = b"".join(parts), [], 0
    while len(places) < len(data):
        rest = data[len(places) :]
        try:
            size = len(rest.decode()[0].encode())
        except UnicodeDecodeError as error:
            size = error.end if error.start == 0 else len(rest[: error.start].decode()[0].encode())
        places += [number] * size
        number += 1
    starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
    return [places[start] for start in starts]


def test_places_of_tokens_that_are_parts_of_characters(story):
    """Invalid bytes, characters of several tokens, and both in turn, among tokens of several bytes."""
    rng, write = random.Random(5), token_writer(story.tokenizer)
    parts = {token: write(word) for word, token in story.tokenizer.get_vocab().items() if not word.startswith("<")}
    broken = [token for token, part in parts.items() if "\ufffd" in part.decode(errors="replace")]
    assert len(broken) >= 128
    emoji = story.tokenizer("é🙂€" * 2)["input_ids"]
    for _ in range(200):
        ids = []
        while len(ids) < 30:
            ids += rng.choice([emoji[: rng.randrange(9)], rng.choices(broken, k=2), rng.choices(list(parts), k=2)])
        writer, scores = Writer(story, "text_completion", "hi", story.tokenizer("hi")["input_ids"]), []
        for first in range(0, len(ids), 7):  # as a stream gives them
            piece = ids[first : first + 7]
            scores += writer.scores(piece, [None] * len(piece))["text_offset"]
        assert scores == [2 + place for place in places_of([parts[token] for token in ids])], ids


def test_chat_goes_through_hfkits_plain_template(client, story):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who was there?"}]
    text = "System: Be short.\nUser: Who was there?\nAssistant:"
    assert CHAT_TEMPLATE  # which writes that
    expected = as_generate(
        story, text, seed=1, max_new_tokens=30, stop_strings=["\nUser:", "\nAssistant:", "\nSystem:"]
    )
    asked = {"model": "bundled", "messages": messages, "seed": 1, "max_tokens": 30}
    reply = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert reply.choices[0].message.content == expected.lstrip()
    entry = reply.choices[0].logprobs.content[0]
    assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) in (2, 3)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.lstrip()
    assert pieces[-1].choices[0].finish_reason == reply.choices[0].finish_reason


def test_chat_goes_through_the_models_own_template(client, lm, monkeypatch):
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    reply = client.chat.completions.create(
        model=lm.name, messages=[{"role": "user", "content": [{"type": "text", "text": "a b"}]}], seed=1, max_tokens=9
    )
    assert reply.choices[0].message.content == as_generate(lm, "<a b>", seed=1, max_new_tokens=9)


def test_responses(client, story):
    asked = {"model": "bundled", "input": "Who was there?", "max_output_tokens": 9, "extra_body": {"seed": 1}}
    reply = client.responses.create(**asked, instructions="Be short.")
    text = "System: Be short.\nUser: Who was there?\nAssistant:"
    assert reply.output_text == as_generate(story, text, seed=1, max_new_tokens=9).lstrip()
    assert reply.status == "incomplete" and reply.usage.output_tokens == 9
    events = list(client.responses.create(**asked, instructions="Be short.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == reply.output_text == events[-1].response.output_text
    asked["extra_body"]["stop"] = ["e"]
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().status == "completed"


def test_responses_repeat_what_was_asked(client):
    asked = {"instructions": "Be kind.", "metadata": {"a": "b"}, "temperature": 0.5, "top_p": 0.9}
    for fields in ({}, asked):
        fields |= {"max_output_tokens": 3}
        names, same = [*asked, "max_output_tokens"], {"model": "bundled", "input": "Hello", **fields}
        expected = {name: fields.get(name, {} if name == "metadata" else None) for name in names}
        events = list(client.responses.create(**same, stream=True))
        for reply in (client.responses.create(**same), events[0].response, events[-1].response):
            assert {name: getattr(reply, name) for name in names} == expected


@pytest.mark.parametrize(
    ("route", "asked", "words"),
    [
        ("responses", {"extra_body": {"n": 2}}, "'n' is not supported"),
        ("responses", {"include": ["message.output_text.logprobs"]}, "'message.output_text.logprobs' is not supp"),
        ("responses", {"include": ["reasoning.encrypted_content"], "extra_body": {"n": 1}}, None),
        ("chat.completions", {"top_logprobs": 2}, "top_logprobs has no effect alone: add logprobs"),
        ("chat.completions", {"top_logprobs": 2, "logprobs": False}, "top_logprobs has no effect alone"),
        ("chat.completions", {"top_logprobs": 0}, None),
    ],
)
def test_what_would_have_no_effect_is_refused(client, route, asked, words):
    body = {"model": "bundled"}
    if route == "responses":
        create, body = client.responses.create, body | {"input": "Hello", "max_output_tokens": 2}
    else:
        turns = [{"role": "user", "content": "Hello"}]
        create, body = client.chat.completions.create, body | {"messages": turns, "max_tokens": 2}
    if words is None:
        assert create(**body, **asked)
        return
    with pytest.raises(openai.BadRequestError, match=words):
        create(**body, **asked)


def test_models(client, lm):
    assert [model.id for model in client.models.list()] == ["bundled", lm.name]
    assert client.models.retrieve("bundled").max_model_len == 1024
    assert client.completions.create(model=lm.name, prompt="a", max_tokens=2).model == lm.name


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"model": "../bundled"}, openai.NotFoundError, "not served"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 1100}, openai.BadRequestError, "do not fit"),
        ({"temperature": 3000}, openai.BadRequestError, "temperature"),
        ({"logit_bias": {"6144": 1}}, openai.BadRequestError, "logit_bias"),
        ({"suffix": "the end"}, openai.BadRequestError, "suffix"),
        ({"prompt": [[4, 6144]]}, openai.BadRequestError, "token id"),
        ({"prompt": []}, openai.BadRequestError, "empty"),
        ({"stream": True, "echo": True, "logprobs": 1}, openai.BadRequestError, "whole"),
        ({"n": 3, "best_of": 2}, openai.BadRequestError, "best_of"),
        ({"n": 100, "prompt": ["a", "b"]}, openai.BadRequestError, "128"),
        ({"extra_body": {"assistant_model": "/etc"}}, openai.BadRequestError, "assistant_model"),
        ({"extra_body": {"novel": ["/etc/passwd"]}}, openai.BadRequestError, "novel"),
        ({"extra_body": {"do_sample": True, "temperature": 0}}, openai.BadRequestError, "greedy"),
        ({"extra_body": {"length_penalty": 1.0}}, openai.BadRequestError, "num-beams"),
    ],
)
def test_errors_are_the_clients_exceptions(client, asked, error, words):
    with pytest.raises(error, match=words):
        client.completions.create(**{"model": "bundled", "prompt": PROMPT, "max_tokens": 4, **asked})


def test_context_length_has_its_code(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="bundled", prompt=PROMPT * 400)
    assert error.value.code == "context_length_exceeded"


def test_error_inside_a_stream(client, server, monkeypatch):
    from hfkit.serving.cache import Window

    monkeypatch.setattr(Window, "step", lambda *_: (_ for _ in ()).throw(RuntimeError('in"jec\nted')))
    pieces = []
    with pytest.raises(openai.APIError, match="should not happen"):
        for chunk in client.completions.create(model="bundled", prompt=PROMPT, stream=True, seed=1):
            pieces += [chunk]
    assert len(pieces) == 1  # the first token comes from the prompt
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="bundled", prompt=PROMPT, seed=1)


def test_transformers_controls_have_their_own_names(client, story):
    more = {"top_k": 5, "repetition_penalty": 1.3, "bad_words": [" the"], "min_new_tokens": 10}
    reply = client.completions.create(model="bundled", prompt=PROMPT, seed=1, max_tokens=10, extra_body=more)
    assert reply.choices[0].text == as_generate(story, seed=1, max_new_tokens=10, **more)


def test_beams(client, story):
    """They run in transformers' own loop, one request after another."""
    reply = client.completions.create(
        model="bundled", prompt=PROMPT, max_tokens=6, temperature=0, extra_body={"num_beams": 3}
    )
    assert reply.choices[0].text == as_generate(story, max_new_tokens=6, temperature=0, num_beams=3)


# others


def test_langchain(server, story):
    from langchain_openai import ChatOpenAI, OpenAI

    asked = {"base_url": f"{server[0]}/v1", "api_key": "none", "model": "bundled", "max_retries": 0}
    llm = OpenAI(**asked, max_tokens=6, temperature=0, batch_size=2)
    prompts = ["Once upon", "The house", "He said"]
    replies = llm.generate(prompts)
    expected = [as_generate(story, text, temperature=0, max_new_tokens=6) for text in prompts]
    assert [texts[0].text for texts in replies.generations] == expected
    assert "".join(llm.stream("Once upon")) == expected[0]
    chat = ChatOpenAI(**asked, max_tokens=6, temperature=0)
    text = as_generate(story, "User: Hello\nAssistant:", temperature=0, max_new_tokens=6).lstrip()
    assert chat.invoke("Hello").content == text
    assert "".join(piece.content for piece in chat.stream("Hello")) == text


def test_llm(server, story, tmp_path, monkeypatch):
    """simonw's `llm`, with the bundled model as a completion model and as one for chats."""
    entries = [
        {"model_id": name, "model_name": "bundled", "api_base": f"{server[0]}/v1", "completion": completes}
        for name, completes in (("writes", True), ("talks", False))
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump(entries))
    script = """
import llm
for name, prompt in (("writes", "Once upon"), ("talks", "Hello")):
    model = llm.get_model(name)
    model.key = "none"
    for stream in (True, False):
        print(repr(model.prompt(prompt, stream=stream, temperature=0, max_tokens=6).text()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"LLM_USER_PATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    writes = as_generate(story, "Once upon", temperature=0, max_new_tokens=6)
    talks = as_generate(story, "User: Hello\nAssistant:", temperature=0, max_new_tokens=6).lstrip()
    assert done.stdout.splitlines() == [repr(writes)] * 2 + [repr(talks)] * 2


@pytest.mark.slow
def test_llm_endpoint(server, story, tmp_path):
    """The same from the shell, with what its command for endpoints offers."""
    command = [sys.executable, "-m", "llm", "openai", "endpoint", f"{server[0]}/v1", "-m", "bundled", "Hello"]
    options = ["-o", "temperature", "0", "-o", "max_tokens", "6", "--no-stream"]
    done = subprocess.run(
        [*command, *options], env={"LLM_USER_PATH": str(tmp_path), "PATH": ""}, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    assert (
        done.stdout.strip() == as_generate(story, "User: Hello\nAssistant:", temperature=0, max_new_tokens=6).strip()
    )


def test_lm_eval_gets_the_figures_of_its_hf_model(server, story):
    """Log-likelihoods and greedy flags of local-completions equal those of lm-eval's own model of the same folder."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from hfkit.models.sources import BUNDLED

    pairs = [
        ("Once upon a", " time"),
        ("She opened the", " door and went out"),
        ("He had a", " zebra"),
        ("The", " sun"),
    ]
    greedy = as_generate(story, "There was a", temperature=0, max_new_tokens=4)
    pairs.append(("There was a", greedy))
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    plain = HFLM(pretrained=str(BUNDLED), dtype="float32", device="cpu", batch_size=1)
    expected = plain.loglikelihood(requests, disable_tqdm=True)
    for more in ({"tokenizer_backend": "huggingface", "tokenizer": str(BUNDLED)}, {"tokenizer_backend": "remote"}):
        remote = LocalCompletionsAPI(
            base_url=f"{server[0]}/v1/completions", model="bundled", max_length=512, batch_size=2, **more
        )
        results = remote.loglikelihood(requests, disable_tqdm=True)
        assert [is_greedy for _, is_greedy in results] == [is_greedy for _, is_greedy in expected]
        assert [value for value, _ in results] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert expected[-1][1] and not expected[2][1]
