"""Pages of their own, which need no network: text, tables and pictures in one HTML file."""

import base64
import html
from collections.abc import Iterable, Sequence

from hfkit.console import printable

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.25; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre, .sample { background: var(--soft); padding: .8rem 1rem; border-radius: .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.tokens { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.tokens span { border-right: 1px solid var(--line); }
img { max-width: 100%; background: white; border-radius: .4rem; }
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
    """A table of texts; what looks like a number stands on the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if text[:1].isdigit() or text[:1] in '+-−–' else ''}>{escape(text)}</{tag}>"
            for text in row
        )

    lines = [f"<tr>{cells(head, 'th')}</tr>"] if head else []
    return "<table>" + "\n".join([*lines, *(f"<tr>{cells(row, 'td')}</tr>" for row in rows)]) + "</table>"


def image(png: bytes, text: str) -> str:
    """A picture inside the page; `text` says what it shows to who cannot see it."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def samples(pairs: Iterable[tuple[str, str]]) -> str:
    """Texts side by side, each under its title."""
    return '<div class="pair">' + "".join(
        f"<div><b>{escape(title)}</b><div class=sample>{escape(text)}</div></div>" for title, text in pairs
    ) + "</div>"  # fmt: skip
