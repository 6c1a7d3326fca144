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


def test_the_figures_are_those_that_one_counts(rows, bundled, datasets_cache):
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


def test_the_scripts_of_a_large_corpus_are_those_of_a_fair_sample(tmp_path, datasets_cache, monkeypatch):
    monkeypatch.setattr("hfkit.corpus.cache._SAMPLE", 10_000)
    rows = ["ab"] * 3000 + ["漢字" * 1000] * 2 + ["д" * 10_000]  # 6,000 letters, 4,000, 10,000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    scripts = hfkit.prepare(tmp_path / "a.jsonl").prepared.report.scripts
    for script, share in {"Latin": 0.3, "Han": 0.2, "Cyrillic": 0.5}.items():
        assert scripts[script] == pytest.approx(share, abs=0.02)


def test_the_figures_of_answers_are_those_of_their_texts(tmp_path, bundled, datasets_cache):
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


def test_json_is_one_object_with_all_figures_and_the_lines_for_people_have_them_too(rows, tmp_path, capfdbinary, tiny):
    result = call(capfdbinary, "prepare", rows, "-m", tiny, "--json", "-o", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, b"")
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


def test_replaced_bytes_are_counted(tmp_path, capfdbinary, tiny):
    (tmp_path / "a.txt").write_bytes(b"one \xff\xfe\x80 two \0 three")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "a.txt", "-m", tiny), 1, "line 1, byte 5")
    result = call(capfdbinary, "prepare", tmp_path / "a.txt", "-m", tiny, "--errors", "replace")
    assert result.returncode == 0 and b"U+FFFD 4 times" in result.stdout


def test_files_that_are_left_out_are_told(tmp_path, capfdbinary, tiny):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.txt").write_text("text")
    (tmp_path / "a" / "b.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "a" / "c.txt").touch()
    result = call(capfdbinary, "prepare", tmp_path / "a", "-m", tiny)
    assert result.returncode == 0 and result.stderr.decode().splitlines() == [
        "hfkit: 2 files are empty or no text: left out",
        f"hfkit: next: hfkit finetune {tmp_path / 'a'} -m {tiny}",
    ]


def test_a_prepared_folder_is_read_by_datasets_and_by_finetune(rows, tmp_path, capfdbinary, tiny):
    out, dry = tmp_path / "out", ("-m", tiny, "--dry-run", "--max-steps", "2")
    assert call(capfdbinary, "prepare", rows, "-m", tiny, "-o", out).returncode == 0
    assert datasets.load_from_disk(str(out)).column_names == ["input_ids", "document", "bytes"]
    told = [call(capfdbinary, "finetune", corpus, *dry) for corpus in (out, rows)]
    assert [result.returncode for result in told] == [0, 0]
    assert [result.stderr.splitlines()[:5] for result in told[:1]] == [
        result.stderr.splitlines()[:5] for result in told[1:]
    ]
    assert_fails(call(capfdbinary, "finetune", out, "--dry-run"), 1, "another tokenizer")
    for command in ("prepare", "pretrain"):
        assert_fails(call(capfdbinary, command, out, "-o", tmp_path / "new"), 1, "made by prepare")


def test_preparing_again_finds_what_is_there_and_a_taken_folder_is_refused(rows, tmp_path, capfdbinary, tiny):
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


def test_after_a_failure_the_same_folder_may_be_named_again(rows, tmp_path, capfdbinary, tiny):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "bad.txt", "-m", tiny, "-o", tmp_path / "out"), 1, "byte 1")
    assert call(capfdbinary, "prepare", rows, "-m", tiny, "-o", tmp_path / "out").returncode == 0


def test_ctrl_c_ends_it_quietly_and_leaves_nothing(rows, tmp_path, capfdbinary, monkeypatch, tiny):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hfkit.corpus.cache._column", interrupt)
    result = call(capfdbinary, "prepare", rows, "-m", tiny, "-o", tmp_path / "out")
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]


@pytest.mark.parametrize("name", ["deep/er/out", "выход 出", "two\nlines", "n" * 255, "."], ids=ascii)
def test_any_folder_that_can_be_made_can_be_written_to(rows, tmp_path, monkeypatch, tiny, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hfkit.prepare(rows, model=tiny, output_dir=name)
    assert len(datasets.load_from_disk(os.path.abspath(name))) >= 9


@pytest.mark.parametrize("name", ["file", "file/below", "loop", "n" * 256, "/proc/nowhere", "nul\0"], ids=ascii)
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_loaded(rows, tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfkit.training.preparation.load_tokenizer", None)
    with pytest.raises(HfkitError, match="cannot write to") as error:
        hfkit.prepare(rows, output_dir=name)
    assert "\n" not in str(error.value)
    assert Path("file").read_bytes() == b""


def test_a_corpus_or_model_that_is_not_there_is_told_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "empty.txt").touch()
    lines = [["prepare", "nowhere.txt"], ["prepare", f"{tmp_path}/empty.txt"], ["prepare", str(tmp_path)]]
    command = [sys.executable, "-c", WATCH, json.dumps(lines)]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, text=True, check=True)
    assert [json.loads(line) for line in result.stdout.splitlines()] == [[line, 1, []] for line in lines]
    assert len(result.stderr.splitlines()) == 3


def test_a_mistake_in_the_options_is_a_usage_error(rows, capfdbinary):
    assert_fails(call(capfdbinary, "prepare", rows, "--errors", "ignore"), 2, "errors")
    assert_fails(call(capfdbinary, "prepare", rows, "--block-size", "1"), 2, "block")
    assert_fails(call(capfdbinary, "prepare"), 2, "corpus")
    with pytest.raises(TypeError, match="text_column"):
        hfkit.prepare(rows, text_colum="text")


def test_a_corpus_is_prepared_for_models_of_any_kind(tmp_path, rows, tiny, tiny_llama, copy):
    folder = copy(tiny)
    edit_json(folder / "config.json", n_positions=32)
    assert hfkit.prepare(rows, model=str(folder)).block_size == 32
    lm = hfkit.load(tiny_llama)
    for model in (tiny_llama, write_gguf(lm.model, lm.tokenizer, tmp_path / "model.gguf")):
        found = hfkit.prepare(rows, model=model)
        assert found.block_size == 128 and found.prepared.report.documents == 9
        assert found.plan.parameters >= lm.model.num_parameters() > found.plan.parameters * 0.5  # tied or not


def test_documents_in_one_text_are_those_between_the_marks(tmp_path, bundled, datasets_cache):
    (tmp_path / "a.txt").write_text(END.join(["one", "two", "", "two", "three\n"]) + END + "\n")
    report = hfkit.prepare(tmp_path / "a.txt").prepared.report
    assert (report.documents, report.empty, report.duplicates) == (4, 1, 1)
