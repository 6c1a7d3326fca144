"""The model card, and report pages of one run, of several runs and of a search: single files that fetch nothing."""

import contextlib
import json
import math
import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData
from markupsafe import Markup

from hfkit.console import counted, printable
from hfkit.errors import HfkitError, first_line
from hfkit.reporting.pictures import Curve, draw_curves, draw_measure, plot_trials, points, smooth, to_png, to_svg
from hfkit.reporting.summaries import Summary, compared_by, merit, ranked, show_figure, show_value, summarize
from hfkit.reporting.templates import render
from hfkit.storage import make_writable, write_text

METRICS_FILE, SEARCH_FILE = "metrics.json", "tuning.json"  # in the folder of a run, and of a search
CARD, PAGE, PICTURE = "README.md", "report.html", "loss.png"
_TAGS = {"classification": "text-classification", "question-answering": "question-answering"}  # of the Hub, by head
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
    summary = summarize(metrics)
    figure = draw_curves(metrics["history"], summary.unit)
    page = render("report.html.jinja", folder=metrics["folder"], run=summary, curves=to_svg(figure))
    return {CARD: _make_card(metrics, summary), PAGE: page, PICTURE: to_png(figure, dpi=160)}


def _make_card(metrics: dict[str, Any], summary: Summary) -> str:
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

    Raises:
        HfkitError: a folder holds no finished run or search, or a search is not alone.
    """
    paths, output = [Path(folder) for folder in folders], Path(output)
    searches = [path for path in paths if (path / SEARCH_FILE).is_file() and not (path / METRICS_FILE).is_file()]
    if searches and len(paths) > 1:
        raise HfkitError(f"{searches[0]} is a search: report it alone, or name runs in it, like {searches[0]}/trial-0")
    page = _search_page(searches[0]) if searches else _runs_page(paths, output)
    make_writable(output.parent)
    write_text(output, page)
    return output


def _read(folder: Path, name: str, kind: str) -> dict[str, Any]:
    try:
        values = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"no finished {kind} ({folder}): it has no readable {name}") from error
    if not isinstance(values, dict):
        raise HfkitError(f"{folder}/{name} is not what a {kind} leaves: it is not a JSON object")
    return values


@contextlib.contextmanager
def _checked(path: Path, kind: str) -> Iterator[None]:
    """Turn what goes wrong while values of this file are read into one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise HfkitError(f"{path} is not what a {kind} leaves: {reason}") from error


@dataclass(frozen=True)
class _Run:
    """A run beside others."""

    folder: str
    link: str  # from the page to the run's own
    summary: Summary
    curves: dict[str, Curve]  # by the names of _MEASURES
    cells: dict[str, str]  # the row of the run
    rank: tuple[float, float]  # see `merit`


def _read_run(folder: Path, output: Path) -> _Run:
    metrics = _read(folder, METRICS_FILE, "run") | {"folder": str(folder)}
    target = folder / PAGE if (folder / PAGE).is_file() else folder
    with _checked(folder / METRICS_FILE, "run"):
        summary, copied = summarize(metrics), metrics.get("copied")
        cells: dict[str, str] = {}
        for name, before, after, _ in summary.scores:
            if name in ("held-out accuracy", "held-out perplexity"):
                name = name.removeprefix("held-out ")
                cells |= {name: after, f"{name} before": before}
        cells |= {
            "loss": show_figure(metrics.get("loss"), "loss"),
            "copied": f"{copied['share']:.1%}" if copied else "",
            "step": f"{metrics['step']:,}",
            "tokens": f"{metrics['tokens']:,}",
            "learning rate": f"{metrics['learning_rate']:g}",
            "seconds": f"{metrics['seconds']:.0f}",
        }
        return _Run(
            folder=str(folder),
            link=quote(os.fsencode(os.path.relpath(target, output.parent))),
            summary=summary,
            curves={name: points(metrics["history"], name) for name in _MEASURES},
            cells=cells,
            rank=merit(metrics.get("accuracy"), metrics.get("loss")),
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
    return {
        "title": kind,
        "headline": headline,
        "head": head,
        "runs": runs,
        "charts": charts,
        "best": best if len(runs) > 1 else None,
    }


def _search_page(folder: Path) -> str:
    """A search: what the best trial gained, how to use it, and all trials, the best first."""
    search = _read(folder, SEARCH_FILE, "search")
    with _checked(folder / SEARCH_FILE, "search"):
        trials = ranked(search.get("trials", []))
        if not trials or trials[0]["loss"] is None:
            raise HfkitError(f"no finished search ({folder}): no trial was finished")
        best, figure = trials[0], compared_by(trials)
        measures = ("accuracy", "loss") if figure == "accuracy" else ("loss",)
        options = list(dict.fromkeys(name for trial in trials for name in trial["params"]))
        rows = [
            (
                f"{trial['number']}",
                *(show_figure(trial[measure], measure) for measure in measures),
                *(show_value(trial["params"].get(name, "")) for name in options),
                str(trial["state"]) + (", the defaults" if trial.get("default") else ""),
            )
            for trial in trials
        ]
        metrics = _read(folder / best["folder"], METRICS_FILE, "run") | {"folder": str(folder / best["folder"])}
        command, explanation = summarize(metrics).command, explain_search(trials, metrics[f"{figure}_before"])
        picture = to_svg(plot_trials(search["trials"], search["importances"]))
    return render(
        "search.html.jinja",
        folder=str(folder),
        headline=f"Best of {counted(len(rows), 'trial')}: held-out {figure} {show_figure(best[figure], figure)}",
        explanation=explanation,
        command=f"{command}\nhfkit finetune --config {shlex.quote(str(folder))}/best.yaml",
        picture=picture,
        head=["trial", *(f"held-out {measure}" for measure in measures), *options, "state"],
        rows=rows,
        numbers=range(1, 1 + len(measures) + len(options)),
    )


def explain_search(trials: Sequence[dict[str, Any]], before: float | None = None) -> str:
    """What the best of the trials gained over the defaults, over the others and over `before` the training."""
    figure = compared_by(trials)
    scored = [trial for trial in ranked(trials) if trial["loss"] is not None]
    best, values = scored[0], [trial[figure] for trial in scored]
    if best.get("default"):
        return f"The defaults are the best: no other trial has a better held-out {figure}."
    rivals = {
        "the defaults": next((trial[figure] for trial in scored if trial.get("default")), None),
        "the median trial": statistics.median(values) if len(values) > 2 else None,
        "the model before training": before,
    }
    parts = []
    for what, value in rivals.items():
        if value is not None:
            gain = best[figure] - value
            by = f"{100 * abs(gain):.1f} points" if figure == "accuracy" else f"{abs(gain):.4f}"
            parts.append((f"{by} {'above' if gain > 0 else 'below'}" if gain else "equal to") + f" that of {what}")
    return f"The held-out {figure} of trial {best['number']} is {', '.join(parts)}." if parts else ""
