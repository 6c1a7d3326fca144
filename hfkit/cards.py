"""What a finished run leaves for a person: model card, report page and loss picture; and runs compared on one page."""

import json
from pathlib import Path
from typing import Any

from hfkit import pages
from hfkit.console import printable
from hfkit.errors import HfkitError
from hfkit.novelty import MOST, WORDS
from hfkit.pictures import draw_curves, draw_loss
from hfkit.report import duration
from hfkit.storage import write_text

CARD, PAGE, PICTURE = "README.md", "report.html", "loss.png"
_TAGS = {"classification": "text-classification", "question-answering": "question-answering"}
_USES = {
    "classification": 'hfkit classify -m {folder} "A text"',
    "question-answering": 'hfkit answer -m {folder} "A question?" --context text.txt',
}


def make_files(metrics: dict[str, Any]) -> dict[str, str | bytes]:
    """The card, the page and the picture of a finished run, by file name, from its metrics."""
    return {CARD: make_card(metrics), PAGE: make_page(metrics), PICTURE: draw_loss(metrics["history"])}


def settings(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What was done, and with what."""
    return [
        ("model", metrics["model"]),
        ("corpus", ", ".join(Path(source).name for source in metrics["corpus"])),
        ("trained on", f"{metrics['tokens']:,} tokens in {metrics['steps']:,} steps"),
        ("kept", f"the state of step {metrics['step']:,}"),
        ("parameters", f"{metrics['parameters']:,}"),
        ("optimizer", f"{metrics['optim']}, peak {metrics['learning_rate']:g}"),
        ("machine", f"{metrics['device']}, {metrics['precision']}" + (", compiled" if metrics["compiled"] else "")),
        ("time", duration(metrics["seconds"])),
        ("seed", str(metrics["seed"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
        ("command", metrics["command"]),
    ]


def scores(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of: what, before, after, the difference with its error."""
    if metrics.get("loss") is None:
        return []
    gain, error = metrics.get("loss_gain"), metrics.get("loss_gain_stderr")
    told = "" if gain is None else f"{-gain:+.4f}" + ("" if error is None else f" ± {error:.4f}")
    rows = [("held-out loss (nats a token)", _number(metrics["loss_before"], 4), _number(metrics["loss"], 4), told)]
    if metrics.get("perplexity") is not None:
        spread = metrics["perplexity"] * metrics["loss_stderr"] if metrics["loss_stderr"] else None
        after = _number(metrics["perplexity"]) + ("" if spread is None else f" ± {spread:.2f}")
        rows.insert(0, ("held-out perplexity", _number(metrics["perplexity_before"]), after, ""))
    if metrics.get("accuracy") is not None:
        rows.append(("held-out accuracy", _number(metrics["accuracy_before"], 4), _number(metrics["accuracy"], 4), ""))
    return rows


def _number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def copying(metrics: dict[str, Any]) -> str:
    """A sentence on what the samples took from the corpus; empty if there are none."""
    copied = metrics.get("copied")
    if not copied:
        return ""
    seen = "" if copied.get("is_whole", True) else f" Only its first {MOST:,} words were looked at."
    longest = (
        f"The longest run of words in them that stands in the corpus has {copied['words']}: “{copied['longest']}”. "
    )
    return (
        longest if copied["words"] else f"No run of {WORDS} words in them stands in the corpus. "
    ) + f"{copied['share']:.1%} of all runs of {WORDS} words are from there.{seen}"


def make_card(metrics: dict[str, Any]) -> str:
    """README.md, as the Hub shows it."""
    head, folder, task = metrics.get("head"), metrics["folder"], metrics.get("task")
    on_hub = not metrics["from_nothing"] and metrics["model"] != "bundled" and not Path(metrics["model"]).exists()
    base = f"base_model: {json.dumps(metrics['model'])}\n" if on_hub else ""
    use = _USES.get(head, 'hfkit generate -m {folder} "{prompt}"')
    prompt = (metrics.get("prompt") or "Once").replace("\n", " ").replace('"', "'") if not task else "A text"
    rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in settings(metrics))
    figures = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in scores(metrics))
    table = f"| | before | after | difference |\n|---|---|---|---|\n{figures}\n![loss]({PICTURE})"
    samples = "".join(f"**{when}**\n\n{_quoted(text)}\n\n" for when, text in shown_samples(metrics))
    template = f"\nIts template: {json.dumps(task['template'], ensure_ascii=False)}\n" if task else ""
    return f"""---
library_name: {metrics["library"]}
pipeline_tag: {_TAGS.get(head, "text-generation")}
{base}---

# {folder.rstrip("/").rpartition("/")[2]}

{"A model trained from nothing" if metrics["from_nothing"] else f"{metrics['model']}, trained further"} with
[hfkit](https://pypi.org/project/hfkit/). The exact options are in `recipe.yaml`, all figures in `metrics.json`.

## Use

    {use.format(folder=folder, prompt=prompt)}
{template}
## Scores

{table if figures else "Nothing was held out, so nothing was measured."}

## Samples

{samples or "None were drawn."}
{copying(metrics)}

## Training

| | |
|---|---|
{rows}
## Limits

It has learned from this corpus alone what it did not know before: it repeats the corpus' errors and opinions, may give
parts of it back word for word, and states what is not true.
"""


