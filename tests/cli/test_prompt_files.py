"""Many prompts: in order, each exactly once, whatever is wrong with one of them and whatever happens in between."""

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.shell import assert_fails, call

import hfkit
from hfkit.cli import app, generate_file
from hfkit.cli.generate_file import Results
from hfkit.cli.prompts import read_prompt, read_prompts
from hfkit.console import to_json
from hfkit.errors import HfkitError, OptionError
from hfkit.inference import generation


def rows(path) -> list[dict]:
    """The records of a file, without the last digits of a log-probability, which depend on the rest of its batch."""
    return [
        record | {"logprob": round(record["logprob"], 3)} for record in map(json.loads, path.read_text().splitlines())
    ]


@pytest.fixture
def many(tmp_path):
    """A file of so many prompts of different lengths."""

    return lambda count, name="prompts.txt": write_prompts(tmp_path / name, count)


def write_prompts(path: Path, count: int) -> Path:
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcdefgh ", k=draw.randint(1, 20))).strip() + f" {i}" for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


# one file


def test_generate_input_reports_bad_lines(tiny, tmp_path, capfdbinary):
    """Of a thousand prompts fifty bad ones are reported, and no result is lost."""
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
    assert told[-1].startswith("hfkit: error: 50 of 1,000 prompts could not be run")


def test_generate_input_equals_python(tiny, many, capfdbinary):
    """A file gives what Python gives for a list."""
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


def test_generate_input_continues_after_errors(tiny, tmp_path, capfdbinary):
    """A line that cannot be run does not end the run."""
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfa\r\n" + b"x" * 99 + b"\n \n\xff\nlast")
    result = call(capfdbinary, "generate", "-i", tmp_path / "in.txt", "-m", tiny, "-n", 3, "-s", 1, "--num-beams", 2)
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["a", "last"]
    words = [b"line 2: 99 tokens", b"line 3: empty prompt", b"line 4: not UTF-8 (byte 1)", b"error: 3 of 5 prompts"]
    assert all(word in line for word, line in zip(words, result.stderr.splitlines(), strict=True))


