"""Limits, keys and manners of the server, seen from outside."""

import concurrent.futures
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection

import httpx
import psutil
import pytest
import uvicorn
from fastapi.routing import APIRoute
from support.servers import serving, wait_until
from support.shell import assert_fails, call

import hfkit
from hfkit import console
from hfkit.cli.serve import check_address
from hfkit.models.loading import vocabulary_size
from hfkit.serving import server as server_module
from hfkit.serving.app import Server, router
from hfkit.serving.guard import Settings

KEY = "a-key-of-its-own"
LONG = {"prompt": "Once", "max_tokens": 400, "min_new_tokens": 400, "seed": 1}
ROUTES = sorted(
    {(method, route.path.replace("{name:path}", "bundled")) for route in router.routes for method in route.methods}
)


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


def ask(address: str, **body) -> httpx.Response:
    return httpx.post(f"{address}/v1/completions", json=body, timeout=120)


def is_idle(server) -> bool:
    return not server.counts.in_flight and not any(e.running or e.waiting for e in server.engines.values())


# many at a time


@pytest.mark.parametrize("clients", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_clients_get_the_texts_of_one(server, story, clients):
    """Greedy and sampled, whole and streamed, all at once: no error, and each text as if it were alone."""
    address, _ = server
    cases = [
        {"prompt": "The house " + "and so on " * (k % 4), "seed": k, "max_tokens": 8, "temperature": k % 3 / 2}
        for k in range(clients)
    ]
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda case: ask(address, **case).json(), cases))
    for reply, case in zip(replies, cases, strict=True):
        expected = hfkit.generate(
            case["prompt"], model=story, seed=case["seed"], max_new_tokens=8, temperature=case["temperature"]
        )
        assert reply["choices"][0]["text"] == expected.completion


