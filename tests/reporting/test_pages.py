"""What a run leaves for a person holds the figures of metrics.json, and what was generated drives nothing."""

import copy
import io
import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import trials
from support.corpora import longest_common, share_of
from support.pages import NASTY, Page
from support.shell import assert_fails, call

import hfkit
from hfkit.console import printable
from hfkit.corpus.documents import END
from hfkit.errors import HfkitError
from hfkit.reporting import pictures
from hfkit.reporting.pages import compare_runs as compare
from hfkit.reporting.pages import make_files


@pytest.fixture(scope="module")
def runs(brisk, tiny, corpus, tmp_path_factory) -> list[Path]:
    """Two finished runs, at different learning rates."""
    base = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfkit.training.runs.make_files", make_files)
        patch.setattr("hfkit.training.runs._TOKENS", 60)
        options = {"model": tiny, "eval_fraction": 0.3, **trials.SMALL}
        for name, rate in (("one", 1e-3), ("two", 3e-3)):
            hfkit.finetune(corpus, output_dir=base / name, **options | {"learning_rate": rate})
    return [base / "one", base / "two"]


@pytest.fixture
def metrics(runs) -> dict:
    """Of the first run, to be changed."""
    return read(runs[0])


def read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def shown(card: str) -> Page:
    """A card as the Hub renders it."""
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2]))


def flat(text: str) -> str:
    """As it can be told from a page."""
    return " ".join(printable(text).split())


# one run


def figures(metrics: dict) -> dict[str, str]:
    """What should be said of it."""
    known = {name: metrics[name] for name in ("perplexity", "perplexity_before", "loss", "loss_before", "loss_stderr")}
    assert all(value > 0 for value in known.values())
    return {
        "held-out perplexity": f"{metrics['perplexity_before']:.2f} {metrics['perplexity']:.2f} "
        f"± {metrics['perplexity'] * metrics['loss_stderr']:.2f}",
        "held-out loss (nats a token)": f"{metrics['loss_before']:.4f} {metrics['loss']:.4f} "
        f"{metrics['loss'] - metrics['loss_before']:+.4f} ± {metrics['loss_gain_stderr']:.4f}",
        "trained on": f"{metrics['tokens']:,} tokens in 6 steps",
        "kept": f"the state of step {metrics['step']}",
        "parameters": f"{metrics['parameters']:,}",
        "optimizer": f"adamw_torch_fused, peak {metrics['learning_rate']:g}",
        "machine": "cpu, float32",
        "seed": "42",
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        "command": metrics["command"],
        "corpus": "corpus.txt",
        "model": metrics["model"],
    }


def test_card_and_page_hold_the_figures_of_metrics_json(runs):
    for folder in runs:
        metrics = read(folder)
        page, card = Page((folder / "report.html").read_text()), shown((folder / "README.md").read_text())
        for one in (page, card):
            rows = {flat(row[0]): flat(" ".join(row[1:])) for table in one.tables for row in table if row[0]}
            for name, value in figures(metrics).items():
                assert rows[name] == flat(value), name
        page.assert_alone()
        assert folder.name in page.text and metrics["folder"] == str(folder)
        (inside,) = page.pictures
        assert np.array_equal(inside, imread(folder / "loss.png")) and inside.shape[1] > 500
        assert ("src", "loss.png") in card.attributes


def test_the_samples_are_those_of_the_run_before_and_after(runs):
    metrics = read(runs[0])
    samples = {entry["measured"]: entry["sample"] for entry in metrics["history"] if "measured" in entry}
    assert len(samples) == 3 and len(metrics["samples"]) == 4
    page, card = Page((runs[0] / "report.html").read_text()), shown((runs[0] / "README.md").read_text())
    for one in (page, card):
        for step in (0, metrics["step"]):
            assert flat(metrics["prompt"] + samples[step]) in flat(one.text)
        assert f"After step {metrics['step']}" in one.text
    for sample in metrics["samples"]:
        assert flat(sample) in flat(page.text)


def test_what_the_samples_copy_is_what_a_plain_search_finds(runs, corpus):
    documents = [document.split() for document in Path(corpus).read_text().split(END)]
    for folder in runs:
        metrics = read(folder)
        own = [re.findall(r"\w+", sample.removeprefix(metrics["prompt"]).lower()) for sample in metrics["samples"]]
        longest = max(longest_common(sample, documents) for sample in own)
        assert metrics["copied"]["words"] == (longest if longest >= 8 else 0)
        share = sum(share_of(sample, documents, 8) for sample in own) / len(own)
        assert metrics["copied"]["share"] == pytest.approx(share)


def test_what_was_copied_is_said(metrics):
    words = "the rain and the wind over the stone falls"
    metrics["copied"] = {"words": 9, "longest": words, "share": 0.125, "is_whole": True, "run": 8, "limit": 20_000_000}
    for name in ("report.html", "README.md"):
        text = flat(Page(make_files(metrics)[name]).text)
        assert f"has 9: “{words}”. 12.5% of all runs of 8 words" in text and "Only its first" not in text
    metrics["copied"] |= {"words": 0, "longest": "", "share": 0.0, "is_whole": False}
    text = flat(Page(make_files(metrics)["report.html"]).text)
    assert "In 4 samples no run of 8 words stands in the corpus. 0.0%" in text and "Only its first 20,000,000" in text


