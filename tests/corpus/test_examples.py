"""Rows become texts, pairs or conversations in the known forms; a key whose meaning would be lost is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfkit.corpus.documents import Example, read_records
from hfkit.corpus.files import find_corpus
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Yo"}
CHAT = {"messages": [ASK, SAY]}


def read(tmp_path, *rows, **options) -> list:
    """Records of rows: a text, or the row of an Example."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        record.row if isinstance(record, Example) else record.text
        for record in read_records(find_corpus(path), CorpusOptions(**options))
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"id": "identity_0", "tokens": ["a", "b"]},
        {"id": "a", "ner": {"tags": [1]}},
        {"title": "a", "story": None},
        {"id": "a", "dialogue": [{"speaker": 1, "line": "Hi"}]},
    ],
    ids=str,
)
def test_choose_text_column_never_by_elimination_beside_structure(tmp_path, row):
    """Where another column is a list, an object or null, the only text may be an id."""
    with pytest.raises(HfkitError, match=r"which column is the text .*line 1: .*--text-column"):
        read(tmp_path, row)
    name = next(iter(row))
    assert read(tmp_path, row, text_column=name) == [row[name]]


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"story": "x", "n": 1}, "the text is column 'story'"),
        ({"tags": [1], "Text": "x"}, "the text is column 'Text'"),
        ({"prompt": "a", "completion": "b"}, "the rows have prompt and completion"),
        (CHAT, "the rows are conversations (messages)"),
        ({"q": 1, "Question": "a", "Answer": "b"}, "the rows are questions ('Question') and answers ('Answer')"),
        ({"chosen": "a b", "rejected": "a c"}, "the rows are preferences: 'chosen' is learned, 'rejected' is not"),
        (CHAT | {"chosen": None, "rejected": None}, "the rows are conversations (messages)"),
    ],
    ids=str,
)
def test_read_records_says_what_it_takes(tmp_path, row, note, capfd):
    """The note comes once, however often the corpus is read."""
    for _ in range(2):
        assert len(read(tmp_path, row, row)) == 2
    assert capfd.readouterr().err == f"hfkit: {tmp_path}/rows.jsonl: {note}\n"


def test_read_records_of_sharegpt(tmp_path):
    """Speakers become roles."""
    turns = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Yo")]
    row = {"id": "identity_0", "conversations": [{"from": name, "value": text} for name, text in turns]}
    assert read(tmp_path, row) == [{"messages": [{"role": "system", "content": "Be brief."}, ASK, SAY]}]
    assert read(tmp_path, {"conversations": [ASK, SAY], "system": "Be brief."}) == read(tmp_path, row)
    row["conversations"][1]["from"] = "narrator"
    with pytest.raises(HfkitError, match="unknown role 'narrator' .*line 1, message 2"):
        read(tmp_path, row)


def test_read_records_of_alpaca(tmp_path):
    """Instruction and input are the question; history comes before it."""
    rows = [
        {"instruction": "Hi", "input": "", "output": "Yo", "text": "Below is an instruction"},
        {"instruction": "Translate", "input": "rain", "output": "pluie", "history": [["Hi", "Yo"]]},
    ]
    assert read(tmp_path, *rows) == [
        {"messages": [ASK, SAY]},
        {"messages": [ASK, SAY, {"role": "user", "content": "Translate\n\nrain"},
                      {"role": "assistant", "content": "pluie"}]},
    ]  # fmt: skip
    with pytest.raises(HfkitError, match="column 'input' is not text .*line 1"):
        read(tmp_path, {"instruction": "Hi", "input": 7, "output": "Yo"})


def test_read_records_of_prompt_and_completion_in_messages(tmp_path):
    """TRL's conversational form is one conversation, of which the prompt's answers are not learned."""
    assert read(tmp_path, {"prompt": [ASK], "completion": [SAY], "label": True}) == [CHAT]
    turns = [ASK, SAY | {"weight": 0}, ASK, SAY]
    assert read(tmp_path, {"prompt": [ASK, SAY, ASK], "completion": [SAY]}) == [{"messages": turns}]


def test_read_records_of_messages_that_say_what_is_trained(tmp_path):
    """Axolotl's `train: false` is a weight of 0, and `train: true` is what an answer is anyway."""
    turns = [ASK, SAY | {"train": False}, ASK, SAY | {"train": True}]
    assert read(tmp_path, {"messages": turns}) == [{"messages": [ASK, SAY | {"weight": 0}, ASK, SAY]}]


def test_read_records_joins_parts_of_type_text(tmp_path):
    """OpenAI's content parts are one text, unless one is not text."""
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert read(tmp_path, {"messages": [{"role": "user", "content": parts}, SAY]}) == [CHAT]
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(HfkitError, match=r"'content' has a part of type 'image_url' \(.*line 1, message 1\)"):
        read(tmp_path, {"messages": [{"role": "user", "content": [*parts, picture]}, SAY]})


