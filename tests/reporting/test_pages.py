"""What a run leaves for a person holds the figures of metrics.json, and what was generated drives nothing."""

import copy
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

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
from hfkit.reporting.pages import make_files, write_report


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
        "held-out perplexity": f"{metrics['perplexity_before']:,.2f} {metrics['perplexity']:,.2f} "
        f"± {metrics['perplexity'] * metrics['loss_stderr']:,.2f}",
        "held-out loss (nats per token)": f"{metrics['loss_before']:.4f} {metrics['loss']:.4f} "
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


def test_make_files_shows_the_figures_of_metrics_json(runs):
    for folder in runs:
        metrics = read(folder)
        page, card = Page((folder / "report.html").read_text()), shown((folder / "README.md").read_text())
        for one in (page, card):
            rows = {flat(row[0]): flat(" ".join(row[1:])) for table in one.tables for row in table if row[0]}
            for name, value in figures(metrics).items():
                assert rows[name] == flat(value), name
        page.assert_alone()
        assert folder.name in page.text and metrics["folder"] == str(folder)
        page.assert_policy()
        assert page.charts == ["loss and learning rate over the steps"] and page.tags.count("svg") == 1
        for one in (page, card):  # evaluate's perplexity is another one
            assert "hfkit evaluate scores each document on its own, and gives another perplexity" in flat(one.text)
        assert imread(folder / "loss.png").shape[1] > 500 and ("src", "loss.png") in card.attributes


def test_make_files_shows_the_samples_before_and_after(runs):
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


def test_copied_equals_a_plain_search(runs, corpus):
    documents = [document.split() for document in Path(corpus).read_text().split(END)]
    for folder in runs:
        metrics = read(folder)
        own = [re.findall(r"\w+", sample.removeprefix(metrics["prompt"]).lower()) for sample in metrics["samples"]]
        longest = max(longest_common(sample, documents) for sample in own)
        assert metrics["copied"]["words"] == (longest if longest >= 8 else 0)
        share = sum(share_of(sample, documents, 8) for sample in own) / len(own)
        assert metrics["copied"]["share"] == pytest.approx(share)


def test_make_files_says_what_was_copied(metrics):
    words = "the rain and the wind over the stone falls"
    metrics["copied"] = {"words": 9, "longest": words, "share": 0.125, "is_whole": True, "run": 8, "limit": 20_000_000}
    for name in ("report.html", "README.md"):
        text = flat(Page(make_files(metrics)[name]).text)
        assert f"has 9: “{words}”. 12.5% of all runs of 8 words" in text and "Only its first" not in text
    metrics["copied"] |= {"words": 0, "longest": "", "share": 0.0, "is_whole": False}
    text = flat(Page(make_files(metrics)["report.html"]).text)
    assert "In 4 samples no run of 8 words stands in the corpus. 0.0%" in text and "Only its first 20,000,000" in text


def test_make_files_of_a_run_without_held_out_text(metrics):
    history = [entry for entry in metrics["history"] if "loss" in entry]
    none = dict.fromkeys([name for name in metrics if name.startswith(("loss", "perplexity", "token_accuracy"))])
    files = make_files(metrics | none | {"history": history, "samples": [], "copied": None})
    page, card = Page(files["report.html"]), shown(files["README.md"])
    page.assert_alone()
    for one in (page, card):
        assert "held-out " not in one.text and "None" not in one.text.replace("None were written", "")
    assert "Nothing was held out" in card.text and "None were written" in card.text
    assert len(page.tables) == 1  # settings
    assert "Not measured" in page.text and "--eval-file" in page.text

    # one passage has no error, and a run that ended at once no loss
    files = make_files(metrics | {"loss_stderr": None, "loss_gain_stderr": None, "history": []})
    row = Page(files["report.html"]).tables[0][1:]
    assert [len(cells) for cells in row] == [4, 4] and "±" not in str(row)


