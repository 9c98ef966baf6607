"""Elements and text of an HTML page, as a browser without scripts would parse it."""

from __future__ import annotations

from html.parser import HTMLParser


class Elements(HTMLParser):
    """Collects elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.figures = ""
        self._raw = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._raw = tag if tag in ("script", "style") else self._raw
        if ("id", "figures") in attrs:
            self._raw = "figures"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "figures":
            self.figures += data
        elif not self._raw:
            self.text += data
