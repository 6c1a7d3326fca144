"""Every shipped recipe: its three lines run, on less data here and whole under `-m slow`, and beat their baseline."""

import csv
import json
import math
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support import trials
from support.shell import assert_fails, call, run

import hfkit
from hfkit.models.sources import BUNDLED
from hfkit.options import DataOptions, GenerateOptions, SizeOptions, TrainOptions
from hfkit.recipes import head_comment as describe
from hfkit.recipes import read_values, shipped
from hfkit.training.pretraining import train_tokenizer

TRAINED = [name for name in shipped() if name not in ("sampling-story", "bundled")]
# Figures that are better when they are lower.
COSTS = ("perplexity", "loss")


def lines_of(recipe: Path) -> list[str]:
    """The three commands in a recipe's head: train, score, use."""
    return [line.strip() for line in describe(recipe) if re.match(r"  (echo .*\| )?hfkit ", line)][:3]


def arguments_of(line: str) -> tuple[list[str], bytes | None]:
    """A command line as arguments of hfkit, and what is piped into it."""
    before, _, command = line.rpartition("hfkit ")
    piped = shlex.split(before.rstrip("| "))[1] if before else None
    return shlex.split(command), None if piped is None else f"{piped}\n".encode()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A random GPT-2 with the bundled model's tokenizer, so that real texts are not too long."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, set_seed

    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = GPT2Tokenizer.from_pretrained(BUNDLED)
    set_seed(0)
    end = tokenizer.eos_token_id
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=512,
            n_embd=32,
            n_layer=2,
            n_head=2,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def kitchen(tmp_path, monkeypatch):
    """A folder to copy a recipe into, and to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shorten(path: Path, rows: int = 24) -> None:
    """Keep the first rows or documents of a data file."""
    if path.suffix == ".txt":
        parts = path.read_text().split("<|endoftext|>\n")
        path.write_text("<|endoftext|>\n".join(parts[:8]))
    else:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: rows + (path.suffix == ".csv")]))


@pytest.mark.parametrize("name", TRAINED)
def test_recipe_commands_run(name, kitchen, small, monkeypatch, capfdbinary):
    """The three commands in a recipe's head run."""
    monkeypatch.setenv("HFKIT_MODEL", small)
    assert call(capfdbinary, "recipes", "copy", name).returncode == 0
    for path in Path("data").iterdir():
        shorten(path)
    lines = lines_of(Path(f"{name}.yaml"))
    assert len(lines) == 3
    for line in lines:
        arguments, piped = arguments_of(line)
        if arguments[0] in ("finetune", "pretrain", "tune"):
            arguments += ["--max-steps", "2", "--per-device-train-batch-size", "2", "--eval-steps", "2"]
            arguments += ["--eval-fraction", "0.3"] + (["-n", "1"] if arguments[0] == "tune" else [])
            arguments += ["--num-processes", "1"] if arguments[0] != "tune" else []
        if arguments[0] in ("generate", "chat"):
            arguments += ["-n", "4"]
        if piped is not None:
            Path("piped").write_bytes(piped)
            import io

            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(open("piped", "rb")))
        result = call(capfdbinary, *arguments)
        # An untrained BERT may find that the text has no answer, which is told by the exit code.
        assert result.returncode == 0 or b"does not answer that" in result.stderr, (line, result.stderr.decode())


@pytest.fixture
def books(kitchen, corpus) -> list[str]:
    """Books to try the bundled model's recipe on, and the options that fit them."""
    texts = Path(corpus).read_text().split("<|endoftext|>")
    for name, part in (("books", texts[4:]), ("aside-books", texts[:4])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"title": name, "text": text}) + "\n" for text in part))
    return ["pretrain", "--config", "bundled", "--vocab-size", "300", "-q"]


