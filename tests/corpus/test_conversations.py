"""Data as other tools write it: tokens and labels are those of a loop written by hand over each documented form."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfkit.corpus.documents import read_records
from hfkit.corpus.encoding import IGNORED, encode_records
from hfkit.corpus.files import find_corpus
from hfkit.errors import HfkitError
from hfkit.options import CorpusOptions

TEMPLATE = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
RAIN = {"name": "rain", "description": "Is it raining?", "parameters": {"city": {"type": "string"}}}
ULM = {"name": "rain", "arguments": {"city": "Ulm"}}


def message(role, content, **more) -> dict:
    return {"role": role, "content": content, **more}


def said(speaker, text, **more) -> dict:
    return {"from": speaker, "value": text, **more}


ASK, SAY = message("user", "Is it 漢字?"), message("assistant", "Yes,\n🎉 it is.")
AGAIN, BAD = message("user", " And now? "), message("assistant", "Who cares.")


def openai(row):
    """https://platform.openai.com/docs/guides/supervised-fine-tuning: content may be null or parts; weight 0 or 1."""
    messages, learned = [], []
    for turn in row["messages"]:
        content = turn.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        messages.append({"role": turn["role"], "content": content})
        if calls := turn.get("tool_calls"):
            functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
            messages[-1]["tool_calls"] = [{"function": {"name": n, "arguments": values}} for n, values in functions]
        if turn["role"] == "assistant" and turn.get("weight") != 0:
            learned.append(len(messages) - 1)
    return messages, learned, row.get("tools")


