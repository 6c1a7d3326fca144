"""Any corpus is read whole and in order, whatever it is called; what is damaged is one line that says where."""

import codecs
import csv
import gzip
import json
import os
import random
import socket

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpora import TEXTS, scrawl, write
from support.shell import assert_fails, call

from hfkit.console import printable
from hfkit.corpus.documents import END, Example, Piece, cut_pieces, read_records, read_table
from hfkit.corpus.files import find_corpus, name_of
from hfkit.corpus.labelled import classification_rows, question_rows
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions, DataOptions

CHUNK = 1 << 20  # bytes that are read at a time


def read(sources, **options) -> list[Piece | Example]:
    return list(read_records(find_corpus(sources), DataOptions(**options)))


def documents(sources, **options) -> list[str]:
    """The texts of a corpus, their pieces joined."""
    return join(read(sources, **options))


def join(pieces) -> list[str]:
    texts, text = [], ""
    for piece in pieces:
        text += piece.text
        if piece.last:
            texts, text = [*texts, text], ""
    assert not text
    return texts


def fails(sources, **options) -> str:
    """The one line with which a corpus is refused."""
    with pytest.raises(HfkitError) as error:
        read(sources, **options)
    line = printable(str(error.value))
    assert "\n" not in line
    return line


# formats


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("kind", "txt md csv tsv json data pretty jsonl parquet arrow stream".split())
def test_read_records_of_every_format(tmp_path, kind, gz):
    """Every format is read whole and in order."""
    ending = {"data": "json", "pretty": "json", "stream": "arrow"}.get(kind, kind) + ".gz" * gz
    texts = [text for text in TEXTS if not {"\t", "\n"} & set(text)] if kind == "tsv" else TEXTS
    assert documents(write(tmp_path / f"corpus.{ending}", texts, kind, gz=gz)) == texts


def test_read_records_of_json_with_one_object_or_one_on_each_line(tmp_path):
    """A .json file may have an object on each line, or just one."""
    assert documents(write(tmp_path / "corpus.json", TEXTS, "jsonl")) == TEXTS
    (tmp_path / "one.json").write_text(json.dumps({"text": "only this"}))
    (tmp_path / "pretty.json").write_text(json.dumps({"text": "only this", "tags": [1]}, indent=1))
    assert documents([tmp_path / "one.json", tmp_path / "pretty.json"]) == ["only this"] * 2


@pytest.mark.parametrize(
    ("name", "kind", "gz"),
    [
        *(("corpus.txt", "txt", True), ("corpus.txt", "parquet", False), ("corpus.csv", "arrow", True)),
        *(("corpus", "stream", False), ("corpus", "jsonl", False), ("corpus.data", "jsonl", True)),
        *(("corpus.gz", "parquet", False), ("CORPUS.TXT.GZ", "txt", True), ("corpus", "txt", False)),
    ],
)
def test_kind_of_content_before_name(tmp_path, name, kind, gz):
    """The content of a file counts more than its name."""
    assert documents(write(tmp_path / name, TEXTS, kind, gz=gz)) == TEXTS


