"""Renders the `.jinja` files of this package. Every value is escaped: for HTML, or for Markdown."""

import base64
import hashlib
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hfkit.console import printable

# What Markdown reads as a picture, a link, HTML, a table, ...; inside a word an underscore means nothing.
_MARKUP = re.compile(r"[\\`*~\[\]<>#|&$]|(?<!\w)_|_(?!\w)")


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