def test_make_files_of_a_head_shows_its_accuracy(metrics):
    gone = [name for name in metrics if name.startswith(("perplexity", "token_accuracy"))]
    scored = {"head": "classification", "accuracy_before": 0.25, "accuracy": 0.875, "samples": [], "copied": None}
    files = make_files({name: value for name, value in metrics.items() if name not in gone} | scored)
    for one in (Page(files["report.html"]), shown(files["README.md"])):
        rows = {flat(row[0]): flat(" ".join(row[1:])) for table in one.tables for row in table}
        assert "another perplexity" not in one.text
        assert rows["held-out accuracy"] == "25.0% 87.5%" and "held-out perplexity" not in rows
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


def test_command_of_a_chat(metrics):
    """A model that learned conversations is used by `chat`, whose turns go through its template."""
    files = make_files(metrics | {"corpus_kind": "messages", "prompt": "User: Hi\nAssistant:"})
    assert re.findall("^    (hfkit .*)", files["README.md"], re.M)[0] == f"hfkit chat -m {metrics['folder']}"


def test_make_files_escapes_names_and_samples(nasty):
    files = make_files(nasty)
    page = Page(files["report.html"])
    page.assert_alone()
    card = shown(files["README.md"])
    assert "\x1b" not in files["report.html"] + files["README.md"]
    assert not card.links and not page.links
    assert [value for name, value in card.attributes if name in ("href", "src")] == ["loss.png"]
    assert not {"script"} & set(card.tags) and card.tags.count("strong") == 2  # before, and after
    for one in (page, card):
        assert one.text.count("<script>alert(1)</script>") >= 8
        assert "![x](http://a.b/c.png)" in one.text and "**bold**" in one.text and "\\x1b[2J" in one.text


def test_card_command_is_quoted_for_a_shell(nasty, metrics):
    for one, prompt in ((nasty, flat(nasty["prompt"])), (metrics, flat(metrics["prompt"]))):
        (line,) = re.findall("^    (hfkit generate .*)", make_files(one)["README.md"], re.M)
        assert shlex.split(line) == ["hfkit", "generate", "-m", flat(one["folder"]), prompt]


def test_card_head_is_what_the_hub_reads(metrics, nasty):
    def head(one: dict) -> dict:
        return yaml.safe_load(make_files(one)["README.md"].split("---\n")[1])

    plain = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    assert head(metrics) == plain  # its model is a folder here
    assert head(metrics | {"model": "gpt2"}) == plain | {"base_model": "gpt2"}
    assert head(metrics | {"model": "gpt2", "from_nothing": True}) == plain
    assert head(nasty)["base_model"] == nasty["model"]


# pictures


