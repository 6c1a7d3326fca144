"""`hfkit prepare` counts what is there, says what it costs, and leaves a folder that training takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from support.models import write_gguf
from support.shell import WATCH, assert_fails, call, edit_json

import hfkit
from hfkit.console import note_once
from hfkit.corpus.documents import END
from hfkit.errors import HfkitError

TEXTS = [
    "Plain words and more plain words.",
    "Einige Wörter – und ein Tab\t, ein NUL-freier Text.",
    "日本語の文章です。漢字とかな。",
    "Control \x07\x07 and \x1b, private \ue000, separators \u2028 \u2029, a mark \ufeff in the middle.",
    "Plain words and more plain words.",
    "Plain words and more plain words",  # not to the letter
    "Русский текст " * 700,  # of several pieces
    "Русский текст " * 700,
    "",
    "  \n ",
    "1234 5678 !?",
]


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_prepare_figures(rows, bundled, datasets_cache):
    """The figures are those that a person counts."""
    found = hfkit.prepare(rows, block_size=100)
    report, texts = found.prepared.report, [text for text in TEXTS if text.strip()]
    tokens = [len(bundled(text, verbose=False)["input_ids"]) + 1 for text in texts]
    assert report.kind == "text"
    assert (report.documents, report.empty, report.duplicates) == (9, 2, 2)
    assert report.characters == sum(map(len, TEXTS))
    assert report.bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.tokens == sum(tokens)
    odd = {"\a": 2, **dict.fromkeys("\x1b\ue000\u2028\u2029\ufeff", 1)}
    assert report.odd == {f"U+{ord(character):04X}": count for character, count in odd.items()}
    assert found.block_size == 100 and found.blocks == -(-sum(tokens) // 100)
    everything = "".join(TEXTS)
    latin = sum(c.isascii() and c.isalpha() or c in "ö" for c in everything)
    cyrillic = sum("\u0400" <= c <= "\u04ff" for c in everything)
    letters = sum(map(str.isalpha, everything))
    assert report.scripts["Latin"] == pytest.approx(latin / letters)
    assert report.scripts["Cyrillic"] == pytest.approx(cyrillic / letters)
    assert set(report.scripts) == {"Cyrillic", "Latin", "Hiragana", "Han"}


def test_prepare_scripts(tmp_path, datasets_cache, monkeypatch):
    """The scripts of a large corpus are those of a fair sample."""
    monkeypatch.setattr("hfkit.corpus.cache._SAMPLE", 10_000)
    rows = ["ab"] * 3000 + ["漢字" * 1000] * 2 + ["д" * 10_000]  # 6,000 letters, 4,000, 10,000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    scripts = hfkit.prepare(tmp_path / "a.jsonl").prepared.report.scripts
    for script, share in {"Latin": 0.3, "Han": 0.2, "Cyrillic": 0.5}.items():
        assert scripts[script] == pytest.approx(share, abs=0.02)


def test_prepare_answers(tmp_path, bundled, datasets_cache):
    """The figures of answers are those of their texts."""
    rows = [
        {"prompt": "a", "completion": " bc"},
        {"prompt": "ab", "completion": " c"},
        {"prompt": "a", "completion": " bc"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = hfkit.prepare(tmp_path / "a.jsonl").prepared.report
    assert (report.kind, report.documents, report.duplicates, report.empty) == ("completion", 3, 1, 0)
    assert report.characters == report.bytes == 12
    longest = [
        len(bundled(row["prompt"])["input_ids"]) + len(bundled(row["completion"])["input_ids"]) + 1 for row in rows
    ]
    assert report.tokens == sum(longest) and report.longest == max(longest)


def test_prepare_output(rows, tmp_path, capfdbinary, tiny):
    """`--json` is one object with all figures, and the lines for people have them, too."""
    result = call(capfdbinary, "prepare", rows, "-m", tiny, "--json", "-o", tmp_path / "out")
    assert (result.returncode, result.stderr.decode()) == (0, f"hfkit: {rows}: the text is column 'text'\n")
    figures = json.loads(result.stdout)
    python = hfkit.prepare(rows, model=tiny, output_dir=tmp_path / "out").to_dict()
    for timed in (figures, python):
        assert 0 < timed["training"].pop("seconds") < 1e6
    assert figures == python
    assert figures["folder"] == str(tmp_path / "out") and figures["block_size"] == 64
    assert figures["training"]["parameters"] > 0 and figures["training"]["memory"] > 0
    result = call(capfdbinary, "prepare", rows, "-m", tiny)
    text = result.stdout.decode()
    assert (result.returncode, result.stderr.decode()) == (0, f"hfkit: next: hfkit finetune {rows} -m {tiny}\n")
    for name in ("documents", "characters", "tokens", "blocks", "duplicates", "empty"):
        assert f"{figures[name]:,}" in text
    assert "U+0007 2 times" in text and "Cyrillic" in text and f"{figures['training']['parameters']:,}" in text


def test_prepare_shows_an_example(tmp_path, capfdbinary, tiny):
    """Without a flag one example is shown, cut, and what the file was taken for is said each time."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"rain {n}", "answer": "sun"}) + "\n" for n in range(3)))
    for show, count in ([], 1), ([], 1), (["--show", 0], 0), (["--show", 2], 2):
        note_once.cache_clear()
        result = call(capfdbinary, "prepare", path, "-m", tiny, "--block-size", 64, *show)
        assert result.stderr.decode().startswith(f"hfkit: {path}: the rows are questions ('question') and answers (")
        examples = [f"User: rain {n}\nAssistant:⟦ sun<|endoftext|>⟧\n" for n in range(count)]
        assert all(example in result.stdout.decode() for example in examples)
        assert result.stdout.decode().count("⟦ sun") == count
        assert "byte by byte" not in result.stdout.decode()  # although the chat template is most of the tokens


