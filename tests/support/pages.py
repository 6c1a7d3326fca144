"""Pages as a browser reads them: what is in them, and what they would fetch or run."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from matplotlib.image import imread

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;"

_FETCHES = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """`text` that is shown, `tables` as lists of rows of cells, the `pictures` in it, `tags` by name."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tables: list[list[list[str]]] = []
        self.shown: list[str] = []
        self.style, self.in_cell = "", False
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if "style" in self.tags[-1:]:
            self.style += data
            return
        self.shown.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.shown)

    @property
    def pictures(self) -> list[np.ndarray]:
        found = [base64.b64decode(v.partition("base64,")[2]) for n, v in self.attributes if n == "src" and v]
        return [imread(io.BytesIO(png)) for png in found]

    def assert_alone(self) -> None:
        """Nothing is fetched from anywhere, and nothing runs."""
        fetched = [value for name, value in self.attributes if name in _FETCHES]
        assert all(str(value).startswith("data:image/png;base64,") for value in fetched), fetched
        assert not [name for name, _ in self.attributes if name.startswith("on")]
        styles = self.style + "".join(value or "" for name, value in self.attributes if name == "style")
        assert not re.search(r"url\(|@import|expression", styles)
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(self.tags)
