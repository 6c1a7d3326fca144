"""A trained run is not lost, says how it ended, and is watched by what matters."""

import json
import random
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import trials
from support.shell import assert_fails, call
from transformers import TrainerCallback

import hfkit
from hfkit.errors import HfkitError, OptionError
from hfkit.reporting.pages import make_files
from hfkit.training import run_folder
from hfkit.training.checkpoints import commit, find_newest
from hfkit.training.monitor import best_step, is_stale
from hfkit.training.runs import advise

pytestmark = pytest.mark.usefixtures("brisk")
SMALL = {**trials.SMALL, "max_steps": 2, "eval_steps": 1}


def train(corpus, model, folder=None, **options):
    return hfkit.finetune(corpus, model=model, output_dir=folder, **{**SMALL, **options})


class AtBegin(TrainerCallback):
    """Do something when the training begins."""

    def __init__(self, action) -> None:
        self._action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self._action()


def fingerprint(folder) -> str:
    return json.loads((Path(folder) / "run.json").read_text())["corpus_sha256"]


# inside of the corpus


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """A folder with a corpus, which is the current folder."""
    (tmp_path / "texts").mkdir()
    trials.write_corpus(tmp_path / "texts" / "plain.txt")
    monkeypatch.chdir(tmp_path / "texts")
    return tmp_path / "texts"