def test_what_was_not_measured_is_not_made_up(metrics):
    history = [entry for entry in metrics["history"] if "loss" in entry]
    none = dict.fromkeys([name for name in metrics if name.startswith(("loss", "perplexity", "token_accuracy"))])
    files = make_files(metrics | none | {"history": history, "samples": [], "copied": None})
    page, card = Page(files["report.html"]), shown(files["README.md"])
    page.assert_alone()
    for one in (page, card):
        assert "held-out" not in one.text and "None" not in one.text.replace("None were drawn", "")
    assert "Nothing was held out" in card.text and "None were drawn" in card.text
    assert len(page.tables) == 1  # settings

    # one passage has no error, and a run that ended at once no loss
    files = make_files(metrics | {"loss_stderr": None, "loss_gain_stderr": None, "history": []})
    row = Page(files["report.html"]).tables[0][1:]
    assert [len(cells) for cells in row] == [4, 4] and "±" not in str(row)


def test_a_head_is_told_by_its_accuracy(metrics):
    gone = [name for name in metrics if name.startswith(("perplexity", "token_accuracy"))]
    scored = {"head": "classification", "accuracy_before": 0.25, "accuracy": 0.875, "samples": [], "copied": None}
    files = make_files({name: value for name, value in metrics.items() if name not in gone} | scored)
    for one in (Page(files["report.html"]), shown(files["README.md"])):
        rows = {flat(row[0]): flat(" ".join(row[1:])) for table in one.tables for row in table}
        assert rows["held-out accuracy"] == "0.2500 0.8750" and "held-out perplexity" not in rows
    assert "pipeline_tag: text-classification" in files["README.md"] and "hfkit classify -m" in files["README.md"]


@pytest.fixture
def nasty(metrics) -> dict:
    """Metrics of which every text is an attack."""
    text = NASTY + "\n---\n![x](http://a.b/c.png) [y](http://a.b) `z` | $q$ **bold** \x1b[2J"
    history = copy.deepcopy(metrics["history"])
    for entry in history:
        if "sample" in entry:
            entry["sample"] = text
    return metrics | {
        "model": text, "folder": f"runs/{text}", "corpus": [f"a{text}.txt"], "prompt": text, "history": history,
        "command": f"hfkit finetune '{text}'", "versions": {text: text}, "device": text, "samples": [text] * 4,
        "copied": {"words": 9, "longest": text, "share": 0.5, "is_whole": True, "run": 8, "limit": 20_000_000},
    }  # fmt: skip


def test_names_and_samples_are_shown_to_the_letter(nasty):
    files = make_files(nasty)
    page = Page(files["report.html"])
    page.assert_alone()
    card = shown(files["README.md"])
    assert "\x1b" not in files["report.html"] + files["README.md"]
    assert page.tags.count("img") == 1
    links = [value for name, value in card.attributes if name in ("href", "src")]
    assert sorted(links) == ["https://pypi.org/project/hfkit/", "loss.png"]
    assert not {"script"} & set(card.tags) and card.tags.count("strong") == 2  # before, and after
    for one in (page, card):
        assert one.text.count("<script>alert(1)</script>") >= 8
        assert "![x](http://a.b/c.png)" in one.text and "**bold**" in one.text and "\\x1b[2J" in one.text


def test_the_card_says_how_to_use_the_model_in_words_that_a_shell_takes(nasty, metrics):
    for one, prompt in ((nasty, flat(nasty["prompt"])), (metrics, flat(metrics["prompt"]))):
        (line,) = re.findall("^    (hfkit generate .*)", make_files(one)["README.md"], re.M)
        assert shlex.split(line) == ["hfkit", "generate", "-m", flat(one["folder"]), prompt]


def test_the_head_of_the_card_is_what_the_hub_reads(metrics, nasty):
    def head(one: dict) -> dict:
        return yaml.safe_load(make_files(one)["README.md"].split("---\n")[1])

    plain = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert head(metrics) == plain  # its model is a folder here
    assert head(metrics | {"model": "gpt2"}) == plain | {"base_model": "gpt2"}
    assert head(metrics | {"model": "gpt2", "from_nothing": True}) == plain
    assert head(nasty)["base_model"] == nasty["model"]


# pictures