def test_plot_loss_draws_what_was_logged(metrics):
    axes = Figure().subplots()
    pictures.plot_loss(axes, metrics["history"])
    plain, smoothed, held = axes.lines
    assert list(plain.get_ydata()) == trials.losses(metrics) and list(plain.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(smoothed.get_ydata()) == pytest.approx(trials.losses(metrics))
    assert list(zip(held.get_xdata(), held.get_ydata(), strict=True)) == [
        (step, loss) for step, loss, _ in trials.scores(metrics)
    ]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["training", "held out"]


def test_smooth_is_a_running_mean():
    draw = np.random.default_rng(0)
    values = draw.random(300)
    found = pictures.smooth(list(enumerate(values.tolist())))
    expected = [values[max(0, at - 9) : at + 1].mean() for at in range(300)]
    assert [step for step, _ in found] == list(range(300)) and [v for _, v in found] == pytest.approx(expected)
    assert pictures.smooth([]) == []


def test_matplotlib_is_imported_only_to_draw():
    """Every `finetune --dry-run` would pay for it."""
    script = "import sys, hfkit.reporting.pages, hfkit.tuning.search; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


# several runs


def test_write_report_of_several_runs(runs, tmp_path, capfdbinary, monkeypatch):
    """The result first, a chart for each measure, only the settings that differ, links to the runs."""
    monkeypatch.chdir(runs[0].parent)
    result = call(capfdbinary, "report", "one", "two", "-o", tmp_path / "new" / "page.html")
    assert (result.returncode, result.stderr) == (0, b"hfkit: next: open it in a browser\n")
    assert result.stdout.decode() == f"{tmp_path / 'new' / 'page.html'}\n"
    source = (tmp_path / "new" / "page.html").read_text()
    page = Page(source)
    page.assert_alone()
    page.assert_policy()
    head, *rows = page.tables[0]
    assert [row[0] for row in rows] == ["one", "two"]
    best = min(runs, key=lambda folder: read(folder)["perplexity"])
    assert f"Best of 2 runs: {best.name}. Held-out perplexity: " in page.text[:300]
    assert re.search(r'<tr class="best">.*?</a>', source)[0].endswith(f">{best.name}</a>")
    assert page.charts == ["held-out loss", "training loss, smoothed", "learning rate"]
    for folder, row, link in zip(runs, rows, page.links, strict=True):
        metrics, cells = read(folder), dict(zip(head, row, strict=True))
        assert cells["perplexity"].startswith(f"{metrics['perplexity']:,.2f} ± ")
        assert cells["perplexity before"] == f"{metrics['perplexity_before']:,.2f}"
        assert cells["loss"] == f"{metrics['loss']:.4f}" and cells["learning rate"] == f"{metrics['learning_rate']:g}"
        assert cells["copied"] == f"{metrics['copied']['share']:.1%}" and "accuracy" not in cells
        assert cells["step"] == str(metrics["step"]) and metrics["command"] in page.text
        assert (tmp_path / "new" / unquote(link)).resolve() == folder / "report.html"
        for step, _, sample in trials.scores(metrics):
            assert (flat(metrics["prompt"] + sample) in flat(page.text)) or step not in (0, metrics["step"])
    differing = [row[0] for row in page.tables[1][1:]]
    assert "optimizer" in differing and not {"model", "corpus", "seed", "parameters", "command"} & set(differing)


def test_write_report_keeps_tasks_apart(metrics, tmp_path):
    """The perplexity of a text and the accuracy of a classifier share neither a table nor a chart."""
    head = {"head": "classification", "accuracy_before": 0.25, "accuracy": 0.875, "samples": [], "copied": None}
    scored = {
        name: value for name, value in metrics.items() if not name.startswith(("perplexity", "token_acc"))
    } | head
    for name, values in (("text", metrics), ("weak", scored), ("strong", scored | {"accuracy": 0.9375})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(values))
    source = write_report([tmp_path / name for name in ("text", "weak", "strong")], tmp_path / "page.html").read_text()
    page = Page(source)
    texts, labels = page.tables[:2]
    assert [Path(row[0]).name for row in texts[1:]] == ["text"] and "perplexity" in texts[0]
    assert [Path(row[0]).name for row in labels[1:]] == ["weak", "strong"] and "perplexity" not in labels[0]
    assert labels[0][1] == "accuracy" and [row[1] for row in labels[1:]] == ["87.5%", "93.8%"]
    assert page.charts.count("held-out loss") == 2 and page.charts.count("held-out accuracy") == 1
    assert [Path(name).name for name in re.findall('<tr class="best">.*?>([^<>]*)</a>', source)] == ["strong"]


@pytest.mark.parametrize(
    ("gain", "error", "words"),
    [
        (0.5, 0.1, "better than before: its loss fell by 0.5000 ± 0.1000"),
        (0.1, 0.1, "no clear gain"),
        (-0.1, 0.1, "no clear gain"),
        (-0.5, 0.1, "got worse: its loss rose by 0.5000 ± 0.1000"),
        (0.5, None, "its loss fell by 0.5000 nats per token"),
    ],
)
def test_report_opens_with_a_verdict(metrics, gain, error, words):
    page = Page(make_files(metrics | {"loss_gain": gain, "loss_gain_stderr": error})["report.html"])
    start = flat(page.text)[:600]
    assert f"Held-out perplexity: {metrics['perplexity_before']:,.2f} → {metrics['perplexity']:,.2f}" in start
    assert words in start and "words are from there" in start
    assert page.text.index("hfkit generate -m") < page.text.index("Sample 1") < page.text.index("Curves")


@pytest.mark.parametrize(("accuracy", "word"), [(0.75, "better"), (0.5, "not better"), (0.25, "not better")])
def test_report_compares_labels_with_the_most_frequent_one(metrics, accuracy, word):
    """A low perplexity of the labels' tokens says nothing: the model may always give the same answer."""
    task = {"template": "{text}: {label}", "labels": ["a", "b"], "metric": []}
    scores = {"accuracy_before": 0.0, "accuracy": accuracy, "baseline": {"label": "a", "accuracy": 0.5}}
    files = make_files(metrics | {"task": task} | scores)
    for page in (Page(files["report.html"]), shown(files["README.md"])):
        assert f"Held-out accuracy: 0.0% → {accuracy:.1%}" in page.text
        assert f"the model is {word} than always answering 'a', which is right in 50.0%" in flat(page.text)
        rows = {row[0]: row[1:] for table in page.tables for row in table}
        assert rows["accuracy of always 'a'"][1] == "50.0%"


def test_report_marks_the_prompt_and_where_the_last_sentence_ends(metrics):
    texts = ["Once upon a time. It", "Once there was a fox. It ran"]
    source = make_files(metrics | {"prompt": "Once", "samples": texts})["report.html"]
    assert "<b>Once</b> upon a time.<i> It</i>" in source and "<b>Once</b> there was a fox.<i> It ran</i>" in source
    source = make_files(metrics | {"prompt": "", "samples": ["No. " + "word " * 20, "“Done!” she said"]})[
        "report.html"
    ]
    assert "<b></b>No. word" in source and "word <i></i>" in source
    assert "<b></b>“Done!” she said<i></i>" in source or "<b></b>“Done!”<i> she said</i>" in source


def test_card_uses_the_command_of_the_task(metrics):
    """A model that learned to label is used by `classify`; one whose weights are gone by its recipe."""
    task = {"template": "{text}: {label}", "labels": ["a", "b"], "metric": []}
    for files in (make_files(metrics | {"task": task}), make_files(metrics | {"head": "classification"})):
        for name in ("README.md", "report.html"):
            assert f"hfkit classify -m {metrics['folder']}" in Page(files[name]).text, name
    files = make_files(metrics | {"has_weights": False})
    assert "hfkit generate" not in files["README.md"] + files["report.html"].partition("Settings")[0]
    assert f"hfkit finetune --config {metrics['folder']}/recipe.yaml" in files["README.md"]
    assert "weights were deleted" in files["README.md"] and "weights were deleted" in files["report.html"]


def test_charts_are_legible_on_dark_pages_and_count_whole_steps(metrics):
    source = make_files(metrics)["report.html"]
    svg = source[source.index("<svg") : source.index("</svg>")]
    assert "currentColor" in svg and "#010203" not in svg and "#ffffff" not in svg and "fill: #000000" not in svg
    steps = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg) if re.fullmatch(r"[\d.]+", text)]
    rates = svg[svg.index('id="axes_2"') : svg.index('id="matplotlib.axis_4"')]
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", rates)
    assert steps and labels[:-1] and all(re.fullmatch(r"−?\d+", label) for label in labels if label != "step"), labels


