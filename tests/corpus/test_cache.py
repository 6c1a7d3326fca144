"""A corpus becomes the tokens that the tokenizer makes of it, once; what is kept is whole and is found again."""

import json
import os
import random
import resource
import shutil
import signal
import time
from itertools import groupby

import numpy as np
import pytest
from support.corpora import CHATML, TEXTS, prepare, scrawl, talk, whole, write
from support.models import byte_vocabulary

from hfkit.corpus import cache
from hfkit.corpus.cache import load_prepared
from hfkit.corpus.documents import END, PREPARED, Example, cut_pieces
from hfkit.corpus.encoding import CHAT_TEMPLATE, IGNORED, encode_documents, encode_examples, fingerprint
from hfkit.errors import HfkitError
from hfkit.models.loading import load_tokenizer
from hfkit.models.sources import find_model as find
from hfkit.options import ModelOptions


def ids_of(prepared) -> list[int]:
    return np.concatenate(prepared.dataset.with_format("numpy")[:]["input_ids"]).tolist()


# tokens


@pytest.mark.parametrize("seed", range(24))
def test_the_tokens_of_the_pieces_are_those_of_the_whole_document(bundled, seed):
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
def test_no_word_lies_across_two_pieces(seed):
    from tokenizers import pre_tokenizers

    words, text = pre_tokenizers.ByteLevel(add_prefix_space=False), scrawl(seed).replace(END, "")
    ends, end = {stop for _, (_, stop) in words.pre_tokenize_str(text)}, 0
    for piece in cut_pieces([text]):
        end += len(piece.text)
        assert end in ends or len(piece.text) == 16_000  # where there is no place to cut


def test_a_document_begins_as_the_tokenizer_begins_a_text_and_is_closed_unless_told_otherwise(tiny_llama):
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


def test_encoding_leaves_the_environment_and_the_tokenizer_as_they_were(bundled, monkeypatch):
    bundled("a", truncation=True, max_length=2)  # the library keeps this for the next call
    for value in (None, "false", "true"):
        if value:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        else:
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        (row,) = encode_documents(cut_pieces(["a text of more than two tokens"]), bundled)
        assert len(row["input_ids"]) > 3
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value


@pytest.mark.parametrize("words", [1 << 16, (1 << 16) + 1])
def test_a_vocabulary_of_any_size_keeps_its_tokens(tmp_path, datasets_cache, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, words)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    (tmp_path / "a.txt").write_text(f"w2 w300 w65535 w{words - 1}")
    assert ids_of(prepare(tmp_path / "a.txt", tokenizer)) == [2, 300, 65535, words - 1, 1]


# what is kept


def test_a_corpus_is_prepared_as_datasets_keeps_data_and_needs_nothing_else(tmp_path, datasets_cache, bundled):
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


def test_what_was_prepared_is_found_by_content_whatever_its_name_and_time(tmp_path, datasets_cache, bundled):
    first = prepare(write(tmp_path / "a.txt"), bundled)
    shutil.copy(tmp_path / "a.txt", tmp_path / "other-name.txt")
    os.utime(tmp_path / "other-name.txt", (1, 1))
    second = prepare(tmp_path / "other-name.txt", bundled)
    assert second.cached and second.folder == first.folder and ids_of(second) == ids_of(first)
    assert second.report == first.report


def test_what_has_changed_is_prepared_anew_though_size_and_time_are_the_same(tmp_path, datasets_cache, bundled):
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        path.write_text(text)
        os.utime(path, (1, 1))
        prepared = prepare(path, bundled)
        assert not prepared.cached and ids_of(prepared) == whole([text], bundled)


def test_another_tokenizer_or_another_way_to_read_is_prepared_anew(tmp_path, datasets_cache, bundled, tiny):
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


def test_the_fingerprint_does_not_move_while_a_tokenizer_is_used(bundled, tiny):
    bundled("a")
    before = fingerprint(bundled)
    list(encode_examples([talk(("assistant", "a"))], bundled))
    bundled("a", truncation=True, max_length=2)
    assert bundled.chat_template == CHAT_TEMPLATE
    assert fingerprint(bundled) == before != fingerprint(load_tokenizer(find(ModelOptions(model=tiny))))


def test_what_the_hub_has_is_read_anew_each_time(monkeypatch, datasets_cache, bundled):
    for text in ("today", "tomorrow"):
        monkeypatch.setattr("datasets.load_dataset", lambda *_, text=text, **__: [{"text": text}])
        prepared = prepare("hf://owner/name", bundled)
        assert not prepared.cached and ids_of(prepared) == whole([text], bundled)


def test_a_folder_is_found_again_and_never_given_to_another_corpus(tmp_path, datasets_cache, bundled, tiny):
    first, second = write(tmp_path / "a.txt"), write(tmp_path / "b.txt", ["other"])
    assert not prepare(first, bundled, tmp_path / "out").cached
    assert prepare(first, bundled, tmp_path / "out").cached
    for source, tokenizer in ((second, bundled), (first, load_tokenizer(find(ModelOptions(model=tiny))))):
        with pytest.raises(HfkitError, match="name a new folder"):
            prepare(source, tokenizer, tmp_path / "out")
    assert ids_of(load_prepared(tmp_path / "out")) == whole(TEXTS, bundled)


