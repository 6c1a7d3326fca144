"""Rows of tables and JSON: dialects, containers, and what is too large to be read at once."""

import bz2
import gzip
import json
import lzma

import pytest

from hfkit.corpus import formats, rows
from hfkit.corpus.documents import read_records
from hfkit.corpus.files import find_corpus
from hfkit.corpus.labelled import question_rows
from hfkit.corpus.rows import read_rows
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions


def read(path, kind, content, **options) -> list[dict]:
    """The rows of a file with this content."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [row for row, _ in read_rows(path, kind, "strict", **options)]


# tables


def test_read_table_of_tsv_takes_quotes_as_characters(tmp_path, capfd):
    """A row that begins with a quote and a later one that ends with it are still two rows."""
    lines = ["text\tlabel", '"To be" he said\ta', "or not\tb", 'to be"\tc', '5" wide\td']
    assert read(tmp_path / "a.tsv", "tsv", "\n".join(lines)) == [
        dict(zip(("text", "label"), line.split("\t"), strict=True)) for line in lines[1:]
    ]
    assert capfd.readouterr().err == ""
    assert read(tmp_path / "b.tsv", "tsv", 'text\n"all of it"\n') == [{"text": '"all of it"'}]
    assert "b.tsv: quotes around fields are read as text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ('"Comment (free; any; length)","label"\nx,y\n', {"Comment (free; any; length)": "x", "label": "y"}),
        ('"a, b, c, or d";label\n1;2\n3;4\n', {"a, b, c, or d": "1", "label": "2"}),
        ("name, first;label\nx;y\nz;w\n", {"name, first": "x", "label": "y"}),
        ('text|n\n"a|b\nc, d, e",1\nf,2\n', None),
        ("text\nno delimiter\n", {"text": "no delimiter"}),
        ("a,b\n" + "".join(f'"{i}; {i}; {i}",{i}\n' for i in range(99)), {"a": "0; 0; 0", "b": "0"}),
    ],
)
def test_find_delimiter_outside_quotes_and_over_several_rows(tmp_path, content, row):
    """The header alone may have more of another sign."""
    if row is None:
        with pytest.raises(HfkitError, match="not a valid table .*line 2"):
            read(tmp_path / "a.csv", "csv", content)
    else:
        assert read(tmp_path / "a.csv", "csv", content)[0] == row


def test_read_table_skips_a_space_before_a_quote(tmp_path):
    """Such a space is not a part of the field, and the quotes are not either; other spaces stay."""
    assert read(tmp_path / "a.csv", "csv", 'n, text\n1, "a, b"\n2, c\n') == [
        {"n": "1", "text": "a, b"}, {"n": "2", "text": "c"}
    ]  # fmt: skip
    assert read(tmp_path / "b.csv", "csv", 'n,text\n1," ""a"", b"\n2, c\n')[0]["text"] == ' "a", b'
    assert read(tmp_path / "c.csv", "csv", "n,text\n1, a\n") == [{"n": "1", "text": " a"}]


def test_read_table_refuses_two_columns_of_one_name(tmp_path):
    """One of them would be lost; columns without a name may be there several times."""
    with pytest.raises(HfkitError, match=r"two columns are called 'text'.*rename one"):
        read(tmp_path / "a.csv", "csv", "id,text,text\n1,a,b\n")
    assert read(tmp_path / "b.csv", "csv", ",text,\n1,a,\n")[0]["text"] == "a"


def test_read_records_names_the_first_line_of_a_table_without_a_header(tmp_path, capfd):
    """A header that is a text shows in the note, or in the error where there are several columns."""
    (tmp_path / "a.csv").write_text("I love it\nI hate it\n")
    assert [record.text for record in read_records(find_corpus(tmp_path / "a.csv"), CorpusOptions())] == ["I hate it"]
    assert "a.csv: the text is column 'I love it'" in capfd.readouterr().err
    (tmp_path / "b.csv").write_text("I love it,1\nI hate it,0\n")
    with pytest.raises(HfkitError, match="which column is the text .*'I love it', '1'"):
        list(read_records(find_corpus(tmp_path / "b.csv"), CorpusOptions()))


# JSON


def test_read_array_of_one_split(tmp_path, capfd):
    """Of several arrays `train` is read, or the one that was asked for."""
    splits = {name: [{"text": name}] for name in ("test", "train")}
    assert read(tmp_path / "a.json", "json", {"version": 1, **splits}) == [{"text": "train"}]
    assert "a.json has 'test', 'train': reading 'train' (--dataset-split)" in capfd.readouterr().err
    assert read(tmp_path / "a.json", "json", splits, split="test") == [{"text": "test"}]
    assert read(tmp_path / "b.json", "json", {"rows": [{"text": "only"}], "notes": ["x"]}) == [{"text": "only"}]
    with pytest.raises(HfkitError, match=r"several arrays of rows \(.*'dev', 'test'\): .*--dataset-split"):
        read(tmp_path / "a.json", "json", {"dev": splits["test"], "test": splits["test"]})
    for row in (
        {"text": "one row", "links": [{"url": "x"}]},
        {"title": "x", "body": "one row", "comments": [{"text": "y"}]},
    ):
        assert read(tmp_path / "c.json", "json", row) == [row]
    assert read(tmp_path / "d.json", "json", {"content": [{"text": "only"}]}) == [{"text": "only"}]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_read_array_in_parts(tmp_path, monkeypatch, chunk):
    """Rows and errors do not depend on where the parts of a file end."""
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    values = [{"text": 'a, ]b ["\\\n\u2028é🎉', "n": [1, [2.5e-3, True]]}, {"text": ""}, {"n": 12345}, {}]
    for indent in (None, 2):
        text = json.dumps(values, indent=indent, ensure_ascii=indent is None)
        assert read(tmp_path / "a.json", "json", f"  {text}\n ") == values
    assert read(tmp_path / "a.json", "json", " [ ] ") == []
    for text, words in {
        '[{"a": 1},\n\n {"b": 2},\n  {"c" 3}]': "line 4, column 8): Expecting ':' delimiter",
        '[{"a": 1}\n {"b": 2}]': "line 1, column 10): Expecting ','",
        '[{"a": 1}]\n x': "line 1, column 11): Extra data",
        '[{"a": 1}, ]': "Expecting value",
        '[{"a": 1': "Expecting",
        "[7]": "not an object",
    }.items():
        with pytest.raises(HfkitError) as error:
            read(tmp_path / "a.json", "json", text)
        assert words in str(error.value), text


def test_question_rows_of_squads_own_json(tmp_path):
    """Articles, paragraphs and questions become rows."""
    questions = [
        {"id": "1", "question": "what", "answers": [{"text": "rain", "answer_start": 4}]},
        {"id": "2", "question": "who", "answers": [], "is_impossible": True},
    ]
    article = {"title": "Weather", "paragraphs": [{"context": "the rain", "qas": questions}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    found = question_rows(path, CorpusOptions())
    assert [(row.question, row.answers, row.start) for row in found] == [("what", ["rain"], 4), ("who", [], -1)]
    with pytest.raises(HfkitError, match="which column is the text"):
        list(read_records(find_corpus(path), CorpusOptions()))
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "the rain"}]}]}))
    with pytest.raises(HfkitError, match="not as in SQuAD .*row 1"):
        question_rows(path, CorpusOptions())


# size


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "' + b"x" * 3000 + b'"}', "a line of more than"),
        ("b.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 3000, "b.jsonl.gz, line 2)"),
        ("a.csv", b'text\n"' + b"one line\n" * 3000, "field larger than field limit"),
        ("b.csv", b"text\n" + b"x" * 3000, "a line of more than"),
        ("a.json", b'[{"text": "a"},\n {"text": "' + b"x" * 3000 + b'"}]', "a JSON value of more than"),
        ("c.json", b'{"data": [' + b'{"text": "b"},' * 1000 + b'{"text": "c"}]}', "write each row on a line"),
        ("a.ipynb", b'{"cells": [{"source": "' + b"x" * 3000 + b'"}]}', "a JSON value of more than"),
    ],
)
def test_read_rows_of_unlimited_size(tmp_path, monkeypatch, name, content, words):
    """A small compressed file may hold gigabytes in one line, field or array: the error comes before they are read."""
    for module in (formats, rows):
        monkeypatch.setattr(module, "LONGEST", 2000)
    monkeypatch.setattr(formats, "_CHUNK", 500)
    before = rows.csv.field_size_limit(2000)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content))
    try:
        with pytest.raises(HfkitError, match=words.replace(")", r"\)")):
            list(read_records(find_corpus(path), CorpusOptions()))
    finally:
        rows.csv.field_size_limit(before)


# formats


FOREIGN = {
    "a.zip": (b"PK\x03\x04\x14\0", "a zip archive", "unzip"),
    "a.docx": (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xmlPK\x03\x04word/document.xml", "a Word document"),
    "a.xlsx": (b"PK\x03\x04" + bytes(26) + b"xl/workbook.xml", "an Excel workbook", "CSV"),
    "a.epub": (b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/epub+zip", "an e-book"),
    "a.zst": (b"\x28\xb5\x2f\xfd", "compressed with Zstandard"),
    "a.tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "a tar archive", "tar xf"),
    "a.tgz": (gzip.compress(b"name".ljust(257, b"\0") + b"ustar  \0"), "a tar archive", "tar xf"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF", "pdftotext"),
    "a.txt": (b"%PDF-1.7\n", "a PDF"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    "a.db": (b"SQLite format 3\0", "an SQLite database"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_kind_of_names_a_format_that_is_not_read(tmp_path, name):
    """The error says what the file is and what to do, whatever --errors is; in a folder the file is left out."""
    content, *words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HfkitError) as error:
        find_corpus(tmp_path / name)
    assert all(word in str(error.value) for word in [f"{tmp_path / name} is ", *words])
    with pytest.raises(HfkitError, match=f"{name} is {words[0]}"):
        find_corpus(tmp_path)
    (tmp_path / "z.txt").write_text("text")
    assert [path.name for path in find_corpus(tmp_path).files] == ["z.txt"]


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_open_file_of_every_compression(tmp_path, suffix, module):
    """Compressed text and rows are read as they are, whatever the name; what is cut off is one line."""
    packed = module.compress(b"text,n\nhello,1\n")
    (tmp_path / f"a.csv.{suffix}").write_bytes(packed)
    (tmp_path / "a.txt").write_bytes(packed)
    for name, text in ((f"a.csv.{suffix}", "hello"), ("a.txt", "text,n\nhello,1\n")):
        (record,) = read_records(find_corpus(tmp_path / name), CorpusOptions())
        assert record.text == text
    (tmp_path / "a.txt").write_bytes(packed[:-6])
    with pytest.raises(HfkitError, match=r"cannot read the corpus \(.*a.txt\): Compressed file ended"):
        find_corpus(tmp_path / "a.txt")


def test_fingerprint_tells_a_notebook_from_a_text(tmp_path):
    """The same bytes are read as cells or as a text, so the tokens of one are not those of the other."""
    for name in ("a.ipynb", "a.txt", "b.txt"):
        (tmp_path / name).write_text('{"cells": [{"source": "print(1)"}]}')
    notebook, text, copy = (find_corpus(tmp_path / name).fingerprint() for name in ("a.ipynb", "a.txt", "b.txt"))
    assert notebook != text == copy


def test_read_notebook_reads_the_cells(tmp_path):
    """Outputs, with their pictures as base64, are no text."""
    cells = [
        {"cell_type": "markdown", "source": ["# Rain\n", "falls"]},
        {"cell_type": "code", "source": "print(1)", "outputs": [{"data": {"image/png": "iVBORw0KGgo="}}]},
        {"cell_type": "code", "source": []},
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}, indent=1))
    for source in (path, tmp_path):
        (record,) = read_records(find_corpus(source), CorpusOptions())
        assert record.text == "# Rain\nfalls\n\nprint(1)\n\n"
    path.write_text('{"worksheets": []}')
    with pytest.raises(HfkitError, match="not a Jupyter notebook .*a.ipynb"):
        list(read_records(find_corpus(path), CorpusOptions()))
    path.write_text('{"cells": [')
    with pytest.raises(HfkitError, match="not valid JSON .*a.ipynb, line 1"):
        list(read_records(find_corpus(path), CorpusOptions()))