@pytest.mark.parametrize(
    "source", [".", "**/*.txt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("{}", "{}/../texts"))]
)
def test_finetune_inside_its_corpus(tiny, texts, source):
    """A run in a folder of its corpus learns from the same files as one elsewhere, and so does the next run there."""
    elsewhere = fingerprint(train(str(texts / "plain.txt"), tiny, texts.parent / "elsewhere").output_dir)
    first = train(source.format(texts), tiny)  # into runs/ of the current folder
    assert (texts / "runs").is_dir() and fingerprint(first.output_dir) == elsewhere
    second = train(source.format(texts), tiny, texts / "deep" / "er")
    assert fingerprint(second.output_dir) == elsewhere and second.metrics["copied"]["share"] >= 0
    again = train(source.format(texts), tiny, texts / "deep" / "er", resume=True)
    assert again.metrics == second.metrics


def test_finetune_resumed_inside_its_corpus(tiny, texts):
    def cut() -> None:
        raise MemoryError

    class PowerCut(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                cut()

    with pytest.raises(MemoryError):
        train(str(texts), tiny, texts / "run", callbacks=[PowerCut()])
    assert (texts / "run" / "checkpoints" / "checkpoint-1").is_dir()
    assert train(str(texts), tiny, texts / "run", resume=True).metrics["steps"] == 2


def test_pretrain_inside_its_corpus(texts):
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 300}
    runs = [hfkit.pretrain(str(texts), output_dir=texts / name, **sizes, **SMALL) for name in ("a", "b")]
    assert len({fingerprint(run.output_dir) for run in runs}) == 1


# what decorates a report


@pytest.mark.parametrize("how", ["deleted", "emptied", "another"])
def test_finetune_while_its_corpus_goes(tiny, tmp_path, capfd, how):
    """A corpus that is deleted or changed while the model trains costs the report a figure, not the run."""
    corpus = Path(trials.write_corpus(tmp_path / "corpus.txt"))
    acts = {
        "deleted": corpus.unlink,
        "emptied": lambda: corpus.write_text(""),
        "another": lambda: corpus.write_bytes(b"\xff\xfe\xff"),
    }
    run = train(str(corpus), tiny, tmp_path / "run", callbacks=[AtBegin(acts[how])])
    assert run.metrics["loss"] and run.metrics["samples"] and hfkit.load(run.output_dir)
    noted = [line for line in capfd.readouterr().err.splitlines() if "will be missing from the report" in line]
    assert len(noted) == (0 if how == "emptied" else 1) and bool(run.metrics["copied"]) == (how == "emptied")


@pytest.mark.parametrize("name", ["make_files", "generate", "index_corpus"])
def test_report_that_cannot_be_made(tiny, corpus, tmp_path, monkeypatch, capfd, name):
    def fail(*_, **__):
        raise RuntimeError("no font has this sign")

    monkeypatch.setattr("hfkit.training.runs.make_files", make_files)
    monkeypatch.setattr(f"hfkit.training.runs.{name}", fail)
    run = train(corpus, tiny, tmp_path / "run")
    assert hfkit.load(run.output_dir) and json.loads((tmp_path / "run" / "metrics.json").read_text()) == run.metrics
    assert "will be missing from the report: no font has this sign" in capfd.readouterr().err
    assert (tmp_path / "run" / "README.md").is_file() == (name != "make_files")


# what is recorded


def test_command_of_a_program(tiny, corpus, tmp_path, monkeypatch):
    """The arguments of the program that calls hfkit may hold secrets: the options are recorded instead."""
    monkeypatch.setattr(sys, "argv", ["serve.py", "--password", "hunter2"])
    run = train(corpus, tiny, tmp_path / "a run", lora_r=4, report_to=["none"], bf16=False, sample_prompt="Once; upon")
    words = shlex.split(run.metrics["command"])
    assert words[:3] == ["hfkit", "finetune", corpus] and words[words.index("--sample-prompt") + 1] == "Once; upon"
    assert words[words.index("--output-dir") + 1] == str(tmp_path / "a run") and "--no-bf16" in words
    assert words[words.index("--report-to") + 1] == "none" and words[words.index("--lora-r") + 1] == "4"
    for path in Path(run.output_dir).rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_command_can_be_typed(tiny, corpus, tmp_path, capfdbinary, monkeypatch):
    """The recorded command gives the same model, whoever gave the options."""
    monkeypatch.chdir(tmp_path)
    run = train(Path(corpus), tiny, tmp_path / "run", sample_prompt="it's")
    typed = shlex.split(run.metrics["command"])[1:]
    typed[typed.index("--output-dir") + 1] = "again"
    assert call(capfdbinary, *typed).returncode == 0
    assert trials.outcome("again") == trials.outcome("run")


def test_folder_of_a_new_model(tiny, corpus, tmp_path, monkeypatch):
    """Fine-tuning and pretraining on one corpus do not meet in one folder."""
    monkeypatch.chdir(tmp_path)
    new = hfkit.pretrain(corpus, n_layer=1, n_embd=16, n_head=2, n_positions=32, vocab_size=300, **SMALL)
    assert (train(corpus, tiny).output_dir, new.output_dir) == ("runs/corpus", "runs/corpus-pretrained")


# how it ends


def told(capfd) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_end_of_a_run(tiny, corpus, tmp_path, monkeypatch, capfd):
    """After the last step: that the end is being written, what was gained, the report, and the command to type."""
    monkeypatch.setattr("hfkit.training.runs.make_files", make_files)
    run = train(corpus, tiny, tmp_path / "my run", learning_rate=1e-3)
    lines, figures = told(capfd), run.metrics
    at = lines.index("hfkit: writing samples and the report")
    gained = f"{figures['perplexity_before']:,.2f} → {figures['perplexity']:,.2f}"
    assert f"held-out perplexity: {gained} (in blocks of 64 tokens" in lines[at + 1]
    assert lines[-2] == f"hfkit: report: {tmp_path}/my run/report.html"
    assert lines[-1].startswith(f"hfkit: next: hfkit generate -m '{tmp_path}/my run' ")
    train(corpus, tiny, tmp_path / "my run", learning_rate=1e-3, resume=True)
    assert told(capfd)[-1] == f"hfkit: {tmp_path / 'my run'} is finished: there is nothing to resume"


def test_end_of_a_run_that_got_worse(tiny, corpus, tmp_path, capfd):
    train(corpus, tiny, tmp_path / "run", learning_rate=1.0, warmup_steps=0, lr_scheduler_type="constant")
    assert any("it only got worse: the held-out loss rose from" in line for line in told(capfd))


def entries(losses: list[float]) -> dict:
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    best = min(range(1, len(losses)), key=losses.__getitem__) if len(losses) > 1 else 0
    return {"history": history, "loss_before": losses[0], "loss": losses[best], "step": best, "steps": len(losses) - 1}


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([3.0, 3.1, 3.2], "it only got worse"),
        ([3.0, 3.0], "it only got worse"),
        ([3.0, 2.5, 2.2], "still falling"),
        ([3.0, 2.5, 2.2, 2.6], "best at step 2 of 3: more text would bring more"),
        ([3.0, 2.5], ""),
    ],
)
def test_advise(losses, words):
    plan = SimpleNamespace(steps=len(losses) - 1, options=hfkit.TrainOptions(learning_rate=1e-3))
    advice = advise(entries(losses), plan)
    assert len(advice) == bool(words) and words in "".join(advice)