def _cell(text: str) -> str:
    return printable(str(text)).replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in printable(text).split("\n"))


def shown_samples(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The same prompt with the same seed before and after."""
    found = {entry["measured"]: entry["sample"] for entry in metrics["history"] if entry.get("sample") is not None}
    prompt, kept = metrics.get("prompt") or "", metrics["step"]
    last = kept if kept in found else max(found, default=0)
    pairs = [("Before", 0), (f"After step {last:,}", last)]
    return [(title, prompt + found[step]) for title, step in pairs if step in found]


def make_page(metrics: dict[str, Any]) -> str:
    """report.html: everything about a run on one page."""
    parts = []
    if rows := scores(metrics):
        parts += [pages.table(rows, ("", "before", "after", "difference"))]
    parts += [
        pages.image(draw_curves([(metrics["folder"], metrics["history"])]), "loss and learning rate over the steps")
    ]
    if pairs := shown_samples(metrics):
        told = f"<p>{pages.html.escape(printable(copying(metrics)))}</p>"
        parts += [pages.heading("The same prompt and seed"), pages.samples(pairs)]
        drawn = [(f"Sample {number}", text) for number, text in enumerate(metrics.get("samples", []), 1)]
        parts += [pages.heading("More samples"), pages.samples(drawn)] if drawn else []
        parts += [told]
    parts += [pages.heading("Training"), pages.table(settings(metrics))]
    return pages.page(metrics["folder"], *parts)


def compare(folders: list[str | Path], output: str | Path) -> Path:
    """Write one page that shows finished runs side by side.

    Raises:
        HfkitError: a folder holds no finished run.
    """
    found = []
    for folder in map(Path, folders):
        try:
            found.append(json.loads((folder / "metrics.json").read_text("utf-8")) | {"folder": str(folder)})
        except (OSError, ValueError) as error:
            raise HfkitError(f"no finished run ({folder}): it has no readable metrics.json") from error
    names = (
        "folder",
        "model",
        "step",
        "tokens",
        "learning rate",
        "perplexity before",
        "perplexity",
        "loss",
        "seconds",
    )
    rows = [
        (
            one["folder"], one["model"], f"{one['step']:,}", f"{one['tokens']:,}", f"{one['learning_rate']:g}",
            _number(one.get("perplexity_before")), _number(one.get("perplexity")), _number(one.get("loss"), 4),
            f"{one['seconds']:.0f}",
        )
        for one in found
    ]  # fmt: skip
    parts = [
        pages.table(rows, names),
        pages.image(draw_curves([(one["folder"], one["history"]) for one in found]), "losses of the runs"),
    ]
    for one in found:
        parts += [pages.heading(one["folder"]), pages.samples(shown_samples(one)), pages.table(settings(one))]
    path = Path(output)
    write_text(path, pages.page("Runs", *parts))
    return path
