"""A folder is read without what hfkit or `datasets` wrote there, and whatever else lies beside its texts."""

import json

import datasets
import pytest
from support import trials
from support.shell import assert_fails, call

import hfkit
from hfkit.corpus.documents import Example, Piece, read_records, read_table
from hfkit.corpus.files import find_corpus
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions, DataOptions

pytestmark = pytest.mark.usefixtures("brisk")


@pytest.fixture
def folder(tmp_path):
    """A folder with one text."""
    (tmp_path / "texts").mkdir()
    trials.write_corpus(tmp_path / "texts" / "plain.txt")
    return tmp_path / "texts"


def names(sources, **options) -> list[str]:
    """The files of a corpus, relative to its folder."""
    return [str(path.relative_to(sources)) for path in find_corpus(sources, **options).files]


def read(source, **options) -> list[str]:
    """The texts of a corpus of short documents."""
    records = list(read_records(find_corpus(source), CorpusOptions(**options)))
    assert all(isinstance(record, Piece) and record.last for record in records)
    return [record.text for record in records]


# runs and models


@pytest.mark.parametrize("output", ["run", "deep/er/run"])
def test_finetune_a_folder_that_holds_the_run(folder, output, tiny):
    """The run ends, can be resumed, and a second run trains on the same texts."""
    options = trials.SMALL | {"model": tiny, "output_dir": str(folder / output)}
    run = hfkit.finetune(str(folder), **options)
    assert (folder / output / "model.safetensors").is_file()
    assert names(folder) == ["plain.txt"]
    assert hfkit.finetune(str(folder), resume=True, **options).metrics["loss"] == run.metrics["loss"]
    again = hfkit.finetune(str(folder), overwrite=True, **options)
    assert again.metrics["loss"] == run.metrics["loss"]


def test_list_folder_without_runs_models_and_the_output(folder, tiny, copy, capfd):
    """They are counted, and files of the same names that belong to no run or model are read."""
    copy(tiny).rename(folder / "model")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").touch()
    (folder / "adapter" / "README.md").write_text("card")
    for name, content in {
        "old/run.json": '{"recipe": {}, "versions": {}}',
        "new/.hfkit.json": '{"files": []}',
        "site/config.json": '{"title": "not a model"}',
        "site/run.json": '{"recipe": "cake"}',
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
        (folder / name).with_name("notes.txt").write_text("notes")
    (folder / "out").mkdir()
    (folder / "out" / "draft.txt").write_text("draft")
    read = ["plain.txt", "site/config.json", "site/notes.txt", "site/run.json"]
    assert names(folder) == ["out/draft.txt", *read]
    assert names(folder, output=folder / "out") == read
    notes = capfd.readouterr().err
    assert f"{folder}: left out 4 folders with a run or a model, such as {folder}/adapter" in notes


def test_find_corpus_refuses_a_model(tiny, folder, tmp_path, copy, capfdbinary):
    """The error asks for -m: in a command line with a forgotten -m the model is taken for a corpus."""
    model = copy(tiny)
    for command in (["evaluate", folder, model], ["finetune", folder, model, "-o", tmp_path / "run"]):
        assert_fails(call(capfdbinary, *command), 1, f"{model} is a model: did you mean -m {model}?")
    weights = model / "model.safetensors"
    assert_fails(call(capfdbinary, "evaluate", folder, weights), 1, f"{weights} is a model", f"-m {weights}?")
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert_fails(call(capfdbinary, "prepare", tmp_path / "tiny.gguf"), 1, f"did you mean -m {tmp_path}/tiny.gguf?")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / ".hfkit.json").write_text('{"files": []}')
    with pytest.raises(HfkitError, match="begun is a run: did you mean -m"):
        find_corpus(tmp_path / "begun")