def test_prepare_replaced_bytes(tmp_path, capfdbinary, tiny):
    """Replaced bytes are counted."""
    (tmp_path / "a.txt").write_bytes(b"one \xff\xfe\x80 two \0 three")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "a.txt", "-m", tiny), 1, "line 1, byte 5")
    result = call(capfdbinary, "prepare", tmp_path / "a.txt", "-m", tiny, "--errors", "replace")
    assert result.returncode == 0 and b"U+FFFD 4 times" in result.stdout


def test_prepare_left_out_files(tmp_path, capfdbinary, tiny):
    """Files that are left out are reported."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("text")
    (tmp_path / "a" / "b.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "a" / "c.txt").touch()
    result = call(capfdbinary, "prepare", tmp_path / "a", "-m", tiny)
    assert result.returncode == 0 and result.stderr.decode().splitlines() == [
        f"hfkit: {tmp_path / 'a'}: left out 2 files without text",
        f"hfkit: next: hfkit finetune {tmp_path / 'a'} -m {tiny}",
    ]


def test_prepare_folder(rows, tmp_path, capfdbinary, tiny):
    """`datasets` and `finetune` read a prepared folder."""
    out, dry = tmp_path / "out", ("-m", tiny, "--dry-run", "--max-steps", "2")
    assert call(capfdbinary, "prepare", rows, "-m", tiny, "-o", out).returncode == 0
    assert datasets.load_from_disk(str(out)).column_names == ["input_ids", "document", "content", "bytes"]
    told = [call(capfdbinary, "finetune", corpus, *dry) for corpus in (out, rows)]
    assert [result.returncode for result in told] == [0, 0]
    assert [result.stderr.splitlines()[:5] for result in told[:1]] == [
        result.stderr.splitlines()[:5] for result in told[1:]
    ]
    assert_fails(call(capfdbinary, "finetune", out, "--dry-run"), 1, "another tokenizer")
    for command in ("prepare", "pretrain"):
        assert_fails(call(capfdbinary, command, out, "-o", tmp_path / "new"), 1, "made by prepare")


def test_prepare_twice(rows, tmp_path, capfdbinary, tiny):
    """Preparing again finds what is there; a taken folder is refused."""
    out = tmp_path / "out"
    assert not hfkit.prepare(rows, model=tiny, output_dir=out).prepared.cached
    assert hfkit.prepare(rows, model=tiny, output_dir=out).prepared.cached
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "b.txt").write_text("other")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "b.txt", "-m", tiny, "-o", out), 1, "name a new folder")
    assert_fails(call(capfdbinary, "prepare", rows, "-o", out), 1, "name a new folder")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("dear")
    assert_fails(
        call(capfdbinary, "prepare", rows, "-m", tiny, "-o", taken), 1, "holds thesis.txt, which hfkit did not write"
    )
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


def test_prepare_after_a_failure(rows, tmp_path, capfdbinary, tiny):
    """After a failure the same folder may be used again."""
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "bad.txt", "-m", tiny, "-o", tmp_path / "out"), 1, "byte 1")
    assert call(capfdbinary, "prepare", rows, "-m", tiny, "-o", tmp_path / "out").returncode == 0


def test_prepare_interrupted(rows, tmp_path, capfdbinary, monkeypatch, tiny):
    """Ctrl-C ends it quietly and leaves nothing."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfkit.corpus.cache._make_column", interrupt)
    result = call(capfdbinary, "prepare", rows, "-m", tiny, "-o", tmp_path / "out")
    note = f"hfkit: {rows}: the text is column 'text'\n"
    assert (result.returncode, result.stdout, result.stderr.decode()) == (130, b"", note)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]


