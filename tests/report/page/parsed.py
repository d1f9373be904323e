"""Reads a page: checks that what is opened is closed, and collects what tests ask for."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

VOID = frozenset({"meta", "input"})


class Parsed(HTMLParser):
    """The tags of a page with their attributes, the text by tag, and the data of its script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, list[str]] = {}
        self.data: dict[str, Any] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.text[tag][-1] += data
        if self.open and self.open[-1] == "script" and data.startswith("{"):
            self.data = json.loads(data)

    def all(self, tag: str, cls: str = "") -> list[dict[str, str]]:
        """The attributes of every element of a tag that has a class."""
        classes = ((attrs, attrs.get("class", "").split()) for t, attrs in self.found if t == tag)
        return [attrs for attrs, names in classes if not cls or cls in names]