# a search


SEARCH = {
    "space": {},
    "recipe": {},
    "best": {"learning_rate": 1e-3},
    "loss": 2.5,
    "importances": {"learning_rate": 0.75, "dropout": 0.25},
    "trials": [
        {"number": 0, "state": "complete", "loss": 3.0, "params": {"learning_rate": 1e-4, "dropout": 0.0},
         "folder": "trial-0", "default": True},
        {"number": 1, "state": "complete", "loss": 2.5, "params": {"learning_rate": 1e-3, "dropout": 0.1},
         "folder": "trial-1"},
        {"number": 2, "state": "pruned", "loss": None, "params": {"learning_rate": 1.0, "dropout": 0.2},
         "folder": "trial-2"},
        {"number": 3, "state": "complete", "loss": 4.0, "params": {"learning_rate": 1e-2, "dropout": 0.3},
         "folder": "trial-3"},
    ],
}  # fmt: skip


def save_search(folder: Path, metrics: dict, **changes) -> Path:
    (folder / "trial-1").mkdir(parents=True)
    (folder / "trial-1" / "metrics.json").write_text(json.dumps(metrics | {"loss_before": 5.0}))
    (folder / "tuning.json").write_text(json.dumps(SEARCH | changes))
    return folder


def test_write_report_of_a_search(metrics, tmp_path, capfdbinary, monkeypatch):
    """What was gained over the defaults, and the trials, the best first and marked."""
    monkeypatch.chdir(tmp_path)
    save_search(tmp_path / "found", metrics)
    assert call(capfdbinary, "report", "found").returncode == 0
    source = (tmp_path / "runs.html").read_text()
    page = Page(source)
    page.assert_alone()
    page.assert_policy()
    assert "Best of 4 trials: held-out loss 2.5000" in page.text
    assert "0.5000 below that of the defaults, 0.5000 below that of the median trial" in page.text
    assert "2.5000 below that of the model before training" in page.text
    assert "hfkit generate -m found/trial-1" in page.text and "--config found/best.yaml" in page.text
    head, *rows = page.tables[0]
    assert head == ["trial", "held-out loss", "learning_rate", "dropout", "state"]
    assert [row[0] for row in rows] == ["1", "0", "3", "2"] and rows[3][1] == "–"
    assert re.search(r'<tr class="best">\s*<td[^>]*>1</td>', source) and len(page.charts) == 1
    assert_fails(call(capfdbinary, "report", "found", "other", "--overwrite"), 1, "found is a search", "trial-0")


