"""What is said to be copied is what a plain search finds, and what must not be copied is not."""

import itertools
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from support.corpora import longest_common, share_of
from support.shell import assert_fails, call
from support.trials import write_corpus

import hfkit
from hfkit.cli.generate_file import Results
from hfkit.corpus import overlap
from hfkit.corpus.documents import END, Piece
from hfkit.corpus.overlap import Index, index_corpus
from hfkit.errors import HfkitError, OptionError
from hfkit.inference import generation, remote


def pieces(documents: list[list[str]], draw: random.Random) -> list[Piece]:
    """Documents in pieces, cut between words anywhere."""
    found = []
    for document in documents:
        cuts = sorted(draw.choices(range(len(document) + 1), k=draw.randint(0, 3)))
        parts = zip([0, *cuts], [*cuts, len(document)], strict=True)
        found += [Piece(" ".join(document[start:end]) + " ", False) for start, end in parts]
        found[-1] = found[-1]._replace(last=True)
    return found


@pytest.mark.parametrize("length", [2, 3, 8])
@pytest.mark.parametrize("seed", range(20))
def test_index_agrees_with_plain_search(seed, length):
    """The index finds what a plain search finds."""
    draw = random.Random(seed)
    words = ["rain", "wind", "stone", "light"][: draw.choice([2, 3, 4])]
    documents = [draw.choices(words, k=draw.randint(0, 70)) for _ in range(draw.randint(1, 6))]
    index = Index(pieces(documents, draw), length)
    for _ in range(5):
        sample = draw.choices(words, k=draw.randint(0, 30))
        source = draw.choice(documents)
        start = draw.randint(0, len(source))
        sample += source[start : start + draw.randint(0, 25)] + draw.choices(words, k=draw.randint(0, 8))
        found = index.look_up(" ".join(sample))
        longest = longest_common(sample, documents)
        assert found.words == (longest if longest >= length else 0)
        assert found.share == pytest.approx(share_of(sample, documents, length))
        assert len(found.longest.split()) == found.words
        assert any(found.longest in " ".join(document) for document in documents)


def test_index_joins_no_distant_runs():
    """Runs from different places are not one long run."""
    one, two = "a b c d e f g h x", "y b c d e f g h i"
    found = Index([Piece(one, True), Piece(two, True)]).look_up("a b c d e f g h i")
    assert (found.words, found.share) == (8, 1.0)
    # Nor are the end of a document and the beginning of the next one.
    found = Index([Piece("a b c d e f g h", True), Piece("b c d e f g h i", True)]).look_up("a b c d e f g h i")
    assert found.words == 8
    assert Index([Piece("a b c d", True), Piece("e f g h", True)]).look_up("a b c d e f g h").words == 0


def test_index_splits_words():
    """Case and punctuation do not matter, and each Chinese character is a word."""
    index = Index([Piece("The rain, the wind -- “and” the stone\nfell: again. 一二三四五六七八九", True)])
    found = index.look_up("so THE RAIN the wind and the stone fell, yes")
    assert (found.longest, found.words) == ("the rain the wind and the stone fell", 8)
    assert index.look_up("零一二三四五六七八,九").words == 9
    assert index.look_up("").words == index.look_up("rain").words == Index([]).look_up("a b c d e f g h i").words == 0


def test_index_corpus_reads_pieces(tmp_path, monkeypatch, capsys):
    """A file without an end-of-text token is one document, however large: it is read in pieces, up to a limit."""
    draw = random.Random(0)
    words = [f"w{draw.randrange(10**6)}" for _ in range(9000)]
    (tmp_path / "corpus.txt").write_text(" ".join(words))
    held = []
    monkeypatch.setattr(overlap, "_split", lambda text, split=overlap._split: held.append(len(text)) or split(text))
    index = index_corpus(tmp_path / "corpus.txt")
    assert len(held) > 10 and max(held) < 10_000
    assert index.look_up(" ".join(words)).words == 9000 and index.is_whole
    monkeypatch.setattr(overlap, "MOST", 3000)
    capsys.readouterr()
    part = index_corpus(tmp_path / "corpus.txt")
    assert not part.is_whole and 3000 <= part.look_up(" ".join(words)).words < 5000
    assert "first 3,000 words" in capsys.readouterr().err


