"""Pages of their own, which need no network: text, tables and pictures in one HTML file."""

import base64
import html
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hfkit.console import duration, printable
from hfkit.errors import HfkitError, first_line
from hfkit.reporting.pictures import draw_curves, points
from hfkit.storage import make_writable, write_text

_NUMBER = re.compile(r"[-+−–]?\d|–$")
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.25; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre, .sample { background: var(--soft); padding: .8rem 1rem; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.tokens { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.tokens span { border-right: 1px solid var(--line); display: inline-block; }
img { max-width: min(100%, 46rem); background: white; border-radius: .4rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
.wide img { max-width: none; }
@media (max-width: 40rem) { table { font-size: .85rem; } td, th { padding: .25rem .4rem; } }
"""


def escape(text: str) -> str:
    """`text` as a page shows it to the letter; control characters are written out."""
    return html.escape(printable(text))


def page(title: str, *parts: str) -> str:
    """A whole page; the parts are HTML."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of texts; under a head, a column of what looks like numbers stands on the right."""
    rows = list(rows)
    is_number = [
        bool(head) and all(not cell or _NUMBER.match(cell) for cell in column) for column in zip(*rows, strict=True)
    ]

    def cells(row: Sequence[str], tag: str) -> str:
        kinds = zip(row, is_number, strict=True)
        return "".join(f"<{tag}{' class=number' * right}>{escape(text)}</{tag}>" for text, right in kinds)

    lines = [f"<tr>{cells(head, 'th')}</tr>"] if head and rows else []
    return "<table>" + "\n".join([*lines, *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]) + "</table>"


def image(png: bytes, text: str, *, wide: bool = False) -> str:
    """A picture inside the page; `text` says what it shows to who cannot see it. wide: it is scrolled, not shrunk."""
    found = f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    return f"<div class=wide>{found}</div>" if wide else found


def samples(pairs: Iterable[tuple[str, str]]) -> str:
    """Texts side by side, each under its title."""
    return '<div class="pair">' + "".join(
        f"<div><b>{escape(title)}</b><div class=sample>{escape(text)}</div></div>" for title, text in pairs
    ) + "</div>"  # fmt: skip


METRICS = "metrics.json"
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


def score_lines(metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of: what, before, after, the difference with its error."""
    if metrics.get("loss") is None:
        return []
    gain, error = metrics.get("loss_gain"), metrics.get("loss_gain_stderr")
    told = "" if gain is None else f"{-gain:+.4f}" + (f" ± {error:.4f}" if error else "")
    before, after = (_format_number(metrics[name], 4) for name in ("loss_before", "loss"))
    rows = [("held-out loss (nats a token)", before, after, told)]
    if metrics.get("perplexity") is not None:
        rows.insert(0, ("held-out perplexity", _format_number(metrics["perplexity_before"]), _perplexity(metrics), ""))
    if metrics.get("accuracy") is not None:
        before, after = (_format_number(metrics[name], 4) for name in ("accuracy_before", "accuracy"))
        rows.append(("held-out accuracy", before, after, ""))
    return rows


def _perplexity(metrics: dict[str, Any]) -> str:
    """With its error, if that is known."""
    value, error = metrics.get("perplexity"), metrics.get("loss_stderr")
    return _format_number(value) + (f" ± {value * error:.2f}" if value is not None and error else "")


def _format_number(value: float | None, places: int = 2) -> str:
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
    figures = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in score_lines(metrics))
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
    if rows := score_lines(metrics):
        parts += [table(rows, _COMPARED)]
    parts += [image(picture, "loss and learning rate over the steps")]
    if pairs := shown_samples(metrics):
        parts += [heading("The same prompt and seed"), samples(pairs)]
    if drawn := [(f"Sample {number}", text) for number, text in enumerate(metrics.get("samples", []), 1)]:
        parts += [heading("More samples"), samples(drawn), paragraph(copying(metrics))]
    parts += [heading("Training"), table(settings(metrics))]
    return page(metrics["folder"], *parts)


def compare_runs(folders: Sequence[str | Path], output: str | Path) -> Path:
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
            parts += [heading(one["folder"]), table(score_lines(one), _COMPARED) if score_lines(one) else ""]
            parts += [samples(shown_samples(one)), paragraph(copying(one)), table(settings(one))]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
            raise HfkitError(f"{one['folder']}/metrics.json is not what a run leaves: {what}") from error
    make_writable(Path(output).parent)
    top = [table(rows, _SUMMARY), image(draw_curves(histories), "losses and learning rates of the runs")]
    write_text(Path(output), page("Runs", *top, *parts))
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
        _format_number(one.get("perplexity_before")), _perplexity(one), _format_number(one.get("loss"), 4),
        _format_number(one.get("accuracy"), 4), f"{one['seconds']:.0f}",
    )  # fmt: skip
