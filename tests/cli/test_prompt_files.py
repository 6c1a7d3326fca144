"""Many prompts: in order, each exactly once, whatever is wrong with one of them and whatever happens in between."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support.shell import assert_fails, call

import hfkit
from hfkit.cli import app
from hfkit.cli.prompt_files import Results, read_prompt, read_prompts, to_line
from hfkit.errors import HfkitError, OptionError


def rows(path) -> list[dict]:
    """The records of a file, without the last digits of a log-probability, which depend on the rest of its batch."""
    return [
        record | {"logprob": round(record["logprob"], 3)} for record in map(json.loads, path.read_text().splitlines())
    ]


@pytest.fixture
def many(tmp_path):
    """A file of so many prompts of different lengths."""

    def write(count: int, name: str = "prompts.txt"):
        draw = random.Random(0)
        lines = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 20))).strip() + f" {i}" for i in range(count)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


# one file


def test_of_a_thousand_prompts_fifty_bad_ones_are_reported_and_nothing_is_lost(tiny, tmp_path, capfdbinary):
    lines = [json.dumps({"prompt": f"prompt {i}", "id": i}).encode() for i in range(1000)]
    bad = random.Random(1).sample(range(1000), 50)
    faults = [
        *(
            b'{"prompt": ""}',
            b"",
            b'{"prompt": "' + b"x" * 70 + b'"}',
            b'{"prompt": "\xff"}',
            b'{"prompt": "cut',
            b"[1]",
        ),
        *(b'{"text": "x"}', b'{"prompt": 7}', b'{"prompt": "\\ud800"}', b"[" * 5000),
    ]
    for place, line in enumerate(bad):
        lines[line] = faults[place % len(faults)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    result = call(
        capfdbinary,
        "generate",
        "-i",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        "-m",
        tiny,
        "-n",
        2,
        "-s",
        1,
    )
    told = result.stderr.decode().splitlines()
    found = rows(tmp_path / "out.jsonl")
    assert result.returncode == 1 and result.stdout == b""
    assert [row["line"] for row in found] == [i + 1 for i in range(1000) if i not in bad]
    assert [row["prompt"] for row in found] == [f"prompt {i}" for i in range(1000) if i not in bad]
    assert [line.split(": ")[1] for line in told[:-1]] == [f"{tmp_path}/in.jsonl, line {i + 1}" for i in sorted(bad)]
    assert told[-1].startswith("hfkit: error: 50 of 1000 prompts could not be run")


def test_a_file_gives_what_python_gives_for_the_list(tiny, many, capfdbinary):
    path, flags = many(20), ["-m", tiny, "-n", 4, "-s", 9, "--num-return-sequences", 2]
    result = call(capfdbinary, "generate", "-i", path, *flags)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    expected = hfkit.generate(
        path.read_text().splitlines(), model=tiny, max_new_tokens=4, seed=9, num_return_sequences=2
    )
    assert [row["completion"] for row in found] == [one.completion for samples in expected for one in samples]
    assert [row["seed"] for row in found] == list(range(9, 49))
    assert [row["line"] for row in found] == [i // 2 + 1 for i in range(40)]
    (single,) = [
        json.loads(line) for line in call(capfdbinary, "generate", "-i", many(1), *flags[:-2]).stdout.splitlines()
    ]
    assert single["completion"] == hfkit.generate(single["prompt"], model=tiny, max_new_tokens=4, seed=9).completion


def test_a_line_that_does_not_run_on_its_own_ends_nothing(tiny, tmp_path, capfdbinary):
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfa\r\n" + b"x" * 99 + b"\n \n\xff\nlast")
    result = call(capfdbinary, "generate", "-i", tmp_path / "in.txt", "-m", tiny, "-n", 3, "-s", 1, "--num-beams", 2)
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["a", "last"]
    words = [b"line 2: 99 tokens", b"line 3: empty prompt", b"line 4: not UTF-8 (byte 1)", b"error: 3 of 5 prompts"]
    assert all(word in line for word, line in zip(words, result.stderr.splitlines(), strict=True))


def test_prompts_may_come_through_a_pipe(tiny, tmp_path, capfdbinary):
    os.mkfifo(tmp_path / "pipe")
    if not (child := os.fork()):
        (tmp_path / "pipe").write_text("a\nb\n")
        os._exit(0)
    result = call(capfdbinary, "generate", "-i", tmp_path / "pipe", "-m", tiny, "-n", 2, "-s", 1)
    os.waitpid(child, 0)
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["-i", "none.txt"], 1, ["none.txt", "No such file"]),
        (["-i", "."], 1, ["directory"]),
        (["-i", "in.txt", "-o", "no/folder/out"], 1, ["no/folder/out.partial", "No such file"]),
        (["-i", "in.txt", "-o", "sub"], 1, ["sub is a folder"]),
        (["-i", "in.txt", "-o", "there.jsonl"], 1, ["there.jsonl exists", "--overwrite"]),
        (["-i", "in.txt", "-o", "there.jsonl", "--resume"], 1, ["complete"]),
        (["-i", "in.txt", "-o", "begun.jsonl"], 1, ["begun.jsonl.partial", "--resume", "--overwrite"]),
        (["-i", "in.txt", "hi"], 2, ["--input"]),
        (["-i", "in.txt", "--resume"], 2, ["--output"]),
        (["hi", "-o", "x", "--resume"], 2, ["--input"]),
    ],
)
def test_what_is_wrong_with_the_files_is_said_before_a_model_is_loaded(
    tiny, tmp_path, monkeypatch, capfdbinary, flags, code, words
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfkit.models.loading.load_weights", None)
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "there.jsonl").write_text("kept")
    (tmp_path / "begun.jsonl.partial").write_text(to_line({"line": 1}))
    assert_fails(call(capfdbinary, "generate", *flags, "-m", tiny), code, *words)
    assert (tmp_path / "there.jsonl").read_text() == "kept"


def test_a_run_that_failed_before_it_began_is_not_in_the_way(tiny, many, tmp_path, capfdbinary):
    line = ["generate", "-i", many(3), "-o", tmp_path / "out.jsonl", "-n", 2, "-s", 1]
    (tmp_path / "model").mkdir()
    assert call(capfdbinary, *line, "-m", tmp_path / "model").returncode == 1
    assert call(capfdbinary, *line, "-m", tiny).returncode == 0
    (tmp_path / "out.jsonl").write_text("old")
    assert call(capfdbinary, *line, "-m", tiny, "--overwrite").returncode == 0
    assert len(rows(tmp_path / "out.jsonl")) == 3 and not (tmp_path / "out.jsonl.partial").exists()


def test_one_prompt_may_go_to_a_file_too(tiny, tmp_path, capfdbinary):
    result = call(capfdbinary, "generate", "hi", "-o", tmp_path / "out.jsonl", "-m", tiny, "-n", 2, "-s", 1)
    (row,) = rows(tmp_path / "out.jsonl")
    assert (result.returncode, result.stdout, row["prompt"], row["line"]) == (0, b"", "hi", 1)


# interrupted and resumed


def generate(*flags) -> list[str]:
    return [*map(str, ("generate", "-n", 3, "--batch-size", 2, "--num-return-sequences", 2, *flags))]


@pytest.fixture
def whole(tiny, many, tmp_path, capfdbinary):
    """An uninterrupted run of 60 prompts, two of them bad: its flags and its records."""
    path = many(60)
    text = path.read_text().splitlines()
    text[7], text[40] = "", "x" * 99
    path.write_text("\n".join(text))
    flags = ["-i", path, "-m", tiny, "-s", 5]
    assert call(capfdbinary, *generate(*flags, "-o", tmp_path / "whole.jsonl")).returncode == 1
    return flags, rows(tmp_path / "whole.jsonl")


def test_a_run_cut_at_any_byte_goes_on_to_the_same_end(whole, tmp_path, capfdbinary):
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    draw = random.Random(0)
    ends = [at + 1 for at, byte in enumerate(data) if byte == 10]
    for at in [1, len(data), draw.choice(ends), draw.choice(ends) - 1, *(draw.randrange(len(data)) for _ in range(4))]:
        out.with_name("out.jsonl.partial").write_bytes(data[:at])
        resumed = call(capfdbinary, *generate(*flags, "-o", out, "--resume"))
        assert rows(out) == expected
        assert resumed.returncode == 1 and b"2 of 60 prompts" in resumed.stderr
        out.unlink()


def kill_and_resume(flags, out, kills: int) -> None:
    """Start a run, kill it after a random time, go on with it, kill it again ... and let the last one end."""
    draw = random.Random(kills)
    for last in [False] * kills + [True]:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv = ["hfkit", *generate(*flags, "-o", out, "--resume")]
            try:
                app.main()
            finally:
                os._exit(0)
        if not last:
            time.sleep(draw.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_time_goes_on_to_the_same_end(whole, tmp_path, kills):
    flags, expected = whole
    kill_and_resume(flags, tmp_path / "out.jsonl", kills)
    assert rows(tmp_path / "out.jsonl") == expected
    assert [row["line"] for row in expected] == [line for line in range(1, 61) if line not in (8, 41) for _ in "ab"]


@pytest.mark.parametrize("fault", ["input", "shorter", "model", "seed", "samples", "greedy"])
def test_a_run_is_not_resumed_with_something_else(whole, tiny_llama, tmp_path, capfdbinary, fault):
    flags, _ = whole
    out = tmp_path / "out.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    out.with_name("out.jsonl.partial").write_bytes(b"".join(lines[:20]))
    text, extra = flags[1].read_text(), []
    match fault:
        case "input":
            flags[1].write_text(text.replace("\n", " other\n", 1))
        case "shorter":
            flags[1].write_text("\n".join(text.splitlines()[:5]))
        case "model":
            extra = ["-m", tiny_llama]
        case "seed":
            extra = ["-s", 6]
        case "samples":
            extra = ["--num-return-sequences", 3]
        case "greedy":
            extra = ["-t", 0, "--num-beams", 2]
    assert_fails(call(capfdbinary, *generate(*flags, *extra, "-o", out, "--resume")), 1, "--overwrite begins anew")
    assert out.with_name("out.jsonl.partial").read_bytes() == b"".join(lines[:20])


def test_a_run_whose_seed_was_drawn_goes_on_with_it(whole, tmp_path, capfdbinary):
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    out.with_name("out.jsonl.partial").write_bytes(data[:3000])
    call(capfdbinary, *generate(*flags[:-2], "-o", out, "--resume"))
    assert rows(out) == expected


def test_a_line_that_was_mended_is_run_when_the_rest_goes_on(whole, tmp_path, capfdbinary):
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    out.with_name("out.jsonl.partial").write_bytes(data)
    text = flags[1].read_text().splitlines()
    text[7] = "mended"
    flags[1].write_text("\n".join(text))
    result = call(capfdbinary, *generate(*flags, "-o", out, "--resume"))
    assert rows(out)[:-2] == expected and [row["prompt"] for row in rows(out)[-2:]] == ["mended"] * 2
    assert b"1 of 60 prompts" in result.stderr


def test_two_runs_do_not_write_one_file(tmp_path):
    first = Results(tmp_path / "out", overwrite=False)
    with pytest.raises(HfkitError, match="another process"):
        Results(tmp_path / "out", overwrite=True)
    first.add([{"line": 1}])
    first.finish()
    assert (tmp_path / "out").read_text() == '{"line": 1}\n'


def test_two_processes_give_what_one_gives(whole, tmp_path):
    flags, expected = whole
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hfkit"]
    result = subprocess.run(
        [*command, *generate(*flags, "-o", tmp_path / "out.jsonl")], capture_output=True, timeout=120
    )
    assert rows(tmp_path / "out.jsonl") == expected
    assert result.returncode == 1 and result.stderr.count(b"could not be run") == 1


# reading and writing


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_a_json_lines_file_gives_its_prompts(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "a\\nb"}\n{"prompt": "\\u00e9", "x": 1}')
    assert list(read_prompts(tmp_path / name)) == ["a\nb", "é"]


def test_a_text_file_gives_its_lines_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a \r\nb\x85\x0cc\n\xef\xbb\xbfd".replace(b"\x85", "\x85".encode()))
    assert list(read_prompts(tmp_path / "a.txt")) == [" a ", "b\x85\x0cc", "\ufeffd"]


@pytest.mark.parametrize("data", [b"a\n", b"a", b"a\r\n", b"\xef\xbb\xbfa"])
def test_stdin_is_the_prompt_where_there_is_no_other(monkeypatch, data):
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_prompt("given") == "given"
    assert read_prompt(None) == "a"
    stdin.buffer.seek(0)
    assert read_prompt("-") == "a"


def test_a_terminal_is_not_waited_for_and_other_bytes_are_refused(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(OptionError, match="byte 2"):
        read_prompt(None)
    stdin.isatty = lambda: True
    assert read_prompt(None) == ""


@pytest.mark.parametrize("text", ["é日本", "\ud800", "a\nb\x1b\u2028", '"'])
def test_a_record_is_one_line_of_utf8_that_reads_back(text):
    line = to_line({"text": text})
    assert line.encode().count(b"\n") == 1 and json.loads(line) == {"text": text}
