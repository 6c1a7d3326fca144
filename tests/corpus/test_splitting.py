"""What is held out: as much as was asked for, never a copy of what is trained on, and something of a single text."""

import json
import random

import numpy as np
import pytest
from support.corpora import write

from hfkit.corpus.documents import END
from hfkit.corpus.encoding import content_of
from hfkit.corpus.labelled import gather_labelled_data
from hfkit.corpus.training_data import gather_training_data, hold_out, hold_out_texts
from hfkit.options import DataOptions


@pytest.mark.parametrize("seed", range(40))
def test_hold_out_takes_whole_documents(seed):
    """About the wanted part is held out, in whole documents."""
    draw = np.random.default_rng(seed)
    count, fraction = int(draw.integers(20, 400)), float(draw.choice([0.01, 0.05, 0.2, 0.5]))
    documents = np.repeat(np.arange(count), draw.integers(1, 8, count))
    sizes = (draw.lognormal(6, draw.choice([0.1, 1.5]), len(documents)) + 1).astype(int)
    train, held = hold_out(documents, sizes, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(documents)))
    assert not set(documents[train]) & set(documents[held])
    assert len(held) and len(train)
    bulk = np.bincount(documents, sizes)
    wanted = min(fraction * sizes.sum(), 1e6)
    # Off by half a document at most, and by what the seed had to choose from.
    assert abs(sizes[held].sum() - wanted) <= max(wanted, np.median(bulk)) * 0.75
    again = hold_out(documents, sizes, fraction, seed)
    assert (train == again[0]).all() and (held == again[1]).all()


def test_hold_out_follows_seed():
    """Another seed holds out other documents, and each document is as likely as the others."""
    documents, sizes = np.arange(100), np.full(100, 50)
    drawn = [hold_out(documents, sizes, 0.05, seed)[1] for seed in range(200)]
    assert len({tuple(held) for held in drawn}) > 190 and {len(held) for held in drawn} == {5}
    often = np.bincount(np.concatenate(drawn), minlength=100)  # 10 times each, on average
    assert often.min() >= 1 and often.max() <= 25


def test_hold_out_leaves_large_documents():
    """A document that is most of the corpus is never held out."""
    sizes = np.array([100] * 15 + [1_000_000] + [100] * 15)
    for seed in range(50):
        assert 15 not in hold_out(np.arange(31), sizes, 0.05, seed)[1]


def test_hold_out_of_few_units():
    """Of few units at least one is held out; of too few nothing is."""
    assert len(hold_out(np.arange(4), np.full(4, 10), 0.05, 0)[1]) == 1
    for rows in range(4):
        train, held = hold_out(np.arange(rows), np.full(rows, 10), 0.5, 0)
        assert len(held) == 0 and train.tolist() == list(range(rows))
    assert len(hold_out(np.arange(100), np.full(100, 10), 0.0, 0)[1]) == 0


def test_hold_out_takes_a_megabyte():
    """At most a megabyte is held out."""
    sizes = np.full(100_000, 1000)
    held = hold_out(np.arange(100_000), sizes, 0.05, 0)[1]
    assert sizes[held].sum() == 1_000_000


def test_hold_out_keeps_rows_and_bytes_small():
    """Neither the rows nor the bytes that are held out are much more than the fraction, whatever the sizes are."""
    skewed = np.array([30] * 28 + [9000] * 12)
    for sizes in (skewed, skewed[::-1], np.array([1, 1, 1, 100]), np.geomspace(1, 1e5, 60)):
        for seed in range(20):
            _, held = hold_out(np.arange(len(sizes)), sizes, 0.05, seed)
            assert 1 <= len(held) <= 1 + 0.05 * len(sizes)
            assert sizes[held].sum() <= max(2 * 0.05 * sizes.sum(), sizes.min())


def test_hold_out_keeps_copies_together():
    """Rows of one unit are on one side, wherever they stand."""
    units = np.random.default_rng(0).permutation(np.arange(200) % 50)
    for seed in range(20):
        train, held = hold_out(units, np.full(200, 100), 0.05, seed)
        assert not {*units[train]} & {*units[held]} and 4 <= len(held) <= 16


def test_content_of_ignores_case_and_space():
    """Copies that differ in white space or case count as copies; other texts do not."""
    assert content_of("One two\nthree ") == content_of(" one  two three\r\n") != content_of("one two tree")
    assert content_of("Stra\u00dfe") == content_of("STRASSE") != content_of("") == content_of(" \n")


def pieces(*documents) -> list[np.ndarray]:
    """Documents, contents and sizes of documents that are lists of (content, size)."""
    rows = [(number, *row) for number, document in enumerate(documents) for row in document]
    return list(np.array(rows, np.int64).T)


def test_hold_out_texts_takes_the_end_of_a_book():
    """Of one text its end is held out as one piece; the row where it begins is cut."""
    shares = hold_out_texts(*pieces([(row, 4000) for row in range(100)]), 0.05, 0)
    assert shares.tolist() == [0] * 95 + [1] * 5
    shares = hold_out_texts(*pieces([(1, 4000), (2, 4000)]), 0.05, 0)
    assert shares.tolist() == [0, 0.1]
    shares = hold_out_texts(*pieces([(1, 300)], [(2, 4000), (3, 4000), (4, 100)], [(5, 300)]), 0.05, 0)
    assert shares.tolist() == pytest.approx([0, 0, 335 / 4000, 1, 0])


