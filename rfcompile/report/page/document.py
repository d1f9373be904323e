"""Page: one HTML file without network, made of a model, a table of sites, plots and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from rfcompile.report.page.blocks import TRAFFIC, WIRE
from rfcompile.report.page.boxes import boxes
from rfcompile.report.page.rows import Row

SIDES = ("before", "after")


@dataclass(frozen=True)
class Column:
    """Of the table; numbers stand at the right and are sorted as numbers."""

    title: str
    is_number: bool = False


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by where the column has numbers."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Line:
    """A row of the table; ``box``: the number of the row of the model that it belongs to."""

    cells: tuple[Cell, ...]
    box: int | None


@dataclass(frozen=True)
class Fact:
    """A line of the panel beside the model, with a value for each side that has one."""

    label: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """The statements of one side, and what the panel says of each line."""

    lines: tuple[str, ...]
    sizes: tuple[int | None, ...]
    sources: tuple[str, ...]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Args:
        title, summary: the heading, and lines under it.
        tiles: (label, value) of the numbers at the top.
        model: the rows of the model, None where there is none to draw.
        arrows: what the arrows between boxes follow.
        facts: by number of a row, what the panel says; an operator's come from ``texts``.
        unknown: what the panel says is not known, and why.
        texts: the statements of each side.
        columns, lines: of the table; ``table_title`` is its heading.
        plots: figures. notes: further lines. sections: (title, HTML) at the end.
    """

    title: str
    summary: tuple[str, ...] = ()
    tiles: tuple[tuple[str, str], ...] = ()
    model: Row | None = None
    arrows: str = ""
    facts: Mapping[int, Sequence[Fact]] = field(default_factory=dict)
    unknown: Mapping[int, str] = field(default_factory=dict)
    texts: tuple[Texts, ...] = ()
    table_title: str = "Sites"
    columns: tuple[Column, ...] = ()
    lines: tuple[Line, ...] = ()
    plots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[tuple[str, str], ...] = ()

    def html(self) -> str:
        """The page as a text that a browser opens."""
        body = "".join(self._body())
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{escape(self.title)}</title>"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="generator" content="rfcompile">'
            f"<style>{_file('style.css')}</style></head><body>{body}"
            f'<script type="application/json" id="data">{_json(self._data())}</script>'
            f"<script>{_file('script.js')}</script></body></html>\n"
        )

    def write(self, path: str | PathLike[str]) -> None:
        """Write the page to a file.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(self.html(), encoding="utf-8")

    def _body(self) -> Iterator[str]:
        yield f"<header><h1>{escape(self.title)}</h1>"
        yield from (f"<p>{escape(line)}</p>" for line in self.summary)
        tiles = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in self.tiles)
        yield f'<dl class="tiles">{"".join(tiles)}</dl></header><main>'
        if self.plots:
            yield f'<section class="plots" aria-label="Plots">{"".join(self.plots)}</section>'
        if self.model is not None:
            yield from self._model(self.model)
        if self.columns:
            yield from self._table()
        if self.notes:
            notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
            yield f'<section><h2>Notes</h2><ul class="notes">{notes}</ul></section>'
        for title, html in self.sections:
            yield f"<section><h2>{escape(title)}</h2>{html}</section>"
        yield "</main>"

    def _model(self, model: Row) -> Iterator[str]:
        sides = len(model.sides)
        yield f'<section id="model"><h2>Model</h2><p class="key">{_legend(model)}'
        yield f" <span>{escape(self.arrows)}</span></p>"
        yield (
            '<p class="tools"><button data-do="unfold">Unfold all</button>'
            '<button data-do="fold">Fold all</button>'
            "<span>Hover or focus a box for what is known of it. Keys: up and down move, right and "
            "left unfold and fold, Enter goes to its line in the table.</span></p>"
        )
        yield '<div class="both"><div class="model">'
        if sides > 1:
            yield '<div class="sides"><h3>before</h3><h3>after</h3></div>'
        yield boxes(model)
        yield '</div><aside id="panel" aria-live="polite" aria-label="The box in focus"></aside>'
        yield "</div></section>"

    def _table(self) -> Iterator[str]:
        yield f'<section id="sites"><h2>{escape(self.table_title)}</h2><p class="tools">'
        yield '<label>Filter <input type="search" id="filter"></label>'
        yield '<button data-do="all" hidden>Show all</button><output id="count"></output></p>'
        yield '<div class="scroll"><table><thead><tr>'
        for column in self.columns:
            kind = ' class="n"' if column.is_number else ""
            yield f'<th scope="col"{kind}><button>{escape(column.title)}</button></th>'
        yield "</tr></thead><tbody>"
        for i, line in enumerate(self.lines):
            box = "" if line.box is None else f' data-box="{line.box}" tabindex="0"'
            yield f'<tr id="t{i}"{box}>'
            for column, cell in zip(self.columns, line.cells, strict=True):
                kind = ' class="n"' if column.is_number else ""
                value = "" if cell.value is None else f' data-v="{cell.value:.12g}"'
                yield f"<td{kind}{value}>{escape(cell.text)}</td>"
            yield "</tr>"
        yield "</tbody></table></div></section>"

    def _data(self) -> dict[str, Any]:
        rows = [] if self.model is None else [*self.model.walk()]
        links: dict[int, list[int]] = {}
        for i, line in enumerate(self.lines):
            if line.box is not None:
                links.setdefault(line.box, []).append(i)
        within: dict[int, list[int]] = {}
        for row in reversed(rows):  # children before the row that holds them
            inner = [*links.get(row.number, ())]
            inner += [i for child in row.children for i in within.get(child.number, ())]
            if inner:
                within[row.number] = inner
        boxes: dict[int, dict[str, Any]] = {}
        for row in rows:
            found: dict[str, Any] = {}
            places = [block.line if block else None for block in row.sides]
            if any(place is not None for place in places):
                found["at"] = places
            if facts := self.facts.get(row.number):
                found["facts"] = [[fact.label, *fact.values] for fact in facts]
            if unknown := self.unknown.get(row.number):
                found["unknown"] = unknown
            if row.number in within:
                found["sites"] = sorted(within[row.number])
            if found:
                boxes[row.number] = found
        texts = [
            {
                "lines": side.lines,
                "sizes": side.sizes,
                **_indexed("source", side.sources),
                **_indexed("module", side.modules),
            }
            for side in self.texts
        ]
        sides = SIDES if self.model is not None and len(self.model.sides) > 1 else ("",)
        return {"boxes": boxes, "texts": texts, "sides": sides}


def _indexed(name: str, values: Sequence[str]) -> dict[str, Any]:
    """Texts that repeat, each once, and the place of each."""
    unique = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return {f"{name}s": [*unique], name: [unique[value] for value in values]}


def _legend(model: Row) -> str:
    """The colours that the model has."""
    rows = [*model.walk()]
    blocks = [block for row in rows for block in row.sides if block is not None]
    there = {block.kind for block in blocks}
    kinds = [(f"f {kind}", "fake wire" if kind == WIRE else kind) for kind in TRAFFIC]
    found = [(cls, name) for cls, name in kinds if cls[2:] in there]
    bits = dict.fromkeys(cell for block in blocks for cell, _ in block.strip)
    for cls in sorted(bits):
        found.append((f"cell {cls}", "exact" if cls == "qx" else f"{cls[1:]} bits"))
    if any(edge.crossed for row in rows for edge in row.edges):
        found.append(("bar", "crosses ranks, with the bytes that a rank sends"))
    return "".join(f'<span><i class="{cls}"></i>{escape(name)}</span> ' for cls, name in found)


def _file(name: str) -> str:
    return (files("rfcompile.report.page") / name).read_text(encoding="utf-8")


def _json(data: Any) -> str:
    """JSON that may stand in a script of a page."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c")