# labels


@pytest.fixture
def reviews(tmp_path) -> str:
    """Rows with two labels, one more frequent, which `tiny` cannot learn to tell apart in a few steps."""
    rows = [f"text {number},{'good' if number % 3 else 'bad'}" for number in range(60)]
    held = [f"other {number},{'good' if number < 7 else 'bad'}" for number in range(10)]
    for name, lines in (("reviews", rows), ("held", held)):
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return str(tmp_path / "reviews.csv")


LABELLED = {"template": "{text} is {label}", "labels": ["good", "bad"]}


def test_labels_are_watched(tiny, reviews, tmp_path, capfd):
    """A task with labels is watched and kept by its held-out accuracy, beside that of the most frequent answer."""
    run = train(reviews, tiny, tmp_path / "run", **LABELLED, eval_file=str(tmp_path / "held.csv"), max_steps=4)
    metrics, lines = run.metrics, told(capfd)
    measured = {entry["step"]: entry["eval_accuracy"] for entry in metrics["history"] if "eval_accuracy" in entry}
    assert set(measured) == {0, 1, 2, 3, 4} and metrics["accuracy_before"] == measured[0]
    assert metrics["accuracy"] == max(accuracy for step, accuracy in measured.items() if step)
    assert metrics["baseline"] == {"label": "good", "accuracy": 0.7}
    assert len([line for line in lines if "(always 'good': 70.0%)" in line]) == 5
    worse = [line for line in lines if "it is not better than always answering 'good'" in line]
    assert len(worse) == (metrics["accuracy"] <= metrics["baseline"]["accuracy"])
    assert lines[-1].startswith("hfkit: next: hfkit classify -m ")