def test_generate_input_reads_a_pipe(tiny, tmp_path, capfdbinary):
    """Prompts may come through a named pipe."""
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
        (["-i", "in.txt", "-o", "sub"], 1, ["sub is not a regular file"]),
        (["-i", "in.txt", "-o", "there.jsonl"], 1, ["there.jsonl exists", "--overwrite"]),
        (["-i", "in.txt", "-o", "begun.jsonl"], 1, ["begun.jsonl.partial", "--resume", "--overwrite"]),
        (["-i", "in.txt", "hi"], 2, ["--input"]),
        (["-i", "in.txt", "--resume"], 2, ["--output"]),
        (["hi", "-o", "x", "--resume"], 2, ["--input"]),
    ],
)
def test_generate_checks_files_first(tiny, tmp_path, monkeypatch, capfdbinary, flags, code, words):
    """Problems with the files are reported before a model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfkit.models.loading.load_weights", None)
    (tmp_path / "in.txt").write_text("a\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "there.jsonl").write_text("kept")
    (tmp_path / "begun.jsonl.partial").write_text(to_json({"line": 1}))
    assert_fails(call(capfdbinary, "generate", *flags, "-m", tiny), code, *words)
    assert (tmp_path / "there.jsonl").read_text() == "kept"


@pytest.mark.parametrize(
    ("seconds", "flags", "expected"),
    [
        (0, [], [2, 4, 8, 16, 16, 16]),
        (60, [], [2] * 31),
        (3, [], [2, 4, 8, 16, 16, 16]),
        (60, ["--num-beams", 2], [2] * 31),
        (60, ["--prompt-lookup-num-tokens", 2], [1] * 62),
    ],
)
def test_generate_output_grows(tiny, many, tmp_path, monkeypatch, capfdbinary, seconds, flags, expected):
    """Slow texts are written batch by batch, so that an interruption loses one; of fast ones several are sorted."""
    clock, sizes = itertools.count(0, seconds), []
    monkeypatch.setattr(generate_file.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(generate_file.processes, "gather", lambda items: items)

    def each(prompts, **options):
        sizes.append(len(prompts))
        return ((number, []) for number, _ in prompts)

    monkeypatch.setattr(generation, "generate_each", each)
    line = ["generate", "-i", many(62), "-m", tiny, "-o", tmp_path / "out.jsonl", "--batch-size", 2]
    assert call(capfdbinary, *line, *flags).returncode == 0
    assert sizes == expected


def test_resume_of_a_complete_file(tiny, many, tmp_path, monkeypatch, capfdbinary):
    """A complete file is not an error, and stays as it is."""
    monkeypatch.setattr("hfkit.models.loading.load_weights", None)
    (tmp_path / "out.jsonl").write_text("kept")
    result = call(capfdbinary, "generate", "-i", many(2), "-o", tmp_path / "out.jsonl", "--resume", "-m", tiny)
    assert result.returncode == 0 and b"complete: there is nothing to resume" in result.stderr
    assert (tmp_path / "out.jsonl").read_text() == "kept"


def test_generate_output_after_a_failed_start(tiny, many, tmp_path, capfdbinary):
    """A run that failed before it began does not block the next one."""
    line = ["generate", "-i", many(3), "-o", tmp_path / "out.jsonl", "-n", 2, "-s", 1]
    (tmp_path / "model").mkdir()
    assert call(capfdbinary, *line, "-m", tmp_path / "model").returncode == 1
    assert call(capfdbinary, *line, "-m", tiny).returncode == 0
    (tmp_path / "out.jsonl").write_text("old")
    assert call(capfdbinary, *line, "-m", tiny, "--overwrite").returncode == 0
    assert len(rows(tmp_path / "out.jsonl")) == 3 and not (tmp_path / "out.jsonl.partial").exists()


def test_generate_output_of_one_prompt(tiny, tmp_path, capfdbinary):
    """One prompt may go to a file, too."""
    result = call(capfdbinary, "generate", "hi", "-o", tmp_path / "out.jsonl", "-m", tiny, "-n", 2, "-s", 1)
    (row,) = rows(tmp_path / "out.jsonl")
    assert (result.returncode, result.stdout, row["prompt"], row["line"]) == (0, b"", "hi", 1)


# interrupted and resumed


def generate(*flags) -> list[str]:
    return [*map(str, ("generate", "-n", 3, "--batch-size", 2, "--num-return-sequences", 2, *flags))]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run of 60 prompts, two of them bad."""
    folder = tmp_path_factory.mktemp("finished")
    write_prompts(folder / "prompts.txt", 60)
    text = (folder / "prompts.txt").read_text().splitlines()
    text[7], text[40] = "", "x" * 99
    (folder / "prompts.txt").write_text("\n".join(text))

    def finish(results):
        shutil.copy(folder / "whole.jsonl.partial.json", folder / "settings.json")
        original(results)

    original = Results.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "finish", finish)
        flags = generate("-i", folder / "prompts.txt", "-m", tiny, "-s", 5, "-o", folder / "whole.jsonl")
        patch.setattr(sys, "argv", ["hfkit", *flags])
        with pytest.raises(SystemExit, match="1"):
            app.main()
    return folder