@pytest.mark.parametrize("name", [PREPARED, "data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
@pytest.mark.parametrize("keep", [None, 0.0, 0.5])
def test_a_damaged_cache_is_made_anew_and_a_damaged_folder_is_one_sentence(
    tmp_path, datasets_cache, bundled, name, keep
):
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


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, bundled):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(HfkitError, match="HF_DATASETS_CACHE"):
        prepare(write(tmp_path / "a.txt"), bundled)


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


STEPS = ["hfkit.corpus.cache._column", "hfkit.corpus.cache._save_one", "os.replace",
         "hfkit.corpus.cache.make_names_durable", "hfkit.corpus.cache.write_text", "done"]  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_whole(
    tmp_path, datasets_cache, bundled, monkeypatch, step
):
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


def test_a_process_that_is_killed_while_it_renews_leaves_nothing_that_is_taken_for_whole(
    datasets_cache, bundled, monkeypatch
):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "today"}])
    prepared = prepare("hf://owner/name", bundled)

    def work():
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "tomorrow"}])
        monkeypatch.setattr("hfkit.corpus.cache.write_text", die)
        prepare("hf://owner/name", bundled)

    assert end_of(start(work)) == -signal.SIGKILL
    with pytest.raises(HfkitError, match="cannot be read"):
        load_prepared(prepared.folder)


def test_an_error_in_the_middle_leaves_nothing_that_is_taken_for_whole(tmp_path, datasets_cache, bundled, monkeypatch):
    monkeypatch.setattr(cache, "BATCH", 2)
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20))
    (tmp_path / "a.jsonl").write_text(rows + "{")
    with pytest.raises(HfkitError, match="line 21"):
        prepare(tmp_path / "a.jsonl", bundled, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]
    (tmp_path / "a.jsonl").write_text(rows)
    prepared = prepare(tmp_path / "a.jsonl", bundled, tmp_path / "out")
    assert ids_of(prepared) == whole([f"text {i}" for i in range(20)], bundled)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, datasets_cache, bundled):
    source = write(tmp_path / "a.txt", ["word " * 100_000])

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(HfkitError, match="cannot write the tokens .*File too large"):
            prepare(source, bundled, tmp_path / "out")

    assert end_of(start(work)) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".hfkit.lock"]


def test_of_two_processes_one_prepares_and_the_other_waits_for_it(
    tmp_path, datasets_cache, bundled, monkeypatch, capsys
):
    source, column = write(tmp_path / "a.txt"), cache._column
    began = tmp_path / "began"

    def slowly(*arguments):
        began.touch()
        time.sleep(0.3)
        return column(*arguments)

    def first():
        monkeypatch.setattr(cache, "_column", slowly)
        assert not prepare(source, bundled).cached

    child = start(first)
    while not began.exists():
        time.sleep(0.01)
    prepared = prepare(source, bundled)
    assert end_of(child) == 0
    assert prepared.cached and ids_of(prepared) == whole(TEXTS, bundled)
    assert f"in use by process {child} on" in capsys.readouterr().err


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
def test_of_a_conversation_what_the_assistant_says_is_learned_and_nothing_else(bundled, template, turns):
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


def test_the_first_token_of_an_answer_is_learned_where_the_prompt_ends_with_its_space(bundled):
    bundled.chat_template = (
        "{% for m in messages %}[{{ m.role }}]: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]: {% endif %}"
    )
    (row,) = encode_examples([talk(("user", "hi"), ("assistant", "the answer"))], bundled)
    assert learned(row, bundled) == [" the answer\n"]


REWRITING = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}"
    "{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}"
)
RAISING = "{{ raise_exception('roles must\nalternate') }}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (REWRITING + "{% if add_generation_prompt %}assistant:{% endif %}", "changes earlier turns"),
        (CHATML.replace("'<|im_start|>assistant\\n' }}{% endif %}", "'<think>' }}{% endif %}"), "changes earlier"),
        (RAISING, "does not take this conversation"),
        ("{{ nonsense.nonsense.nonsense }}", "does not take this conversation"),
        ("{% for %}", "does not take this conversation"),
    ],
)
def test_a_template_that_rewrites_what_was_said_or_fails_is_one_sentence(bundled, template, words):
    bundled.chat_template = template
    with pytest.raises(HfkitError, match=words) as error:
        list(encode_examples([talk(*TALKS[1])], bundled))
    assert "a.jsonl, line 7" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["Question:", "", "two\nlines 漢 "])
def test_of_a_prompt_and_its_completion_the_completion_is_learned(bundled, prompt):
    example = Example({"prompt": prompt, "completion": " an answer 🎉"}, "")
    (row,) = encode_examples([example], bundled)
    assert learned(row, bundled) == [" an answer 🎉<|endoftext|>"]
    assert bundled.decode(row["input_ids"]) == prompt + " an answer 🎉<|endoftext|>"


def test_examples_are_kept_with_their_labels(tmp_path, datasets_cache, bundled):
    rows = [{"messages": talk(*turns).row["messages"]} for turns in TALKS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared = prepare(tmp_path / "a.jsonl", bundled)
    wanted = list(encode_examples([talk(*turns) for turns in TALKS], bundled))
    assert prepared.report.kind == "messages" and prepared.report.documents == len(TALKS)
    for name in ("input_ids", "labels"):
        assert list(prepared.dataset[name]) == [row[name].tolist() for row in wanted]
    assert prepared.report.longest == max(len(row["labels"]) for row in wanted)


def test_a_slow_tokenizer_takes_texts_and_completions_and_says_what_it_cannot_do(tmp_path, datasets_cache):
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
