"""TokenDataset hold every token once; batches add nothing that is learned."""

import json
import random
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from support.corpora import CHATML, prepare, talk, whole, write

from hfkit.corpus import sequences
from hfkit.corpus.documents import END
from hfkit.corpus.encoding import IGNORED, encode_examples
from hfkit.corpus.files import find_corpus
from hfkit.corpus.sequences import Collator, Stream, TokenDataset, cut_example, pad_rows, show_examples
from hfkit.corpus.sequences import cut_sequences as cut
from hfkit.corpus.templates import CHAT_TEMPLATE
from hfkit.corpus.training_data import gather_training_data as gather_material
from hfkit.errors import HfkitError
from hfkit.models.loading import load_tokenizer
from hfkit.models.sources import find_model as find
from hfkit.options import DataOptions, ModelOptions, SizeOptions
from hfkit.training import pretraining


def make_rows(sizes) -> datasets.Dataset:
    """Rows of so many tokens, each token another number."""
    ends = np.cumsum(sizes)
    rows = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": rows}, features)


def ids(items) -> list[int]:
    return [i for item in items for i in np.asarray(item["input_ids"]).tolist()]


def note_of(capsys) -> str:
    return capsys.readouterr().err


# prompts


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("He mended a net. “Come and see,” said Ann, and then all the others came. ", "“Come"),
        ("the boat came, slowly\nThe rain fell over the harbour and all of the boats. ", "The rain"),
        ("there is no full stop in this one and the words go on and on and on ", None),
    ],
)
def test_prompt_begins_where_a_sentence_does(tiny, tmp_path, datasets_cache, text, prompt):
    """The end of a single text is held out; what is sampled from it does not begin in mid-sentence."""
    tokenizer = load_tokenizer(find(ModelOptions(model=tiny)))
    (tmp_path / "a.txt").write_text(text * 60)
    found = gather_material(str(tmp_path / "a.txt"), tokenizer, DataOptions(eval_fraction=0.1), 1000, seed=1).prompt
    assert found.startswith(prompt or tuple(text.split()))
    other = gather_material(str(tmp_path / "a.txt"), tokenizer, DataOptions(eval_fraction=0), 1000, seed=1).prompt
    assert text.startswith(other)  # where the document itself begins


# blocks