def test_exactly_the_excess_is_told_to_come_again(story):
    with serving(story, max_requests=4) as (address, server), concurrent.futures.ThreadPoolExecutor(64) as pool:
        busy = [pool.submit(ask, address, **{**LONG, "max_tokens": 80, "min_new_tokens": 80}) for _ in range(4)]
        wait_until(lambda: server.counts.in_flight == 4)
        more = [pool.submit(ask, address, **LONG) for _ in range(20)]
        replies = [each.result() for each in more]
        assert [reply.status_code for reply in replies] == [429] * 20
        assert all(reply.headers["retry-after"] == "1" for reply in replies)
        assert replies[0].json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{address}/health").status_code == 200
        assert [each.result().status_code for each in busy] == [200] * 4
        assert ask(address, prompt="a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_clients_that_leave_free_their_place(server, streams):
    """At any point: before the first token, or in the middle."""
    address, running = server
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": streams}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    rng = random.Random(1)
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            wait_until(lambda: running.counts.in_flight)
            time.sleep(rng.random() * 0.1)
        wait_until(lambda: is_idle(running))


@pytest.mark.parametrize("streams", [False, True])
def test_clients_that_stall_are_given_up(lm, monkeypatch, streams):
    """A body that does not come, and a stream that nobody reads."""
    monkeypatch.setattr("hfkit.serving.guard._STALLED", 0.2)
    with serving(lm) as (address, server):
        host, port = address.removeprefix("http://").split(":")
        fields = {"prompt": "a", "n": 100, "max_tokens": 50, "min_new_tokens": 50, "stream": True, "logprobs": 20}
        body = json.dumps(fields).encode() if streams else b'{"prompt": '
        length = len(body) if streams else 100
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
            wait_until(lambda: server.counts.in_flight)
            wait_until(lambda: is_idle(server))


def test_request_has_a_time_limit(story):
    with serving(story, request_timeout=0.2) as (address, _):
        choice = ask(address, **LONG).json()["choices"][0]
        assert choice["finish_reason"] == "length" and len(choice["text"]) < 1000


def test_stop_ends_what_runs_beside_beams(story):
    """Every text ends with what it has: beams do not hold up the others."""
    long = {**LONG, "max_tokens": 1000, "min_new_tokens": 1000}
    fields = [long | {"num_beams": 4}, long, long | {"stream": True, "stream_options": {"include_usage": True}}]
    with serving(story) as (address, server), concurrent.futures.ThreadPoolExecutor(3) as pool:
        replies = [pool.submit(ask, address, **each) for each in fields]
        (engine,) = server.engines.values()
        wait_until(lambda: engine.running == 3 and engine.tokens_written)
        server.stop()
        beams, whole, streamed = (each.result() for each in replies)
    *_, last, usage, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert json.loads(last)["choices"][0]["finish_reason"] == "length" and done == "[DONE]"
    for reply in (beams.json(), whole.json(), json.loads(usage)):
        assert all(choice["finish_reason"] == "length" for choice in reply["choices"])
        assert 0 < reply["usage"]["completion_tokens"] < 1000


# what comes in


@pytest.mark.parametrize(
    "fields", [{"num_beams": 129}, {"num_beams": 100_000}, {"num_beams": 65, "n": 2}, {"num_beams": 13, "best_of": 10},
               {"num_beams": 2, "n": 9, "prompt": ["a"] * 8}],
)  # fmt: skip
def test_beams_have_a_limit(http, lm, fields):
    """Each needs as much memory as a text, and more time."""
    for path, prompt in (("completions", {"prompt": "a"}), ("chat/completions", GOOD["/v1/chat/completions"])):
        if path == "completions" or not {"best_of", "prompt"} & set(fields):
            body = {"model": lm.name, **prompt, "max_tokens": 1, **fields}
            reply = http.post(f"/v1/{path}", json=body)
            assert reply.status_code == 400 and "at most 128 beams" in reply.json()["error"]["message"]
    most = {"model": lm.name, "prompt": "a", "max_tokens": 1, "num_beams": 64, "n": 2}
    assert http.post("/v1/completions", json=most).status_code == 200


def test_long_beams_have_a_limit(http, lm, monkeypatch):
    """A beam search keeps the logits of all its steps."""
    monkeypatch.setattr("hfkit.serving.jobs._MOST_LOGITS", 3 * 4 * vocabulary_size(lm.model))
    body = {"model": lm.name, "prompt": "a", "num_beams": 3}
    assert http.post("/v1/completions", json=body | {"max_tokens": 4}).status_code == 200
    reply = http.post("/v1/completions", json=body | {"max_tokens": 5})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("3 beams of 5 tokens take too much memory: lower num_beams")


@pytest.mark.parametrize("sized", [True, False])
def test_body_has_a_limit(http, sized):
    body = b'{"prompt": "' + b"a" * 2_000_001 + b'"}'
    content = body if sized else iter([body[:1_000_000], body[1_000_000:]])
    reply = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 413 and reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}',
             b'{"temperature": 1e999}', b'{"seed": 1' + b"0" * 5000 + b"}", b'{"n": true}', b'{"prompt": [1, "a"]}',
             b'{"seed": -1}', b'{"logit_bias": {"1": NaN}}', b'{"stop": ""}', b'{"stop": [' + b'"a",' * 64 + b'"b"]}',
             b'{"max_tokens": 1.5}', b'{"prompt": "a", "prompt": 7}', b'{"stream_options": 3}'],
)  # fmt: skip
def test_body_that_is_wrong(http, body):
    reply = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


