"""Pages of their own, which need no network: text, tables and pictures in one HTML file."""

import base64
import html
import re
from collections.abc import Iterable, Sequence

from hfkit.console import printable

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