def test_kind_of_text_that_looks_like_json_or_a_table(tmp_path):
    """A text that looks like JSON or a table is still a text."""
    for name, text in {
        "a.txt": '{"text": "in braces"}\n{"text": "and more"}',
        "b.md": "[1, 2]",
        "c.py": "[{'a': 1}]\n",
        "d": "{not json}\n",
        "e.txt": "a,b\n1,2\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert documents(tmp_path / name) == [text]


@pytest.mark.parametrize("delimiter", ",;\t|")
def test_read_rows_finds_the_delimiter(tmp_path, delimiter):
    """The delimiter of a table is corpus."""
    rows = [["number", "text"], ["1", 'with , ; \t | and "quotes"'], ["2", "two\nlines"]]
    with (tmp_path / "corpus.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert documents(tmp_path / "corpus.csv") == [text for _, text in rows[1:]]


def test_read_rows_of_large_batches(tmp_path):
    """A file whose rows are one batch is read whole."""
    texts = [f"text {i}" for i in range(1000)]
    table = pa.table({"text": texts})
    for name, new in (("one.arrow", pa.ipc.new_file), ("two.arrow", pa.ipc.new_stream)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table)  # one batch
        assert documents(tmp_path / name) == texts


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_read_rows_across_chunks(tmp_path, kind):
    """A row that spans two chunks of the file is whole."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("ab cé\n", k=draw.randint(1, 60_000))) + "." for _ in range(100)]
    path = write(tmp_path / f"a.{kind}", texts)
    assert os.path.getsize(path) > 2 * CHUNK
    assert documents(path) == texts


# sources


def test_find_corpus_in_a_folder(tmp_path, capfd):
    """All files of a folder are read, except hidden ones, empty ones, those that are not text, and settings."""
    folder = tmp_path / "folder"
    for name, content in {
        "b.txt": b"second",
        "a/deep/er/1.py": b"def first():\n    return {}\n",
        "c.c": b"int main() { return 0; }",
        "package.json": b'{"name": "package", "files": ["a"], "scripts": {"x": [{"a": 1}]}}',
        "z.jsonl": b'{"text": "last"}\n',
        ".git/config": b"hidden",
        ".hidden.txt": b"hidden",
        "a/.b/c.txt": b"hidden",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "empty.txt": b"",
        "blank.txt": b" \n\t\n",
        "bom.txt": codecs.BOM_UTF8,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "missing").symlink_to("nowhere")
    corpus = find_corpus(folder)
    read_as_texts = ["a/deep/er/1.py", "b.txt", "c.c"]
    assert documents(folder) == [*((folder / name).read_text() for name in read_as_texts), "last"]
    notes = capfd.readouterr().err
    assert f"{folder}: left out 4 files without text" in notes
    assert f"left out 1 file of descriptions or settings beside the rows, such as {folder}/package.json\n" in notes
    assert corpus.size == sum((folder / name).stat().st_size for name in [*read_as_texts, "package.json", "z.jsonl"])
    (folder / "z.jsonl").unlink()
    assert documents(folder) == [(folder / name).read_text() for name in [*read_as_texts, "package.json"]]


def test_find_corpus_in_a_saved_data_set(tmp_path):
    """The metadata files of `save_to_disk` are not read."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    assert documents(tmp_path / "saved") == TEXTS


def test_find_corpus_of_globs_and_several_sources(tmp_path, monkeypatch):
    """Sources are read in order, and each file once."""
    for name in ("c.txt", "a.txt", "b.txt", "sub/d.txt", "x[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert documents("?.txt") == ["a.txt", "b.txt", "c.txt"]
    assert documents("**/[bd].txt") == ["b.txt", "sub/d.txt"]
    assert documents(["c.txt", "*.txt"]) == ["c.txt", "a.txt", "b.txt", "x[1].txt"]
    assert documents("x[1].txt") == ["x[1].txt"]  # a name before a pattern
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/a.txt") == ["a.txt"]


def test_read_records_with_a_text_column_for_each_file(tmp_path):
    """Each file may have another name for its text column."""
    sources = [write(tmp_path / "a.csv", column="text"), write(tmp_path / "b.jsonl", column="body")]
    assert documents(sources) == TEXTS * 2


def test_find_corpus_once_for_all_readers(tmp_path, monkeypatch):
    """A Corpus that was found is passed on: no reader looks at the files again to tell their kinds."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "rain", "label": "a", "question": "q", "context": "c", "answer": "c"}\n')
    corpus = find_corpus(path)
    expected = classification_rows(path, DataOptions()), question_rows(path, DataOptions())
    monkeypatch.setattr("hfkit.corpus.files.kind_of", lambda *_: pytest.fail("found twice"))
    assert find_corpus(corpus) is corpus
    assert (classification_rows(corpus, DataOptions()), question_rows(corpus, DataOptions())) == expected
    assert [row for row, _ in read_table(corpus, DataOptions())] == [json.loads(path.read_text())]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        *(("missing.txt", "no such file or folder"), ("*.nothing", "no such file or folder"), ("", "no corpus ''")),
        *(("~no-such-user/x", "cannot read the corpus"), ("empty", "nothing to read"), ("a" * 300, "too long")),
        *(("two\nlines.txt", "no such file"), ("nul\0.txt", "no such file"), ("loop", "no such file")),
        ([], "name a file, a folder or hf://NAME"),
    ],
    ids=ascii,
)
def test_find_corpus_of_a_missing_source(tmp_path, monkeypatch, source, words):
    """The error is one sentence."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    assert words in fails(source)


def test_find_corpus_refuses_a_prepared_folder(tmp_path):
    """A prepared folder is only read alone."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "prepared.json").write_text('{"fingerprint": ""}')
    write(tmp_path / "a.txt")
    assert "was made by prepare" in fails([tmp_path / "a.txt", tmp_path / "prepared"])


def test_name_of_the_first_source():
    """A run is named after its first source."""
    names = {"a/corpus.txt": "corpus", "b.jsonl.gz": "b", "my novel (2).md": "my-novel-2", "folder/": "folder"}
    names |= {"*.txt": "corpus", "hf://owner/name": "name", "...": "corpus", "x.tar.gz": "x.tar", "本.txt": "本"}
    assert {source: name_of([source, "other.txt"]) for source in names} == names


# the Hub


def test_read_hub_rows_with_configuration_and_split(monkeypatch):
    """The options for configuration and split reach `load_dataset`."""
    asked = []

    def load_dataset(name, configuration=None, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert documents("hf://owner/name") == TEXTS
    assert documents("hf://name", dataset_config_name="small", dataset_split="test", streaming=True) == TEXTS
    list(read_records(find_corpus("hf://x"), CorpusOptions()))  # as `evaluate` reads it
    assert asked.pop() == ("hf://datasets/x", None, "train", False)
    assert asked == [("hf://datasets/owner/name", None, "train", False), ("hf://datasets/name", "small", "test", True)]


@pytest.mark.parametrize("error", [ValueError("one\ntwo"), KeyError(), ConnectionError("")])
def test_read_hub_rows_reports_any_error(monkeypatch, error):
    """Whatever `datasets` raises becomes one sentence."""

    def load_dataset(*arguments, **keywords):
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert "cannot read hf://owner/name" in fails("hf://owner/name")


def test_read_hub_rows_from_an_unreachable_hub(monkeypatch):
    """The Hub is asked once, with a time limit of two seconds, before `datasets` is."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("this would wait for long"))
    limits, session = [], huggingface_hub.utils.get_session()
    head = type(session).head
    monkeypatch.setattr(type(session), "head", lambda *a, timeout: limits.append(timeout) or head(*a, timeout=timeout))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], 1):
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
            line = fails("hf://owner/name")
            assert "cannot be reached" in line and "HF_ENDPOINT" in line and "HF_HUB_OFFLINE=1" in line
    assert limits == [2, 2]  # seconds


# columns


@pytest.mark.parametrize("row", [{"id": 1, "Text": "x"}, {"title": "y", "content": "x"}, {"any": "x"}, {"text": None}])
def test_columns_with_one_plain_text(tmp_path, row):
    """A single column of text, or one with a usual name, is taken."""
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row))
    assert documents(tmp_path / "corpus.jsonl") == ["" if "text" in row else "x"]