TURN = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "b"}}]}
REASONS = [
    ("completions", b'{"prompt": "a",}', None, "the body is not valid JSON (character 16: Expecting property name"),
    ("completions", {"prompt": [1, "a"]}, "prompt", "prompt.1: Input should be a valid integer"),
    ("completions", {"prompt": ["a", 1]}, "prompt", "prompt.1: Input should be a valid string"),
    ("completions", {"prompt": [[1], ["a"]]}, "prompt", "prompt.1.0: Input should be a valid integer"),
    ("completions", {"prompt": 7}, "prompt", "prompt: Input should be a valid string or a valid list"),
    ("completions", {"stop": ["a"] * 65}, "stop", "stop: List should have at most 64 items"),
    ("completions", {"stop": ["a", "b" * 4097]}, "stop", "stop.1: String should have at most 4096 characters"),
    ("completions", {"logit_bias": {"1": "a"}}, "logit_bias", "logit_bias.1: Input should be a valid number"),
    ("chat/completions", {}, "messages", "messages: Field required"),
    ("chat/completions", {"messages": [{"content": "a"}]}, "messages", "messages.0.role: Field required"),
    ("chat/completions", {"messages": [TURN]}, "messages", "messages.0.content.1.type: Input should be 'text', "),
    ("classify", {"input": ["a", 3]}, "input", "input.1: Input should be a valid string or a valid dictionary"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "param", "words"), REASONS, ids=lambda value: str(value)[:40])
