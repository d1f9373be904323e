"""Sites on a page: the table, the panel, the boxes and the plots of any report that has sites."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rfcompile.report.page.blocks import MODULE
from rfcompile.report.page.document import Cell, Column, Fact, Line
from rfcompile.report.page.plots import Points, bars, linear, logarithmic, plot
from rfcompile.report.page.rows import Row
from rfcompile.report.page.texts import number, short_bytes

CELLS = 128
"""A strip shows the formats of so many sites at most."""
LIMIT_DB = 20 * math.log10(2)
"""A bit more raises the rate-distortion limit of a Gaussian by so many dB."""


@dataclass(frozen=True)
class ShownSite:
    """What a page knows of one site; None and "" where it is not known.

    Args:
        what: such as "forward all_reduce". kind: of traffic.
        graph: the name of the graph that it is in, "" if the page has one or none.
        tensor: dtype and shape, such as "f32[4, 64]", or the dtype and what else is known.
        format: "" for exact, and then ``reason``.
        bits: of the payload an element, scales and padding included.
        bytes_before, bytes_after: that one rank sends in all runs.
        increase: predicted, of the loss.
    """

    what: str
    kind: str
    module: str
    graph: str = ""
    source: str = ""
    tensor: str = ""
    format: str = ""
    reason: str = ""
    bits: float | None = None
    bytes_before: float | None = None
    bytes_after: float | None = None
    runs: int = 1
    sqnr_db: float | None = None
    kurtosis: float | None = None
    increase: float | None = None
    seconds: float | None = None

    def facts(self) -> Iterator[tuple[str, str]]:
        """(label, value) of what is known."""
        yield from (("tensor", self.tensor),) if self.tensor else ()
        reason = f" ({self.reason})" if self.reason else ""
        yield "format", (self.format or "exact") + reason
        if self.bytes_before is not None and self.bytes_after is not None:
            runs = f" in {self.runs} runs" if self.runs != 1 else ""
            yield "bytes", f"{self.bytes_before:,.0f} -> {self.bytes_after:,.0f}{runs}"
        for label, value, unit in (
            ("SQNR", self.sqnr_db, " dB"),
            ("excess kurtosis", self.kurtosis, ""),
            ("predicted loss", self.increase, " more"),
        ):
            if number(value):
                yield label, number(value) + unit
        if self.seconds is not None:
            yield "time", f"{1e3 * self.seconds:.3f} ms"
        yield from (("line of code", self.source),) if self.source else ()

    def unknown(self) -> list[str]:
        """What is not known of it."""
        known = {
            "shape": "[" in self.tensor,
            "dtype": bool(self.tensor),
            "bytes": self.bytes_after is not None,
            "SQNR": bool(number(self.sqnr_db)),
            "kurtosis": bool(number(self.kurtosis)),
            "predicted loss": self.increase is not None,
            "line of code": bool(self.source),
        }
        return [label for label, is_known in known.items() if not is_known]


# ---- boxes -------------------------------------------------------------------------------------


def boxes_of(root: Row, sites: Sequence[ShownSite]) -> list[int | None]:
    """For each site the number of the row of its module, or of the nearest that holds it.

    The rows get their sites and badges.
    """
    rows: dict[tuple[str, str], Row] = {}
    for graph, row in _graphs(root):
        for inner in row.walk():
            for block in inner.sides:
                if block is not None and block.kind == MODULE:
                    rows.setdefault((graph, block.key), inner)
    found: list[int | None] = []
    for i, site in enumerate(sites):
        nearest = _nearest(rows, site)
        if nearest is not None:
            nearest.sites.append(i)
        found.append(nearest.number if nearest is not None else None)
    for row in root.walk():
        inner_sites = [sites[i] for r in row.walk() for i in r.sites]
        if inner_sites:
            row.block.badge = _badge(inner_sites)
            row.block.strip = tuple(_cell_of(site) for site in inner_sites[:CELLS])
    return found


def _graphs(root: Row) -> Iterator[tuple[str, Row]]:
    """The rows of each graph by its name; "" for the only one."""
    yield "", root
    if root.block.key == "" and root.block.label == "":
        yield from ((child.block.label, child) for child in root.children)


def _nearest(rows: Mapping[tuple[str, str], Row], site: ShownSite) -> Row | None:
    path = site.module
    while path:
        for graph in (site.graph, ""):
            if (graph, path) in rows:
                return rows[graph, path]
        path = path.rpartition(".")[0]
    return None


def _cell_of(site: ShownSite) -> tuple[str, str]:
    """Of a strip: the colour by bits, "qx" for exact."""
    bits = site.format.partition("b")[0]
    return (f"q{bits}" if bits.isdigit() else "qx"), site.format or "exact"


def _badge(sites: Sequence[ShownSite]) -> str:
    formats = list(dict.fromkeys(site.format or "exact" for site in sites))
    before = sum(site.bytes_before or 0 for site in sites)
    after = sum(site.bytes_after or 0 for site in sites)
    head = formats[0] if len(formats) == 1 else f"{len(formats)} formats"
    count = f"{len(sites)} sites \N{MIDDLE DOT} " if len(sites) > 1 else ""
    return f"{count}{head} \N{MIDDLE DOT} {short_bytes(before)} \N{RIGHTWARDS ARROW} " + (
        short_bytes(after)
    )


def facts_of(row: Row, sites: Sequence[ShownSite]) -> list[Fact]:
    """What the panel says of a row: its module, then each site on it, or all within in sum."""
    block = row.block
    facts = [Fact("box", (block.label,))]
    if block.kind == MODULE and block.key:
        facts.append(Fact("module", (block.key,)))
    facts += [Fact("class", (block.note,))] if block.note else []
    for i in row.sites:
        facts.append(Fact(f"site {i}", (sites[i].what,)))
        facts += [Fact(label, (value,)) for label, value in sites[i].facts()]
    inner = [sites[i] for r in row.walk() for i in r.sites]
    if len(inner) > len(row.sites):
        facts += [Fact(label, (value,)) for label, value in _totals(inner)]
    return facts


def _totals(sites: Sequence[ShownSite]) -> Iterator[tuple[str, str]]:
    quantized = sum(bool(site.format) for site in sites)
    yield "sites within", f"{len(sites)}, {quantized} quantized"
    before = sum(site.bytes_before or 0 for site in sites)
    after = sum(site.bytes_after or 0 for site in sites)
    yield "bytes within", f"{before:,.0f} -> {after:,.0f}"
    for label, values in (
        ("SQNR", [site.sqnr_db for site in sites]),
        ("excess kurtosis", [site.kurtosis for site in sites]),
    ):
        known = [value for value in values if value is not None and math.isfinite(value)]
        if known:
            yield label, f"{number(min(known))} to {number(max(known))}"
    increases = [site.increase for site in sites if site.increase is not None]
    if increases:
        yield "predicted loss", f"{number(sum(increases))} more"


def unknown_of(row: Row, sites: Sequence[ShownSite], hints: Mapping[str, str]) -> str:
    """What is not known of the sites on a row, with the reasons."""
    if not row.sites:
        return ""
    missing = dict.fromkeys(what for i in row.sites for what in sites[i].unknown())
    return "; ".join(what + (f" ({hints[what]})" if what in hints else "") for what in missing)


# ---- the table ---------------------------------------------------------------------------------


def table_of(
    sites: Sequence[ShownSite], boxes: Sequence[int | None]
) -> tuple[tuple[Column, ...], tuple[Line, ...]]:
    """The columns that have values, and a line a site."""
    wanted: list[tuple[Column, list[Cell]]] = [
        (Column("site", True), [Cell(str(i), i) for i in range(len(sites))]),
        (Column("what"), [Cell(site.what) for site in sites]),
        (Column("module"), [Cell(site.module) for site in sites]),
        (Column("tensor"), [Cell(site.tensor) for site in sites]),
        (Column("format"), [Cell(_format(site)) for site in sites]),
        (Column("bits", True), [_cell(site.bits) for site in sites]),
        (Column("bytes before", True), [_whole(site.bytes_before) for site in sites]),
        (Column("after", True), [_whole(site.bytes_after) for site in sites]),
        (Column("runs", True), [_cell(site.runs if site.runs != 1 else None) for site in sites]),
        (Column("SQNR dB", True), [_cell(site.sqnr_db) for site in sites]),
        (Column("kurtosis", True), [_cell(site.kurtosis) for site in sites]),
        (Column("loss increase", True), [_cell(site.increase) for site in sites]),
        (Column("ms", True), [_cell(_milli(site.seconds)) for site in sites]),
        (Column("line of code"), [Cell(site.source) for site in sites]),
    ]
    kept = [(column, cells) for column, cells in wanted if any(cell.text for cell in cells)]
    columns = tuple(column for column, _ in kept)
    lines = [Line(tuple(cells[i] for _, cells in kept), boxes[i]) for i in range(len(sites))]
    return columns, tuple(lines)


def _format(site: ShownSite) -> str:
    if site.format:
        return site.format + (f" ({site.reason})" if site.reason else "")
    return f"exact: {site.reason}" if site.reason else "exact"


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _cell(value: float | None) -> Cell:
    is_known = value is not None and math.isfinite(value)
    return Cell(number(value), value if is_known else None)


def _whole(value: float | None) -> Cell:
    return Cell("symbolic", None) if value is None else Cell(f"{value:,.0f}", value)


# ---- plots -------------------------------------------------------------------------------------


def bytes_plot(sites: Sequence[ShownSite]) -> Iterator[str]:
    """Bytes by kind of traffic, before and after."""
    kinds = dict.fromkeys(site.kind for site in sites)
    totals = [
        (
            sum(site.bytes_before or 0 for site in sites if site.kind == kind),
            sum(site.bytes_after or 0 for site in sites if site.kind == kind),
        )
        for kind in kinds
    ]
    if totals and any(map(any, totals)):
        before, after = zip(*totals, strict=True)
        series = [("before", "c5", before), ("after", "c0", after)]
        yield bars("Bytes by kind of traffic", [*kinds], series)


def kurtosis_plot(sites: Sequence[ShownSite]) -> Iterator[str]:
    """Kurtosis of the sites in order, on a logarithmic scale."""
    found = [
        (i, site)
        for i, site in enumerate(sites)
        if site.kurtosis is not None and math.isfinite(site.kurtosis)
    ]
    if len(found) < 2:
        return
    depth = tuple(float(i) for i, _ in found)
    values = tuple((site.kurtosis or 0.0) + 3 for _, site in found)
    texts = tuple(f"site {i} {s.module}: excess kurtosis {number(s.kurtosis)}" for i, s in found)
    x = linear("site, in the order of the model", depth, write=_integer)
    y = logarithmic("kurtosis", [*values, 3.0])
    ends = (x.low, x.high)
    yield plot(
        "Kurtosis by depth",
        x,
        y,
        [
            Points("a Gaussian: 3", "limit", ends, (3.0, 3.0), is_line=True, has_marks=False),
            Points("excess kurtosis + 3", "c1", depth, values, texts, is_line=True),
        ],
    )


def sqnr_plot(points: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    """SQNR by bits against the rate-distortion limit of a Gaussian.

    Args:
        points: (bits an element, SQNR in dB, text).
    """
    found = [point for point in points if math.isfinite(point[1])]
    if not found:
        return
    bits, decibels, texts = zip(*found, strict=True)
    x = linear("bits an element, with scales and padding", bits, zero=True)
    y = linear("SQNR, dB", [*decibels, LIMIT_DB * max(bits)], zero=True)
    top = min(x.high, y.high / LIMIT_DB)
    limit = (0.0, top), (0.0, LIMIT_DB * top)
    yield plot(
        "SQNR by bits",
        x,
        y,
        [
            Points("limit of a Gaussian", "limit", *limit, is_line=True, has_marks=False),
            Points("sites", "c0", bits, decibels, texts),
        ],
    )


def _integer(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""