def test_bundled_twice(books, capfdbinary):
    """The recipe of the bundled model gives the same weights each time, to the bit."""
    small = ["--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--n-positions", 32, "--num-processes", 1, "--no-bf16"]
    steps = ["--max-steps", 8, "--warmup-steps", 2, "--lr-scheduler-kwargs", '{"num_decay_steps": 4}']
    for folder in ("first", "second"):
        result = call(capfdbinary, *books, *small, *steps, "-o", folder)
        assert result.returncode == 0, result.stderr
    assert trials.outcome("first") == trials.outcome("second")


@pytest.mark.slow
def test_bundled_twice_at_full_size(books):
    """200 steps of the recipe as it is, in two processes, but for shorter sequences."""
    for folder in ("first", "second"):
        result = run(*books, "--block-size", 128, "--max-steps", 200, "-o", folder, timeout=1500)
        assert result.returncode == 0, result.stderr
    assert trials.outcome("first") == trials.outcome("second")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "pretrain-chinese"])
def test_recipe_beats_its_baseline(name, kitchen):
    """A recipe beats its baseline by more than the error."""
    assert run("recipes", "copy", name).returncode == 0
    train, score, use = map(arguments_of, lines_of(Path(f"{name}.yaml")))
    for arguments, piped in (train, use):
        result = run(*arguments, input=piped, timeout=1500)
        assert result.returncode == 0 and result.stdout.strip(), result.stderr.decode()
        if arguments is train[0]:
            scored = run(*score[0], *(["--json"] if score[0][0] == "evaluate" else []), timeout=900)
            assert scored.returncode == 0, scored.stderr.decode()
    if score[0][0] != "evaluate":  # of a search
        trials = json.loads(Path("runs/tune/tuning.json").read_text())
        losses = [trial["loss"] for trial in trials["trials"] if trial["loss"] is not None]
        best = json.loads(Path("runs/tuned/metrics.json").read_text())["loss"]
        assert best == pytest.approx(min(losses), rel=1e-9) and best < max(losses)
        return
    found = json.loads(scored.stdout)
    if isinstance(found, list):
        before, after = (hfkit.evaluate(score[0][1], model=one["model"]) for one in found)
        gain, error = after.gain_over(before)  # of the difference, which is known better than either figure
        assert gain > 2 * error > 0
        return
    figure = next(key for key in ("accuracy", "exact_match", "chrf") if key in found)
    for baseline in found["baselines"].values():
        assert found[figure] - baseline[figure] > 2 * found[f"{figure}_stderr"] > 0


def ngram_bits(train: list[str], test: list[str], size: int) -> float:
    """Bits per byte of `test` under an interpolated model of `size` characters with absolute discounting."""
    counts: Counter[str] = Counter()
    begin, discount, signs = "\x02" * (size - 1), 0.75, 21_000
    for text in train:
        padded = f"{begin}{text}\x03"
        counts.update(padded[i - k : i + 1] for i in range(size - 1, len(padded)) for k in range(size))
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for gram, count in counts.items():
        totals[gram[:-1]] += count
        kinds[gram[:-1]] += 1
    bits = 0.0
    for text in test:
        for i in range(size - 1, len(begin + text)):
            chance = 1 / signs
            for k in range(size):
                before = (begin + text)[i - k : i]
                if before in totals:
                    own = max(counts[before + (begin + text)[i]] - discount, 0)
                    chance = (own + discount * kinds[before] * chance) / totals[before]
            bits -= math.log2(chance)
    return bits / sum(len(text.encode()) for text in test)


@pytest.mark.slow
def test_pretrain_chinese(kitchen):
    """A new model of Chinese beats six characters' statistics, and writes no part of a character."""
    assert run("recipes", "copy", "pretrain-chinese").returncode == 0
    train, score, use = (arguments_of(line)[0] for line in lines_of(Path("pretrain-chinese.yaml")))
    assert run(*train, timeout=1500).returncode == 0
    scored = json.loads(run(*score, "--json", timeout=900).stdout)
    texts = [
        Path(f"data/{name}.txt").read_text("utf-8").split("<|endoftext|>\n") for name in ("chinese", "chinese-test")
    ]
    assert scored[1]["bits_per_byte"] + 2 * scored[1]["bits_per_byte_stderr"] < ngram_bits(*texts, 6)
    assert scored[1]["bits_per_byte"] < scored[0]["bits_per_byte"]
    prompt = use[3]
    assert run(*use).stdout.decode().startswith(prompt)
    samples = hfkit.generate([prompt] * 50, model="runs/chinese", seed=0, max_new_tokens=100)
    assert not any("\ufffd" in str(sample) for sample in samples)
    assert sum(sample.finish_reason == "stop" for sample in samples) > 40  # they come to an end


