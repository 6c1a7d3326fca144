"""What README.md and README.zh.md tell people to type works, in a reduced setting: small corpora, few steps."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support import trials
from support.shell import call, run

from hfkit.recipes import head_comment, shipped

pytestmark = pytest.mark.usefixtures("brisk")
README, CHINESE = (Path(__file__).parents[1] / name for name in ("README.md", "README.zh.md"))
# They need several processes or GPUs, or go on: test_processes.py, test_warm.py and tests/serving run the like.
NOT_HERE = ("--num-processes", "accelerate launch", "torchrun", "hfkit warm", "KEEP_ALIVE", "hfkit serve", "--server")
REDUCED = {
    "finetune": ["--max-steps", "2"],
    "pretrain": ["--max-steps", "2"],
    "tune": ["--max-steps", "2", "-n", "1"],
    "generate": ["--max-new-tokens", "4"],
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The command lines of all shell blocks, and of the sessions that show an output."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    return lines + [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line[:2] == "$ "]


def words_of(line: str) -> list[str]:
    """A command line without its comment."""
    return shlex.split(line, comments=True)


@pytest.fixture(scope="module")
def place(tiny, tiny_chinese, tmp_path_factory) -> Path:
    """A working folder with all the files that the commands name; `gpt2` and the like are tiny models here."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("gpt2", "my-model"):
        shutil.copytree(tiny, folder / name)
    shutil.copytree(tiny_chinese, folder / "uer" / "gpt2-chinese-cluecorpussmall")
    (folder / "小说.txt").write_text(f"{trials.CHINESE}<|endoftext|>" * 9, "utf-8")
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


def run_lines(lines: list[str], capfdbinary, folder: Path) -> int:
    """Run command lines in order, each of which must succeed; how many were left out."""
    skipped = 0
    for line in lines:
        if any(words in line for words in NOT_HERE):
            skipped += 1
            continue
        before, _, command = line.rpartition("| ")
        words = words_of(command)
        assert words.pop(0) == "hfkit", line
        words += REDUCED.get(words[0], [])
        if before:
            spoken = shlex.split(before)[1].encode()  # echo "..."
            result = run(*words, input=spoken)
        else:
            result = call(capfdbinary, *words)
        assert result.returncode == 0, (line, result.stderr.decode())
        shorten(folder)
    return skipped


def test_readme_commands(place, monkeypatch, capfdbinary):
    """Every command line of README.md succeeds, in the order in which it stands there."""
    monkeypatch.chdir(place)
    lines = commands(README)
    assert run_lines(lines, capfdbinary, place) == 12 and len(lines) > 25


def test_chinese_readme_commands(place, monkeypatch, capfdbinary):
    """So does every line of README.zh.md; those of README.md and of the recipe run where these are tested."""
    monkeypatch.chdir(place)
    recipe = [line for line in head_comment(shipped()["pretrain-chinese"]) if line.startswith("  hfkit ")][:3]
    tested = [words_of(line) for line in [*commands(README), *recipe, "hfkit recipes copy pretrain-chinese"]]
    lines = [line for line in commands(CHINESE) if words_of(line) not in tested]
    assert run_lines(lines, capfdbinary, place) == 0
    assert 3 < len(lines) < 9 and len(commands(CHINESE)) > 15


def test_readme_python(place, monkeypatch, capsys):
    """The Python blocks run as they stand."""
    monkeypatch.chdir(place)
    source = "\n".join(blocks(README, "python"))
    exec(compile(source, str(README), "exec"), {})  # noqa: S102
    text, perplexity = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert text.startswith("Hello, my name is") and float(perplexity) > 1


def test_chinese_readme_python():
    """README.zh.md shows the first of these blocks after the same words in Chinese."""
    (source,) = blocks(CHINESE, "python")
    assert ast.dump(ast.parse(source)) == ast.dump(ast.parse(blocks(README, "python")[0]))


def test_readme_names_every_command_and_only_those():
    from hfkit.cli.app import app

    there = {command.name or command.callback.__name__ for command in app.registered_commands}
    there |= {group.name for group in app.registered_groups}
    assert {name for name in re.findall(r"^\| `hfkit (\w+)", README.read_text("utf-8"), re.MULTILINE)} == there