@pytest.fixture
def whole(tiny, finished, tmp_path):
    """A copy of it: its flags and its records."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return ["-i", tmp_path / "prompts.txt", "-m", tiny, "-s", 5], rows(tmp_path / "whole.jsonl")


def interrupt(tmp_path, data: bytes) -> None:
    """Leave what the run of `whole` leaves if it is killed after it wrote `data`."""
    (tmp_path / "out.jsonl.partial").write_bytes(data)
    shutil.copy(tmp_path / "settings.json", tmp_path / "out.jsonl.partial.json")


def test_resume_after_a_cut_at_any_byte(whole, tmp_path, capfdbinary):
    """A run whose file is cut at any byte resumes to the same end."""
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    draw = random.Random(0)
    ends = [at + 1 for at, byte in enumerate(data) if byte == 10]
    for at in [1, len(data), draw.choice(ends), draw.choice(ends) - 1, *(draw.randrange(len(data)) for _ in range(4))]:
        interrupt(tmp_path, data[:at])
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
def test_resume_after_kills(whole, tmp_path, kills):
    """A run that is killed at any time resumes to the same end."""
    flags, expected = whole
    kill_and_resume(flags, tmp_path / "out.jsonl", kills)
    assert rows(tmp_path / "out.jsonl") == expected
    assert [row["line"] for row in expected] == [line for line in range(1, 61) if line not in (8, 41) for _ in "ab"]


@pytest.mark.parametrize(
    "fault", ["input", "shorter", "model", "seed", "samples", "greedy", "length", "top_k", "dtype", "unset"]
)
def test_resume_refuses_other_settings(whole, tiny_llama, tmp_path, capfdbinary, fault):
    """A run is not resumed with another input, model or option."""
    flags, _ = whole
    out = tmp_path / "out.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    interrupt(tmp_path, b"".join(lines[:20]))
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
        case "length":
            extra = ["-n", 4]
        case "top_k":
            extra = ["--top-k", 5]
        case "dtype":
            extra = ["--dtype", "bfloat16"]
        case "unset":  # an option that the interrupted run had
            settings = json.loads((tmp_path / "settings.json").read_text())
            (tmp_path / "out.jsonl.partial.json").write_text(json.dumps({**settings, "top_p": 0.5}))
    assert_fails(call(capfdbinary, *generate(*flags, *extra, "-o", out, "--resume")), 1, "--overwrite begins anew")
    assert out.with_name("out.jsonl.partial").read_bytes() == b"".join(lines[:20])


def test_resume_keeps_a_random_seed(whole, tmp_path, capfdbinary):
    """A run with a random seed resumes with the same seed."""
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    interrupt(tmp_path, data[:3000])
    call(capfdbinary, *generate(*flags[:-2], "-o", out, "--resume"))
    assert rows(out) == expected


def test_resume_runs_a_fixed_line(whole, tmp_path, capfdbinary):
    """A line that was fixed is run when the rest is resumed."""
    flags, expected = whole
    data, out = (tmp_path / "whole.jsonl").read_bytes(), tmp_path / "out.jsonl"
    interrupt(tmp_path, data)
    text = flags[1].read_text().splitlines()
    text[7] = "mended"
    flags[1].write_text("\n".join(text))
    result = call(capfdbinary, *generate(*flags, "-o", out, "--resume"))
    assert rows(out)[:-2] == expected and [row["prompt"] for row in rows(out)[-2:]] == ["mended"] * 2
    assert b"1 of 60 prompts" in result.stderr


def test_results_are_locked(tmp_path):
    """Two runs do not write the same file."""
    first = Results(tmp_path / "out", overwrite=False)
    with pytest.raises(HfkitError, match="another process"):
        Results(tmp_path / "out", overwrite=True)
    first.add([{"line": 1}])
    first.finish()
    assert (tmp_path / "out").read_text() == '{"line": 1}\n'


def test_generate_input_two_processes(whole, tmp_path):
    """Two processes give what one gives."""
    flags, expected = whole
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hfkit"]
    result = subprocess.run(
        [*command, *generate(*flags, "-o", tmp_path / "out.jsonl")], capture_output=True, timeout=120
    )
    assert rows(tmp_path / "out.jsonl") == expected
    assert result.returncode == 1 and result.stderr.count(b"could not be run") == 1


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_generate_output_on_a_full_disk(tiny, many, tmp_path, monkeypatch, capfdbinary, step):
    """A full disk is one line that names the file, and what is written so far can be resumed."""

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    flags = generate("-i", many(4), "-m", tiny, "-s", 5, "-o", tmp_path / "out.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("hfkit.cli.generate_file.Results.begin", lambda self, settings: None)
        patch.setattr(os, step, fail)
        assert_fails(call(capfdbinary, *flags), 1, f"cannot write {tmp_path}/out.jsonl.partial: No space left")
    assert not (tmp_path / "out.jsonl").exists()


# reading and writing


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson"])
def test_read_prompts_json_lines(tmp_path, name):
    """A JSON Lines file gives its prompts."""
    (tmp_path / name).write_text('{"prompt": "a\\nb"}\n{"prompt": "\\u00e9", "x": 1}')
    assert list(read_prompts(tmp_path / name)) == ["a\nb", "é"]


def test_read_prompts_text(tmp_path):
    """A text file gives its lines unchanged."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf a \r\nb\x85\x0cc\n\xef\xbb\xbfd".replace(b"\x85", "\x85".encode()))
    assert list(read_prompts(tmp_path / "a.txt")) == [" a ", "b\x85\x0cc", "\ufeffd"]


@pytest.mark.parametrize("data", [b"a\n", b"a", b"a\r\n", b"\xef\xbb\xbfa"])
def test_read_prompt_stdin(monkeypatch, data):
    """stdin is the prompt if no other is given."""
    stdin = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_prompt("given") == "given"
    assert read_prompt(None) == "a"
    stdin.buffer.seek(0)
    assert read_prompt("-") == "a"


def test_read_prompt_terminal_and_bad_bytes(monkeypatch):
    """Bytes that are not UTF-8 are refused; at a terminal a line is asked for."""
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xff"))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(OptionError, match="byte 2"):
        read_prompt(None)
    stdin = io.TextIOWrapper(io.BytesIO(b"a line\nanother"), encoding="utf-8")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert read_prompt(None) == "a line"


@pytest.mark.parametrize("text", ["é日本", "\ud800", "a\nb\x1b\u2028", '"'])
def test_to_json_reads_back(text):
    """A record is one line of UTF-8 that reads back."""
    line = to_json({"text": text})
    assert line.encode().count(b"\n") == 1 and json.loads(line) == {"text": text}