def test_find_corpus_of_a_glob_leaves_runs_out(folder, tiny, copy):
    """A glob that reaches into a model or the output takes no file of it; one for a model alone is refused."""
    copy(tiny).rename(folder / "model")
    (folder / "out").mkdir()
    (folder / "out" / "draft.txt").write_text("draft")
    pattern = f"{folder}/**/*.*"
    assert [path.name for path in find_corpus(pattern).files] == ["draft.txt", "plain.txt"]
    assert [path.name for path in find_corpus(pattern, output=folder / "out").files] == ["plain.txt"]
    with pytest.raises(HfkitError, match=f"names files of {folder}/model, a run or a model: did you mean -m"):
        find_corpus(f"{folder}/model/*.json")


def test_find_corpus_of_a_file_in_a_run(folder):
    """A file that is named is read wherever it lies."""
    (folder / ".hfkit.json").write_text('{"files": []}')
    assert find_corpus(folder / "plain.txt").files == (folder / "plain.txt",)


# links


def test_list_folder_follows_links_once(folder, tmp_path, capfd):
    """Links to folders are read once, wherever they lead, and a note names what lies outside."""
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "deep" / "a.txt").write_text("outside")
    for name, target in {
        "link": tmp_path / "outside",
        "twice": tmp_path / "outside" / "deep",
        "loop": folder,
        "gone": tmp_path / "nowhere",
    }.items():
        (folder / name).symlink_to(target)
    assert names(folder) == ["link/deep/a.txt", "plain.txt"]
    assert f"links that lead out of it, which are read ({folder}/link to {tmp_path}/outside)" in capfd.readouterr().err
    (folder / "self").mkdir()
    (folder / "self" / "again").symlink_to(folder / "self")
    (folder / "link").unlink()
    assert names(folder) == ["plain.txt", "twice/a.txt"]


# data sets


def test_list_folder_reads_what_a_saved_data_set_names(tmp_path):
    """Files that `map` cached beside the data are not read."""
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(str(tmp_path / "saved"))
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"text": row["text"] + " more"}, cache_file_name=str(tmp_path / "saved" / "cache-1.arrow"))
    assert (tmp_path / "saved" / "cache-1.arrow").is_file()
    assert read(tmp_path / "saved") == read(tmp_path) == ["one", "two"]
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(HfkitError, match="lacks a file .*data-00000-of-00001.arrow"):
        find_corpus(tmp_path)


def test_read_records_of_one_split_of_a_data_set(tmp_path, capfd):
    """`train` is read, or what --dataset-split names; a note says so."""
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"text": [name], "label": ["a"]}) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == ["train"] and "reading 'train' (--dataset-split)" in capfd.readouterr().err
    assert read(tmp_path / "saved", dataset_split="test") == ["test"] and "reading 'test'" in capfd.readouterr().err
    table = read_table(find_corpus(tmp_path / "saved"), CorpusOptions(dataset_split="test"))
    assert [row["text"] for row, _ in table] == ["test"]
    with pytest.raises(HfkitError, match="no split 'dev' .*'test', 'train'.*--dataset-split"):
        read(tmp_path / "saved", dataset_split="dev")
    datasets.DatasetDict(validation=splits["test"]).save_to_disk(str(tmp_path / "single"))
    assert read(tmp_path / "single") == ["test"]


@pytest.mark.parametrize(("other", "is_told"), [("test-00000-of-00001.jsonl", True), ("testament.jsonl", False)])
def test_list_folder_says_that_it_reads_all_splits(tmp_path, other, is_told, capfd):
    """Only a data set that was saved as splits says which one is meant; files in a folder only look like some."""
    for name in ("train.jsonl", other):
        (tmp_path / name).write_text('{"text": "one"}\n')
    assert read(tmp_path) == ["one", "one"]
    assert ("has files called test and train: all are read" in capfd.readouterr().err) == is_told
    find_corpus(tmp_path, CorpusOptions(exclude="test*"))
    assert "has files" not in capfd.readouterr().err


def test_fingerprint_tells_a_split_from_all_its_files(tmp_path):
    """What is cached for one split of a data set is not taken for all of them."""
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    one, both = find_corpus(tmp_path / "saved"), find_corpus([tmp_path / "saved/test", tmp_path / "saved/train"])
    assert one.files == both.files and one.fingerprint() != both.fingerprint()


