"""A trained run is not lost: not to what lies in its corpus, not to a report that cannot be written."""

import json
from pathlib import Path

import pytest
from support import trials
from transformers import TrainerCallback

import hfkit
from hfkit.reporting.pages import make_files

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


@pytest.mark.parametrize("source", [".", "{}", "{}/../texts", "**/*.txt"])
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
