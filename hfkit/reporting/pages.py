"""The model card, and report pages of one run, of several runs and of a search: single files that fetch nothing."""

import base64
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hfkit.console import counted, printable
from hfkit.errors import HfkitError, first_line
from hfkit.reporting import summaries
from hfkit.reporting.pictures import Curve, draw_curves, draw_measure, plot_trials, points, smooth, to_png, to_svg
from hfkit.storage import make_writable, write_text

METRICS, SEARCH = "metrics.json", "tuning.json"  # in the folder of a run, and of a search
CARD, PAGE, PICTURE = "README.md", "report.html", "loss.png"
_TAGS = {"classification": "text-classification", "question-answering": "question-answering"}  # of the Hub, by head
# What Markdown reads as a picture, a link, HTML, a table, ...; inside a word an underscore means nothing.
_MARKUP = re.compile(r"[\\`*~\[\]<>#|&$]|(?<!\w)_|_(?!\w)")
# What a run logs, and what a chart of it is called.
_MEASURES = {
    "eval_loss": "held-out loss",
    "loss": "training loss, smoothed",
    "eval_accuracy": "held-out accuracy",
    "eval_token_accuracy": "held-out accuracy",  # of a head
    "learning_rate": "learning rate",
}


def make_files(metrics: dict[str, Any]) -> dict[str, str | bytes]:
    """The card, the page and the picture of a finished run, by file name, from its metrics."""
    summary = summaries.summarize(metrics)
    figure = draw_curves(metrics["history"], summary.unit)
    page = render("report.html.jinja", folder=metrics["folder"], run=summary, curves=to_svg(figure))
    return {CARD: _make_card(metrics, summary), PAGE: page, PICTURE: to_png(figure, dpi=160)}