# by-catch


def test_read_records_leaves_out_rows_without_a_text(folder, capfd):
    """A settings file or a table of numbers beside the texts does not stop a folder; named, it does."""
    (folder / "plain.txt").write_text("plain")
    (folder / "manifest.json").write_text('{"icons": [{"src": "a.png", "sizes": "1x1", "type": "image/png"}]}')
    (folder / "data.csv").write_text("x,y\n1,2\n")
    (folder / "z.jsonl").write_text('{"text": "last", "id": "a"}\n')
    assert read(folder) == ["plain", "last"]
    notes = capfd.readouterr().err
    assert "left out 2 files of rows without a clear text, such as: which column is the text (" in notes
    assert "data.csv, line 2: 'x', 'y'" in notes and "z.jsonl: the text is column 'text'" in notes
    with pytest.raises(HfkitError, match="which column is the text .*manifest.json"):
        read(folder / "manifest.json")
    for name in ("plain.txt", "z.jsonl"):
        (folder / name).unlink()
    with pytest.raises(HfkitError, match="which column is the text .*data.csv"):
        read(folder)


def test_read_table_leaves_out_plain_texts_of_a_folder(folder, capfd):
    """A README beside the rows does not stop a template or a head; a folder of texts does."""
    (folder / "rows.jsonl").write_text('{"en": "rain", "fr": "pluie"}\n')
    corpus, options = find_corpus(folder), CorpusOptions(template="{en}={fr}")
    assert [row for row, _ in read_table(corpus, options)] == [{"en": "rain", "fr": "pluie"}]
    assert [type(record) for record in read_records(corpus, options)] == [Example]
    assert f"left out plain texts such as {folder}/plain.txt" in capfd.readouterr().err
    with pytest.raises(HfkitError, match="plain.txt is a plain text"):
        list(read_table(find_corpus([folder / "plain.txt", folder / "rows.jsonl"]), options))
    (folder / "rows.jsonl").unlink()
    with pytest.raises(HfkitError, match="plain.txt is a plain text"):
        list(read_table(find_corpus(folder), options))


def test_finetune_refuses_a_web_address(capfdbinary, tmp_path):
    """The error says how to get the file."""
    for address, remedy in {
        "https://example.org/a.txt": "curl -LO https://example.org/a.txt",
        "http://example.org/": "download",
        "https://huggingface.co/datasets/rajpurkar/squad/viewer": "did you mean hf://rajpurkar/squad?",
    }.items():
        result = call(capfdbinary, "finetune", address, "-o", tmp_path / "run")
        assert_fails(result, 1, f"{address} is a web address", remedy)


def test_prepared_corpus_in_a_folder_is_left_out(folder, tiny):
    """What `prepare` wrote into a corpus folder is not read again."""
    hfkit.prepare(str(folder), model=tiny, output_dir=folder / "prepared")
    assert names(folder) == ["plain.txt"]
    again = hfkit.prepare(str(folder), model=tiny, output_dir=folder / "prepared")
    assert again.prepared.cached


@pytest.fixture
def chats(tmp_path):
    """A folder of conversations as people publish them."""
    (tmp_path / "chats" / "data").mkdir(parents=True)
    row = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n'
    (tmp_path / "chats" / "data" / "train.jsonl").write_text(row)
    for name in ("README.md", "LICENSE", "CHANGELOG-2.txt", "package.json", "info.yaml"):
        (tmp_path / "chats" / name).write_text('{"name": "not a row"}')
    return tmp_path / "chats"


