"""Texts, examples and conversations become the tokens that the tokenizer makes of them."""

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from support.chats import PARTS, TEMPLATES
from support.corpora import CHATML, prepare, scrawl, talk, whole
from support.models import byte_vocabulary
from transformers import GPT2Tokenizer

from hfkit.console import note_once
from hfkit.corpus.documents import END, Example, cut_pieces
from hfkit.corpus.encoding import IGNORED, encode_documents, encode_examples
from hfkit.errors import HfkitError
from hfkit.models.loading import load_tokenizer
from hfkit.models.sources import find_model as find
from hfkit.options import ModelOptions


def ids_of(prepared) -> list[int]:
    return np.concatenate(prepared.dataset.with_format("numpy")[:]["input_ids"]).tolist()


# documents


@pytest.mark.parametrize("seed", range(24))
def test_encode_documents_cuts_no_token(bundled, seed):
    """The tokens of the pieces are those of the whole document."""
    text, draw = scrawl(seed), random.Random(seed)
    chunks, start = [], 0
    while start < len(text):
        chunks.append(text[start : start + draw.randint(1, 12_000)])
        start += len(chunks[-1])
    rows = list(encode_documents(cut_pieces(chunks), bundled))
    documents = [document for document in text.split(END) if document.strip()]
    for (number, group), document in zip(groupby(rows, lambda row: row["document"]), documents, strict=True):
        group = list(group)
        assert np.concatenate([row["input_ids"] for row in group]).tolist() == whole([document], bundled), number
        assert sum(row["bytes"] for row in group) == len(document.encode())
    assert [number for number, _ in groupby(row["document"] for row in rows)] == list(range(len(documents)))


@pytest.mark.parametrize("seed", range(24))
def test_cut_pieces_keeps_words_whole(seed):
    """No word lies across two pieces."""
    from tokenizers import pre_tokenizers

    words, text = pre_tokenizers.ByteLevel(add_prefix_space=False), scrawl(seed).replace(END, "")
    ends, end = {stop for _, (_, stop) in words.pre_tokenize_str(text)}, 0
    for piece in cut_pieces([text]):
        end += len(piece.text)
        assert end in ends or len(piece.text) == 16_000  # where there is no place to cut


def test_encode_documents_frames_documents(tiny_llama):
    """A document begins as the tokenizer begins a text, and ends with EOS unless `close` is off."""
    tokenizer = load_tokenizer(find(ModelOptions(model=tiny_llama)))
    assert tokenizer.bos_token_id is not None
    from tokenizers.processors import TemplateProcessing

    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)])
    tokenizer.backend_tokenizer.post_processor = processor
    texts = ["one text", "x " * 5000]
    for close in (True, False):
        rows = list(encode_documents(cut_pieces([END.join(texts)]), tokenizer, close=close))
        ids = [row["input_ids"].tolist() for row in rows]
        assert ids[0] == [*tokenizer(texts[0])["input_ids"], *[end] * close]
        assert sum(ids, []).count(begin) == 2 and sum(ids, []).count(end) == 2 * close


def test_encode_documents_changes_no_state(bundled, monkeypatch):
    """Encoding changes no environment variable and is not cut by what an earlier call left in the tokenizer."""
    bundled("a", truncation=True, max_length=2)  # the library keeps this for the next call
    for value in (None, "false", "true"):
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        else:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        (row,) = encode_documents(cut_pieces(["a text of more than two tokens"]), bundled)
        assert len(row["input_ids"]) > 3
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


def test_encode_documents_in_threads(tmp_path, tiny, monkeypatch):
    """Many threads encode with one tokenizer, whose file has truncation and padding, and none disturbs another."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    folder = Path(shutil.copytree(tiny, tmp_path / "cutting"))
    state = json.loads((folder / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    state["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                        "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(find(ModelOptions(model=str(folder))))
    assert isinstance(tokenizer, GPT2Tokenizer) and not tokenizer.backend_tokenizer.truncation

    def encode_one(number: int) -> list[int]:
        rows = encode_documents(cut_pieces([f"text {number} " * 40]), tokenizer)
        return [i for row in rows for i in row["input_ids"].tolist()]

    with ThreadPoolExecutor(8) as threads:
        encoded = list(threads.map(encode_one, range(200)))
    texts = [f"text {number} " * 40 for number in range(200)]
    assert encoded == [whole([text], tokenizer) for text in texts]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


@pytest.mark.parametrize("words", [1 << 16, (1 << 16) + 1])
def test_encode_corpus_keeps_large_vocabularies(tmp_path, datasets_cache, words):
    """Token ids above 16 bits are kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, words)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    (tmp_path / "a.txt").write_text(f"w2 w300 w65535 w{words - 1}")
    assert ids_of(prepare(tmp_path / "a.txt", tokenizer)) == [2, 300, 65535, words - 1, 1]