def test_columns_of_an_option(tmp_path):
    """--text-column is taken whatever other columns there are."""
    row = {"text": "a", "messages": "b", "completion": "c", "prompt": "d"}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row))
    for name, text in row.items():
        assert documents(tmp_path / "corpus.jsonl", text_column=name) == [text]


def test_columns_that_are_unclear_are_listed(tmp_path):
    """If several columns may be the text, the error lists them."""
    (tmp_path / "a.csv").write_text("title,abstract\none,two\n")
    line = fails(tmp_path / "a.csv")
    assert "'title', 'abstract'" in line and "--text-column" in line and "line 2" in line
    assert "'title', 'abstract'" in fails(tmp_path / "a.csv", text_column="nope")
    assert documents(tmp_path / "a.csv", text_column="abstract") == ["two"]


def test_read_records_of_examples_and_mixtures(tmp_path):
    """Rows with an answer become Examples; a mixture of texts and examples is refused."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 1}
    pair = {"prompt": "a", "completion": "b", "source": "x"}
    for name, row in {"chat": chat, "pair": pair}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([chat]), tmp_path / "chat.parquet")
    sources = [tmp_path / name for name in ("chat.jsonl", "pair.jsonl", "chat.parquet")]
    wanted = [{"messages": chat["messages"]}, {"prompt": "a", "completion": "b"}, {"messages": chat["messages"]}]
    assert [example.row for example in read(sources)] == wanted
    write(tmp_path / "text.txt")
    for mixture in (["chat.jsonl", "text.txt"], ["text.txt", "pair.jsonl"]):
        line = fails([tmp_path / name for name in mixture])
        assert "mixes" in line and mixture[1] in line


# damage: for each kind of it the whole way, from the shell

GOOD = '{"text": "good"}\n'
TALK = '{"messages": [{"role": "%s", "content": %s}]}'
DAMAGED = {
    # name -> content, words of the line
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \r\n\t", "is empty"),
    "bom.txt": (codecs.BOM_UTF8, "is empty"),
    "bom16.txt": (codecs.BOM_UTF16_LE + " \n".encode("utf-16-le"), "is empty"),
    "bytes.txt": (b"one\r\ntwo \xff\xfe\x80 three\n", "not UTF-8", "bytes.txt, line 2, byte 10)"),
    "cr.txt": (b"one\rtwo\rthree \x80", "cr.txt, line 3, byte 15)"),
    "bom-bytes.txt": (codecs.BOM_UTF8 + b"a\nb\xc3", "bom-bytes.txt, line 2, byte 7)"),
    "cut.txt": ("one\ntwo 🎉".encode()[:-1], "cut.txt, line 2, byte 9)"),
    "nul.txt": (b"one\n\0two", "nul.txt, line 2, byte 5)", "--errors replace"),
    "latin.csv": ("text\ncaf\xe9\n".encode("latin-1"), "latin.csv, line 2, byte 9)"),
    "utf16-cut.txt": (codecs.BOM_UTF16_LE + "ab\nc".encode("utf-16-le") + b"x", "UTF-16", "line 2, byte 11)"),
    "utf16-half.txt": (codecs.BOM_UTF16_BE + "a\n\u0a0a".encode("utf-16-be") + b"\xd8\0a", "line 2, byte 9)"),
    "utf16-bare.txt": ("plain".encode("utf-16-le"), "line 1, byte 2)"),
    "picture.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8", "byte 1)"),
    "cut.txt.gz": (gzip.compress(random.Random(0).randbytes(3000))[:-1000], "cut.txt.gz", "Compressed file ended"),
    "crc.txt.gz": (gzip.compress(b"text " * 99)[:-8] + bytes(8), "crc.txt.gz", "CRC"),
    "head.txt.gz": (b"\x1f\x8b\x08 not gzip", "head.txt.gz"),
    "bad.jsonl": (f"{GOOD}\n{GOOD}{{'a': 1}}\n".encode(), "not valid JSON", "bad.jsonl, line 4, column 2"),
    "list.jsonl": (f"{GOOD}[1]\n".encode(), "not an object", "list.jsonl, line 2"),
    "half.jsonl": (f'{GOOD}{{"text": "\\ud83d"}}\n'.encode(), "surrogate", "half.jsonl, line 2"),
    "HALF.jsonl": (b'{"text": "\\uDC00"}', "surrogate", "HALF.jsonl, line 1"),
    "deep.jsonl": (GOOD.encode() + b"[" * 100_000, "not valid JSON", "deep.jsonl, line 2"),
    "bad.json": (b'[{"text": "a"},\n {"text" "b"}]', "not valid JSON", "bad.json, line 2, column 10"),
    "cut.json": (b'[{"text": "a"},\n', "not valid JSON", "cut.json, line 2"),
    "flat.json": (b"[1, 2]", "not an object", "flat.json, row 1"),
    "word.json": (b'"word"', "no rows"),
    "wide.csv": (b'text,n\n"two\nlines",1\n\none,2,3\n', "3 fields, the header has 2", "wide.csv, line 5)"),
    "quote.csv": (b'text,n\none,1\n"two"x,2\n', "not a valid table", "quote.csv, line 3)"),
    "open.csv": (b'text,n\none,1\n"two,2\nthree,3\n', "not a valid table", "open.csv, line 3)"),
    "header.csv": (b"text\n", "holds no text"),
    "missing.jsonl": (f'{GOOD}{{"txt": "x"}}\n'.encode(), "no column 'text'", "missing.jsonl, line 2", "'txt'"),
    "number.jsonl": (f'{GOOD}{{"text": 7}}\n'.encode(), "'text' is not text", "number.jsonl, line 2"),
    "prompt.jsonl": (b'{"prompt": 7, "completion": "x"}', "must be texts", "prompt.jsonl, line 1"),
    "answer.jsonl": (b'{"prompt": "a", "completion": ""}', "an answer is empty", "answer.jsonl, line 1"),
    "user.jsonl": ((TALK % ("user", '"hi"')).encode(), "without an assistant", "user.jsonl, line 1"),
    "null.jsonl": ((TALK % ("assistant", "null")).encode(), "'content' is null", "null.jsonl, line 1, message 1"),
    "talk.jsonl": (b'{"messages": "hello"}', "messages must be", "talk.jsonl, line 1"),
    "spaces.jsonl": (b'{"text": " "}\n{"text": ""}\n{"text": null}', "holds no text"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_prepare_reports_damage_with_its_place(tmp_path, capfdbinary, tiny, name):
    """The error is one line on stderr, with the place; -q leaves out the note on which column is read."""
    content, *words = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    assert_fails(call(capfdbinary, "prepare", tmp_path / name, "-m", tiny, "-q"), 1, *words)


def test_read_rows_of_damaged_parquet_and_arrow(tmp_path):
    """The error is one line that says how many rows were read."""
    for kind in ("parquet", "arrow", "stream"):
        path = tmp_path / f"corpus.{kind}"
        whole = open(write(path, [f"text {i}" * 50 for i in range(1000)], kind), "rb").read()
        for size in (12, len(whole) // 2, len(whole) - 5):
            path.write_bytes(whole[:size])
            if kind != "stream" or size != len(whole) - 5:  # its last bytes only say that it ends
                assert f"{path}, after row" in fails(path)
    column = pa.array([b"good", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "latin.parquet")
    assert "latin.parquet" in fails(tmp_path / "latin.parquet")


def test_find_corpus_of_a_fifo_a_device_or_an_unreadable_file(tmp_path, capfdbinary, monkeypatch):
    """The error comes at once, in one line."""
    os.mkfifo(tmp_path / "fifo.txt")
    for source in (tmp_path / "fifo.txt", "/dev/null"):
        assert_fails(call(capfdbinary, "prepare", source), 1, "is not a file or folder")

    def refuse(*arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "a.txt")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert "Permission denied" in fails(tmp_path / "a.txt")


# encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be-bom", "utf-16-le-bom"])
def test_read_text_with_a_byte_order_mark(tmp_path, encoding):
    """The mark decides the encoding and is not part of the text."""
    text, path = TEXTS[2] + "\n" + TEXTS[4], tmp_path / "corpus.txt"
    mark = {"utf-16-be-bom": codecs.BOM_UTF16_BE, "utf-16-le-bom": codecs.BOM_UTF16_LE}.get(encoding, b"")
    path.write_bytes(mark + text.encode(encoding.removesuffix("-bom")))
    assert documents(path) == [text]
    write(path, TEXTS, "csv")
    path.with_name("corpus.csv").write_bytes(mark + path.read_bytes().decode().encode(encoding.removesuffix("-bom")))
    assert documents(path.with_name("corpus.csv")) == TEXTS


def test_read_text_line_ends(tmp_path):
    r"""The line ends of every system become \n, and nothing else ends a line."""
    (tmp_path / "a.txt").write_bytes("a\r\nb\rc\nd\n\re\u2028f\x85g\x0ch\v".encode())
    assert documents(tmp_path / "a.txt") == ["a\nb\nc\nd\n\ne\u2028f\x85g\x0ch\v"]
    (tmp_path / "one.txt").write_bytes(b"x")
    assert documents(tmp_path / "one.txt") == ["x"]
    for cut in (-1, 0, 1):  # of \r\n at the border of what is read at a time
        head = b"a" * (CHUNK + cut - 1)
        (tmp_path / "b.txt").write_bytes(head + b"\r\nz\r")
        assert documents(tmp_path / "b.txt") == [head.decode() + "\nz\n"]


@pytest.mark.parametrize("shift", range(-4, 3))
def test_read_text_reports_the_place_of_an_invalid_byte(tmp_path, shift):
    draw, path = random.Random(shift), tmp_path / "a.txt"
    head = "".join(draw.choices("ab é€🎉\n", k=CHUNK)).encode()[: CHUNK + shift].decode(errors="ignore").encode()
    head += b"." * (CHUNK + shift - len(head))
    for bad, tail in ((b"\xff\xfe\x80", b""), (b"\xf0\x9f\x8e", b" more"), (b"\xf0\x9f", b""), (b"\0", b"\n")):
        path.write_bytes(head + bad + tail)
        line, byte = head.count(b"\n") + 1, len(head) + 1
        assert f"({path}, line {line}, byte {byte})" in fails(path)
    path.write_bytes(head + "🎉".encode())  # whole, across the border
    assert documents(path) == [(head + "🎉".encode()).decode()]


@pytest.mark.parametrize("gz", [False, True])
def test_read_text_replaces_invalid_bytes(tmp_path, gz):
    """--errors replace replaces invalid bytes and unpaired surrogates."""
    data = b"one \xff\xfe\x80 two\0\n\xe2\x82"
    path = tmp_path / ("a.txt.gz" if gz else "a.txt")
    path.write_bytes(gzip.compress(data) if gz else data)
    assert documents(path, errors="replace") == ["one \ufffd\ufffd\ufffd two\ufffd\n\ufffd"]
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \\ud83d \\\\ud83d", "\\udc00": 1}')
    assert documents(tmp_path / "a.jsonl", errors="replace", text_column="text") == ["😀 \ufffd \\ud83d"]
    (tmp_path / "b.jsonl").write_text('{"text": "\\uD83D\\uDE00 \\\\ud83d"}')
    assert documents(tmp_path / "b.jsonl") == ["😀 \\ud83d"]


# pieces


@pytest.mark.parametrize("seed", range(24))
def test_cut_pieces_whatever_the_chunks(seed):
    """The pieces together are the text, and do not depend on the chunks."""
    text, draw = scrawl(seed), random.Random(seed)
    pieces = list(cut_pieces([text]))
    wanted = text.split(END)
    if not wanted[-1].strip() and len(wanted) > 1:  # END closes the last document
        wanted.pop()
    assert join(pieces) == wanted
    assert max(len(piece.text) for piece in pieces) <= 16_000
    assert all(len(piece.text) >= 2000 for piece in pieces if not piece.last)
    for most in (1, 13, 5000, 70_000):
        chunks, start = [], 0
        while start < len(text):
            size = draw.randint(1, most)
            chunks.append(text[start : start + size])
            start += size
        if len(chunks) < 20_000:
            assert list(cut_pieces(chunks)) == pieces


def test_cut_pieces_at_an_end_across_chunks():
    """END is found wherever a chunk ends."""
    line = "=" * 9000  # without a place to cut
    for cut in range(len(END) + 1):
        assert join(cut_pieces([line + END[:cut], END[cut:] + "next"])) == [line, "next"]


@pytest.mark.parametrize("size", [9, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", ["word ", "字", "=", " "])
def test_cut_pieces_of_a_line_of_megabytes(tmp_path, unit, size):
    """A line without a place to cut becomes pieces of limited length."""
    text = "a" + unit * (size * 1_000_000 // len(unit.encode())) + "z"
    (tmp_path / "a.txt").write_text(text)
    assert documents(tmp_path / "a.txt") == [text]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False))
    pieces = read(tmp_path / "a.jsonl")
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 16_000