def _make_card(metrics: dict[str, Any], summary: summaries.Summary) -> str:
    """The model card, as the Hub shows it."""
    model = metrics["model"]
    is_on_hub = not metrics["from_nothing"] and model != "bundled" and not Path(model).exists()
    data = ModelCardData(
        library_name=metrics["library"],
        pipeline_tag=_TAGS.get(str(metrics.get("head")), "text-generation"),
        base_model=model if is_on_hub else None,
    )
    head = Markup(data.to_yaml().strip())  # noqa: S704, YAML is quoted by its writer
    line = Markup(printable(summary.command))  # noqa: S704, indented lines are code
    return render("card.md.jinja", head=head, metrics=metrics, run=summary, line=line, picture=PICTURE)


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that shows finished runs side by side, or a search.

    HfkitError if a folder holds no finished run or search, or if a search is not alone.
    """
    paths, output = [Path(folder) for folder in folders], Path(output)
    searches = [path for path in paths if (path / SEARCH).is_file() and not (path / METRICS).is_file()]
    if searches and len(paths) > 1:
        raise HfkitError(f"{searches[0]} is a search: report it alone, or name runs in it, like {searches[0]}/trial-0")
    page = _search_page(searches[0]) if searches else _runs_page(paths, output)
    make_writable(output.parent)
    write_text(output, page)
    return output


@contextlib.contextmanager
def _read(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The values in this file; what goes wrong while they are used becomes one line."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise HfkitError(f"no finished {kind} ({path.parent}): it has no readable {path.name}") from error
    try:
        yield values | {"folder": str(path.parent)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise HfkitError(f"{path} is not what a {kind} leaves: {reason}") from error


@dataclass(frozen=True)
class _Run:
    """A run beside others."""

    folder: str
    link: str  # from the page to the run's own
    summary: summaries.Summary
    curves: dict[str, Curve]  # by the names of _MEASURES
    cells: dict[str, str]  # the row of the run
    rank: tuple[float, float]  # see `merit`


def _read_run(folder: Path, output: Path) -> _Run:
    target = folder / PAGE if (folder / PAGE).is_file() else folder
    with _read(folder / METRICS, "run") as metrics:
        summary, copied = summaries.summarize(metrics), metrics.get("copied")
        cells: dict[str, str] = {}
        for name, before, after, _ in summary.scores:
            if name in ("held-out accuracy", "held-out perplexity"):
                name = name.removeprefix("held-out ")
                cells |= {name: after, f"{name} before": before}
        cells |= {
            "loss": summaries.show_figure(metrics.get("loss"), "loss"),
            "copied": f"{copied['share']:.1%}" if copied else "",
            "step": f"{metrics['step']:,}",
            "tokens": f"{metrics['tokens']:,}",
            "learning rate": f"{metrics['learning_rate']:g}",
            "seconds": f"{metrics['seconds']:.0f}",
        }
        return _Run(
            folder=str(folder),
            link=urllib.parse.quote(os.fsencode(os.path.relpath(target, output.parent))),
            summary=summary,
            curves={name: points(metrics["history"], name) for name in _MEASURES},
            cells=cells,
            rank=summaries.merit(metrics.get("accuracy"), metrics.get("loss")),
        )


def _runs_page(folders: Sequence[Path], output: Path) -> str:
    runs = [_read_run(folder, output) for folder in folders]
    kinds = dict.fromkeys(run.summary.kind for run in runs)
    groups = [_group(kind, [run for run in runs if run.summary.kind == kind]) for kind in kinds]
    settings = [(name, *(run.summary.settings[name] for run in runs)) for name in runs[0].summary.settings]
    return render(
        "runs.html.jinja",
        headline=groups[0]["headline"] if len(groups) == 1 else f"{len(runs)} runs of {len(groups)} tasks",
        groups=groups,
        settings_head=["", *(run.folder for run in runs)],
        settings=[(name, *values) for name, *values in settings if name != "command" and len(set(values)) > 1],
        runs=runs,
    )


def _group(kind: str, runs: list[_Run]) -> dict[str, Any]:
    """Runs that do the same task: a table, the best run marked, and a chart for each measure."""
    names = dict.fromkeys(name for run in runs for name in run.cells)
    head = [name for name in names if any(run.cells.get(name) for run in runs)]
    charts: dict[str, Markup] = {}
    for name, label in _MEASURES.items():
        curves = {run.folder: smooth(run.curves[name]) if name == "loss" else run.curves[name] for run in runs}
        is_accuracy = label == "held-out accuracy"
        if any(curves.values()) and not (is_accuracy and ("accuracy" not in head or label in charts)):
            charts[label] = to_svg(draw_measure(curves, label))
    best = min(runs, key=lambda run: run.rank)
    headline = best.summary.headline
    if len(runs) > 1:
        is_measured = best.rank[1] < math.inf
        headline = f"Best of {len(runs)} runs: {best.folder}. {headline}" if is_measured else "No run was measured"
    marked = best if len(runs) > 1 else None
    return {"title": kind, "headline": headline, "head": head, "runs": runs, "charts": charts, "best": marked}


def _search_page(folder: Path) -> str:
    """A search: what the best trial gained, how to use it, and all trials, the best first."""
    with _read(folder / SEARCH, "search") as search:
        trials = summaries.rank_trials(search["trials"])
        if not trials or trials[0]["loss"] is None:
            raise HfkitError(f"no finished search ({folder}): no trial was finished")
        best, figure = trials[0], summaries.compared_by(trials)
        measures = ("accuracy", "loss") if figure == "accuracy" else ("loss",)
        options = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
        rows = []
        for trial in trials:
            figures = [summaries.show_figure(trial[measure], measure) for measure in measures]
            values = [summaries.show_value(trial["params"].get(name, "")) for name in options]
            state = str(trial["state"]) + (", the defaults" if trial.get("default") else "")
            rows.append([f"{trial['number']}", *figures, *values, state])
        with _read(folder / best["folder"] / METRICS, "run") as metrics:
            command = summaries.summarize(metrics).command
            explanation = summaries.explain_search(trials, metrics[f"{figure}_before"])
        picture = to_svg(plot_trials(search["trials"], search["importances"]))
    score = summaries.show_figure(best[figure], figure)
    return render(
        "search.html.jinja",
        folder=str(folder),
        headline=f"Best of {counted(len(rows), 'trial')}: held-out {figure} {score}",
        explanation=explanation,
        command=f"{command}\nhfkit finetune --config {shlex.quote(str(folder))}/best.yaml",
        picture=picture,
        head=["trial", *(f"held-out {measure}" for measure in measures), *options, "state"],
        rows=rows,
        numbers=range(1, 1 + len(measures) + len(options)),
    )


def render(template: str, **values: Any) -> str:
    """The text of a `.html.jinja` or `.md.jinja` file with these values in it.

    In HTML, control characters are written out and the rest is escaped; in Markdown, all markup is. Values of type
    Markup stay as they are.
    """
    return _environment(template.endswith(".html.jinja")).get_template(template).render(values)


@cache
def _environment(is_html: bool) -> Environment:
    def show(value: object) -> object:
        if isinstance(value, Markup):
            return value
        return printable(str(value)) if is_html else markdown(str(value))

    environment = Environment(
        loader=PackageLoader("hfkit.reporting", "."),
        autoescape=is_html,  # noqa: S701, Markdown is escaped by `show`
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "quote": quote, "script_hash": script_hash}
    return environment


def script_hash(script: str) -> str:
    """What a page's Content-Security-Policy calls this script: a browser runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def markdown(text: str) -> str:
    """`text` in one line, as Markdown shows it to the letter."""
    return _MARKUP.sub(r"\\\g<0>", printable(text).replace("\n", " "))


def code(text: str) -> Markup:
    """`text` as Markdown code in a table's cell, so that it can be copied."""
    text = printable(text).replace("\n", " ").replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{ticks} {text} {ticks}")  # noqa: S704, code spans show their content to the letter


def quote(text: str) -> Markup:
    """`text` as a Markdown quotation that keeps its lines."""
    # A leading sign would start a list or a heading; two spaces at the end keep a line.
    lines = (re.sub("^[-+=]", r"\\\g<0>", markdown(line.strip())) for line in text.split("\n"))
    return Markup("  \n".join(f"> {line}" for line in lines))  # noqa: S704, escaped above
