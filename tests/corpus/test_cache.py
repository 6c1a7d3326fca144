"""A corpus is tokenized once; what is kept on disk is complete and is found again."""

import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from support.corpora import CHATML, TEXTS, prepare, talk, whole, write

from hfkit.corpus import cache
from hfkit.corpus.cache import Report, corpus_lines, load_prepared
from hfkit.corpus.encoding import encode_examples, fingerprint
from hfkit.corpus.files import PREPARED
from hfkit.corpus.templates import CHAT_TEMPLATE
from hfkit.errors import HfkitError
from hfkit.models.loading import load_tokenizer
from hfkit.models.sources import find_model as find
from hfkit.options import ModelOptions


def ids_of(prepared) -> list[int]:
    return np.concatenate(prepared.dataset.with_format("numpy")[:]["input_ids"]).tolist()


# what is kept


def test_encode_corpus_writes_a_dataset(tmp_path, datasets_cache, bundled):
    """`datasets` reads a prepared folder, and nothing else is written."""
    import datasets

    prepared = prepare(write(tmp_path / "a.jsonl"), bundled, tmp_path / "out")
    kept = datasets.load_from_disk(str(tmp_path / "out"))
    assert ids_of(prepared) == sum(kept["input_ids"], []) == whole(TEXTS, bundled)
    assert sum(kept["bytes"]) == sum(len(text.encode()) for text in TEXTS)
    assert list(dict.fromkeys(kept["document"])) == list(range(len(TEXTS)))
    assert not datasets_cache.exists()
    assert not [path.name for path in (tmp_path / "out").iterdir() if "tokens" in path.name]
    loaded = load_prepared(tmp_path / "out")
    assert loaded.report == prepared.report and loaded.cached and not prepared.cached


def test_encode_corpus_finds_by_content(tmp_path, datasets_cache, bundled):
    """Tokens are found again whatever the name and time of the file."""
    first = prepare(write(tmp_path / "a.txt"), bundled)
    shutil.copy(tmp_path / "a.txt", tmp_path / "other-name.txt")
    os.utime(tmp_path / "other-name.txt", (1, 1))
    second = prepare(tmp_path / "other-name.txt", bundled)
    assert second.cached and second.folder == first.folder and ids_of(second) == ids_of(first)
    assert second.report == first.report


def test_encode_corpus_notices_changes(tmp_path, datasets_cache, bundled):
    """A changed file is prepared anew, even if its size and time are the same."""
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        path.write_text(text)
        os.utime(path, (1, 1))
        prepared = prepare(path, bundled)
        assert not prepared.cached and ids_of(prepared) == whole([text], bundled)