def test_recipe_head_says_its_purpose():
    """Every recipe says in its first line what it is for."""
    for name, path in shipped().items():
        first, empty, *_ = describe(path)
        assert 20 < len(first) < 110 and empty == "", name
        assert any(f"--config {name}" in line for line in lines_of(path)), name


def test_data_is_split_and_licensed():
    """Training and test data do not overlap, and their licence is named."""
    data = next(iter(shipped().values())).parent / "data"
    told = (data / "README.md").read_text()
    for path in data.iterdir():
        if path.name == "README.md":
            continue
        assert f"`{path.name.replace('-test', '')}`" in told and told.count("CC0-1.0") > 7
        if "-test" in path.name:
            rest = path.with_name(path.name.replace("-test", ""))
            mark = "<|endoftext|>\n" if path.suffix == ".txt" else "\n"
            parts = [set(file.read_text().split(mark)[path.suffix == ".csv" :]) - {""} for file in (path, rest)]
            assert parts[0] and not parts[0] & parts[1], path.name


def test_data_is_sound():
    """Answers stand in their contexts, and labels are balanced."""
    data = next(iter(shipped().values())).parent / "data"
    for row in map(json.loads, (data / "questions.jsonl").read_text().splitlines()):
        assert row["answer"] in row["context"]
    size = int(re.search(r"vocab_size: (\d+)", shipped()["pretrain-chinese"].read_text("utf-8"))[1])
    tokenizer = train_tokenizer(str(data / "chinese.txt"), SizeOptions(vocab_size=size), DataOptions(), 42)
    for name in ("chinese.txt", "chinese-test.txt"):  # no character is spelled byte by byte
        tokens = set(tokenizer((data / name).read_text("utf-8"))["input_ids"])
        assert not any("\ufffd" in text for text in tokenizer.batch_decode([[token] for token in tokens]))
    with (data / "reviews.csv").open(newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert 0.45 < labels.count("positive") / len(labels) < 0.55


def test_recipes_lists_all(capfdbinary):
    """Recipes are listed, a line each."""
    result = call(capfdbinary, "recipes")
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0 and [line.split()[0] for line in lines] == list(shipped())


def test_copy_refuses(kitchen, capfdbinary):
    """A copy does not overwrite, and a wrong name gets a hint."""
    assert call(capfdbinary, "recipes", "copy", "generation-poems").returncode == 0
    assert_fails(call(capfdbinary, "recipes", "copy", "generation-poems"), 1, "exists")
    assert_fails(call(capfdbinary, "recipes", "copy", "generation-poem"), 1, "did you mean 'generation-poems'")


def test_copy_on_a_full_disk(kitchen, capfdbinary, monkeypatch):
    """A full disk leaves no cut file, and the line names the file."""

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert_fails(call(capfdbinary, "recipes", "copy", "generation-poems"), 1, "generation-poems.yaml: No space left")
    assert not list(kitchen.rglob("*.*"))


def test_read_values_finds_shipped_recipes(kitchen):
    """A shipped recipe is found by name and finds its data."""
    values = read_values("generation-poems", ["corpus", *TrainOptions.names(), *DataOptions.names()])
    assert Path(values["corpus"]).is_file()
    shutil.copytree(shipped()["generation-poems"].parent / "data", "data")
    values = read_values("generation-poems", ["corpus", *TrainOptions.names(), *DataOptions.names()])
    assert values["corpus"] == "data/poems.txt"
    values = read_values(shipped()["sampling-story"], GenerateOptions.names())
    assert GenerateOptions.read(values).temperature == 0.8