# examples


def learned(row, tokenizer) -> list[str]:
    """The texts of each run of labelled tokens."""
    assert len(row["labels"]) == len(row["input_ids"])
    runs = groupby(zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True), lambda pair: pair[1] >= 0)
    texts = []
    for is_label, run in runs:
        run = list(run)
        if is_label:
            assert all(i == label for i, label in run)
            texts.append(tokenizer.decode([i for i, _ in run]))
        else:
            assert {label for _, label in run} == {IGNORED}
    return texts


TALKS = [
    [("user", "Hello?"), ("assistant", "Yes.")],
    [("system", "Be kind."), ("user", "One"), ("assistant", "Two 🎉 漢字"), ("user", "Three "), ("assistant", "Four")],
    [("assistant", "I begin."), ("user", "So you do.")],
    [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "no answer to this")],
]


@pytest.mark.parametrize("turns", TALKS)
@pytest.mark.parametrize("template", [None, CHATML], ids=["ours", "chatml"])
def test_encode_examples_learns_answers(bundled, template, turns):
    """In a conversation the assistant's answers are learned and nothing else."""
    bundled.chat_template = template
    (row,) = encode_examples([talk(*turns)], bundled)
    answers = [text for role, text in turns if role == "assistant"]
    if template:
        wanted = [f"{text}<|im_end|>\n" for text in answers]
        text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    else:
        wanted = [f" {text}<|endoftext|>" for text in answers]
        end = {"assistant": "<|endoftext|>"}
        text = "\n".join(f"{role.capitalize()}: {text.strip()}{end.get(role, '')}" for role, text in turns)
    assert learned(row, bundled) == wanted
    assert bundled.decode(row["input_ids"]) == text
    assert row["input_ids"].tolist() == bundled(text, add_special_tokens=False)["input_ids"]
    assert row["bytes"] == sum(len(text.encode()) for _, text in turns)


def test_encode_examples_learns_first_token(bundled):
    """An answer's first token is learned even if the prompt ends with the token's space."""
    bundled.chat_template = (
        "{% for m in messages %}[{{ m.role }}]: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]: {% endif %}"
    )
    (row,) = encode_examples([talk(("user", "hi"), ("assistant", "the answer"))], bundled)
    assert learned(row, bundled) == [" the answer\n"]