def test_hold_out_texts_of_many_books():
    """Of many long texts, too, a megabyte is enough: the end of one of them."""
    documents = np.repeat(np.arange(5000), 300)
    shares = hold_out_texts(documents, np.arange(len(documents)), np.full(len(documents), 4000), 0.05, 0)
    assert shares.sum() * 4000 == 600_000 and len({*documents[shares > 0]}) == 1


def test_hold_out_texts_of_too_little():
    """Of next to nothing, and where nothing is asked for, nothing is held out."""
    assert not hold_out_texts(*pieces([(1, 400)], [(2, 400)]), 0.05, 0).any()
    assert not hold_out_texts(*pieces([(1, 4000)]), 0.0, 0).any()
    assert len(hold_out_texts(*np.zeros((3, 0), np.int64), 0.05, 0)) == 0


def test_hold_out_texts_keeps_copies_together():
    """Copies of a document of several pieces share its fate: whole or, where documents are few, its end."""
    book = [(1, 4000), (2, 4000), (3, 500)]
    shares = hold_out_texts(*pieces(book, [(4, 300)], book, [(3, 500)]), 0.05, 0)
    assert (shares[:3] == shares[4:7]).all() and 0.7 < shares[2] < 1 and not shares[[0, 1, 3, 7]].any()
    reordered = [book[1], book[0], book[2]]
    documents = [book, reordered, *([(10 + number, 700)] for number in range(30)), book]
    for seed in range(40):
        shares = hold_out_texts(*pieces(*documents), 0.3, seed)
        assert {*shares} == {0.0, 1.0} and (shares[:3] == shares[-3:]).all() and len({*shares[3:6]}) == 1


_NAMES = ["".join(random.Random(number).choices("abcdefgh", k=6)) for number in range(50)]
FABLES = [f"The fox {name} met a crow and said: {'well, ' * (1 + size)}." for size, name in enumerate(_NAMES)]


def texts_of(sequences, tokenizer) -> set[str]:
    """The documents of packed sequences; of one that is an example, without what is padding."""
    text = tokenizer.decode([i for item in sequences for i in np.asarray(item["input_ids"]).tolist()])
    return {part.strip().lower() for part in text.split(END) if part.strip()}


@pytest.mark.parametrize("kind", ["txt", "jsonl", "prompts", "messages"])
def test_gather_training_data_splits_no_copies(tmp_path, datasets_cache, bundled, kind):
    """No copy of a held-out document or example is trained on, even if its case or its spaces differ."""
    copies = [*FABLES, *FABLES, *(fable + "  " for fable in FABLES), *(fable.upper() for fable in FABLES)]
    random.Random(0).shuffle(copies)
    if kind == "prompts":
        rows = [{"prompt": text[:20], "completion": text[20:]} for text in copies]
    else:
        rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": t}]} for t in copies]
    path = tmp_path / f"a.{kind if kind == 'txt' else 'jsonl'}"
    if kind in ("txt", "jsonl"):
        write(path, copies)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = gather_training_data(str(path), bundled, DataOptions(), 512, seed=1)
    held, trained = texts_of(data.held_out, bundled), texts_of(data.train_set, bundled)
    assert len(held) >= 2 and len(trained) >= 40 and not held & trained


def test_gather_labelled_data_splits_no_copies(tmp_path, tiny_bert):
    """Rows of one text stay together, whatever their labels."""
    from hfkit.models.loading import load_tokenizer
    from hfkit.models.sources import find_model
    from hfkit.options import ModelOptions

    tokenizer = load_tokenizer(find_model(ModelOptions(model=tiny_bert)))
    rows = [{"text": fable, "label": ["good", "bad"][copy % 2]} for copy in range(4) for fable in FABLES]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = gather_labelled_data(str(tmp_path / "a.jsonl"), tokenizer, DataOptions(), "classification", 64, 1, None)
    held, trained = ({tuple(item["input_ids"]) for item in part} for part in (data.held_out, data.train_set))
    assert not held & trained
    assert held and len(data.held_out) % 4 == 0


@pytest.mark.parametrize(("short", "long"), [(28, 12), (15, 15)])
def test_gather_training_data_holds_out_what_fits(tmp_path, datasets_cache, bundled, capsys, short, long):
    """Examples that do not fit are left out first; of the others the wanted part is held out."""
    sizes = [3] * short + [1500] * long
    rows = [{"prompt": f"{number} " + "word " * size, "completion": "yes"} for number, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = gather_training_data(str(tmp_path / "a.jsonl"), bundled, DataOptions(), 512, seed=1)
    assert len(data.held_out) == 1 and len(data.train_set) == short - 1
    assert capsys.readouterr().err.count(f"more than 512 tokens are left out: {long} of {short + long}") == 1


@pytest.mark.parametrize("size", [3_000, 9_000, 200_000])
def test_gather_training_data_holds_out_the_end_of_one_text(tmp_path, datasets_cache, bundled, size):
    """Of a single text, however short, the end is measured on and the rest is trained on; no token is lost."""
    draw = random.Random(0)
    text = " ".join(draw.choice(["rain", "wind", "stone", "light"]) for _ in range(size // 5))
    data = gather_training_data(write(tmp_path / "a.txt", [text]), bundled, DataOptions(), 64, seed=1)
    trained, held = ([i for item in part for i in item["input_ids"].tolist()]
                     for part in (data.train_set, data.held_out))  # fmt: skip
    assert bundled.decode(trained + held) == text + END and bundled.decode(held).startswith(" ")
    assert 0.03 < len(held) / len(trained + held) < 0.07 and data.held_out.tokens == len(held)
