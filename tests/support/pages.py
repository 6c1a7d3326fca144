"""Pages as a browser reads them: what is in them, and what they would fetch or run."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import hfkit

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"
ATTENTION_SCRIPT = (Path(hfkit.__file__).parent / "reporting" / "attention.js").read_text()

_FETCHES = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """The `text` that it shows, `tables` as lists of rows of cells, `charts` by what they say they show, `links`."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.shown: list[str] = []
        self.links: list[str] = []
        self.charts: list[str] = []
        self.scripts: list[str] = []
        self.policy = ""  # what the page allows the browser to run and fetch
        self.style, self.in_cell, self.in_script = "", False, False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        known = dict(attributes)
        if tag == "a":
            self.links.append(str(known.pop("href")))
        elif known.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(known["content"])
        elif tag == "figure":
            self.charts.append(str(known["aria-label"]))
        elif tag == "script":
            self.scripts.append("")
            self.in_script = True
        self.attributes += known.items()
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if "style" in self.tags[-1:]:
            self.style += data
            return
        if self.in_script:
            self.scripts[-1] += data
            return
        self.shown.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.shown)

    def assert_alone(self, script: str = "") -> None:
        """Nothing is fetched from anywhere, and nothing runs but `script`. Links lead to files near the page."""
        fetched = [str(value) for name, value in self.attributes if name in _FETCHES]
        assert all(value.startswith("#") for value in fetched), fetched  # a part of the page itself
        assert all(re.fullmatch(r"[\w.~%/-]+", link) for link in self.links), self.links
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        styles = self.style + "".join(value or "" for name, value in self.attributes if name == "style")
        assert not re.search(r"url\((?!#)|@import|expression", styles)
        assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & set(self.tags)
        assert self.scripts == [script] * bool(script)

    def assert_policy(self) -> None:
        """The browser would run nothing else, either."""
        allowed = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        for script in self.scripts:
            allowed += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        assert self.policy == allowed