def test_write_report_of_a_search_by_accuracy(metrics, tmp_path):
    """The most right answers are the best, whatever the loss."""
    accuracies = [0.5, 0.75, None, 0.875]
    rows = [row | {"accuracy": accuracy} for row, accuracy in zip(SEARCH["trials"], accuracies, strict=True)]
    folder = save_search(tmp_path / "found", metrics | {"accuracy_before": 0.25}, trials=rows)
    (folder / "trial-1").rename(folder / "trial-3")
    source = write_report([folder], tmp_path / "page.html").read_text()
    page = Page(source)
    assert "Best of 4 trials: held-out accuracy 87.5%" in page.text
    assert (
        "trial 3 is 37.5 points above that of the defaults" in page.text
        and "62.5 points above that of the model" in page.text
    )
    head, *shown_rows = page.tables[0]
    assert head[1:3] == ["held-out accuracy", "held-out loss"] and [row[0] for row in shown_rows] == [
        "3",
        "1",
        "0",
        "2",
    ]
    assert re.search(r'<tr class="best">\s*<td[^>]*>3</td>', source) and "held-out accuracy</text>" in source
    even = [rows[0] | {"accuracy": 0.875}, *rows[1:3], rows[3] | {"loss": 1.0}]
    (folder / "tuning.json").write_text(json.dumps(SEARCH | {"trials": even}))
    page = Page(write_report([folder], tmp_path / "page.html").read_text())
    assert "accuracy of trial 3 is equal to that of the defaults, equal to that of the median trial" in page.text
    one = [rows[0] | {"default": True}]
    (folder / "tuning.json").write_text(json.dumps(SEARCH | {"trials": one}))
    (folder / "trial-3").rename(folder / "trial-0")
    page = Page(write_report([folder], tmp_path / "page.html").read_text())
    assert "Best of 1 trial: " in page.text and "The defaults are the best" in page.text


def test_write_report_of_what_is_not_a_search(metrics, tmp_path):
    for number, changes in enumerate(
        ({"trials": []}, {"trials": None}, {"trials": [{}]}, {"importances": 3}, {"trials": SEARCH["trials"][2:3]})
    ):
        folder = save_search(tmp_path / str(number), metrics, **changes)
        with pytest.raises(HfkitError, match=f"{folder}"):
            write_report([folder], tmp_path / "page.html")
    (folder / "tuning.json").write_text("[]")
    with pytest.raises(HfkitError, match="not a JSON object"):
        write_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_write_report_escapes_a_search(metrics, tmp_path):
    trial = {"number": 0, "state": NASTY, "loss": 1.0, "params": {NASTY: NASTY}, "folder": "trial-1"}
    folder = save_search(tmp_path / "<script>", metrics, trials=[trial], importances={NASTY: 1.0})
    page = Page(write_report([folder], tmp_path / "page.html").read_text())
    page.assert_alone()
    assert page.text.count(NASTY) >= 3