@pytest.mark.parametrize("name", ["deep/er/out", "выход 出", "two\nlines", "n" * 255, "."], ids=ascii)
def test_prepare_odd_folders(rows, tmp_path, monkeypatch, tiny, name):
    """Any folder that can be made can be written to."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hfkit.prepare(rows, model=tiny, output_dir=name)
    assert len(datasets.load_from_disk(os.path.abspath(name))) >= 9


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "n" * 256, "/proc/nowhere", "nul\0"], ids=ascii)
def test_prepare_unwritable_folders(rows, tmp_path, monkeypatch, name):
    """A folder that cannot be written is one line before anything is loaded."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfkit.training.finetuning.load_tokenizer", None)
    with pytest.raises(HfkitError, match="cannot write to") as error:
        hfkit.prepare(rows, output_dir=name)
    assert "\n" not in str(error.value)
    assert Path("file").read_bytes() == b""


def test_prepare_missing_corpus(tmp_path):
    """A corpus that does not exist is reported before anything heavy is imported."""
    (tmp_path / "empty.txt").touch()
    lines = [["prepare", "nowhere.txt"], ["prepare", f"{tmp_path}/empty.txt"], ["prepare", str(tmp_path)]]
    command = [sys.executable, "-c", WATCH, json.dumps(lines)]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=True)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [[line, 1, []] for line in lines]
    assert len(result.stderr.splitlines()) == 3


def test_prepare_bad_options(rows, capfdbinary):
    """A mistake in the options is a usage error."""
    assert_fails(call(capfdbinary, "prepare", rows, "--errors", "ignore"), 2, "errors")
    assert_fails(call(capfdbinary, "prepare", rows, "--block-size", "1"), 2, "block")
    assert_fails(call(capfdbinary, "prepare"), 2, "corpus")
    with pytest.raises(TypeError, match="text_column"):
        hfkit.prepare(rows, text_colum="text")


def test_prepare_for_any_model(tmp_path, rows, tiny, tiny_llama, copy):
    """A corpus is prepared for models of any kind."""
    folder = copy(tiny)
    edit_json(folder / "config.json", n_positions=32)
    assert hfkit.prepare(rows, model=str(folder)).block_size == 32
    lm = hfkit.load(tiny_llama)
    for model in (tiny_llama, write_gguf(lm.model, lm.tokenizer, tmp_path / "model.gguf")):
        found = hfkit.prepare(rows, model=model)
        assert found.block_size == 128 and found.prepared.report.documents == 9
        assert found.plan.parameters >= lm.model.num_parameters() > found.plan.parameters * 0.5  # tied or not


def test_prepare_documents(tmp_path, bundled, datasets_cache):
    """The documents of a text are those between the marks."""
    (tmp_path / "a.txt").write_text(END.join(["one", "two", "", "two", "three\n"]) + END + "\n")
    report = hfkit.prepare(tmp_path / "a.txt").prepared.report
    assert (report.documents, report.empty, report.duplicates) == (4, 1, 1)


def test_prepare_show_prints_examples(tmp_path, capfdbinary, tiny):
    """--show N prints N sequences and marks what is learned, also as JSON."""
    rows = [{"prompt": f"{number} and", "completion": " more"} for number in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("prepare", tmp_path / "a.jsonl", "-m", tiny, "--show", 2)
    result = call(capfdbinary, *line)
    assert result.returncode == 0 and "0 and⟦ more<|endoftext|>⟧" in result.stdout.decode().splitlines()
    assert result.stdout.count("⟧\n".encode()) == 2
    assert json.loads(call(capfdbinary, *line, "--json").stdout)["examples"][1] == "1 and⟦ more<|endoftext|>⟧"
    assert_fails(call(capfdbinary, *line[:-1], -1), 2, "--show")


@pytest.mark.parametrize(("text", "told"), [("漢字とかな", True), ("Привет, мир. ", True), ("hello ", False)])
def test_prepare_notes_text_without_vocabulary(tmp_path, capfdbinary, tiny, text, told):
    """A text that the tokenizer spells byte by byte is noted, with the way out."""
    (tmp_path / "a.txt").write_text(text * 50)
    result = call(capfdbinary, "prepare", tmp_path / "a.txt", "-m", tiny)
    assert (b"byte by byte; 'hfkit pretrain' makes a vocabulary" in result.stdout) == told
    assert (b"recipe pretrain-chinese" in result.stdout) == text.startswith("漢")