def test_index_corpus_of_examples(tmp_path):
    """Of examples the answers are indexed."""
    answer = "one two three four five six seven eight nine"
    messages = [{"role": "user", "content": answer.upper()[:13] + " x"}, {"role": "assistant", "content": answer}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": answer, "completion": "no"}) + "\n")
    assert index_corpus(tmp_path / "a.jsonl").look_up(answer).words == 9
    assert index_corpus(tmp_path / "b.jsonl").look_up(answer).words == 0


# samples that are new


@pytest.fixture(scope="module")
def parrot(tmp_path_factory, tiny):
    """A model that says three words at random, and a corpus of some of what it says."""
    import torch

    lm = hfkit.load(tiny)
    ids = [lm.tokenizer(letter)["input_ids"][0] for letter in "abc"]
    space = lm.tokenizer(" ")["input_ids"][0]

    class Parrot(type(lm.model)):
        def forward(self, input_ids=None, **arguments):
            output = super().forward(input_ids=input_ids, **arguments)
            logits = torch.full_like(output.logits, -1e4)
            for row, each in enumerate(input_ids):
                for column, token in enumerate(each[-logits.shape[1] :].tolist()):
                    logits[row, column, ids if token == space else [space]] = 0.0
            output.logits = logits
            return output

    lm.model.__class__ = Parrot
    corpus = tmp_path_factory.mktemp("parrot") / "corpus.txt"
    draw = random.Random(1)
    corpus.write_text(END.join(" ".join(draw.choices("abc", k=20)) for _ in range(2)))
    return lm, str(corpus)


def copied(text: str, corpus: str) -> int:
    documents = [document.split() for document in open(corpus).read().split(END)]
    return longest_common(text.split(), documents)


def test_generate_novel_limits_copies(parrot):
    """No sample copies more words than are allowed."""
    lm, corpus = parrot
    asked = {"model": lm, "max_new_tokens": 20, "seed": 0}
    prompts = ["a"] * 12
    plain = hfkit.generate(prompts, **asked)
    counts = [copied(one.completion, corpus) for one in plain]
    assert max(counts) > 5 > min(counts)
    found = hfkit.generate(prompts, **asked, novel=corpus, novel_words=5)
    assert all(copied(one.completion, corpus) <= 5 for one in found)
    for count, before, now in zip(counts, plain, found, strict=True):
        assert (now == before) == (count <= 5)  # what was new already stays as it is
        assert now == hfkit.generate("a", **asked | {"seed": now.seed})  # its seed gives it again
        assert now.seed % generation.REDRAW_STRIDE == before.seed
    streamed = hfkit.stream("a", **asked, novel=corpus, novel_words=5)
    assert "".join(streamed) == found[0].completion
    many = hfkit.generate("a", **asked, novel=corpus, novel_words=5, num_return_sequences=4)
    assert [one.completion for one in many] == [one.completion for one in found[:4]]


def test_generate_novel_gives_up(parrot):
    """Where every sample is a copy, the error says so."""
    lm, corpus = parrot
    with pytest.raises(HfkitError, match="copies more than 1 words, such as '[abc ]+': raise --novel-words"):
        hfkit.generate("a", model=lm, max_new_tokens=30, seed=0, novel=corpus, novel_words=1)
    for other in ({"temperature": 0}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(OptionError, match="--novel draws again"):
            hfkit.generate("a", model=lm, novel=corpus, **other)


def test_generate_novel_reads_changed_corpus(parrot, tmp_path):
    """A corpus that changes is read again."""
    lm, _ = parrot
    path = tmp_path / "corpus.txt"
    path.write_text("nothing of that")
    asked = {"model": lm, "max_new_tokens": 20, "seed": 0, "novel": path, "novel_words": 5}
    first = hfkit.generate("a", **asked)
    path.write_text(first.completion)
    assert hfkit.generate("a", **asked) != first


def test_generate_novel_resumes_seeds(tiny, tmp_path, capfdbinary, monkeypatch):
    """The last record may be of a redrawn text and so have a seed that is far away."""
    corpus = write_corpus(tmp_path / "corpus.txt", 2)
    (tmp_path / "prompts.txt").write_text("".join(f"{number}\n" for number in range(9)))

    def look_up(self, text: str) -> overlap.Copied:  # some texts are called copies
        return overlap.Copied("", 9 * (sum(map(ord, text)) % 2), 0.0)

    def texts(path: Path) -> list[tuple[str, int]]:
        return [(row["completion"], row["seed"]) for row in map(json.loads, path.read_text().splitlines())]

    def begin(self, settings, begin=Results.begin) -> None:
        begin(self, settings)
        shutil.copy(f"{self.partial}.json", tmp_path / "settings.json")

    monkeypatch.setattr(Results, "begin", begin)
    monkeypatch.setattr(Index, "look_up", look_up)
    seeds = itertools.count(12, 100)
    monkeypatch.setattr(remote, "seed_of", lambda options: next(seeds) if options.seed is None else options.seed)
    line = ["generate", "-i", tmp_path / "prompts.txt", "-m", tiny, "-n", 8, "--novel", corpus]
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    for seed in (["-s", 5], ["-s", 2**41 + 7], []):
        assert call(capfdbinary, *line, "-o", whole, "--overwrite", *seed).returncode == 0
        rows = whole.read_text().splitlines()
        base = seed[1] if seed else json.loads(rows[0])["seed"] % generation.REDRAW_STRIDE
        far = [number for number, (_, own) in enumerate(texts(whole)) if own != base + number]
        assert far and base < 2**42
        for number in {*far[:2], 3}:
            part.unlink(missing_ok=True)
            part.with_name("part.jsonl.partial").write_text("".join(row + "\n" for row in rows[: number + 1]))
            shutil.copy(tmp_path / "settings.json", tmp_path / "part.jsonl.partial.json")
            result = call(capfdbinary, *line, "-o", part, "--resume", *seed)
            assert result.returncode == 0, result.stderr
            assert texts(part) == texts(whole)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no corpus"), (b"", "empty"), (b"a \xff b", "UTF-8"), (b"a\0b", "not")]
)
def test_generate_novel_checks_corpus_first(tiny, tmp_path, capfdbinary, monkeypatch, content, words):
    """A corpus that cannot be read is an error of one line, before a model is loaded."""
    monkeypatch.setattr("hfkit.models.loading.load_weights", None)
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    assert_fails(call(capfdbinary, "generate", "a", "-m", tiny, "--novel", path), 1, words, "corpus.txt")
    with pytest.raises(HfkitError, match=re.escape(str(path))):
        hfkit.generate("a", model=tiny, novel=path)


def test_generate_novel_words_is_a_number(tiny, tmp_path, capfdbinary):
    """--novel-words that is not a positive number is a usage error."""
    for value in (0, -1, "many"):
        assert_fails(call(capfdbinary, "generate", "a", "-m", tiny, "--novel-words", value), 2, "--novel-words")