@pytest.mark.parametrize("writes", ["Prepend", "Metaspace", "ByteLevel"])
def test_encode_within_a_text_writes_no_space(writes):
    """What a tokenizer writes before a text is not written before an answer, nor where a long text was cut."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "Ġ" if writes == "ByteLevel" else "▁"
    letters = ["<unk>", "<end>", space, "Ċ", *"\nabcdefghijklmnopqrstuvwxyz=.", f"{space}f", "fo", f"{space}fo"]
    merges = [(space, "f"), ("f", "o"), (f"{space}f", "o")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(letters)}, merges, unk_token="<unk>"))
    if writes == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Metaspace()
    elif writes == "Metaspace":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    for prompt, answer in (("a=", "four"), ("a", " four"), ("a\n", "fo"), ("a", "\nfo"), ("a ", "fo")):
        (row,) = encode_examples([Example({"prompt": prompt, "completion": answer}, "x")], tokenizer)
        assert tokenizer.decode(row["input_ids"]).lstrip(" ") == f"{prompt}{answer}<end>"
    text = "fo a fo.\n\nfour lines of fo " * 900
    rows = list(encode_documents(cut_pieces([text]), tokenizer, close=False))
    assert len(rows) > 2
    assert [i for row in rows for i in row["input_ids"].tolist()] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.thinking }}{{ m.content }}\n{% endfor %}"])
def test_encode_examples_says_which_thoughts_it_leaves_out(bundled, template, capfd):
    """A template reads the thoughts of an answer by one name, or not at all."""
    bundled.chat_template = template
    note_once.cache_clear()
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "hm"}]}
    list(encode_examples([Example(row, "x")], bundled))
    lost = "the chat template leaves out 'thinking' of answers: it is not learned"
    assert (lost in capfd.readouterr().err) == (template is None)


RAISING = "{{ raise_exception('roles must\nalternate') }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (PARTS, "leaves out an answer"),
        (RAISING, "rejects this conversation"),
        (RAISING + "{% generation %}{% endgeneration %}", "rejects this conversation"),
        ("{{ nonsense.nonsense.nonsense }}", "rejects this conversation"),
        ("{% for %}", "rejects this conversation"),
    ],
)
def test_encode_examples_refuses_templates(bundled, template, words):
    """A template that fails, or renders a text as nothing, is an error of one sentence."""
    bundled.chat_template = template
    with pytest.raises(HfkitError, match=words) as error:
        list(encode_examples([talk(*TALKS[1])], bundled))
    assert "a.jsonl, line 7" in str(error.value) and "\n" not in str(error.value)


def exchange(*texts) -> list[tuple[str, str]]:
    """Turns of the user and the assistant, one after another."""
    return list(zip(("user", "assistant") * len(texts), texts, strict=False))


CONVERSATIONS = {
    "one turn": exchange("What is rain?", "Water from clouds."),
    "two turns": exchange("One", "The first reply.", "Two", "<ok> the second"),
    "system": [("system", "Be kind."), *exchange("Hello", "A kind reply")],
    "three turns": exchange("alpha?", "A of alpha", "beta?", "B of beta", "gamma?", "C of gamma"),
    "empty question": exchange("", "A reply to nothing"),
    "unicode": exchange("漢字?", "Zwölf 🎉 漢\n\nja", "é", "oui ça"),
    "thoughts": exchange("One", "<think>\nhm\n</think>\n\nA", "Two", "<think>\nso\n</think>\n\nB"),
    "question last": exchange("One", "The reply", "Two"),
}
# What is learned of an answer, in addition to its text.
AROUND = {
    "llama": "@<|eot|>",
    "qwen3": "<think>\n\n</think>\n\n@<|im_end|>\n",
    "r1": "@<|end|>",
    "phi": "@<|end|>\n<|endoftext|>",
    "gptoss": "<|channel|>final<|message|>@<|return|>",
    "marked": "@<|im_end|>",
    "gemma": "@<end_of_turn>\n",
}


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_encode_examples_accepts_what_templates_render(bundled, name, turns):
    """What transformers renders is accepted, and what is learned is the answers and nothing else."""
    bundled.chat_template, turns = TEMPLATES[name], CONVERSATIONS[turns]
    example = talk(*turns)
    try:
        bundled.apply_chat_template(example.row["messages"], tokenize=False)
    except Exception:  # noqa: BLE001 - whatever a template raises
        with pytest.raises(HfkitError, match="rejects this conversation"):
            list(encode_examples([example], bundled))
        return
    answers = [text for role, text in turns if role == "assistant"]
    if name == "r1" and any("<think>" in text for text in answers):
        with pytest.raises(HfkitError, match="leaves out an answer"):
            list(encode_examples([example], bundled))
        return
    rows = list(encode_examples([example], bundled))
    texts = [text for row in rows for text in learned(row, bundled)]
    assert len(texts) == len(answers) and {row["document"] for row in rows} == {0}
    for text, answer in zip(texts, answers, strict=True):
        if "<think>" in answer and name == "qwen3":
            assert text == answer + "<|im_end|>\n"
        else:
            last = "<|end|>" if name == "marked" and answer != turns[-1][1] else "<|im_end|>"
            assert text == AROUND[name].replace("<|im_end|>", last).replace("@", answer)


@pytest.mark.parametrize("name", ["qwen3", "phi", "gptoss"])
def test_encode_examples_renders_as_at_inference(bundled, name):
    """Where later turns change earlier ones, each answer follows the prompt that it is asked for with."""
    bundled.chat_template = TEMPLATES[name]
    example = talk(*CONVERSATIONS["three turns"])
    messages = example.row["messages"]
    rows = list(encode_examples([example], bundled))
    for row, turn in zip(rows, (1, 3, 5), strict=True):
        prompt = bundled.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        text = bundled.decode(row["input_ids"])
        assert text == prompt + learned(row, bundled)[0]
        assert text == bundled.apply_chat_template(messages[: turn + 1], tokenize=False)
    whole = sum(len(message["content"]) for message in messages)
    assert whole - 3 < sum(row["bytes"] for row in rows) <= whole and len({row["content"] for row in rows}) == 1


def test_encode_examples_does_not_learn_weight_0(bundled):
    """An answer of weight 0 is context, marked or not; an example without anything to learn is refused."""
    for template in (None, CHATML, TEMPLATES["qwen3"], TEMPLATES["marked"]):
        bundled.chat_template = template
        example = talk(*CONVERSATIONS["two turns"])
        example.row["messages"][1]["weight"] = 0
        (row,) = encode_examples([example], bundled)
        (text,) = learned(row, bundled)
        assert "the second" in text and "first" not in text and "The first reply." in bundled.decode(row["input_ids"])
        example.row["messages"][3]["weight"] = 0
        with pytest.raises(HfkitError, match="nothing is learned .*line 7"):
            list(encode_examples([example], bundled))


def test_encode_examples_gives_tools_to_the_template(bundled):
    """Tools reach the template, a call without a text is learned, and a template that drops calls is refused."""
    tool = {"type": "function", "function": {"name": "weather", "description": "?", "parameters": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "yes"}, {"role": "assistant", "content": "It rains."}]  # fmt: skip
    example = Example({"messages": messages, "tools": [tool]}, "a.jsonl, line 7")
    bundled.chat_template = (
        "{% if tools %}{{ tools | tojson + '\\n' }}{% endif %}{% for m in messages %}"
        "{{ m.role + ':' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    (row,) = encode_examples([example], bundled)
    assert learned(row, bundled) == ['{"name": "weather", "arguments": {"city": "Ulm"}}\n', "It rains.\n"]
    assert bundled.decode(row["input_ids"]).startswith('[{"type": "function", "function": {"name": "weather"')
    with_tools = bundled.chat_template
    bundled.chat_template = CHATML
    with pytest.raises(HfkitError, match="no place for 'tools' .*line 7"):
        list(encode_examples([example], bundled))
    bundled.chat_template = with_tools.replace("c.function | tojson", "''")
    with pytest.raises(HfkitError, match="leaves out an answer"):
        list(encode_examples([example], bundled))


def test_encode_examples_changes_no_tokenizer(bundled):
    """Encoding a conversation does not turn a model without a chat template into one that has one."""
    bundled.chat_template = None
    list(encode_examples([talk(*TALKS[0])], bundled))
    assert bundled.chat_template is None


@pytest.mark.parametrize("prompt", ["Question:", "", "two\nlines 漢 "])
def test_encode_examples_learns_completions(bundled, prompt):
    """Of a prompt and its completion the completion is learned."""
    example = Example({"prompt": prompt, "completion": " an answer 🎉"}, "")
    (row,) = encode_examples([example], bundled)
    assert learned(row, bundled) == [" an answer 🎉<|endoftext|>"]
    assert bundled.decode(row["input_ids"]) == prompt + " an answer 🎉<|endoftext|>"


def test_encode_corpus_keeps_labels(tmp_path, datasets_cache, bundled):
    """Examples are kept with their labels."""
    rows = [{"messages": talk(*turns).row["messages"]} for turns in TALKS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(tmp_path / "a.jsonl", bundled)
    wanted = list(encode_examples([talk(*turns) for turns in TALKS], bundled))
    assert prepared.report.kind == "messages" and prepared.report.documents == len(TALKS)
    for name in ("input_ids", "labels"):
        assert list(prepared.dataset[name]) == [row[name].tolist() for row in wanted]
    assert prepared.report.longest == max(len(row["labels"]) for row in wanted)


def test_encode_examples_with_a_slow_tokenizer(tmp_path, datasets_cache):
    """A slow tokenizer encodes texts and completions, and refuses conversations."""
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        def __init__(self, **keywords):
            self.symbols = sorted(byte_vocabulary())
            super().__init__(eos_token="<|endoftext|>", **keywords)

        vocab_size = property(lambda self: len(self.symbols))

        def get_vocab(self):
            return {symbol: i for i, symbol in enumerate(self.symbols)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.symbols.index(token)

        def _convert_id_to_token(self, index):
            return self.symbols[index]

    tokenizer = Slow()
    (tmp_path / "a.txt").write_text("one" + END + "two")
    ids = ids_of(prepare(tmp_path / "a.txt", tokenizer))
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == f"one{END}two{END}"
    with pytest.raises(HfkitError, match="give prompt and completion"):
        list(encode_examples([talk(*TALKS[0])], tokenizer))
