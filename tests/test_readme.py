"""What README.md tells people to type works, in a reduced setting: small corpora, few steps, short texts."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support import trials
from support.shell import call, run

pytestmark = pytest.mark.usefixtures("brisk")
README = Path(__file__).parents[1] / "README.md"
# They need several processes or GPUs, or go on: test_processes.py, test_warm.py and tests/serving run the like.
NOT_HERE = ("--num-processes", "accelerate launch", "torchrun", "hfkit warm", "KEEP_ALIVE", "hfkit serve", "--server")
REDUCED = {
    "finetune": ["--max-steps", "2"],
    "pretrain": ["--max-steps", "2"],
    "tune": ["--max-steps", "2", "-n", "1"],
    "generate": ["--max-new-tokens", "4"],
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The command lines of all shell blocks, and of the sessions that show an output."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return lines + [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory) -> Path:
    """A working folder with all the files that README's commands name; `gpt2` is a tiny model here."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("gpt2", "my-model"):
        shutil.copytree(tiny, folder / name)
    trials.write_corpus(folder / "corpus.txt")
    trials.write_corpus(folder / "held-out.txt", documents=4, seed=1)
    (folder / "prompts.txt").write_text("The rain\nThe wind\n")
    turns = [{"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "It is."}]
    (folder / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    return folder


def shorten(folder: Path) -> None:
    """Keep a few rows of the data that a recipe brought."""
    for path in folder.glob("data/*.csv"):
        path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:40]))


def test_readme_commands(place, monkeypatch, capfdbinary):
    """Every command line of README.md succeeds, in the order in which it stands there."""
    monkeypatch.chdir(place)
    skipped = []
    for line in commands():
        if any(words in line for words in NOT_HERE):
            skipped.append(line)
            continue
        before, _, command = line.rpartition("| ")
        words = shlex.split(command, comments=True)
        assert words.pop(0) == "hfkit", line
        words += REDUCED.get(words[0], [])
        if before:
            spoken = shlex.split(before)[1].encode()  # echo "..."
            result = run(*words, input=spoken)
        else:
            result = call(capfdbinary, *words)
        assert result.returncode == 0, (line, result.stderr.decode())
        shorten(place)
    assert len(skipped) == 12 and len(commands()) > 25


def test_readme_python(place, monkeypatch, capsys):
    """The Python blocks run as they stand."""
    monkeypatch.chdir(place)
    source = "\n".join(blocks("python"))
    exec(compile(source, str(README), "exec"), {})  # noqa: S102
    text, perplexity = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith("Hello, my name is") and float(perplexity) > 1


def test_readme_names_every_command_and_only_those():
    from hfkit.cli.app import app

    there = {command.name or command.callback.__name__ for command in app.registered_commands}
    there |= {group.name for group in app.registered_groups}
    assert {name for name in re.findall(r"^\| `hfkit (\w+)", README.read_text("utf-8"), re.MULTILINE)} == there