def test_read_records_leaves_out_descriptions_beside_examples(chats, capfd):
    """A README or settings beside conversations are not taken for texts, with a note; other texts are refused."""
    (record,) = read_records(find_corpus(chats), CorpusOptions())
    assert isinstance(record, Example)
    note = f"left out 5 files of descriptions or settings beside the rows, such as {chats}/CHANGELOG-2.txt\n"
    assert note in capfd.readouterr().err
    with pytest.raises(HfkitError, match="mixes texts and examples"):
        list(read_records(find_corpus([chats / "README.md", chats / "data"]), CorpusOptions()))
    (chats / "story.txt").write_text("Once upon a time")
    with pytest.raises(HfkitError, match=r"mixes texts and examples .*story.txt.* \(--exclude\)"):
        list(read_records(find_corpus(chats), CorpusOptions()))
    exclude = CorpusOptions(exclude="story.txt")
    assert list(read_records(find_corpus(chats, exclude), exclude)) == [record]


def test_has_texts_beside_rows(chats):
    """What describes rows is not a text; without rows, and by its own name, it is one."""
    assert not find_corpus(chats).has_texts and not find_corpus(chats / "data").has_texts
    assert find_corpus([chats / "README.md", chats / "data"]).has_texts
    (chats / "story.txt").write_text("Once upon a time")
    assert find_corpus(chats).has_texts
    for path in (chats / "story.txt", chats / "data" / "train.jsonl"):
        path.unlink()
    assert find_corpus(chats).has_texts


def test_read_records_leaves_out_descriptions_beside_rows_with_a_text(folder, capfd):
    """A README is a text like any other beside texts alone, or where it is named; beside rows it is left out."""
    for name, text in {"README.md": "read me", "plain.txt": "plain", "settings.json": '{"a": 1}'}.items():
        (folder / name).write_text(text)
    assert read(folder) == ["read me", "plain", '{"a": 1}']
    assert "left out" not in capfd.readouterr().err
    (folder / "rows.csv").write_text("text,label\nrow,good\n")
    assert read(folder) == ["plain", "row"]
    note = f"left out 2 files of descriptions or settings beside the rows, such as {folder}/README.md\n"
    assert note in capfd.readouterr().err
    assert read([folder, folder / "README.md"]) == ["read me", "plain", "row"]
    (folder / "plain.txt").unlink()
    (folder / "rows.csv").write_text("first,second\na,b\n")
    with pytest.raises(HfkitError, match="which column is the text .*rows.csv"):  # not a training on the README alone
        read(folder)


ODD = {
    "manifest.json": '{"icons": [{"src": "a.png"}]}',
    "a-package.json": '{"name": "x"}',
    "dataset_info.json": '{"features": [{"name": "text"}]}',
}


@pytest.mark.parametrize("read", [classification_rows, question_rows, read_records], ids=["label", "question", "task"])
def test_rows_in_a_folder_without_odd_json(tmp_path, capfd, read):
    """JSON that is no rows does not stop a head or a template; in a folder of nothing else, it is named."""
    options = CorpusOptions(template="{question}={label}" if read is read_records else None)
    rows = (tmp_path / "rows").absolute()
    rows.mkdir()
    for name, content in ODD.items():
        (rows / name).write_text(content)
    (rows / "rows.jsonl").write_text('{"text": "a", "label": "b", "question": "c", "context": "d", "answer": "d"}\n')
    assert len(list(read(find_corpus(rows), options))) == 1
    notes = capfd.readouterr().err
    assert "left out 2 files without the columns" in notes and f"{rows}/dataset_info.json" in notes
    (rows / "rows.jsonl").unlink()
    with pytest.raises(HfkitError, match=r"dataset_info.json|a-package.json"):
        list(read(find_corpus(rows), options))


def test_rows_in_a_folder_keep_their_errors(tmp_path):
    """A data file with a bad value in its first row is not taken for an odd file."""
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(HfkitError, match="column 'label' has no label .*a.jsonl, line 1"):
        classification_rows(tmp_path, CorpusOptions())