def test_labels_are_those_of_classify(tiny, reviews, tmp_path):
    """The accuracy is that of what `classify` says of the same rows."""
    held = [("red", "good"), ("a green one", "bad"), ("blue", "bad"), ("x", "good"), ("black and white", "bad")]
    (tmp_path / "held.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in held))
    run = train(reviews, tiny, tmp_path / "run", **LABELLED, eval_file=str(tmp_path / "held.csv"))
    said = hfkit.classify([text for text, _ in held], model=run.output_dir)
    right = sum(one.label == label for one, (_, label) in zip(said, held, strict=True))
    assert run.metrics["accuracy"] == right / 5 and run.metrics["baseline"] == {"label": "bad", "accuracy": 0.6}


def test_labels_longer_than_the_room(tiny, tmp_path):
    """A prompt that fits with its own label, but not with a longer one, does not end the run."""
    rows = [f"{'x' * (40 + number % 8)},{'no' if number % 2 else 'certainly'}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    options = {"template": "{text}: {label}", "labels": ["no", "certainly", "x" * 15], "eval_fraction": 0.3}
    run = train(str(tmp_path / "rows.csv"), tiny, tmp_path / "run", **options)
    assert 0 <= run.metrics["accuracy"] <= 1


def test_labels_choose_the_step(tmp_path):
    """The highest accuracy is the best; of equal ones, the lowest loss."""
    history = [
        {"step": 0, "eval_loss": 9.0, "eval_accuracy": 1.0},
        {"step": 1, "eval_loss": 1.0, "eval_accuracy": 0.5},
        {"step": 2, "eval_loss": 3.0, "eval_accuracy": 0.8},
        {"step": 3, "eval_loss": 2.0, "eval_accuracy": 0.8},
    ]
    assert best_step(history) == 3 and best_step(history[:2]) == 1 and best_step(history[:1]) is None
    assert not is_stale(history, 1) and is_stale([*history, {**history[1], "step": 4}], 1)


def test_labels_of_a_head(tiny, reviews, tmp_path, capfd):
    run = train(reviews, tiny, tmp_path / "run", head="classification", eval_file=str(tmp_path / "held.csv"))
    assert run.metrics["baseline"] == {"label": "good", "accuracy": 0.7}
    assert "(always 'good': 70.0%)" in "".join(told(capfd))
    assert run.metrics["accuracy"] == next(
        entry["eval_token_accuracy"]
        for entry in run.metrics["history"]
        if "eval_loss" in entry and entry["step"] == run.metrics["step"]
    )


# options


@pytest.mark.parametrize("call_it", [hfkit.finetune, hfkit.prepare])
def test_block_size_above_the_context(tiny, corpus, tmp_path, call_it):
    with pytest.raises(OptionError, match="--block-size is 65: the model takes at most 64 tokens"):
        call_it(corpus, model=tiny, block_size=65, output_dir=tmp_path / "run")


def test_block_size_above_the_context_of_a_new_model(corpus, tmp_path):
    with pytest.raises(OptionError, match="--block-size is 65: raise --n-positions, 64, as well"):
        hfkit.pretrain(corpus, block_size=65, n_positions=64, output_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorboard", "needs a package: pip install 'hfkit[tensorboard]'"),
        ("comet_ml", "needs a package: pip install not-installed"),
        ("nothing", "no such tracker; there are azure_ml,"),
        ("torch", "no such tracker"),
    ],
)
def test_report_to_what_is_not_there(tiny, corpus, tmp_path, monkeypatch, capfdbinary, name, words):
    """It is reported before anything is written."""
    if name in run_folder._TRACKERS:
        monkeypatch.setitem(run_folder._TRACKERS, name, "not_installed")
    for command in (["finetune", corpus, "-m", tiny], ["pretrain", corpus], ["tune", corpus, "-m", tiny]):
        result = call(capfdbinary, *command, "-o", tmp_path / "run", "--report-to", name)
        assert_fails(result, 2, f"--report-to {name}", words)
    with pytest.raises(OptionError, match=f"--report-to {name}"):
        hfkit.finetune(corpus, model=tiny, report_to=name, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# files of another shape

SHAPES = ["[]", "{}", "null", '"text"', "[" * 100_000, "{", '{"recipe": 3}', "\xff"]


@pytest.fixture(scope="module")
def short_run(tiny, corpus, tmp_path_factory) -> str:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    return train(corpus, tiny, folder, max_steps=1, eval_steps=1).output_dir


@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("name", ["run.json", "metrics.json"])
def test_finetune_where_a_file_has_another_shape(tiny, corpus, short_run, tmp_path, name, shape):
    folder = Path(shutil.copytree(short_run, tmp_path / "run"))
    options = {"max_steps": 1, "eval_steps": 1}
    (folder / name).write_text(shape, encoding="latin-1")
    if name == "metrics.json" and shape != '{"recipe": 3}':
        with pytest.raises(HfkitError, match=r"metrics.json cannot be read: .*; --overwrite starts over"):
            train(corpus, tiny, folder, resume=True, **options)
    assert train(corpus, tiny, folder, overwrite=True, **options).metrics["loss"]


@pytest.mark.parametrize("shape", [*SHAPES, '{"files": 3}', '{"files": [1]}', '{"files": {"a": []}}'], ids=range(11))
def test_find_newest_where_a_manifest_has_another_shape(tmp_path, shape):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").touch()
        commit(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(shape, encoding="latin-1")
    assert find_newest(tmp_path) == tmp_path / "checkpoint-1"


# three pages of one's own text


@pytest.mark.slow
def test_finetune_three_pages(tmp_path, monkeypatch, capfd):
    """Without any option, a text of three pages is learned: its names are in the samples, its end is held out."""
    monkeypatch.setattr("hfkit.training.runs._TOKENS", 80)
    draw = random.Random(0)
    places = "the mill,the harbour,the old bridge,the orchard,the lighthouse,the market,her garden,his workshop".split(
        ","
    )
    deeds = "mended a net,found a letter,counted the boats,lost a button,heard a song,planted a pear tree".split(",")
    lines = []
    while sum(map(len, lines)) < 6000:
        one, other = draw.sample(["Ottaviel", "Marwenna", "Brimbold"], 2)
        when, where, deed = (
            draw.choice(["One morning", "That night", "Later"]),
            draw.choice(places),
            draw.choice(deeds),
        )
        lines.append(f"{when} {one} went to {where} and {deed}. “Come and see,” said {one}, and {other} came.\n")
    (tmp_path / "corpus.txt").write_text("".join(lines))
    run = hfkit.finetune(tmp_path / "corpus.txt", output_dir=tmp_path / "run")
    assert run.perplexity < 0.5 * run.metrics["perplexity_before"]
    assert any(name in text for text in run.metrics["samples"] for name in ("Ottaviel", "Marwenna", "Brimbold"))
    assert not any("nothing is held out" in line for line in told(capfd))
