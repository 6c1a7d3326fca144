"""hfkit deletes and changes only what it wrote, and one process at a time writes into a folder."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from support import trials
from support.shell import assert_fails, call

import hfkit
from hfkit import storage
from hfkit.errors import HfkitError, LockedError

pytestmark = pytest.mark.usefixtures("brisk")
FAST = ("--max-steps", 1, "--no-bf16")
OURS = (storage.LIST, storage.LOCK)


def fill(folder: Path, outside: Path, *names: str) -> None:
    """Somebody's work: hidden files, private keys, links out of the folder, names that hfkit uses as well."""
    outside.mkdir(exist_ok=True)
    (outside / "diary.txt").write_text("private")
    (outside / "diary.txt").chmod(0o600)
    files = {".git/HEAD": "ref", ".ssh/id_rsa": "key", ".env": "TOKEN=1", **dict.fromkeys(names, "{}")}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    (folder / ".link").symlink_to(outside / "diary.txt")


def state(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every file with its mode and content; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name not in OURS:
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
            found[str(path)] = (stat.S_IMODE(path.lstat().st_mode), content)
    return found


def command_line(command: str, corpus: str, tiny: str) -> list:
    """A command that writes a folder, without the folder."""
    return {
        "finetune": ["finetune", corpus, "-m", tiny, *FAST, "-o"],
        "pretrain": ["pretrain", corpus, "--size", "tiny", *FAST, "-o"],
        "prepare": ["prepare", corpus, "-m", tiny, "-o"],
        "tune": ["tune", corpus, "-m", tiny, *FAST, "-n", 1, "-o"],
        "export": ["export", tiny, "-o"],
    }[command]


FLAGS = {
    "finetune": [[], ["--overwrite"], ["--resume"]],
    "pretrain": [[], ["--overwrite"], ["--resume"]],
    "prepare": [[]],
    "tune": [[], ["--overwrite"]],
    "export": [[], ["--overwrite"]],
}
STRANGERS = {
    "a run.json of another program": ["run.json", "thesis.txt"],
    "a tuning.json of another program": ["tuning.json", "thesis.txt"],
    "a prepared.json of another program": ["prepared.json", "thesis.txt"],
    "a model of another program": ["config.json", "model.safetensors", "README.md"],
    "checkpoints": ["run.json", "checkpoints/checkpoint-1/model.safetensors", "metrics.json"],
    "lists": ["notes.txt", "manifest.json"],
}


@pytest.mark.parametrize("names", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("command", FLAGS)
def test_check_owned_strangers_files(command, names, corpus, tiny, tmp_path, capfdbinary):
    """A folder with someone else's files is refused and left as it was."""
    fill(folder := tmp_path / "folder", tmp_path / "outside", *names)
    before = state(tmp_path)
    for flag in FLAGS[command]:
        result = call(capfdbinary, *command_line(command, corpus, tiny), folder, *flag)
        assert_fails(result, 1, str(folder), "which hfkit did not write", "name another --output-dir")
        assert state(tmp_path) == before


@pytest.mark.parametrize("command", ["finetune", "pretrain", "prepare", "tune"])
def test_check_owned_hidden_files(command, corpus, tiny, tmp_path, capfdbinary):
    """A folder under version control is free to write to; nothing of the versions is lost."""
    fill(folder := tmp_path / "folder", tmp_path / "outside")
    before = state(tmp_path)
    for flag in [], ["--overwrite"] if command != "prepare" else []:
        result = call(capfdbinary, *command_line(command, corpus, tiny), folder, *flag)
        assert result.returncode == 0, result.stderr
        now = state(tmp_path)
        assert {path: now.get(path) for path in before} == before


def test_check_owned_hidden_files_of_export(tiny, tmp_path, capfdbinary):
    """An export replaces a whole folder, so hidden files in it are refused."""
    hfkit.export(tiny, output_dir=tmp_path / "out")
    fill(tmp_path / "out", tmp_path / "outside")
    before = state(tmp_path)
    assert_fails(call(capfdbinary, "export", tiny, "-o", tmp_path / "out", "--overwrite"), 1, ".env")
    assert state(tmp_path) == before


def test_remove_owned_strangers_file(corpus, tiny, tmp_path, capfdbinary):
    """A run that holds someone else's file cannot be overwritten."""
    line = ["finetune", corpus, "-m", tiny, *FAST, "-o", tmp_path / "run"]
    assert call(capfdbinary, *line).returncode == 0
    (tmp_path / "run" / "notes.md").write_text("lessons")
    assert_fails(call(capfdbinary, *line, "--overwrite"), 1, "notes.md, which hfkit did not write")
    assert (tmp_path / "run" / "notes.md").read_text() == "lessons" and hfkit.load(tmp_path / "run")


def test_remove_owned_search(corpus, tiny, tmp_path, capfdbinary):
    """Overwriting a search keeps the files that a person put into a trial."""
    line = ["tune", corpus, "-m", tiny, *FAST, "-n", 1, "-o", tmp_path / "search", "--overwrite"]
    assert call(capfdbinary, *line).returncode == 0
    (tmp_path / "search" / "trial-0" / "notes.md").write_text("lessons")
    assert_fails(call(capfdbinary, *line), 1, "trial-0/notes.md, which hfkit did not write")
    (tmp_path / "search" / "trial-0" / "notes.md").rename(tmp_path / "search" / "trial-0" / ".notes")
    assert call(capfdbinary, *line).returncode == 0
    assert (tmp_path / "search" / "trial-0" / ".notes").read_text() == "lessons"


@pytest.mark.parametrize("how", ["run", "adapter", "base of an adapter", "corpus", "corpus by glob", "eval file"])
def test_finetune_overwrites_no_input(how, corpus, tiny, tmp_path, capfdbinary):
    """A flag that would destroy the model or the corpus in use is neither suggested nor obeyed."""
    folder = tmp_path / "run"
    hfkit.finetune(corpus, model=tiny, output_dir=folder, max_steps=1, bf16=False, lora=how == "adapter")
    model, source, more = tiny, corpus, []
    if how in ("run", "adapter"):
        model = str(folder)
    elif how == "base of an adapter":
        model = str(tmp_path / "adapter")
        hfkit.finetune(corpus, model=str(folder), output_dir=model, max_steps=1, bf16=False, lora=True)
    else:
        shutil.copy(corpus, folder / ".corpus.txt")
        source = {"corpus by glob": f"{folder}/.c*.txt", "corpus": str(folder / ".corpus.txt")}.get(how, corpus)
        more = ["--eval-file", folder / ".corpus.txt"] if how == "eval file" else []
    weights = trials.digest(folder)
    for flag in [], ["--overwrite"]:
        if how == "base of an adapter" and not flag:  # the adapter's own files tell which base it has
            continue
        result = call(capfdbinary, "finetune", source, "-m", model, "-o", folder, *FAST, *more, *flag)
        # A glob that names nothing but a run's own files is no corpus in the first place.
        words = "did you mean -m" if how == "corpus by glob" else "which this run reads: name another --output-dir"
        assert_fails(result, 1, words)
        assert b"--overwrite" not in result.stderr
    assert trials.digest(folder) == weights


def test_tune_overwrites_no_input(corpus, tiny, tmp_path, capfdbinary):
    """A search does not overwrite the trial that it starts from."""
    search = ["tune", corpus, *FAST, "-n", 1, "-o", tmp_path / "search"]
    assert call(capfdbinary, *search, "-m", tiny).returncode == 0
    result = call(capfdbinary, *search, "-m", tmp_path / "search" / "trial-0", "--overwrite")
    assert_fails(result, 1, "which this run reads")
    assert hfkit.load(tmp_path / "search" / "trial-0")


def test_write_links_and_devices(corpus, tiny, tmp_path, capfdbinary):
    """Links and devices are not written through."""
    (tmp_path / "precious").write_text("precious")
    for name in OURS:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
        call(capfdbinary, "finetune", corpus, "-m", tiny, *FAST, "-o", tmp_path / "run")
        assert (tmp_path / "precious").read_text() == "precious"
        shutil.rmtree(tmp_path / "run")
    (tmp_path / "prompts.txt").write_text("a")
    for name in ("output.jsonl.partial", "output.jsonl.partial.json"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
        line = ["generate", "-i", tmp_path / "prompts.txt", "-m", tiny, "-n", 1, "-o", tmp_path / "output.jsonl"]
        result = call(capfdbinary, *line, "--overwrite")
        assert result.returncode == (1 if name.endswith("partial") else 0), result.stderr
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / ".tokens").symlink_to(tmp_path / "precious")
    result = call(capfdbinary, "prepare", corpus, "-m", tiny, "-o", tmp_path / "prepared")
    assert_fails(result, 1, "is not a regular file")
    assert (tmp_path / "precious").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a")
    for command in (["generate", "-i", tmp_path / "prompts.txt", "-m", tiny], ["generate", "a", "-m", tiny]):
        result = call(capfdbinary, *command, "-n", 1, "-o", tmp_path / "pipe", "--overwrite")
        assert_fails(result, 1, "is not a regular file")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_owned_names(tmp_path):
    """A list names only files of its own folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("ten years")
    listed = ["../thesis.txt", "..", "/etc", "a/b", 5, None]
    (tmp_path / "run" / storage.LIST).write_text(json.dumps({"files": listed}))
    assert storage.owned(tmp_path / "run") == set()
    storage.remove_owned(tmp_path / "run")
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "run" / storage.LIST).write_text('{"files": ["old"]}')
    storage.add_owned(tmp_path / "run", ["new"])
    assert storage.owned(tmp_path / "run") == {"old", "new"}
    for text in ("", "[", "[]", '{"files": 3}', '{"files": null}', "[" * 100_000):
        (tmp_path / "run" / storage.LIST).write_text(text)
        assert storage.owned(tmp_path / "run") == set()


def test_finetune_foreign_run_json(corpus, tiny, tmp_path):
    """A folder is a run because of what run.json says, not because there is a file of that name."""
    for content in ("{}", "[]", "null", '{"recipe": 1}', '{"recipe": {}, "versions": {}}', "not JSON"):
        (folder := tmp_path / "run").mkdir()
        (folder / "run.json").write_text(content)
        (folder / "metrics.json").write_text(content)
        with pytest.raises(HfkitError, match="did not write"):
            hfkit.finetune(corpus, model=tiny, output_dir=folder, overwrite=True, max_steps=1)
        assert (folder / "metrics.json").read_text() == content
        shutil.rmtree(folder)


HOLD = """
import sys
from pathlib import Path
from hfkit.storage import lock
with lock(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen:
    """Another process that holds `folder` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"\n", process.communicate()[1]
    return process


def test_lock_names_its_holder(tmp_path):
    """The error names the process and its host, however often it is asked; the only new file is the lock itself."""
    process = hold(tmp_path)
    try:
        for _ in range(3):
            with pytest.raises(LockedError, match=f"in use by process {process.pid} on {socket.gethostname()}: wait"):
                with storage.lock(tmp_path):
                    pass
        assert [path.name for path in tmp_path.iterdir()] == [storage.LOCK]
    finally:
        process.kill()
        process.communicate()


def test_lock_is_free_when_its_process_dies(tmp_path, capsys):
    """A killed process leaves the lock file, not the lock; whoever waits for it goes on then."""
    process = hold(tmp_path)
    with pytest.raises(LockedError), storage.lock(tmp_path):
        pass
    process.kill()
    with storage.lock(tmp_path, wait=True):
        assert f"process {os.getpid()} on" in (tmp_path / storage.LOCK).read_text()
        with pytest.raises(LockedError, match=str(os.getpid())), storage.lock(tmp_path):
            pass
    process.communicate()
    with storage.lock(tmp_path):
        pass


def test_lock_file(tmp_path):
    """A file is locked until it is closed, and keeps its content."""
    (tmp_path / "file").write_text("text")
    with (tmp_path / "file").open("a+b") as first, (tmp_path / "file").open("a+b") as second:
        assert storage.lock_file(first) and not storage.lock_file(second)
        first.close()
        assert storage.lock_file(second)
    assert (tmp_path / "file").read_text() == "text"


def test_make_writable_without_home(tmp_path, monkeypatch, corpus, tiny):
    """A home that nobody knows is one line, and no folder called ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "~/.cache/huggingface/datasets")
    with pytest.raises(HfkitError, match="no home directory"):
        storage.make_writable(Path("~/runs/a"))
    with pytest.raises(HfkitError, match="home|cache"):
        hfkit.finetune(corpus, model=tiny, output_dir=tmp_path / "run", max_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_check_free(tmp_path):
    """An existing file is refused with both ways out."""
    storage.check_free(tmp_path / "file", overwrite=False, flag="--output")
    (tmp_path / "file").touch()
    storage.check_free(tmp_path / "file", overwrite=True, flag="--output")
    with pytest.raises(HfkitError, match="file exists: --overwrite replaces it, or name another --output"):
        storage.check_free(tmp_path / "file", overwrite=False, flag="--output")
