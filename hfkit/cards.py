"""What a finished run leaves for a person: model card, report page and loss picture; and runs compared on one page."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfkit import pages
from hfkit.console import duration, printable
from hfkit.errors import HfkitError, first_line
from hfkit.pictures import draw_curves, points
from hfkit.runs import METRICS
from hfkit.storage import make_writable, write_text

CARD, PAGE, PICTURE = "README.md", "report.html", "loss.png"
_TAGS = {"classification": "text-classification", "question-answering": "question-answering"}
_USES = {
    "classification": 'hfkit classify -m {folder} "A text"',
    "question-answering": 'hfkit answer -m {folder} "A question?" --context text.txt',
}
_COMPARED = ("", "before", "after", "difference")
_SUMMARY = ("folder", "model", "step", "tokens", "learning rate", "perplexity before", "perplexity", "loss",
            "accuracy", "seconds")  # fmt: skip
# What Markdown may take for a picture, a link, HTML, a table ...; an underline does nothing inside a word.
_MARKUP = re.compile(r"[\\`*~\[\]<>#|&$]|(?<!\w)_|_(?!\w)")


def make_files(metrics: dict[str, Any]) -> dict[str, str | bytes]:
    """The card, the page and the picture of a finished run, by file name, from its metrics."""
    picture = draw_curves([(metrics["folder"], metrics["history"])])
    return {CARD: make_card(metrics), PAGE: make_page(metrics, picture), PICTURE: picture}


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
    told = "" if gain is None else f"{-gain:+.4f}" + (f" ± {error:.4f}" if error else "")
    rows = [("held-out loss (nats a token)", _number(metrics["loss_before"], 4), _number(metrics["loss"], 4), told)]
    if metrics.get("perplexity") is not None:
        rows.insert(0, ("held-out perplexity", _number(metrics["perplexity_before"]), _perplexity(metrics), ""))
    if metrics.get("accuracy") is not None:
        rows.append(("held-out accuracy", _number(metrics["accuracy_before"], 4), _number(metrics["accuracy"], 4), ""))
    return rows


def _perplexity(metrics: dict[str, Any]) -> str:
    """With its error, if that is known."""
    value, error = metrics.get("perplexity"), metrics.get("loss_stderr")
    return _number(value) + (f" ± {value * error:.2f}" if value is not None and error else "")


def _number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def copying(metrics: dict[str, Any]) -> str:
    """A sentence on what the samples took from the corpus; empty if there are none."""
    copied = metrics.get("copied")
    if not copied:
        return ""
    longest = f"the longest run of words that stands in the corpus has {copied['words']}: “{copied['longest']}”"
    told = longest if copied["words"] else f"no run of {copied['run']} words stands in the corpus"
    seen = "" if copied.get("is_whole", True) else f" Only its first {copied['limit']:,} words were looked at."
    count = len(metrics.get("samples", []))
    return (
        f"In {count} samples {told}. {copied['share']:.1%} of all runs of {copied['run']} words are from there.{seen}"
    )


def make_card(metrics: dict[str, Any]) -> str:
    """README.md, as the Hub shows it."""
    head, folder, task = metrics.get("head"), metrics["folder"], metrics.get("task")
    on_hub = not metrics["from_nothing"] and metrics["model"] != "bundled" and not Path(metrics["model"]).exists()
    base = f"base_model: {json.dumps(metrics['model'])}\n" if on_hub else ""
    prompt = printable(" ".join((metrics.get("prompt") or "Once").split())) if not task else "A text"
    words = {"folder": shlex.quote(" ".join(printable(folder).split())), "prompt": shlex.quote(prompt)}
    use = _USES.get(head, "hfkit generate -m {folder} {prompt}").format(**words)
    rows = "".join(
        f"| {name} | {_code(value) if name == 'command' else _cell(value)} |\n" for name, value in settings(metrics)
    )
    figures = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in scores(metrics))
    table = f"| | before | after | difference |\n|---|---|---|---|\n{figures}\n![loss]({PICTURE})"
    samples = "".join(f"**{when}**\n\n{_quoted(text)}\n\n" for when, text in shown_samples(metrics))
    template = f"\nIts template: {_cell(json.dumps(task['template'], ensure_ascii=False))}\n" if task else ""
    return f"""---
library_name: {metrics["library"]}
pipeline_tag: {_TAGS.get(head, "text-generation")}
{base}---