@pytest.mark.parametrize("seed", range(30))
def test_blocks_hold_every_token(seed):
    """Blocks hold every token once and in order."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, draw.randint(1, 9), draw.randint(1, 300)]) for _ in range(draw.randint(1, 60))]
    dataset, size = make_rows(sizes), draw.choice([1, 2, 7, 64, sum(sizes), sum(sizes) - 1 or 1, 10_000])
    blocks = TokenDataset(dataset, np.arange(len(sizes)), size)
    items = list(blocks)
    assert ids(items) == list(range(sum(sizes))) and blocks.tokens == sum(sizes)
    assert len(items) == len(blocks)
    assert {len(item["input_ids"]) for item in items[:-1]} <= {size} and 0 < len(items[-1]["input_ids"]) <= size
    assert all((item["input_ids"] == item["labels"]).all() for item in items)
    for index in draw.sample(range(len(blocks)), min(5, len(blocks))):
        assert ids([blocks[index]]) == ids([items[index]])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_blocks_of_some_rows():
    """Blocks of some rows hold these rows and no others."""
    dataset = make_rows([3, 4, 5, 6])
    assert ids(TokenDataset(dataset, np.array([2, 0]), 4)) == [*range(7, 12), *range(3)]
    nothing = TokenDataset(dataset, np.array([], int), 4)
    assert len(nothing) == nothing.tokens == 0 and list(nothing) == []


def test_cut_sequences_joins_documents(tmp_path, datasets_cache, bundled):
    """Documents keep their borders, and a corpus may be shorter than a block."""
    texts = ["One short text.", "And another."]
    prepared = prepare(write(tmp_path / "a.txt", texts), bundled)
    for size in (4, 1024):
        assert ids(cut(prepared, size)) == whole(texts, bundled)
    assert len(cut(prepared, 1024)) == 1


# examples


def test_cut_sequences_leaves_long_examples_out(tmp_path, datasets_cache, bundled, capsys):
    """Examples are the rows with their labels; those that are too long are left out."""
    talks = [talk(("user", "a " * n), ("assistant", "b " * n)) for n in (1, 40, 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(example.row) + "\n" for example in talks))
    prepared = prepare(tmp_path / "a.jsonl", bundled)
    wanted = list(encode_examples(talks, bundled))
    examples = cut(prepared, 60)
    assert not examples.is_joined and len(examples) == 2
    assert "examples of more than 60 tokens are left out: 1 of 3" in note_of(capsys)
    for example, row in zip(examples, (wanted[0], wanted[2]), strict=True):
        assert all(example[name].tolist() == row[name].tolist() for name in ("input_ids", "labels"))
    assert examples.tokens == sum(len(example["labels"]) for example in examples)
    assert len(cut(prepared, 10_000)) == 3 and note_of(capsys) == ""


def test_show_examples_marks_what_is_learned(tmp_path, datasets_cache, bundled):
    """An example is shown with its special tokens, and what is learned is marked; of texts all is."""
    talks = [talk(("user", f"q {n}"), ("assistant", "漢 🎉"), ("user", "so?"), ("assistant", "yes")) for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(example.row) + "\n" for example in talks))
    first = "User: q 0\nAssistant:⟦ 漢 🎉<|endoftext|>⟧\nUser: so?\nAssistant:⟦ yes<|endoftext|>⟧"
    shown = show_examples(cut(prepare(tmp_path / "a.jsonl", bundled), 64), bundled, 2)
    assert shown == [first, first.replace("0", "1", 1)]
    texts = cut(prepare(write(tmp_path / "a.txt", ["one", "two"]), bundled), 64)
    assert show_examples(texts, bundled, 9) == [f"⟦one{END}two{END}⟧"]
    assert show_examples(texts, bundled, 0) == []


def test_cut_example_keeps_what_is_short():
    """Three turns at most, and of long parts the beginning and the end; every mark that opens also closes."""
    short = "User: a\nAssistant:⟦ b⟧\nUser: c\nAssistant:⟦ d⟧\n"
    assert cut_example(short) == short
    assert cut_example("x⟦y⟧" * 9) == "x⟦y⟧" * 3 + " …"
    long = cut_example(f"⟦{'first ' * 9000}last⟧")
    assert len(long) < 300 and long.startswith("⟦first first") and " … " in long and long.endswith("first last⟧")


# streams


def stream(path, tokenizer, size=16, seed=0) -> Stream:
    return Stream(find_corpus(path), tokenizer, DataOptions(streaming=True), size, seed)


@pytest.fixture
def numbers(tmp_path) -> str:
    """A corpus whose blocks all differ, of more blocks than a stream is shuffled within."""
    return write(tmp_path / "numbers.txt", [" ".join(map(str, range(i, i + 100))) for i in range(0, 4000, 100)])


def test_stream_gives_every_token(numbers, bundled):
    """Each pass gives every token once, in an order of its own."""
    wanted = whole(open(numbers).read().split(END), bundled)
    blocks, orders = Counter(), []
    for start in range(0, len(wanted), 16):
        blocks[tuple(wanted[start : start + 16])] += 1
    assert blocks.total() > sequences._WINDOW * 2
    source = stream(numbers, bundled)
    for epoch in range(3):
        items = [tuple(ids([item])) for item in source.read_shuffled(epoch)]
        assert Counter(items) == blocks
        orders.append(items)
    assert len({tuple(order) for order in orders}) == 3 and list(blocks) not in orders
    moved = [abs(orders[0].index(block) - i) for i, block in enumerate(blocks)]
    assert np.mean(moved) > 50  # shuffled, not only shifted


def test_stream_order_follows_seed(numbers, bundled):
    """The order of a pass depends on the seed and the number of the pass alone."""

    def order(seed, epoch):
        return ids(stream(numbers, bundled, seed=seed).read_shuffled(epoch))

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(2, 1) and order(1, 1) != order(1, 2)


def test_stream_is_shared_by_forked_workers(numbers, bundled, monkeypatch):
    """Forked workers get a share each, and none waits for the tokenizer's threads, which a fork lacks."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    source = stream(numbers, bundled)
    wanted = Counter(tuple(ids([item])) for item in source.read_shuffled(0))  # starts the tokenizer's threads
    together = torch.utils.data.DataLoader(
        source, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert Counter(tuple(ids([item])) for item in islice(together, wanted.total())) == wanted


def test_stream_goes_on_with_another_pass(numbers, bundled):
    """A stream is one pass after another, each in its own order."""
    source = stream(numbers, bundled)
    passes = [ids(source.read_shuffled(number)) for number in range(2)]
    total = len(list(source.read_shuffled(0)))
    assert ids(islice(source, 2 * total)) == passes[0] + passes[1]


def test_stream_gives_examples_that_fit(tmp_path, bundled):
    """A stream of examples gives those that fit."""
    talks = [talk(("user", "a " * n), ("assistant", "b " * n)) for n in (1, 40, 2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(example.row) + "\n" for example in talks))
    items = list(stream(tmp_path / "a.jsonl", bundled, size=60).read_shuffled(0))
    wanted = {tuple(row["labels"].tolist()) for row in encode_examples([talks[0], talks[2]], bundled)}
    assert len(items) == 2 and {tuple(item["labels"].tolist()) for item in items} == wanted


# batches


@pytest.mark.parametrize("shape", [None, (4, 9)])
def test_collator_pads(shape):
    """A batch holds its items, and padding that is not learned."""
    items = [{"input_ids": np.arange(n, dtype=np.uint16), "labels": np.arange(n) - 100} for n in (3, 7, 1)]
    batch = Collator(5, shape)(items)
    rows, width = shape or (3, 7)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels"), (rows, width)
    )
    for row in range(rows):
        size = len(items[row]["labels"]) if row < 3 else 0
        assert batch["input_ids"][row].tolist() == [*range(size), *[5] * (width - size)]
        assert batch["labels"][row].tolist() == [*range(-100, size - 100), *[IGNORED] * (width - size)]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("left", [False, True])