def test_reason_is_that_of_the_type_that_was_meant(http, route, body, param, words):
    """Where a field may be of several types, no other one is named, nor are pydantic's own names for them."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    reply = http.post(f"/v1/{route}", content=content, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param and error["message"].startswith(words), error


@pytest.mark.parametrize(
    ("route", "body"),
    [("/v1/completions", {"prompt": "a", "suffix": "HALF"}), ("/v1/completions", {"prompt": ["a", "HALF"]}),
     ("/v1/completions", {"prompt": "a", "stop": ["HALF"]}), ("/v1/completions", {"prompt": "a", "HALF": 1}),
     ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "HALF"}]}]}),
     ("/v1/responses", {"input": "HALF"}), ("/v1/responses", {"input": "a", "instructions": "HALF"}),
     ("/v1/classify", {"input": [{"HALF": "a"}]}), ("/v1/classify", {"input": "a", "labels": ["b", "HALF"]}),
     ("/v1/answer", {"question": "HALF", "context": "a"}), ("/v1/answer", {"question": "a", "context": "HALF"}),
     ("/tokenize", {"prompt": "HALF"}), ("/detokenize", {"tokens": [1], "model": "HALF"})],
)  # fmt: skip
def test_half_a_surrogate_pair_is_refused_in_every_body(http, route, body):
    content = json.dumps(body).replace("HALF", "hi \\ud83d")
    reply = http.post(route, content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400, reply.text
    assert r"'hi \ud83d' in " in reply.json()["error"]["message"]
    assert "is not UTF-8 text (character 4): convert it" in reply.json()["error"]["message"]


def test_nulls_are_as_good_as_nothing(http):
    fields = "n best_of echo logprobs stop seed logit_bias presence_penalty frequency_penalty stream suffix user top_k"
    nulls = dict.fromkeys([*fields.split(), "stream_options", "max_tokens", "temperature", "top_p", "model"])
    assert http.post("/v1/completions", json={"prompt": "a", **nulls}).status_code == 200
    chat = {"messages": [{"role": "user", "content": "a", "name": None}], "max_tokens": 2, "tools": None}
    assert http.post("/v1/chat/completions", json=chat | {"response_format": {"type": "text"}}).status_code == 200


SPARE = [
    "a",
    "",
    0,
    -1,
    1.5,
    True,
    None,
    [],
    {},
    [[]],
    "\x00\x1b[31m",
    2**70,
    float("nan"),
    [1, "a"],
    {"a": {}},
    "€" * 99,
]
FIELDS = {
    "/v1/completions": ["prompt", "n", "best_of", "echo", "logprobs", "stop", "seed", "logit_bias", "temperature",
                        "presence_penalty", "max_tokens", "top_p", "stream", "stream_options", "model", "suffix"],
    "/v1/chat/completions": ["messages", "n", "logprobs", "top_logprobs", "max_tokens", "stop", "seed", "stream",
                             "tools", "response_format", "chat_template"],
    "/v1/responses": ["input", "instructions", "stream", "max_output_tokens", "previous_response_id", "text"],
    "/v1/classify": ["input", "labels", "template"], "/v1/answer": ["question", "context", "no_answer_threshold"],
    "/tokenize": ["prompt", "add_special_tokens"], "/detokenize": ["tokens"],
}  # fmt: skip
GOOD = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2, "seed": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "seed": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 2}, "/v1/classify": {"input": "a", "labels": ["b", "c"]},
    "/v1/answer": {"question": "a", "context": "b"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]},
}  # fmt: skip
CONTROLS = ["top_k", "min_p", "bad_words", "sequence_bias", "guidance_scale", "suppress_tokens", "truncate", "raw",
            "repetition_penalty", "max_time", "do_sample", "typical_p", "forced_bos_token_id"]  # fmt: skip


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bodies_of_chance(server, lm, count):
    """No body is a fault of the server, and the next good request gets its text."""
    address, running = server
    rng, client = random.Random(count), httpx.Client(base_url=address, timeout=60)
    expected = hfkit.generate("the", model=lm, seed=1, max_new_tokens=4).completion
    statuses = set()
    for number in range(count):
        path = rng.choice(list(GOOD))
        body = {"model": lm.name, **GOOD[path]}
        for _ in range(rng.randrange(1, 4)):
            name = rng.choice(FIELDS[path] + CONTROLS * ("seed" in FIELDS[path]))
            body[name] = rng.choice(SPARE)
        reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        statuses.add(reply.status_code)
        assert reply.status_code < 500, (path, body, reply.text)
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}, (path, body)
        elif body.get("stream") is True:
            assert reply.text.endswith("data: [DONE]\n\n") and "server_error" not in reply.text, (path, body)
        if number % 50 == 0:
            good = {"model": lm.name, "prompt": "the", "seed": 1, "max_tokens": 4}
            assert client.post("/v1/completions", json=good).json()["choices"][0]["text"] == expected
    assert {200, 400} <= statuses
    wait_until(lambda: is_idle(running))


# who gets in


def test_key_opens_every_route(story):
    """Every route and method with twenty wrong keys: 401, whatever else is odd about the request."""
    wrong = [[], *([("authorization", value)] for value in (
        "", "Bearer", KEY, f"Basic {KEY}", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Bearer {KEY.upper()}",
        f"Bearer  {KEY}", "Bearer \xff\xfe", f"bearer{KEY}", f"Token {KEY}", f"Bearer {KEY}, Bearer {KEY}",
        f"Bearer\t{KEY}", "Bearer null", "Bearer *", f"key {KEY}",
    )), [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer no")], [("x-api-key", KEY)],
        [("api-key", KEY)], [("cookie", f"authorization=Bearer {KEY}")]]  # fmt: skip
    assert len(wrong) >= 20
    paths = [(method, path) for method, path in ROUTES if path not in ("/health", "/")]
    odd = [("POST", "/health"), ("GET", "//health"), ("GET", "/health/"), ("GET", "/v1/../health"), ("PUT", "/"),
           ("GET", "/health%2f..%2fv1/models"), ("GET", "/nothing"), ("OPTIONS", "/v1/models"),
           ("GET", "/docs")]  # fmt: skip
    with serving(story, api_key=KEY) as (address, _), httpx.Client(base_url=address) as client:
        connection = HTTPConnection(address.removeprefix("http://"))  # httpx would tidy the paths
        for method, path in paths + odd:
            for headers in wrong:
                connection.putrequest(method, path)
                for name, value in [*headers, ("content-type", "application/json"), ("content-length", "0")]:
                    connection.putheader(name, value.encode("latin-1"))
                connection.endheaders()
                reply = connection.getresponse()
                reply.read()
                assert reply.status == 401, (method, path, headers)
        assert client.get("/health").json() == {"status": "ok"} and client.get("/").status_code == 200
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/v1/models?key=" + KEY).status_code == 401


def test_routes_are_those_that_are_known():
    """A new route must be thought about here: what it shows, and to whom."""
    assert {path for _, path in ROUTES} == {
        "/", "/health", "/metrics", "/v1/models", "/v1/models/bundled", "/v1/completions", "/v1/chat/completions",
        "/v1/responses", "/v1/classify", "/v1/answer", "/tokenize", "/detokenize", "/tokenizer_info",
    }  # fmt: skip
    assert all(isinstance(route, APIRoute) for route in router.routes)


def test_pages_of_others_get_nothing(http):
    body = {"prompt": "a", "max_tokens": 1}
    assert http.post("/v1/completions", json=body, headers={"host": "evil.example"}).status_code == 403
    assert http.post("/v1/completions", json=body, headers={"origin": "http://evil.example"}).status_code == 403
    assert http.post("/v1/completions", content=json.dumps(body)).status_code == 415
    plain = {"content-type": "text/plain"}
    assert http.post("/v1/completions", content=json.dumps(body), headers=plain).status_code == 415
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    reply = http.options("/v1/completions", headers=preflight)
    assert reply.status_code == 403 and "access-control-allow-origin" not in reply.headers
    own = {"origin": str(http.base_url)}
    assert http.post("/v1/completions", json=body, headers=own).status_code == 200
    assert http.get("/health", headers={"host": "localhost:1"}).status_code == 200


def test_page_may_load_nothing(http):
    reply = http.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy.replace("https", "http")


def test_log_has_no_prompt_and_no_forged_line(http, capsys, monkeypatch):
    monkeypatch.setattr(console.state, "verbose", True)
    for path in ("/v1/completions", "/nothing%0Ahfkit:%20forged", "/%1b[31m"):
        http.post(path, json={"prompt": "a secret", "max_tokens": 1}, headers={"x-request-id": "x" * 5000})
    lines: list[str] = []  # written after the reply is sent
    wait_until(lambda: len(lines.extend(capsys.readouterr().err.splitlines()) or lines) >= 3)
    assert len(lines) == 3 and all(line.startswith("hfkit: POST ") for line in lines)
    assert not any("secret" in line or "\x1b" in line or "xxx" in line for line in lines)


def test_log_has_prompts_if_asked(lm, capsys):
    with serving(lm, logs_prompts=True) as (address, _):
        ask(address, prompt="line\nand \x1b another", max_tokens=1)
        wait_until(lambda: (text := capsys.readouterr().err) and "line\\nand \\u001b another" in text)


def test_request_id(http):
    assert http.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    for bad in ("x" * 65, "a b", "€".encode()):
        assert http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"].isalnum()


# the other routes


def test_tokenize_and_back(http, story):
    text = "The house, and “so” on."
    reply = http.post("/tokenize", json={"prompt": text}).json()
    assert reply == {
        "tokens": story.tokenizer(text)["input_ids"],
        "count": len(reply["tokens"]),
        "max_model_len": 1024,
    }
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": [9999999]}).status_code == 400


def test_classify_and_answer(http, story):
    labels = ["rain", "war"]
    reply = http.post("/v1/classify", json={"input": ["It is wet.", "A sword"], "labels": labels}).json()
    expected = hfkit.classify(["It is wet.", "A sword"], model=story, labels=labels)
    assert [entry["label"] for entry in reply["data"]] == [each.label for each in expected]
    assert reply["data"][0]["probabilities"] == pytest.approx(expected[0].probabilities)
    refused = http.post("/v1/classify", json={"input": "a", "template": "{text}"})
    assert refused.status_code == 400 and "template" in refused.text
    asked = {"question": "Who was there?", "context": "A dog was there."}
    expected = hfkit.answer(*asked.values(), model=story)
    assert http.post("/v1/answer", json=asked).json()["answer"] == expected.answer


def test_compute_threads_are_left_to_the_steps(http, monkeypatch):
    """What computes in a thread of its own ends its compute threads: see `test_compute_threads_of_loading_end`."""
    ended = []
    for module in ("app", "engine"):
        monkeypatch.setattr(
            f"hfkit.serving.{module}.end_compute_threads", lambda: ended.append(threading.current_thread().name)
        )
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).is_success and not ended
    assert http.post("/v1/classify", json={"input": "a", "labels": ["b", "c"]}).is_success
    assert http.post("/v1/answer", json={"question": "Who?", "context": "A dog."}).is_success
    assert len(ended) == 2 and all(name.startswith("asyncio") for name in ended)
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "num_beams": 2}).is_success
    wait_until(lambda: ended[2:] == ["engine of bundled"])


def test_translators(tiny_t5):
    """A model with an encoder: the last turn is its text, and it streams as well."""
    lm = hfkit.load(tiny_t5)
    expected = hfkit.generate("the cat", model=lm, seed=1, max_new_tokens=8, do_sample=True).completion
    with serving(lm) as (address, _):
        body = {"seed": 1, "max_tokens": 8, "do_sample": True}
        assert ask(address, prompt="the cat", **body).json()["choices"][0]["text"] == expected
        chat = {"messages": [{"role": "user", "content": "the cat"}], **body}
        reply = httpx.post(f"{address}/v1/chat/completions", json=chat, timeout=60).json()
        assert reply["choices"][0]["message"]["content"] == expected
        lines = httpx.post(f"{address}/v1/completions", json={"prompt": "the cat", "stream": True, **body}).text
        chunks = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
        assert ask(address, prompt="the cat", logprobs=1).status_code == 400


def test_metrics(http, server):
    before = http.get("/metrics").text
    http.post("/v1/completions", json={"prompt": "a b c", "max_tokens": 3, "min_new_tokens": 3})
    after = http.get("/metrics").text
    figures = [dict(line.rsplit(" ", 1) for line in text.splitlines()) for text in (before, after)]
    name = 'hfkit_tokens_written_total{model="0"}'
    assert int(figures[1][name]) == int(figures[0][name]) + 3
    assert not any("nothing" in name for name in figures[1])


# from the shell


def test_address_that_others_reach_needs_a_key(capfdbinary, monkeypatch):
    monkeypatch.delenv("HFKIT_API_KEY", raising=False)
    assert_fails(call(capfdbinary, "serve", "--host", "0.0.0.0"), 2, "--host 0.0.0.0", "--api-key")  # noqa: S104
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_address(host, None)
    check_address("0.0.0.0", KEY)  # noqa: S104


@pytest.mark.parametrize("host, names", [("127.9.9.9", {"127.9.9.9", "localhost"}), ("127.0.0.1", {"127.0.0.1"})])
def test_local_server_has_names_without_a_key(host, names, tiny, capfdbinary, monkeypatch):
    """Every loopback address checks the Host header: a name of another site could lead there."""
    settings = []
    monkeypatch.setattr("hfkit.serving.server.serve", lambda models, listener, made, grace: settings.append(made))
    assert call(capfdbinary, "serve", "-m", tiny, "--host", host, "--port", 0).returncode == 0
    assert names <= set(settings[0].hosts) and "example.com" not in settings[0].hosts


def test_port_in_use(capfdbinary, tiny):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert_fails(
            call(capfdbinary, "serve", "-m", tiny, "--port", taken.getsockname()[1]), 1, "cannot listen", "--port"
        )


def test_model_named_twice(capfdbinary, tiny):
    assert_fails(call(capfdbinary, "serve", "-m", tiny, "-m", tiny), 2, "twice")


@pytest.fixture(scope="module")
def process():
    """Starts `hfkit serve` with these arguments; its address and its process."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "hfkit", "serve", "--port", "0", *arguments]
        running = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        started.append(running)
        return running.stderr.readline().split(" at ")[1].split(";")[0], running

    yield start
    for running in started:
        running.kill()
        running.wait()