# {_cell(folder.rstrip("/").rpartition("/")[2])}

{"A model trained from nothing" if metrics["from_nothing"] else f"{_cell(metrics['model'])}, trained further"} with
[hfkit](https://pypi.org/project/hfkit/). The exact options are in `recipe.yaml`, all figures in `metrics.json`.

## Use

    {use}
{template}
## Scores

{table if figures else "Nothing was held out, so nothing was measured."}

## Samples

{samples or "None were drawn."}
{_cell(copying(metrics))}

## Training

| | |
|---|---|
{rows}
## Limits

It has learned from this corpus alone what it did not know before: it repeats the corpus' errors and opinions, may give
parts of it back word for word, and states what is not true.
"""


def _cell(text: str) -> str:
    """`text` as Markdown shows it to the letter, in one line."""
    return _MARKUP.sub(r"\\\g<0>", printable(str(text)).replace("\n", " "))


def _code(text: str) -> str:
    """`text` to be copied, in a cell of a table."""
    text = printable(str(text)).replace("\n", " ").replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}"


def _quoted(text: str) -> str:
    # Two spaces keep the end of a line; a line or a sign of a list would make more of it.
    lines = (re.sub("^[-+=]", r"\\\g<0>", _cell(line.strip())) for line in text.split("\n"))
    return "  \n".join(f"> {line}" for line in lines)


def shown_samples(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """The same prompt with the same seed before and after."""
    found = {entry["measured"]: entry["sample"] for entry in metrics["history"] if entry.get("sample") is not None}
    prompt, kept = metrics.get("prompt") or "", metrics["step"]
    last = kept if kept in found else max(found, default=0)
    pairs = [("Before", 0), (f"After step {last:,}", last)]
    return [(title, prompt + found[step]) for title, step in pairs if step in found]


def make_page(metrics: dict[str, Any], picture: bytes) -> str:
    """report.html: everything about a run on one page."""
    parts = []
    if rows := scores(metrics):
        parts += [pages.table(rows, _COMPARED)]
    parts += [pages.image(picture, "loss and learning rate over the steps")]
    if pairs := shown_samples(metrics):
        parts += [pages.heading("The same prompt and seed"), pages.samples(pairs)]
    if drawn := [(f"Sample {number}", text) for number, text in enumerate(metrics.get("samples", []), 1)]:
        parts += [pages.heading("More samples"), pages.samples(drawn), pages.paragraph(copying(metrics))]
    parts += [pages.heading("Training"), pages.table(settings(metrics))]
    return pages.page(metrics["folder"], *parts)


def compare(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Write one page that shows finished runs side by side.

    Raises:
        HfkitError: a folder holds no finished run.
    """
    runs = [_read(Path(folder)) for folder in folders]
    rows, histories, parts = [], [], []
    for one in runs:
        try:
            rows.append(_summary(one))
            histories.append((one["folder"], one["history"]))
            for name in ("loss", "eval_loss", "learning_rate"):
                points(one["history"], name)
            parts += [pages.heading(one["folder"]), pages.table(scores(one), _COMPARED) if scores(one) else ""]
            parts += [pages.samples(shown_samples(one)), pages.paragraph(copying(one)), pages.table(settings(one))]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise HfkitError(f"{one['folder']}/metrics.json is not what a run leaves: {what}") from error
    make_writable(Path(output).parent)
    top = [pages.table(rows, _SUMMARY), pages.image(draw_curves(histories), "losses and learning rates of the runs")]
    write_text(Path(output), pages.page("Runs", *top, *parts))
    return Path(output)


def _read(folder: Path) -> dict[str, Any]:
    """A run's metrics; the folder is where they are now."""
    try:
        found = json.loads((folder / METRICS).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HfkitError(f"no finished run ({folder}): it has no readable {METRICS}") from error
    if not isinstance(found, dict):
        raise HfkitError(f"{folder}/{METRICS} is not what a run leaves: it is no object")
    return found | {"folder": str(folder)}


def _summary(one: dict[str, Any]) -> tuple[str, ...]:
    """The cells under _SUMMARY."""
    return (
        one["folder"], one["model"], f"{one['step']:,}", f"{one['tokens']:,}", f"{one['learning_rate']:g}",
        _number(one.get("perplexity_before")), _perplexity(one), _number(one.get("loss"), 4),
        _number(one.get("accuracy"), 4), f"{one['seconds']:.0f}",
    )  # fmt: skip