def test_the_losses_are_drawn_as_they_were_logged(metrics):
    axes = Figure().subplots()
    pictures.plot_loss(axes, metrics["history"], "runs/$x$")
    plain, smoothed, held = axes.lines
    assert list(plain.get_ydata()) == trials.losses(metrics) and list(plain.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(smoothed.get_ydata()) == pytest.approx(trials.losses(metrics))
    assert list(zip(held.get_xdata(), held.get_ydata(), strict=True)) == [
        (step, loss) for step, loss, _ in trials.scores(metrics)
    ]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == [r"training (runs/\$x\$)", r"held out (runs/\$x\$)"]


def test_a_smooth_curve_is_a_running_mean():
    draw = np.random.default_rng(0)
    values = draw.random(300)
    found = pictures.smooth(list(enumerate(values.tolist())))
    expected = [values[max(0, at - 9) : at + 1].mean() for at in range(300)]
    assert [step for step, _ in found] == list(range(300)) and [v for _, v in found] == pytest.approx(expected)
    assert pictures.smooth([]) == []


# several runs


def test_runs_are_compared_on_one_page(runs, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(runs[0].parent)
    result = call(capfdbinary, "report", "one", "two", "-o", tmp_path / "new" / "page.html")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode() == f"{tmp_path / 'new' / 'page.html'}\n"
    page = Page((tmp_path / "new" / "page.html").read_text())
    page.assert_alone()
    head, *rows = page.tables[0]
    assert [row[0] for row in rows] == ["one", "two"] and len(page.pictures) == 1
    for folder, row in zip(runs, rows, strict=True):
        metrics, cells = read(folder), dict(zip(head, row, strict=True))
        assert cells["perplexity"].startswith(f"{metrics['perplexity']:.2f} ± ")
        assert cells["perplexity before"] == f"{metrics['perplexity_before']:.2f}"
        assert cells["loss"] == f"{metrics['loss']:.4f}" and cells["learning rate"] == f"{metrics['learning_rate']:g}"
        assert cells["step"] == str(metrics["step"]) and cells["accuracy"] == "–"
        assert metrics["command"] in page.text
        for step, _, sample in trials.scores(metrics):
            assert (flat(metrics["prompt"] + sample) in flat(page.text)) or step not in (0, metrics["step"])


def test_a_page_is_never_written_over(runs, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capfdbinary, "report", runs[0]).returncode == 0
    first = (tmp_path / "runs.html").read_text()
    assert_fails(call(capfdbinary, "report", runs[1]), 1, "runs.html exists", "--overwrite")
    assert (tmp_path / "runs.html").read_text() == first
    assert call(capfdbinary, "report", runs[1], "--overwrite").returncode == 0
    assert (tmp_path / "runs.html").read_text() != first
    assert_fails(call(capfdbinary, "report", runs[0], "-o", "/proc/none/a.html"), 1, "cannot write")


def test_names_and_samples_are_escaped_where_runs_are_compared(nasty, tmp_path):
    folder = tmp_path / "<script>$run$ & <b>"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(nasty))
    page = Page(compare([folder, str(folder)], tmp_path / "page.html").read_text())
    page.assert_alone()
    assert page.tags.count("img") == 1 and page.text.count("<script>alert(1)</script>") > 8
    assert page.text.count(str(folder)) >= 4


# runs that are none


def test_a_run_that_is_not_finished_or_not_whole_is_one_line(runs, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    assert_fails(call(capfdbinary, "report", runs[0], "run"), 1, "no finished run (run)")
    assert_fails(call(capfdbinary, "report", tmp_path / "none"), 1, "no finished run")
    damaged = {
        b"": "readable", b"{": "readable", b"\xff\xfe": "readable", b"[" * 100_000: "readable", b"[]": "no object",
        b"3": "no object", b"{}": "it has no 'model'", b'{"model": "a", "step": "x"}': "metrics.json",
    }  # fmt: skip
    for content, words in damaged.items():
        path.write_bytes(content)
        assert_fails(call(capfdbinary, "report", runs[0], "run"), 1, "run", words)
    assert not (tmp_path / "runs.html").exists()


def test_whatever_is_missing_or_wrong_in_the_metrics_there_is_a_page_or_one_error(metrics, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    refused = set()

    def attempt(changed: dict) -> bool:
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(changed))
        try:
            Page(compare([tmp_path / "run"], tmp_path / "page.html").read_text()).assert_alone()
        except HfkitError as error:
            assert str(tmp_path / "run") in str(error)
            return False
        return True

    assert attempt(metrics)
    draw = pictures.draw_curves
    monkeypatch.setattr("hfkit.reporting.pages.draw_curves", lambda runs: b"")  # it takes most of the time
    for name in metrics:
        if not attempt({key: value for key, value in metrics.items() if key != name}):
            refused.add(name)
    assert {"model", "step", "tokens", "history", "seconds", "loss_before"} <= refused
    assert not {"folder", "token_accuracy", "copied", "loss_gain"} & refused
    wrong = [None, "x", 7, [], {}, [None], {"a": 1}]
    for name, value in itertools.product(("step", "history", "samples", "copied", "corpus", "prompt", "loss"), wrong):
        attempt(metrics | {name: value})
    monkeypatch.setattr("hfkit.reporting.pages.draw_curves", draw)
    history = metrics["history"]
    for value in wrong:
        attempt(metrics | {"history": [*history, value]})
        attempt(metrics | {"history": [{**entry, "loss": value} for entry in history]})


def test_a_loss_that_is_no_number_leaves_a_gap(metrics):
    """JSON has no infinity: what was one is null."""
    history = [
        {**entry, "loss": None} if entry.get("step") == 3 and "loss" in entry else entry
        for entry in metrics["history"]
    ]
    assert imread(io.BytesIO(make_files(metrics | {"history": history})["loss.png"])).ndim == 3
