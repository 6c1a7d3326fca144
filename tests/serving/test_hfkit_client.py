"""hfkit as the client of hfkit's server: what a command prints is what it prints for a model of this machine."""

import json

import httpx
import pytest
from support.servers import serving
from support.shell import assert_fails, call, edit_json

import hfkit
from hfkit.errors import HfkitError

PROMPT = "Once upon a time"
OPTIONS = [
    {},
    {"temperature": 0},
    {"do_sample": False, "repetition_penalty": 1.3},
    {"top_k": 5, "typical_p": 0.9, "no_repeat_ngram_size": 2},
    {"stop_strings": [" the"], "min_new_tokens": 4},
    {"stop_strings": ["#", "x" * 4096, "%", "@", "^", " the"], "min_new_tokens": 4},
    {"sequence_bias": [" house=4"], "bad_words": [" and"]},
    {"max_new_tokens": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options)[:60])
def test_generate(server, story, options):
    """Every field of a result is the same, streamed or not."""
    options = {"seed": 7, "max_new_tokens": 16} | options
    local = hfkit.generate(PROMPT, model=story, **options)
    remote = hfkit.generate(PROMPT, model="bundled", server=server[0], **options)
    expected, fields = local.to_dict(), remote.to_dict()
    assert fields.pop("logprob") == pytest.approx(expected.pop("logprob"), abs=1e-3)
    assert fields == expected and str(remote) == str(local)
    pieces = list(hfkit.stream(PROMPT, model="bundled", server=server[0], **options))
    assert "".join(pieces) == local.completion


def test_backslash_and_n_at_a_shell_and_in_json(server, story):
    r"""Where people type, \n is a newline, on this machine and on a server; in JSON it is two characters."""
    slash, newline = "\\n", "\n"
    most = {"temperature": 0, "max_new_tokens": 6}
    bias = {"sequence_bias": [f"{slash}=60"]}  # it writes newlines, whatever else is asked
    local, remote = {"model": story}, {"model": "bundled", "server": server[0]}
    expected = hfkit.generate(PROMPT, **most, **bias, **local)
    assert newline in expected.completion and slash not in expected.completion
    for options in (bias, bias | {"bad_words": [slash]}, bias | {"stop_strings": [slash]}):
        texts = [hfkit.generate(PROMPT, **most, **options, **where).completion for where in (local, remote)]
        assert texts[0] == texts[1] and (options == bias) == (newline in texts[0])
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 6, "sequence_bias": [f"{newline}=60"]}

    def text(**fields) -> str:
        return httpx.post(f"{server[0]}/v1/completions", json=body | fields, timeout=60).json()["choices"][0]["text"]

    assert text() == text(stop=slash) == text(bad_words=[slash]) == expected.completion
    assert newline not in text(stop=newline) and newline not in text(bad_words=[newline])
    plain = hfkit.generate(PROMPT, **most, **local).completion
    assert text(sequence_bias=[f"{slash}=60"]) == plain and newline not in plain
    beams = {"num_beams": 2, "max_tokens": 3}  # in transformers' own loop
    assert text(**beams) == text(**beams, stop=slash) != text(**beams, stop=newline)


def test_generate_lists(server, story, lm):
    """Many prompts and samples have the seeds that they have here; a prompt that does not fit is named."""
    prompts = ["The house", "He said 🙂", "I", ""]
    options = {"seed": 11, "max_new_tokens": 6, "num_return_sequences": 3}
    local, remote = (
        hfkit.generate(prompts, **options, **where)
        for where in ({"model": story}, {"model": "bundled", "server": server[0]})
    )
    assert [[each.completion for each in row] for row in remote] == [
        [each.completion for each in row] for row in local
    ]
    assert [[each.seed for each in row] for row in remote] == [[each.seed for each in row] for row in local]
    long = {"model": lm.name, "server": server[0], "seed": 1}
    assert hfkit.generate("x" * 60, **long).completion == hfkit.generate("x" * 60, model=lm, seed=1).completion
    with pytest.raises(HfkitError, match="do not fit"):
        hfkit.generate("x" * 100, model=lm.name, server=server[0])
    with pytest.raises(HfkitError, match="not supported"):
        hfkit.generate(PROMPT, model="bundled", server=server[0], prompt_lookup_num_tokens=3)


def test_shell(server, story, capfdbinary):
    """The command prints the same."""
    arguments = ["generate", PROMPT, "-n", 12, "-s", 3, "--num-return-sequences", 2]
    remote = call(capfdbinary, *arguments, "-m", "bundled", "--server", server[0])
    assert remote.stdout == call(capfdbinary, *arguments).stdout and remote.returncode == 0
    named = call(capfdbinary, "generate", PROMPT, "--server", server[0])
    assert_fails(named, 2, "-m", "bundled, ")
    assert_fails(call(capfdbinary, "generate", PROMPT, "-m", "gpt2", "--server", server[0]), 1, "gpt2")


def test_chat(server, capfdbinary, monkeypatch):
    """A chat goes on past the context: the oldest turns are cut."""
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n" + "x " * 600 + "\n"))
    result = call(capfdbinary, "chat", "-m", "bundled", "--server", server[0], "-n", 4, "-s", 1)
    assert result.returncode == 0 and len(result.stdout.splitlines()) >= 2, result.stderr