def test_read_records_drops_nulls_of_columnar_files(tmp_path):
    """In Parquet every message has every key: those without a value are not there for a chat template."""
    rows = [{"messages": [ASK | {"tool_calls": None, "weight": None, "name": "Ann"}, SAY | {"weight": 1.0}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (record,) = read_records(find_corpus(tmp_path / "a.parquet"), CorpusOptions())
    assert record.row == {"messages": [ASK | {"name": "Ann"}, SAY]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASK, SAY | {"weight": 2}]}, "'weight' is 2"),
        ({"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]}, "'tool_calls'"),
        (
            {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "'tool_calls'",
        ),
        ({"messages": [ASK, {"role": "assistant", "content": None, "function_call": {}}]}, "'content' is null"),
        ({"messages": [ASK, {"role": "assistant", "function_call": {"arguments": "{}"}}]}, "'tool_calls'"),
        ({"messages": [ASK, {"role": "assistant"}]}, "'content' is null"),
        ({"messages": [ASK, {"content": "x"}]}, "no role"),
        ({"messages": [ASK, SAY], "tools": {"type": "function"}}, "'tools'"),
        ({"messages": [ASK, SAY], "functions": ["f"]}, "'tools'"),
        ({"system": "Be brief.", "prompt": "a", "completion": "b"}, "'system' would be lost"),
        ({"prompt": "a", "completion": "b", "label": False}, "'label' is false"),
        ({"messages": "Hi"}, "messages must be a list"),
        ({"conversations": [ASK]}, "without an assistant"),
        ({"id": "a", "translation": {"en": "rain", "fr": "pluie"}}, "--template"),
    ],
    ids=str,
)
def test_read_records_refuses_what_would_be_lost(tmp_path, row, words):
    """The error names the key and the line."""
    with pytest.raises(HfkitError) as error:
        read(tmp_path, row)
    assert words in str(error.value) and "rows.jsonl, line 1" in str(error.value)


@pytest.mark.parametrize(
    ("row", "filled", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "}]},
         {"conversations": [ASK, SAY]}, "an answer is empty"),
        ({"messages": [ASK, SAY | {"content": ""}]}, CHAT, "an answer is empty"),
        ({"prompt": "a", "completion": " \n"}, {"prompt": "a", "completion": "b"}, "an answer is empty"),
        ({"instruction": "a", "output": ""}, {"instruction": "a", "output": "b"}, "an answer is empty"),
        ({"conversations": []}, {"conversations": [ASK, SAY]}, "messages without an assistant"),
        ({"prompt": "a", "completion": "b", "label": False}, {"prompt": "a", "completion": "b"}, "'label' is false"),
    ],
    ids=str,
)  # fmt: skip
def test_read_records_leaves_out_rows_without_an_answer(tmp_path, row, filled, reason, capfd):
    """Public data has such rows: a note counts them and names the first. Where there is no other, it is an error."""
    assert len(read(tmp_path, filled, row, filled, row)) == 2
    assert f"left out 2 rows, such as: {reason} (" in (notes := capfd.readouterr().err)
    assert "rows.jsonl, line 2" in notes and "line 4" not in notes
    with pytest.raises(HfkitError, match=rf"{reason} \(.*line 1"):
        read(tmp_path, row)


def test_read_records_keeps_tools_and_weights(tmp_path):
    """Tools, their calls and the weight 0 reach the chat template; arguments become an object, and nulls go."""
    call = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": '{"city": "Ulm"}'}}
    tool = {"type": "function", "function": {"name": "rain", "parameters": {"city": {"type": "string", "enum": None}}}}
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "no"}]
    rows = [{"messages": [*turns, SAY, ASK, SAY | {"weight": 0}], "tools": [tool]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (from_parquet,) = read_records(find_corpus(tmp_path / "a.parquet"), CorpusOptions())
    (record,) = read(tmp_path, *rows)
    assert record == from_parquet.row
    assert record["tools"][0]["function"]["parameters"] == {"city": {"type": "string"}}
    assert record["messages"][1]["tool_calls"][0]["function"] == {"name": "rain", "arguments": {"city": "Ulm"}}
    assert record["messages"][1]["content"] == "" and record["messages"][-1] == SAY | {"weight": 0}
    assert from_parquet.answers == ['{"name": "rain", "arguments": {"city": "Ulm"}}', "Yo"]


def test_read_records_checks_every_row(tmp_path):
    """A key that comes later is not dropped either."""
    with pytest.raises(HfkitError, match=r"'weight' is 0\.5.*line 3, message 2"):
        read(tmp_path, CHAT, CHAT, {"messages": [ASK, SAY | {"weight": 0.5}]})
    rows = [CHAT, {"conversations": CHAT["messages"]}, {"prompt": "a", "completion": "b"},
            {"instruction": "a", "output": "b"}, {"text": "a"}]  # fmt: skip
    for first, second in zip(rows, rows[1:] + rows[:1], strict=True):
        with pytest.raises(HfkitError, match=r"rows.jsonl, line 2"):
            read(tmp_path, first, second)
