"""A model on a server, which may misbehave: the right text or one line, and never the key."""

import gc
import io
import json
import math
import re
import signal
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
from support import fake_server
from support.fake_server import KEY, Fake, status, text_for
from support.shell import WATCH, assert_fails, call

import hfkit
from hfkit.errors import HfkitError, OptionError
from hfkit.inference import connection
from hfkit.inference.connection import Connection
from hfkit.inference.remote import Server, run_ahead
from hfkit.options import GenerateOptions, ModelOptions, ServerOptions

SEEDED = GenerateOptions(seed=7)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between tries, in seconds. None is waited for."""
    waits = []
    monkeypatch.setattr(connection, "time", SimpleNamespace(sleep=waits.append))
    for name in ("HFKIT_SERVER", "HFKIT_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return waits


@pytest.fixture
def fake():
    with Fake() as server:
        yield server


def stream(server, prompt="hi", options=SEEDED):
    pieces = []
    answer = server.stream(prompt, options=options)
    while True:
        try:
            pieces.append(next(answer))
        except StopIteration as stop:
            return pieces, stop.value


def remote(fake, **options):
    return Server(ServerOptions(server=fake.url, api_key=KEY), ModelOptions(**options))


@pytest.mark.parametrize("routes", [("completions",), ("chat/completions",), ("responses",)])
def test_stream_and_whole(routes):
    """Each of the three routes gives the text, in pieces and at once, where the server has only that one."""
    with Fake(routes=routes) as fake:
        server = remote(fake)
        pieces, generation = stream(server)
        (whole,) = server.generate("hi", options=SEEDED)
    seed = None if routes == ("responses",) else 7
    assert "".join(pieces) == generation.completion == whole.completion == text_for("hi", seed)
    assert len(pieces) > 2
    assert generation == whole and generation.tokens == 7 and generation.model == "fake" and generation.seed == seed
    assert generation.finish_reason == ("length" if routes == ("completions",) else "stop")
    assert generation.to_dict()["logprob"] == (-3.5 if routes == ("completions",) else None)
    assert str(generation) == ("hi" * generation.echo + generation.completion).strip()
    assert fake.requests[-1][0] == f"/v1/{routes[0]}" and len(fake.requests) <= 5, "a route is looked for once"


PASSING = {
    "busy": [status(429, retry_after="3"), status(429)],
    "failing": [status(503), status(500), status(502)],
    "dropped": [fake_server.drop, fake_server.drop],
    "slow": [fake_server.slowly],
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_fault_that_passes(fake, waits, faults, live):
    """What may go well later is tried again: the text is right."""
    server = remote(fake)
    fake.faults = list(faults)
    generation = stream(server)[1] if live else server.generate("hi", options=SEEDED)[0]
    assert generation.completion == text_for("hi", 7)
    tries = [] if faults == PASSING["slow"] else faults
    assert len(waits) == len(tries) and (faults != PASSING["busy"] or waits[0] == 3)
    assert waits[1:] == sorted(waits[1:]), "the waits grow"


def test_answer_cut_then_whole(fake):
    """An answer that is not shown yet is asked for again."""
    server = remote(fake)
    fake.faults = [fake_server.cut]
    assert server.generate("hi", options=SEEDED)[0].completion == text_for("hi", 7)


LASTING = {
    "cut": ([fake_server.cut], True, "broke off"),
    "error inside": ([fake_server.error_inside], True, "out of memory"),
    "error at 200": ([fake_server.error_inside], False, "out of memory"),
    "page": ([fake_server.page], False, "not in OpenAI's format"),
    "page for a stream": ([fake_server.page], True, "not in OpenAI's format"),
    "other JSON": ([fake_server.other_json], False, "not in OpenAI's format"),
    "wrong stream": ([fake_server.wrong_stream], True, "not in OpenAI's format"),
    "always busy": ([status(429)] * 9, False, "429"),
    "long wait": ([status(429, retry_after="3600")], True, "429"),
    "down": ([fake_server.drop] * 9, False, "is the server running"),
    "refused": ([status(400, "top_k is odd")], True, "top_k is odd"),
    "no key": ([status(401)], False, "HFKIT_API_KEY"),
    "redirect": ([status(307, location="http://127.0.0.1:9/")], False, "307"),
}


@pytest.mark.parametrize(("faults", "live", "words"), LASTING.values(), ids=LASTING)
def test_fault_that_lasts(fake, faults, live, words):
    """What does not pass is one line, and neither it nor a traceback shows the key, even if the server repeats it."""
    server = remote(fake)
    fake.faults = list(faults)
    with pytest.raises(HfkitError, match=words) as caught:
        stream(server) if live else server.generate("hi", options=SEEDED)
    assert "\n" not in str(caught.value) and fake.url in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_key_goes_to_its_server(fake, monkeypatch):
    """OpenAI's key goes to OpenAI and nowhere else; hfkit's does not go to OpenAI."""

    def sent(address, **options):
        return Connection(ServerOptions(server=address, **options))._client.headers.get("authorization")

    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert sent("openai") == sent("https://api.openai.com/") == sent("https://api.openai.com/v1") == "Bearer sk-openai"
    others = ["https://api.openai.com.evil.example", "http://api.openai.com", "https://api.openai.com@evil.example/v1",
              "https://api.openai.com:8443", fake.url]  # fmt: skip
    assert {sent(address) for address in others} == {None}
    monkeypatch.setenv("HFKIT_API_KEY", " sk-hfkit\n")
    assert sent("openai") == "Bearer sk-openai" and {sent(address) for address in others} == {"Bearer sk-hfkit"}
    assert sent(fake.url, api_key="sk-given") == "Bearer sk-given"
    Server(ServerOptions(server=fake.url))
    assert fake.requests[-1][1]["Authorization"] == "Bearer sk-hfkit"
    with pytest.raises(OptionError, match="characters that no key has") as caught:
        sent(fake.url, api_key="sk-se\ncret")
    assert "sk-" not in str(caught.value)
    with pytest.raises(OptionError) as caught:
        ServerOptions(server=fake.url, api_key=b"sk-secret")
    assert "sk-" not in str(caught.value) and "sk-given" not in repr(ServerOptions(api_key="sk-given"))


def test_password_in_address(fake):
    """A password in the address is used, and never shown."""
    address = fake.url.replace("//", "//me:swordfish@")
    fake.faults = [status(400)]
    with pytest.raises(HfkitError) as caught:
        Server(ServerOptions(server=address)).generate("hi", options=SEEDED)
    assert fake.requests[-1][1]["Authorization"].startswith("Basic ")
    assert "swordfish" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("address", ["ftp://host", "http://", "http://[", "/tmp/socket", "gopher:70"])
def test_address_refused(address):
    """What is no address of a server is named as such."""
    with pytest.raises(HfkitError):
        Server(ServerOptions(server=address))


def test_model_named_or_only_one():
    """Without a name the only model is used; several are listed."""
    with Fake(models=["a", "b"]) as fake:
        assert remote(fake, model="b").model == "b"
        with pytest.raises(OptionError, match="-m: a, b$"):
            remote(fake)
    with Fake(models=[]) as fake:
        with pytest.raises(OptionError, match="lists none"):
            remote(fake)
        assert remote(fake, model="hidden").model == "hidden"


def test_options_as_the_server_calls_them(fake):
    """Options get OpenAI's names, and those that a server might ignore are refused."""
    options = GenerateOptions(max_new_tokens=3, stop_strings=["\\n"], top_k=5, do_sample=False, seed=1)
    remote(fake).generate("hi", options=options)
    sent = fake.requests[-1][2]
    expected = {"max_tokens": 3, "stop": ["\n"], "top_k": 5, "temperature": 0, "seed": 1, "prompt": "hi"}
    assert {name: sent.get(name) for name in expected} == expected
    assert not {"max_new_tokens", "stop_strings", "do_sample", "raw", "truncate"} & set(sent)
    for name, value in {"typical_p": 0.5, "novel": ["corpus.txt"], "num_return_sequences": 2}.items():
        with pytest.raises(OptionError, match=name.replace("_", "-")):
            remote(fake).generate("hi", options=GenerateOptions(temperature=0, **{name: value}))
    with pytest.raises(OptionError, match="--device"):
        remote(fake, device="cpu")
    with Fake(owner="hfkit") as other:
        remote(other).generate("hi", options=GenerateOptions(typical_p=0.5, raw=True))
        assert other.requests[-1][2]["typical_p"] == 0.5 and other.requests[-1][2]["raw"] is True