def openai_functions(row):
    """The form before tools: what `function_call` and `functions` became is in OpenAI's API reference."""
    messages = []
    for turn in row["messages"]:
        messages.append({"role": turn["role"].replace("function", "tool"), "content": turn.get("content") or ""})
        if call := turn.get("function_call"):
            function = {"name": call["name"], "arguments": json.loads(call["arguments"])}
            messages[-1]["tool_calls"] = [{"function": function}]
    learned = [place for place, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
    return messages, learned, [{"type": "function", "function": function} for function in row["functions"]]


def openai_preference(row):
    """https://platform.openai.com/docs/guides/direct-preference-optimization: the preferred output is learned."""
    messages = row["input"]["messages"] + row["preferred_output"]
    return messages, range(len(row["input"]["messages"]), len(messages)), None


def sharegpt(row):
    """LLaMA-Factory's data/README.md: observations and functions, `system` and `tools` beside the conversation."""
    messages = [message("system", row["system"])] if row.get("system") else []
    learned = []
    for turn in row["conversations"]:
        speaker, text = turn["from"], turn["value"]
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": [{"function": json.loads(text)}]})
        elif speaker in ("observation", "tool"):
            messages.append(message("tool", text))
        else:
            role = "system" if speaker == "system" else "user" if speaker in ("human", "user") else "assistant"
            messages.append(message(role, text))
        if messages[-1]["role"] == "assistant" and turn.get("weight") != 0:
            learned.append(len(messages) - 1)
    tools = [{"type": "function", "function": tool} for tool in json.loads(row.get("tools", "[]"))]
    return messages, learned, tools or None


def alpaca(row):
    """LLaMA-Factory's data/README.md, of Alpaca: history comes first, and its answers are learned."""
    messages = [message("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history", []):
        messages += [message("user", question), message("assistant", answer)]
    question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    messages += [message("user", question), message("assistant", row["output"])]
    return messages, [place for place, turn in enumerate(messages) if turn["role"] == "assistant"], None


def question(name, answer, context=None, system=None):
    """A question and its answer in two columns, as in GSM8K, Dolly, OpenOrca, MetaMath, Firefly, xP3 ..."""

    def read(row):
        text = f"{row[name]}\n\n{row[context]}" if context and row[context] else row[name]
        messages = [message("user", text), message("assistant", str(row[answer]))]
        messages = [message("system", row[system]), *messages] if system else messages
        return messages, [len(messages) - 1], None

    return read


def preferred(row):
    """https://huggingface.co/docs/trl/dataset_formats, conversational: what both have in common is the prompt."""
    prompt = row.get("prompt", [])
    if not isinstance(prompt, list):
        prompt = []
    answers, place = row["chosen"], 0
    while not prompt and answers[place] == row["rejected"][place]:
        place += 1
    messages = prompt + answers
    return messages, range(len(prompt) + place, len(messages)), None


def pairs(row):
    """Capybara's turns are pairs, MOSS's, too; LIMA's are the texts alone."""
    messages = []
    for turn in row.get("conversation") or zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
        first, second = turn.values() if isinstance(turn, dict) else turn
        messages += [message("user", first), message("assistant", second)]
    return messages, range(1, len(messages), 2), None


def prompted(prompt, completion):
    """A text that goes on: only what goes on is learned."""
    return lambda row: (prompt(row), completion(row))


FORMS = {
    "openai": (openai, [
        {"messages": [message("system", "Be brief."), ASK, SAY, AGAIN, SAY]},
        {"messages": [ASK | {"content": [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]}, SAY]},
        {"messages": [ASK, SAY | {"weight": 0}, AGAIN, SAY | {"weight": 1}], "parallel_tool_calls": False},
    ]),
    "openai-tools": (openai, [
        {"messages": [
            ASK, {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {
                "name": "rain", "arguments": '{"city": "Ulm"}'}}]},
            {"role": "tool", "tool_call_id": "c", "content": "no"}, SAY,
        ], "tools": [{"type": "function", "function": RAIN}]},
    ]),
    "openai-functions": (openai_functions, [
        {"messages": [
            ASK, message("assistant", None, function_call={"name": "rain", "arguments": '{"city": "Ulm"}'}),
            {"role": "function", "name": "rain", "content": "no"}, SAY,
        ], "functions": [RAIN]},
    ]),
    "openai-preference": (openai_preference, [
        {"input": {"messages": [ASK, BAD, AGAIN], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [SAY], "non_preferred_output": [BAD]},
    ]),
    "openai-completions": (prompted(lambda row: row["prompt"], lambda row: row["completion"]), [
        {"prompt": "Is it 漢字?\n\n###\n\n", "completion": " Yes. END"}, {"prompt": "", "completion": "No"},
    ]),
    "sharegpt": (sharegpt, [
        {"id": "a_0", "conversations": [said("human", "Hi"), said("gpt", "Yo"), said("human", "?"), said("gpt", "!")]},
        {"conversations": [said("system", "Be."), said("user", "Hi", weight=0), said("chatgpt", "Yo", weight=1)]},
        {"conversations": [said("human", "a"), said("bing", "b", weight=0), said("human", "c"), said("bard", "d")]},
        {"conversations": [said("human", "Hi"), said("gpt", "Yo")], "system": "Be brief."},
    ]),
    "sharegpt-tools": (sharegpt, [
        {"conversations": [
            said("human", "?"), said("function_call", json.dumps(ULM)), said("observation", "no"), said("gpt", "No."),
        ], "system": "Help.", "tools": json.dumps([RAIN])},
    ]),
    "alpaca": (alpaca, [
        {"instruction": "Translate.", "input": "rain", "output": "Regen"},
        {"instruction": "Hi", "input": "", "output": "Yo", "text": "Below is an instruction"},
        {"instruction": "So?", "output": "z", "system": "Be brief.", "history": [["a", "b"], ["c", "d"]]},
    ]),
    "dolly": (question("instruction", "response", context="context"), [
        {"instruction": "When?", "context": "It was 1999.", "response": "1999", "category": "closed_qa"},
        {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
    ]),
    "gsm8k": (question("question", "answer"), [
        {"question": "48 / 2?", "answer": "48/2 = <<48/2=24>>24\n#### 24"}, {"question": "3 + 4?", "answer": 7},
    ]),
    "openorca": (question("question", "response", system="system_prompt"), [
        {"id": "a", "system_prompt": "Think.", "question": "q", "response": "r"},
    ]),
    "metamath": (question("query", "response"), [{"query": "q", "response": "r", "original_question": "o"}]),
    "firefly": (question("input", "target"), [{"kind": "古文", "input": "四大发明", "target": "造纸术"}]),
    "zhihu": (question("INSTRUCTION", "RESPONSE"), [{"INSTRUCTION": "吗?", "RESPONSE": "是。", "SOURCE": "Zhihu"}]),
    "intel-orca": (question("question", "chosen", system="system"), [
        {"system": "Think.", "question": "q", "chosen": "good", "rejected": "bad"},
    ]),
    "xlam": (
        lambda row: (
            [message("user", row["query"]), message("assistant", "", tool_calls=[{"function": ULM}])],
            [1], [{"type": "function", "function": RAIN}],
        ),
        [{"id": 0, "query": "Rain?", "answers": json.dumps([ULM]), "tools": json.dumps([RAIN])}],
    ),
    "preferences": (preferred, [
        {"prompt": [ASK, BAD, AGAIN], "chosen": [SAY], "rejected": [BAD]},
        {"prompt": "Is it 漢字?", "chosen": [ASK, SAY], "rejected": [ASK, BAD], "score_chosen": 8.5},
        {"chosen": [ASK, BAD, AGAIN, SAY], "rejected": [ASK, BAD, AGAIN, BAD]},
    ]),
    "preference-texts": (
        prompted(lambda row: row.get("prompt", "The sky is"), lambda row: row["chosen"].removeprefix("The sky is")), [
        {"prompt": "Grass is", "chosen": " green.", "rejected": " grey."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
    ]),
    "hh-rlhf": (
        prompted(lambda row: "".join(row["chosen"].rpartition("Assistant:")[:2]),
                 lambda row: row["chosen"].rpartition("Assistant:")[2]),
        [{"chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I {verb} so",
          "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I do not"} for verb in ("say", "do")],
    ),
    "capybara": (pairs, [{"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}]),
    "moss": (pairs, [{"conversation": [{"human": "你好", "assistant": "您好"}]}]),
    "lima": (pairs, [{"conversations": ["a", "b", "c", "d"], "source": "x"}]),
}  # fmt: skip


def encode(path, tokenizer) -> list[tuple[list[int], list[int]]]:
    rows = encode_records(read_records(find_corpus(path), CorpusOptions()), tokenizer)
    return [(row["input_ids"].tolist(), row["labels"].tolist()) for row in rows]


def by_hand(row, tokenizer, loop) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row, by transformers alone."""
    if len(values := loop(row)) == 2:
        prompt, answer = (tokenizer(text)["input_ids"] for text in values)
        answer = [*answer, tokenizer.eos_token_id]
        return prompt + answer, [IGNORED] * len(prompt) + answer
    messages, learned, tools = values

    def render(messages, prompt=False):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    encoded = tokenizer(render(messages), return_offsets_mapping=True)
    labels = [IGNORED] * len(encoded["input_ids"])
    for turn in learned:
        start, stop = len(render(messages[:turn], prompt=True)), len(render(messages[: turn + 1]))
        for place, (first, last) in enumerate(encoded["offset_mapping"]):
            if start <= first and last <= stop:
                labels[place] = encoded["input_ids"][place]
    return encoded["input_ids"], labels


@pytest.mark.parametrize("name", FORMS)
def test_encode_records_as_by_hand(name, tmp_path, bundled):
    """Each form gives the same tokens and labels as a loop, as JSON Lines and as a JSON array."""
    loop, rows = FORMS[name]
    bundled.chat_template = TEMPLATE
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    wanted = [by_hand(row, bundled, loop) for row in rows]
    assert all(any(label != IGNORED for label in labels) for _, labels in wanted)
    for container in ("a.jsonl", "a.json"):
        assert encode(tmp_path / container, bundled) == wanted


def test_encode_records_of_tables(tmp_path, bundled):
    """Parquet gives every object the keys of all; a table has lists as JSON, and heads with capitals."""
    bundled.chat_template = TEMPLATE
    for name in ("openai", "sharegpt", "preferences"):
        rows = [row for row in FORMS[name][1] if not isinstance(row.get("prompt"), str)]
        rows = [row for row in rows if not isinstance(row.get("messages", [ASK])[0]["content"], list)]
        names = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.Table.from_pylist([names | row for row in rows]), tmp_path / "a.parquet")
        assert encode(tmp_path / "a.parquet", bundled) == [by_hand(row, bundled, FORMS[name][0]) for row in rows]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "messages"], [1, json.dumps([ASK, SAY])]])
    assert encode(tmp_path / "a.csv", bundled) == [by_hand({"messages": [ASK, SAY]}, bundled, openai)]
    (tmp_path / "b.csv").write_text("Question,Context,Answer\nWhen?,In 1999.,1999\n")
    row = {"instruction": "When?", "input": "In 1999.", "output": "1999"}
    assert encode(tmp_path / "b.csv", bundled) == [by_hand(row, bundled, alpaca)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ASK, message("helper", "x")]}, "unknown role 'helper' (FILE, line 2, message 2)"),
        ({"messages": [ASK, {"content": "x"}]}, "a message has no role (FILE, line 2, message 2)"),
        ({"messages": [ASK, 7]}, "messages must be a list of objects with role and content (FILE, line 2)"),
        ({"messages": [ASK, message("assistant", 7)]}, "'content' is not text (FILE, line 2, message 2)"),
        ({"messages": [ASK, message("assistant", None, audio={"id": "x"})]}, "'audio' is not learned (FILE, line 2"),
        ({"messages": [ASK, message("function_call", "rain()")]}, "'tool_calls' must be a list of"),
        ({"conversations": [said("human", "a"), said("gpt", "b")]}, "a row without 'messages' (FILE, line 2)"),
        ({"instruction": "a", "output": "b"}, "a row without 'messages' (FILE, line 2): all rows of a file must have"),
    ],
    ids=str,
)  # fmt: skip
def test_read_records_names_a_broken_row(tmp_path, row, words):
    """A row that is broken, or of another form than the first, is named with its file and line."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": [ASK, SAY]}, row)))
    with pytest.raises(HfkitError) as error:
        list(read_records(find_corpus(path), CorpusOptions()))
    assert words.replace("FILE", str(path)) in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "choices": ["a", "b"], "answer": 1},  # MMLU
        {"question": "q", "options": "a, b", "answer": "a"},
        {"question": "q", "context": "c", "answers": {"text": ["c"], "answer_start": [0]}},  # SQuAD
        {"instruction": "a", "query": "b", "response": "c"},
        {"problem": "a", "solution": "b", "answer": "c"},
        {"question": "q", "instruction": "i", "chosen": "a", "rejected": "b"},
        {"en": "rain", "de": "Regen"},
        {"dialogue": "A: hi", "summary": "They talk."},
    ],
    ids=str,
)
def test_choose_form_is_certain(tmp_path, row):
    """Where a question would lose its choices, or a row has several, hfkit asks."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(HfkitError, match=r"(which column is the text|no column 'prompt') \(.*a.jsonl, line 1"):
        list(read_records(find_corpus(tmp_path / "a.jsonl"), CorpusOptions()))


def test_choose_form_prefers_a_text(tmp_path):
    """A column that is called text is the text, unless it is Alpaca's; so is a conversation that is written down."""
    for row in {"text": "all", "question": "q", "answer": "a"}, {"id": 1, "conversation": "all"}:
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        assert [record.text for record in read_records(find_corpus(tmp_path / "a.jsonl"), CorpusOptions())] == ["all"]


def test_encode_records_refuses_calls_that_the_template_leaves_out(tmp_path, bundled):
    """A model whose template has no calls cannot learn them: the error says so."""
    bundled.chat_template = TEMPLATE.replace("call.function | tojson", "''")
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMS["openai-functions"][1][0]))
    with pytest.raises(HfkitError, match=r"leaves out an answer or its calls of tools \(.*line 1\)"):
        encode(tmp_path / "a.jsonl", bundled)