def test_pad_rows(left):
    """Rows of numbers, lists or arrays, become one tensor, filled up on the side that was asked for."""
    rows = [[1, 2, 3], np.array([4], np.uint16), []]
    full = [[1, 2, 3], [9, 9, 4] if left else [4, 9, 9], [9, 9, 9]]
    assert pad_rows(rows, 9, left=left).tolist() == full
    wide = pad_rows(rows, 9, shape=(4, 5), left=left).tolist()
    assert wide == [[9, 9, *row] if left else [*row, 9, 9] for row in [*full, [9, 9, 9]]]


# all together


def test_train_tokenizer_skips_held_out_texts(tmp_path, datasets_cache, monkeypatch):
    """A new tokenizer learns nothing from the held-out part."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=9)) for _ in range(40)]
    path = write(tmp_path / "a.txt", ["", *((word + " ") * 30 for word in words), " "])  # one word a document
    options, size = DataOptions(eval_fraction=0.2), SizeOptions(vocab_size=1000)
    tokenizer = pretraining.train_tokenizer(path, size, options, seed=3)
    material = gather_material(path, tokenizer, options, 64, seed=3)
    known = {word for word in words if len(tokenizer.tokenize(" " + word)) == 1}
    trained, held = (set(tokenizer.decode(ids(part)).replace(END, " ").split()) for part in
                     (material.train_set, material.held_out))  # fmt: skip
    assert trained == known and held == set(words) - known and 6 <= len(held) <= 10


def test_gather_training_data_loses_nothing(tmp_path, datasets_cache, bundled):
    """Everything is trained on or held out."""
    texts = [f"Document {i} says: " + "word " * (i % 30) for i in range(60)]
    path = write(tmp_path / "a.jsonl", texts)
    material = gather_material(path, bundled, DataOptions(eval_fraction=0.2), 32, seed=1)
    both = Counter(ids(material.train_set)) + Counter(ids(material.held_out))
    assert both == Counter(whole(texts, bundled))
    assert 0.1 < material.held_out.tokens / sum(both.values()) < 0.3
    assert material.sequences == len(material.train_set)
    assert material.length * material.sequences == pytest.approx(material.train_set.tokens)
    assert material.prompt.startswith("Document") and END not in material.prompt
    again = gather_material(path, bundled, DataOptions(eval_fraction=0.2), 32, seed=1)
    assert ids(again.train_set) == ids(material.train_set) and again.fingerprint == material.fingerprint
    other = gather_material(path, bundled, DataOptions(eval_fraction=0.2), 32, seed=2)
    assert ids(other.held_out) != ids(material.held_out)


def test_gather_training_data_with_eval_file(tmp_path, datasets_cache, bundled):
    """With --eval-file all of the corpus is trained on."""
    corpus, held = [f"text {i}" for i in range(30)], [f"other {i}" for i in range(5)]
    path, other = write(tmp_path / "a.txt", corpus), write(tmp_path / "b.txt", held)
    for streaming in (False, True):
        material = gather_material(path, bundled, DataOptions(eval_file=other, streaming=streaming), 16, seed=1)
        train_set = material.train_set.read_shuffled(0) if streaming else material.train_set
        assert Counter(ids(train_set)) == Counter(whole(corpus, bundled))
        assert ids(material.held_out) == whole(held, bundled)
        assert material.length == 16 if streaming else material.length <= 16
        assert material.prompt == "other"


def test_gather_training_data_notes_nothing_held_out(tmp_path, datasets_cache, bundled, capsys):
    """A note says when nothing is held out."""
    path = write(tmp_path / "a.txt", ["one", "two"])
    material = gather_material(path, bundled, DataOptions(), 16, seed=1)
    assert len(material.held_out) == 0 and ids(material.train_set) == whole(["one", "two"], bundled)
    assert "nothing is held out" in note_of(capsys)


def test_gather_training_data_without_text(tmp_path, datasets_cache, bundled):
    """A corpus with nothing to train on is an error of one sentence."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "a " * 50, "completion": "b"}))
    (tmp_path / "blank.jsonl").write_text('{"text": " "}')
    for name in ("long.jsonl", "blank.jsonl"):
        for streaming in (False, True):
            with pytest.raises(HfkitError, match="nothing to (train on|learn)"):
                gather_material(tmp_path / name, bundled, DataOptions(streaming=streaming), 16, seed=1)