def test_address_is_printed_when_it_answers(lm, monkeypatch):
    """A program that waits for the line connects at once: it is not refused."""
    server = Server([lm], Settings())
    config = uvicorn.Config(server.guard, log_config=None, log_level="critical", lifespan="off")
    listener, printed = server_module.bind("127.0.0.1", 0), []
    running = server_module._Uvicorn(config, server, "serving", 0)

    def note(text: str) -> None:
        printed.append(text)
        running.should_exit = True
        socket.create_connection(listener.getsockname()).close()  # refused before it listens

    monkeypatch.setattr(server_module, "note", note)
    limit = threading.Timer(20, lambda: setattr(running, "should_exit", True))
    limit.start()
    running.run(sockets=[listener])
    limit.cancel()
    server.stop()
    assert printed == ["serving"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
def test_compute_threads_of_loading_end():
    """Beside them, each operation of an engine would wait for its threads to wake up."""
    script = """
import psutil, torch
from hfkit.serving import server

class Stop(Exception):
    pass

def count(*arguments):
    counts.append(psutil.Process().num_threads())
    raise Stop

counts, server.Server = [], count
torch.set_num_threads(3)
torch.ones(1_000_000).add_(1)
counts.append(psutil.Process().num_threads())
try:
    server.serve([], None, None)
except Stop:
    print(counts[0] - counts[1], torch.ones(1_000_000).add_(1).sum().item())
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.split() == ["2", "2000000.0"], done.stderr


def test_sigterm_under_load(process):
    """Every request that was let in is answered: with its text, or what there is of it, or that it was too late."""
    address, running = process("--grace", "1")
    outcomes: list[tuple[int, str]] = []

    def one(number: int) -> None:
        body = {**LONG, "stream": number % 2 == 0, "n": 2, "num_beams": 4 if number % 6 > 3 else None}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            outcomes.append((reply.status_code, reply.read().decode()))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
    # One client for all: to make one takes longer than to write a text.
    with httpx.Client(base_url=address, timeout=60) as client:
        for thread in threads:
            thread.start()
        wait_until(lambda: "in_flight 12" in client.get("/metrics").text)
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
    assert len(outcomes) == 12
    for status, text in outcomes:
        if text.startswith("data:"):
            assert text.endswith("data: [DONE]\n\n")
            assert text.count('"finish_reason": "length"') == 2 or "try again later" in text
        else:
            assert (status == 200 and text.count('"finish_reason":"length"') == 2) or status == 503
    assert running.wait(20) == 0 and running.stderr.read() == ""


@pytest.mark.slow
def test_memory_is_flat(process):
    """Ten thousand requests, a tenth of them given up."""
    address, running = process()
    worker = psutil.Process(running.pid)
    sizes = []

    def one(number: int) -> None:
        body = {"prompt": "It was " + "so " * (number % 60), "max_tokens": 3, "seed": number}
        try:
            timeout = 0.01 if number % 10 == 0 else 60
            httpx.post(f"{address}/v1/completions", json=body, timeout=timeout)
        except httpx.TimeoutException:
            assert number % 10 == 0

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for first in range(0, 10_000, 1000):
            list(pool.map(one, range(first, first + 1000)))
            sizes.append((worker.memory_info().rss, worker.num_threads(), worker.num_fds()))
    (before, threads, fds), (after, *now) = sizes[1], sizes[-1]
    assert after < 1.05 * before and now[0] <= threads + 1 and now[1] <= fds + 2, sizes


@pytest.mark.slow
def test_health_while_busy(server):
    """p99 within 100 ms while texts are written and two megabytes are tokenized."""
    address, _ = server
    stop, times = threading.Event(), []

    def load(number: int) -> None:
        while not stop.is_set():
            body = LONG if number else {"prompt": "and so on " * 190_000}
            httpx.post(f"{address}/v1/completions", json=body, timeout=120)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=address) as client:
        for _ in range(300):
            started = time.perf_counter()
            assert client.get("/health").status_code == 200
            times.append(time.perf_counter() - started)
            time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    assert sorted(times)[296] < 0.1