# --exclude


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.md", "drafts/c.txt", "drafts/deep/d.md", "final/drafts/e.txt", "final/f.txt"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (["*.md"], "a.txt drafts/c.txt final/drafts/e.txt final/f.txt"),
        (["drafts"], "a.txt b.md final/f.txt"),
        (["drafts/"], "a.txt b.md final/f.txt"),
        (["drafts/*.txt"], "a.txt b.md drafts/deep/d.md final/f.txt"),
        (["final/drafts"], "a.txt b.md drafts/c.txt drafts/deep/d.md final/f.txt"),
        (["drafts", "?.txt"], "b.md"),
        (["raft", "txt"], "a.txt b.md drafts/c.txt drafts/deep/d.md final/drafts/e.txt final/f.txt"),
    ],
)
def test_find_corpus_with_exclude(tree, patterns, kept, capfd):
    """The same files are left out of a folder, of a glob, and of names that a shell made of a glob."""
    options = CorpusOptions(exclude=patterns)
    for source in (tree, f"{tree}/**/*.*", "tree/**/*.*", sorted(tree.rglob("*.*"))):
        files = find_corpus(source, options).files
        assert sorted(str(path.absolute().relative_to(tree)) for path in files) == sorted(kept.split())
    assert ("--exclude 'raft' matches no file of the corpus" in capfd.readouterr().err) == ("raft" in patterns)
    assert len(find_corpus(tree).files) == 6


@pytest.mark.parametrize("named", [["."], ["*.txt"], ["a.txt", "held.txt"]])
def test_find_corpus_without_eval_file(tmp_path, named, capfd):
    """A file of --eval-file that lies in the corpus is not trained on; one that is all of the corpus is."""
    for name in ("a.txt", "held.txt"):
        (tmp_path / name).write_text(f"The text of {name}.")
    options = DataOptions(eval_file=[f"{tmp_path}/./held.txt"])
    assert [path.name for path in find_corpus([f"{tmp_path}/{name}" for name in named], options).files] == ["a.txt"]
    assert f"{tmp_path}/held.txt is held out by --eval-file, and not trained on" in capfd.readouterr().err
    assert [path.name for path in find_corpus(options.eval_file, options).files] == ["held.txt"]


def test_find_corpus_with_exclude_of_everything(tree):
    """The error names the option; a folder above the corpus is not compared with a pattern."""
    for source in (tree, tree / "a.txt", f"{tree}/*"):
        with pytest.raises(HfkitError, match=r"--exclude leaves no file of the corpus \(.*tree.*\): \*"):
            find_corpus(source, CorpusOptions(exclude="*"))
    assert len(find_corpus(tree / "drafts", CorpusOptions(exclude="drafts")).files) == 2
    assert len(find_corpus([tree / "a.txt", tree / "b.md"], CorpusOptions(exclude="*.md")).files) == 1


def test_exclude_at_a_shell_and_in_python(tree, tiny, capfdbinary, tmp_path):
    """Every command that reads a corpus leaves the files out; not those that --eval-file names."""
    trials.write_corpus(tree / "long.txt")
    skip = ["--exclude", "*.md", "--exclude", "drafts", "--exclude", "?.txt"]
    alone = json.loads(call(capfdbinary, "prepare", tree / "long.txt", "-m", tiny, "--json").stdout)
    prepared = call(capfdbinary, "prepare", tree, *skip, "-m", tiny)
    assert prepared.stderr.decode().endswith(
        f"next: hfkit finetune {tree} --exclude '*.md' --exclude drafts --exclude '?.txt' -m {tiny}\n"
    )
    result = json.loads(call(capfdbinary, "prepare", tree, *skip, "-m", tiny, "--json").stdout)
    assert result["tokens"] == alone["tokens"]
    assert json.loads(call(capfdbinary, "evaluate", tree, *skip, "-m", tiny, "--json").stdout)["documents"] == 24
    options = trials.SMALL | {"model": tiny, "output_dir": str(tmp_path / "run"), "max_steps": 1, "eval_steps": 1}
    hfkit.finetune(str(tree), exclude=["*.md", "?.txt"], eval_file=str(tree / "a.txt"), **options)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recipe["corpus_sha256"] == result["fingerprint"] and recipe["recipe"]["exclude"] == ["*.md", "?.txt"]