def test_gather_training_data_from_prepared(tmp_path, datasets_cache, bundled, tiny):
    """A prepared folder gives what its corpus would give, to its own tokenizer only."""
    path = write(tmp_path / "a.txt", [f"text {i}" for i in range(50)])
    prepare(path, bundled, tmp_path / "out")
    expected = gather_material(path, bundled, DataOptions(), 16, seed=1)
    for source in (tmp_path / "out", [str(tmp_path / "out")]):
        material = gather_material(source, bundled, DataOptions(), 16, seed=1)
        assert ids(material.train_set) == ids(expected.train_set)
        assert ids(material.held_out) == ids(expected.held_out)
        assert material.fingerprint == expected.fingerprint
    with pytest.raises(HfkitError, match="another tokenizer"):
        gather_material(tmp_path / "out", load_tokenizer(find(ModelOptions(model=tiny))), DataOptions(), 16, seed=1)
    with pytest.raises(HfkitError, match="made by prepare"):
        gather_material([str(tmp_path / "out"), path], bundled, DataOptions(), 16, seed=1)


def test_gather_training_data_sets_chat_template(tmp_path, datasets_cache, bundled):
    """A tokenizer that learns conversations gets a chat template if it has none, from the cache, too."""
    talks = [talk(("user", f"a {n}"), ("assistant", f"b {n}")) for n in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(example.row) + "\n" for example in talks))
    held = str(tmp_path / "held.jsonl")
    (tmp_path / "held.jsonl").write_text(json.dumps(talks[0].row))
    prepare(tmp_path / "a.jsonl", bundled, tmp_path / "out")
    for source in ("a.jsonl", "a.jsonl", "out"):  # the second time from the cache
        bundled.chat_template = None
        # What is measured on is encoded first, and must not change what the prepared folder is compared with.
        material = gather_material(tmp_path / source, bundled, DataOptions(eval_file=held), 64, seed=1)
        assert bundled.chat_template == CHAT_TEMPLATE
        assert material.prompt == "User: a 0\nAssistant:"
    bundled.chat_template = CHATML
    gather_material(tmp_path / "a.jsonl", bundled, DataOptions(), 64, seed=1)
    assert bundled.chat_template == CHATML
