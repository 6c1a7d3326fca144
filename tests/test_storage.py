"""What hfkit did not write it neither deletes nor changes, whatever the folder's files are called."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from support import trials
from support.shell import assert_fails, call

import hfkit
from hfkit import storage
from hfkit.errors import HfkitError

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
def test_a_folder_with_strangers_files_is_refused_and_left(command, names, corpus, tiny, tmp_path, capfdbinary):
    fill(folder := tmp_path / "folder", tmp_path / "outside", *names)
    before = state(tmp_path)
    for flag in FLAGS[command]:
        result = call(capfdbinary, *command_line(command, corpus, tiny), folder, *flag)
        assert_fails(result, 1, str(folder), "which hfkit did not write", "name another --output-dir")
        assert state(tmp_path) == before


@pytest.mark.parametrize("command", ["finetune", "pretrain", "prepare", "tune"])
def test_hidden_files_stay_as_they_are(command, corpus, tiny, tmp_path, capfdbinary):
    """A folder under version control is free to write to; nothing of the versions is lost."""
    fill(folder := tmp_path / "folder", tmp_path / "outside")
    before = state(tmp_path)
    for flag in [], ["--overwrite"] if command != "prepare" else []:
        result = call(capfdbinary, *command_line(command, corpus, tiny), folder, *flag)
        assert result.returncode == 0, result.stderr
        now = state(tmp_path)
        assert {path: now.get(path) for path in before} == before


def test_export_replaces_a_whole_folder_so_hidden_files_are_refused(tiny, tmp_path, capfdbinary):
    hfkit.export(tiny, output_dir=tmp_path / "out")
    fill(tmp_path / "out", tmp_path / "outside")
    before = state(tmp_path)
    assert_fails(call(capfdbinary, "export", tiny, "-o", tmp_path / "out", "--overwrite"), 1, ".env")
    assert state(tmp_path) == before


def test_overwriting_a_run_is_refused_while_it_holds_a_strangers_file(corpus, tiny, tmp_path, capfdbinary):
    line = ["finetune", corpus, "-m", tiny, *FAST, "-o", tmp_path / "run"]
    assert call(capfdbinary, *line).returncode == 0
    (tmp_path / "run" / "notes.md").write_text("lessons")
    assert_fails(call(capfdbinary, *line, "--overwrite"), 1, "notes.md, which hfkit did not write")
    assert (tmp_path / "run" / "notes.md").read_text() == "lessons" and hfkit.load(tmp_path / "run")


def test_overwriting_a_search_keeps_what_a_trial_was_given_by_hand(corpus, tiny, tmp_path, capfdbinary):
    line = ["tune", corpus, "-m", tiny, *FAST, "-n", 1, "-o", tmp_path / "search", "--overwrite"]
    assert call(capfdbinary, *line).returncode == 0
    (tmp_path / "search" / "trial-0" / "notes.md").write_text("lessons")
    assert_fails(call(capfdbinary, *line), 1, "trial-0/notes.md, which hfkit did not write")
    (tmp_path / "search" / "trial-0" / "notes.md").rename(tmp_path / "search" / "trial-0" / ".notes")
    assert call(capfdbinary, *line).returncode == 0
    assert (tmp_path / "search" / "trial-0" / ".notes").read_text() == "lessons"


@pytest.mark.parametrize("how", ["run", "adapter", "base of an adapter", "corpus", "corpus by glob", "eval file"])
def test_a_run_does_not_overwrite_what_it_reads(how, corpus, tiny, tmp_path, capfdbinary):
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
        assert_fails(result, 1, "which this run reads: name another --output-dir")
        assert b"--overwrite" not in result.stderr
    assert trials.digest(folder) == weights


def test_a_search_does_not_overwrite_the_trial_that_it_begins_with(corpus, tiny, tmp_path, capfdbinary):
    search = ["tune", corpus, *FAST, "-n", 1, "-o", tmp_path / "search"]
    assert call(capfdbinary, *search, "-m", tiny).returncode == 0
    result = call(capfdbinary, *search, "-m", tmp_path / "search" / "trial-0", "--overwrite")
    assert_fails(result, 1, "which this run reads")
    assert hfkit.load(tmp_path / "search" / "trial-0")


def test_links_and_devices_are_not_written_through(corpus, tiny, tmp_path, capfdbinary):
    (tmp_path / "precious").write_text("precious")
    for name in OURS:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
        call(capfdbinary, "finetune", corpus, "-m", tiny, *FAST, "-o", tmp_path / "run")
        assert (tmp_path / "precious").read_text() == "precious"
        shutil.rmtree(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("a")
    for command in (["generate", "-i", tmp_path / "prompts.txt", "-m", tiny], ["generate", "a", "-m", tiny]):
        result = call(capfdbinary, *command, "-n", 1, "-o", tmp_path / "pipe", "--overwrite")
        assert_fails(result, 1, "is not a regular file")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_list_names_only_what_is_in_its_own_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("ten years")
    listed = ["../thesis.txt", "..", "/etc", "a/b", 5, None]
    (tmp_path / "run" / storage.LIST).write_text(json.dumps({"files": listed}))
    assert storage.owned(tmp_path / "run") == set()
    storage.remove_owned(tmp_path / "run")
    assert (tmp_path / "thesis.txt").exists()
    for text in ("", "[", "[]", '{"files": 3}', '{"files": null}'):
        (tmp_path / "run" / storage.LIST).write_text(text)
        assert storage.owned(tmp_path / "run") == set()


def test_a_run_is_what_its_run_json_says_not_its_name(corpus, tiny, tmp_path):
    for content in ("{}", "[]", "null", '{"recipe": 1}', '{"recipe": {}, "versions": {}}', "not JSON"):
        (folder := tmp_path / "run").mkdir()
        (folder / "run.json").write_text(content)
        (folder / "metrics.json").write_text(content)
        with pytest.raises(HfkitError, match="did not write"):
            hfkit.finetune(corpus, model=tiny, output_dir=folder, overwrite=True, max_steps=1)
        assert (folder / "metrics.json").read_text() == content
        shutil.rmtree(folder)