def test_encode_corpus_depends_on_tokenizer_and_options(tmp_path, datasets_cache, bundled, tiny):
    """Another tokenizer, or another way to read, is prepared anew."""
    rows = [{"text": "one", "body": "two"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    other = load_tokenizer(find(ModelOptions(model=tiny)))
    template = load_tokenizer(find(ModelOptions(model="bundled")))
    template.chat_template = CHATML
    seen = [
        prepare(tmp_path / "a.jsonl", tokenizer, **options)
        for tokenizer in (bundled, other, template)
        for options in ({"text_column": "text"}, {"text_column": "body"}, {"text_column": "body", "errors": "replace"})
    ]
    assert not any(prepared.cached for prepared in seen)
    assert ids_of(seen[0]) == whole(["one"], bundled) and ids_of(seen[4]) == whole(["two"], other)
    (tmp_path / "a.csv").write_text("text,a\tb\nx,y\tz\n")  # a comma in each field, or a tab
    (tmp_path / "a.tsv").write_text("text,a\tb\nx,y\tz\n")
    tables = [prepare(tmp_path / f"a.{kind}", bundled, text_column=column)
              for kind, column in (("csv", "a\tb"), ("tsv", "b"))]  # fmt: skip
    assert ids_of(tables[0]) == whole(["y\tz"], bundled) and ids_of(tables[1]) == whole(["z"], bundled)


def test_fingerprint_is_stable(bundled, tiny):
    """Using a tokenizer does not change its fingerprint."""
    bundled("a")
    before = fingerprint(bundled)
    list(encode_examples([talk(("assistant", "a"))], bundled))
    bundled("a", truncation=True, max_length=2)
    bundled.chat_template = CHAT_TEMPLATE
    assert fingerprint(bundled) == before != fingerprint(load_tokenizer(find(ModelOptions(model=tiny))))


def test_encode_corpus_reads_the_hub_anew(monkeypatch, datasets_cache, bundled):
    """A data set on the Hub is read each time."""
    for text in ("today", "tomorrow"):
        monkeypatch.setattr("datasets.load_dataset", lambda *_, text=text, **__: [{"text": text}])
        prepared = prepare("hf://owner/name", bundled)
        assert not prepared.cached and ids_of(prepared) == whole([text], bundled)


def test_encode_corpus_keeps_a_folder_for_its_corpus(tmp_path, datasets_cache, bundled, tiny):
    """A folder is found again, and refused for another corpus or tokenizer."""
    first, second = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", ["other"])
    assert not prepare(first, bundled, tmp_path / "out").cached
    assert prepare(first, bundled, tmp_path / "out").cached
    for source, tokenizer in ((second, bundled), (first, load_tokenizer(find(ModelOptions(model=tiny))))):
        with pytest.raises(HfkitError, match="name a new folder"):
            prepare(source, tokenizer, tmp_path / "out")
    assert ids_of(load_prepared(tmp_path / "out")) == whole(TEXTS, bundled)


@pytest.mark.parametrize("name", [PREPARED, "data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_load_prepared_refuses_damage(tmp_path, datasets_cache, bundled, name, keep):
    """A damaged cache is made anew; a damaged folder is an error of one sentence."""
    prepared = prepare(write(tmp_path / "a.txt"), bundled)
    path, wanted = prepared.folder / name, ids_of(prepared)
    content = path.read_bytes()
    path.unlink()
    if keep is not None:
        path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(HfkitError, match="cannot be read"):
        load_prepared(prepared.folder)
    again = prepare(tmp_path / "a.txt", bundled)
    assert not again.cached and ids_of(again) == wanted
    assert prepare(tmp_path / "a.txt", bundled).cached


@pytest.mark.parametrize("name", [PREPARED, "data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_load_prepared_notices_a_flipped_bit(tmp_path, datasets_cache, bundled, capsys, name):
    """One flipped bit anywhere: a folder is refused, and the cache is made anew, with a note."""
    source = write(tmp_path / "a.txt")
    wanted = ids_of(prepare(source, bundled))
    for place in range(0, 100, 7):
        prepared = prepare(source, bundled)
        assert prepared.cached
        path = prepared.folder / name
        content = bytearray(path.read_bytes())
        content[len(content) * place // 100] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(HfkitError, match="cannot be read .* prepare it again"):
            load_prepared(prepared.folder)
        capsys.readouterr()
        again = prepare(source, bundled)
        assert not again.cached and ids_of(again) == wanted
        assert name == PREPARED or "damaged" in capsys.readouterr().err


def test_encode_corpus_without_a_writable_cache(tmp_path, monkeypatch, bundled):
    """A cache that cannot be written is an error of one sentence."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HfkitError, match="HF_DATASETS_CACHE"):
        prepare(write(tmp_path / "a.txt"), bundled)


@pytest.mark.parametrize(("count", "ending"), [(1, ""), (2, "s"), (1000, "s")])
def test_corpus_lines_count_in_words(count, ending):
    """One document is not called documents."""
    report = Report(documents=count, duplicates=count, empty=count, characters=count, tokens=count)
    lines = corpus_lines(report)
    assert lines[0].startswith(", ".join(f"{count:,} {noun}{ending}" for noun in ("document", "character", "token")))
    assert sum(line.endswith(f": {count:,} document{ending}") for line in lines) == 2
    assert f"{count:,} example{ending}," in corpus_lines(replace(report, kind="messages"))[0]


# crashes


def start(work) -> int:
    """Run `work` in a process forked off; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # noqa: BLE001 - nothing of pytest may run here
        os._exit(1)
    os._exit(0)


def end_of(child: int) -> int:
    """The exit status of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)


STEPS = ["hfkit.corpus.cache._make_column", "datasets.DatasetInfo.write_to_directory", "os.replace",
         "hfkit.corpus.cache.make_names_durable", "hfkit.corpus.cache.write_text", "done"]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_encode_corpus_survives_kill(tmp_path, datasets_cache, bundled, monkeypatch, step):
    """What a killed process leaves is never taken for complete tokens."""
    source, tokens = write(tmp_path / "a.txt"), whole(TEXTS, bundled)

    def work():
        if step == "done":
            die(prepare(source, bundled))
        monkeypatch.setattr(step, die)
        prepare(source, bundled)

    assert end_of(start(work)) == -signal.SIGKILL
    prepared = prepare(source, bundled)
    assert prepared.cached == (step == "done") and ids_of(prepared) == tokens
    assert not (prepared.folder / ".tokens").exists()


def test_encode_corpus_survives_kill_while_renewing(datasets_cache, bundled, monkeypatch):
    """The same for a process that is killed while it replaces older tokens."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "today"}])
    prepared = prepare("hf://owner/name", bundled)

    def work():
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "tomorrow"}])
        monkeypatch.setattr("hfkit.corpus.cache.write_text", die)
        prepare("hf://owner/name", bundled)

    assert end_of(start(work)) == -signal.SIGKILL
    with pytest.raises(HfkitError, match="cannot be read"):
        load_prepared(prepared.folder)


def test_encode_corpus_survives_errors(tmp_path, datasets_cache, bundled, monkeypatch):
    """An error in the middle of a corpus leaves nothing behind."""
    monkeypatch.setattr(cache, "BATCH", 2)
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20))
    (tmp_path / "a.jsonl").write_text(rows + "{")
    with pytest.raises(HfkitError, match="line 21"):
        prepare(tmp_path / "a.jsonl", bundled, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]
    (tmp_path / "a.jsonl").write_text(rows)
    prepared = prepare(tmp_path / "a.jsonl", bundled, tmp_path / "out")
    assert ids_of(prepared) == whole([f"text {i}" for i in range(20)], bundled)


def test_encode_corpus_on_a_full_disk(tmp_path, datasets_cache, bundled):
    """A full disk is an error of one sentence and leaves nothing behind."""
    source = write(tmp_path / "a.txt", ["word " * 100_000])

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(HfkitError, match="cannot write the tokens .*File too large"):
            prepare(source, bundled, tmp_path / "out")

    assert end_of(start(work)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]


def test_encode_corpus_in_two_processes(tmp_path, datasets_cache, bundled, monkeypatch, capsys):
    """Of two processes one prepares, and the other waits for it."""
    source, column = write(tmp_path / "a.txt"), cache._make_column
    began = tmp_path / "began"

    def slowly(*arguments):
        began.touch()
        time.sleep(0.3)
        return column(*arguments)

    def first():
        monkeypatch.setattr(cache, "_make_column", slowly)
        assert not prepare(source, bundled).cached

    child = start(first)
    while not began.exists():
        time.sleep(0.01)
    prepared = prepare(source, bundled)
    assert end_of(child) == 0
    assert prepared.cached and ids_of(prepared) == whole(TEXTS, bundled)
    assert f"in use by process {child} on" in capsys.readouterr().err