def test_report_replaces_a_page_only_with_overwrite(runs, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(capfdbinary, "report", runs[0]).returncode == 0
    first = (tmp_path / "runs.html").read_text()
    assert_fails(call(capfdbinary, "report", runs[1]), 1, "runs.html exists", "--overwrite")
    assert (tmp_path / "runs.html").read_text() == first
    assert call(capfdbinary, "report", runs[1], "--overwrite").returncode == 0
    assert (tmp_path / "runs.html").read_text() != first
    assert_fails(call(capfdbinary, "report", runs[0], "-o", "/proc/none/a.html"), 1, "cannot write")


def test_write_report_escapes_names_and_samples(nasty, tmp_path):
    folder = tmp_path / "<script>$run$ & <b>"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(nasty))
    page = Page(write_report([folder, str(folder)], tmp_path / "page.html").read_text())
    page.assert_alone()
    assert page.text.count("<script>alert(1)</script>") > 8
    assert page.text.count(str(folder)) >= 4


# runs that are none


def test_write_report_of_an_unfinished_run_is_one_line(runs, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "metrics.json"
    path.parent.mkdir()
    assert_fails(call(capfdbinary, "report", runs[0], "run"), 1, "no finished run (run)")
    assert_fails(call(capfdbinary, "report", tmp_path / "none"), 1, "no finished run")
    damaged = {
        b"": "readable", b"{": "readable", b"\xff\xfe": "readable", b"[" * 100_000: "readable",
        b"[]": "not a JSON object", b"3": "not a JSON object", b"{}": "it has no 'history'",
        b'{"model": "a", "step": "x"}': "metrics.json",
    }  # fmt: skip
    for content, words in damaged.items():
        path.write_bytes(content)
        assert_fails(call(capfdbinary, "report", runs[0], "run"), 1, "run", words)
    assert not (tmp_path / "runs.html").exists()


def test_write_report_of_any_metrics_is_a_page_or_one_error(metrics, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    refused = set()

    def attempt(changed: dict) -> bool:
        (tmp_path / "run" / "metrics.json").write_text(json.dumps(changed))
        try:
            Page(write_report([tmp_path / "run"], tmp_path / "page.html").read_text()).assert_alone()
        except HfkitError as error:
            assert str(tmp_path / "run") in str(error)
            return False
        return True

    assert attempt(metrics)
    monkeypatch.setattr("hfkit.reporting.pages.to_svg", lambda figure: "")  # it takes most of the time
    monkeypatch.setattr("hfkit.reporting.pages.draw_measure", lambda curves, label: None)
    for name in metrics:
        if not attempt({key: value for key, value in metrics.items() if key != name}):
            refused.add(name)
    assert {"model", "step", "tokens", "history", "seconds", "loss_before"} <= refused
    assert not {"folder", "token_accuracy", "copied", "loss_gain"} & refused
    wrong = [None, "x", 7, [], {}, [None], {"a": 1}]
    for name, value in itertools.product(("step", "history", "samples", "copied", "corpus", "prompt", "loss"), wrong):
        attempt(metrics | {name: value})
    history = metrics["history"]
    for value in wrong:
        attempt(metrics | {"history": [*history, value]})
        attempt(metrics | {"history": [{**entry, "loss": value} for entry in history]})


def test_draw_curves_leaves_a_gap_for_a_loss_that_is_not_finite(metrics):
    """JSON has no infinity: what was one is null."""
    history = [
        {**entry, "loss": None} if entry.get("step") == 3 and "loss" in entry else entry
        for entry in metrics["history"]
    ]
    assert imread(io.BytesIO(make_files(metrics | {"history": history})["loss.png"])).ndim == 3