def test_chat_as_here(server, capfdbinary, monkeypatch):
    """A model without a chat template continues one raw text, there as here."""
    import io

    replies = []
    for place in (["--server", server[0]], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("Once upon\nThen\n"))
        result = call(capfdbinary, "chat", "-m", "bundled", "-n", 6, "-s", 1, *place)
        replies.append((result.stdout, result.stderr.splitlines()[-1]))
    assert replies[0] == replies[1] and b"as raw text" in replies[0][1]


def test_key(lm, monkeypatch, capfdbinary):
    """The key opens the server; without it, one line says what is missing."""
    with serving(lm, api_key="sesame") as (address, _):
        assert_fails(call(capfdbinary, "generate", "ab", "--server", address), 1, "401", "HFKIT_API_KEY")
        monkeypatch.setenv("HFKIT_API_KEY", "sesame")
        assert call(capfdbinary, "generate", "ab", "--server", address, "-n", 3).returncode == 0


def test_classify(server, story, tmp_path, capfdbinary):
    """Labels and their probabilities are the same."""
    labels = ["happy", "sad"]
    texts = ["She laughed and danced.", "He wept all night."]
    where = {"model": "bundled", "server": server[0]}
    local = [hfkit.classify(text, model=story, labels=labels) for text in texts]  # one by one, as they are sent
    assert hfkit.classify(texts, labels=labels, **where) == local
    (tmp_path / "texts.txt").write_text("\n".join([texts[0], "", texts[1]]))
    flags = ["--labels", "happy", "--labels", "sad", "-m", "bundled", "--json"]
    result = call(capfdbinary, "classify", "-i", tmp_path / "texts.txt", *flags, "--server", server[0])
    assert result.returncode == 1 and b"line 2" in result.stderr
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == texts
    remote = call(capfdbinary, "classify", texts[0], *flags, "--server", server[0])
    assert remote.stdout == call(capfdbinary, "classify", texts[0], *flags).stdout


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents: one that fits the context, one of many windows, one of a single token, an empty one."""
    path = tmp_path_factory.mktemp("corpus") / "documents.txt"
    long = " ".join(f"He said {number} times that the sea was cold 🙂." for number in range(20))
    path.write_text("<|endoftext|>".join(["Once upon a time there was a king.", long, "a", " ", "The end.\n"]))
    return path


@pytest.mark.parametrize("sizes", [{"max_length": 100}, {"max_length": 60, "stride": 25}], ids=str)
def test_evaluate(server, documents, sizes):
    """Every figure is that of the same model on this machine, over the same windows."""
    local = hfkit.evaluate(documents, model="bundled", dtype="float32", **sizes).to_dict()
    remote = hfkit.evaluate(documents, model="bundled", server=server[0], **sizes).to_dict()
    assert remote.pop("dtype") != local.pop("dtype") and remote.pop("model") == local.pop("model")
    assert remote == pytest.approx(local, rel=1e-4)


def test_evaluate_of_the_whole_context(server, documents, lm, capfdbinary):
    """Without --max-length the windows are as long as a server allows: two tokens shorter than here."""
    flags = ["--json", "-m", lm.name]
    remote = json.loads(call(capfdbinary, "evaluate", documents, *flags, "--server", server[0]).stdout)
    flags += ["--dtype", "float32", "--max-length", lm.context - 2]
    local = json.loads(call(capfdbinary, "evaluate", documents, *flags).stdout)
    assert remote["window"] == local["window"] == lm.context - 2
    assert remote["perplexity"] == pytest.approx(local["perplexity"], rel=1e-4)
    rows = documents.with_suffix(".jsonl")
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    assert_fails(call(capfdbinary, "evaluate", rows, *flags[:3], "-q", "--server", server[0]), 2, "not answers")


def test_beams_and_encoders(server, story, tiny_t5):
    """Their texts are the same; the server does not tell their log-probabilities."""
    translator = hfkit.load(tiny_t5)
    with serving(translator) as (address, _):
        cases = [("bundled", story, server[0], {"num_beams": 3}), (translator.name, translator, address, {})]
        for name, lm, place, options in cases:
            options |= {"seed": 1, "max_new_tokens": 6}
            local = hfkit.generate("a house", model=lm, **options)
            remote = hfkit.generate("a house", model=name, server=place, **options)
            assert (str(remote), remote.tokens) == (str(local), local.tokens)
            assert remote.to_dict()["logprob"] is None


def test_answers_stand_alone(copy, tiny, capfdbinary):
    """What a model that learned a task says stands without the prompt, as it does here."""
    folder = copy(tiny)
    edit_json(folder / "tokenizer_config.json", task={"template": "Q: {prompt}\nA:{completion}\n"})
    learned = hfkit.load(str(folder))
    with serving(learned) as (address, _):
        for options in ({}, {"raw": True}):
            options |= {"seed": 1, "max_new_tokens": 5}
            local, remote = (
                hfkit.generate("ab", model=learned, **options),
                hfkit.generate("ab", server=address, **options),
            )
            assert (str(remote), remote.echo) == (str(local), local.echo)