def test_python(fake):
    """`hfkit.generate` and `hfkit.stream` take a server; one prompt gives one result, a list gives a list."""
    options = {"server": fake.url, "seed": 3}
    assert hfkit.generate("hi", **options).completion == text_for("hi", 3)
    results = hfkit.generate(["one", "two"], num_return_sequences=2, **options)
    assert [[sample.completion for sample in row] for row in results] == [
        [text_for("one", 3), text_for("one", 4)],
        [text_for("two", 5), text_for("two", 6)],
    ]
    assert [sample.seed for row in results for sample in row] == [3, 4, 5, 6]
    assert "".join(hfkit.stream("hi", **options)) == text_for("hi", 3)
    with pytest.raises(OptionError, match="is loaded here, or by a server"):
        hfkit.generate("hi", model=("model", "tokenizer"), server=fake.url)


def test_run_ahead():
    """Results keep the order of the items, and an error comes where its item was."""
    assert list(run_ahead(lambda number: number**2, range(50), 4)) == [number**2 for number in range(50)]
    results = run_ahead(lambda number: 6 // (2 - number), range(5), 2)
    assert next(results) == 3 and next(results) == 6
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(run_ahead(len, [], 2)) == []


def test_shell(fake, capfdbinary, monkeypatch):
    """The command prints what it prints for a model of this machine; the address may come from the environment."""
    result = call(capfdbinary, "generate", "hi", "--server", fake.url, "--seed", 7, "--verbose")
    assert result.stdout.decode() == f"hi{text_for('hi', 7)}\n" and b"7 tokens in" in result.stderr
    monkeypatch.setenv("HFKIT_SERVER", fake.url)
    monkeypatch.setenv("HFKIT_API_KEY", KEY)
    result = call(capfdbinary, "generate", "hi", "--json", "--num-return-sequences", 2)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [list(line) for line in lines] == [
        ["prompt", "completion", "finish_reason", "tokens", "logprob", "seed", "model"]
    ] * 2
    assert f"seed {lines[0]['seed']}" in result.stderr.decode() and lines[1]["seed"] == lines[0]["seed"] + 1
    fake.faults = [status(400)]
    assert_fails(call(capfdbinary, "generate", "hi"), 1, "HTTP status 400", "***")
    fake.faults = [fake_server.error_inside, fake_server.error_inside]
    result = call(capfdbinary, "generate", "hi", "--debug")
    assert result.returncode == 1 and b"Traceback" in result.stderr and KEY.encode() not in result.stderr
    assert_fails(call(capfdbinary, "generate", "hi", "--sweep", "top_k=1,2"), 2, "--sweep")
    assert_fails(call(capfdbinary, "generate", "hi", "--device", "cpu"), 2, "--device")
    assert_fails(call(capfdbinary, "generate", "hi", "--server", "127.0.0.1:9"), 1, "is the server running?")


def test_shell_input(fake, tmp_path, capfdbinary):
    """Many prompts: several at a time, in order, one that is refused named, and an interrupted run resumed."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(20)))
    arguments = ["generate", "-i", prompts, "--server", fake.url, "-o", output, "--batch-size", 4]
    fake.delay = 0.02
    fake.faults = [status(503), fake_server.drop, *[None] * 8, status(401)]
    result = call(capfdbinary, *arguments, "--seed", 5)
    assert result.returncode == 1 and b"401" in result.stderr and not output.exists()
    assert 1 < fake.most_busy <= 4
    begun = len(fake.requests)
    gc.collect()  # as the end of a process does: the file of the run before is closed
    result = call(capfdbinary, *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert 10 < len(fake.requests) - begun < 21, "what was done is not done again"
    records = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [record["line"] for record in records] == list(range(1, 21))
    assert [record["completion"] for record in records] == [text_for(f"prompt {i}", 5 + i) for i in range(20)]
    fake.faults = [None, status(400, "too long")]
    result = call(capfdbinary, *arguments[:-4], "--batch-size", 1)
    (failed,) = re.findall(rb"prompts.txt, line (\d+): .*too long", result.stderr)
    lines = [json.loads(line)["line"] for line in result.stdout.splitlines()]
    assert result.returncode == 1 and lines == [number for number in range(1, 21) if number != int(failed)]


def test_shell_chat(fake, capfdbinary, monkeypatch):
    """A chat sends all turns; one that fails is left out; --raw continues one text."""
    server = ["--server", fake.url, "--seed", 1]
    fake.faults = [None, status(400)]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    result = call(capfdbinary, "chat", *server)
    first, third = text_for("one", 1), text_for("three", 3)
    assert result.stdout.decode() == f"{first}\n{third}\n" and b"HTTP status 400" in result.stderr
    turns = [("user", "one"), ("assistant", first), ("user", "three")]
    assert [(turn["role"], turn["content"]) for turn in fake.requests[-1][2]["messages"]] == turns
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    call(capfdbinary, "chat", *server, "--raw")
    assert fake.requests[-1][2]["prompt"] == f"one{first}two"


def test_classify_and_evaluate_where_they_cannot(fake, corpus):
    """Labels come from hfkit's own server, and perplexity from one that tells log-probabilities."""
    with pytest.raises(OptionError, match="hfkit's own server"):
        hfkit.classify("hi", labels=["a", "b"], server=fake.url)
    with pytest.raises(HfkitError, match="404"):
        hfkit.evaluate(corpus, server=fake.url)
    fake.routes = ("/tokenize", "completions")
    result = hfkit.evaluate(corpus, server=fake.url, max_length=8)
    assert result.perplexity == pytest.approx(math.exp(0.5)) and result.token_accuracy == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_server, "whole_for", lambda *_: {"choices": [{"text": "", "logprobs": None}]})
        with pytest.raises(HfkitError, match="no log-probabilities of a prompt"):
            hfkit.evaluate(corpus, server=fake.url, max_length=8)


def test_interrupt(fake, tmp_path):
    """Ctrl-C does not wait for the requests that are under way."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("prompt\n" * 40)
    fake.delay = 30
    command = [sys.executable, "-m", "hfkit", "generate", "-i", prompts, "--server", fake.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while fake.busy < 16:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130


def test_no_torch(tmp_path, corpus):
    """Nothing heavy is imported where a server does the work."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    names = [["generate", "hi"], ["generate", "-i", str(prompts)], ["classify", "hi"], ["chat"],
             ["evaluate", corpus]]  # fmt: skip
    with Fake(owner="hfkit", routes=("/tokenize", "completions")) as fake:
        lines = [[*line, "--server", fake.url] for line in names]
        options = {"capture_output": True, "timeout": 120, "stdin": subprocess.DEVNULL}
        result = subprocess.run([sys.executable, "-c", WATCH, json.dumps(lines)], **options)
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith(b"[")]
    assert [(code, heavy) for _, code, heavy in told] == [(0, [])] * len(lines), result.stderr
