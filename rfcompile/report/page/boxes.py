"""Boxes: the HTML of rows. Python chooses rows and lanes of a grid; the browser sizes and folds."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from rfcompile.report.page.blocks import GRAPH, GROUP, MODULE, WIRE, Block
from rfcompile.report.page.rows import ENTRY, Edge, Row
from rfcompile.report.page.texts import short_bytes

LANES = 6
"""Beside a level of rows; values that pass more rows at once share the outermost."""
_MARKS = {"added": "+", "removed": "\N{MINUS SIGN}", "changed": "\N{PLUS-MINUS SIGN}", "same": ""}


def boxes(root: Row) -> str:
    """The rows within ``root``, those in closed ones too."""
    return "".join(_level(root))


def _level(row: Row) -> Iterator[str]:
    sides = len(row.sides)
    straight, bent = _sorted_edges(row)
    lanes = [_lanes([edge for edge in bent if edge.side == side]) for side in range(sides)]
    widths = [max(side.values(), default=-1) + 1 for side in lanes]
    style = f"--r:{widths[-1]}" + (f";--l:{widths[0]}" if sides > 1 else "")
    yield f'<div class="g s{sides}" style="{style}">'
    for i, child in enumerate(row.children):
        yield from _row(child, 2 * i + 2)
    count = len(row.children)
    for edge in straight:
        yield _straight(edge, count, sides)
    for edge in bent:
        lane = lanes[edge.side][edge.start]
        yield _bent(edge, lane + 1, count, sides)
    yield "</div>"


def _row(row: Row, place: int) -> Iterator[str]:
    head = "".join(_face(row, block) for block in row.sides)
    classes = f"r {row.state}" if len(row.sides) > 1 else "r"
    where = f'style="grid-row:{place}"'
    if not row.children:
        yield f'<button class="{classes}" id="b{row.number}" {where}>{head}</button>'
        return
    is_open = " open" if row.is_open else ""
    yield f'<details class="{classes}"{is_open} {where}>'
    yield f'<summary id="b{row.number}">{head}</summary>'
    yield from _level(row)
    yield "</details>"


def _face(row: Row, block: Block | None) -> str:
    if block is None:
        return '<span class="x"></span>'
    kind = "module" if block.kind in (MODULE, GROUP, GRAPH) and row.children else block.kind
    stack = " stack" if row.times else ""
    mark = _MARKS[row.state] if len(row.sides) > 1 else ""
    parts = [f'<span class="m">{mark}</span>' if mark else "", f"<b>{escape(block.label)}</b>"]
    if row.times:
        parts.append(f"<em>\N{MULTIPLICATION SIGN}{row.times}</em>")
    if block.note:
        parts.append(f"<i>{escape(block.note)}</i>")
    if block.strip and (row.times or block.kind == GRAPH):
        cells = "".join(f'<i class="{cls}"></i>' for cls, _ in block.strip)
        counts = Counter(text for _, text in block.strip)
        said = escape(", ".join(f"{count} {text}" for text, count in counts.items()))
        parts.append(f'<span class="strip" role="img" aria-label="formats: {said}">{cells}</span>')
    if badge := _badge(block):
        parts.append(f"<u>{badge}</u>")
    return f'<span class="f {kind}{stack}">{"".join(parts)}</span>'


def _badge(block: Block) -> str:
    """What was written on the block, or the bytes that it sends."""
    sends = "would send" if block.kind == WIRE else "sends"
    if block.badge:
        return block.badge
    if block.sent is None:
        return f"{sends} ? bytes"
    return f"{sends} {short_bytes(block.sent)}" if block.sent else ""


# ---- edges -------------------------------------------------------------------------------------


def _sorted_edges(row: Row) -> tuple[list[Edge], list[Edge]]:
    """Those between neighbours, and those that pass other rows of their side."""
    straight: list[Edge] = []
    bent: list[Edge] = []
    for side in range(len(row.sides)):
        there = [i for i, child in enumerate(row.children) if child.sides[side] is not None]
        stops = [ENTRY, *there, len(row.children)]
        following = dict(itertools.pairwise(stops))
        for edge in row.edges:
            if edge.side == side:
                (straight if following[edge.start] == edge.end else bent).append(edge)
    return straight, bent


def _lanes(edges: Sequence[Edge]) -> dict[int, int]:
    """A lane for each row that edges start from, such that no two overlap; short ones inside."""
    reach: dict[int, int] = {}
    for edge in edges:
        reach[edge.start] = max(reach.get(edge.start, edge.end), edge.end)
    taken: list[list[tuple[int, int]]] = []
    lanes: dict[int, int] = {}
    for start, end in sorted(reach.items(), key=lambda item: (item[1] - item[0], item[0])):
        free = [
            lane
            for lane, spans in enumerate(taken)
            if all(end <= first or last <= start for first, last in spans)
        ]
        lane = free[0] if free else min(len(taken), LANES - 1)
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lanes[start] = lane
    return lanes


def _straight(edge: Edge, count: int, sides: int) -> str:
    first = 1 if edge.start == ENTRY else 2 * edge.start + 3
    last = 2 * min(edge.end, count) + 2
    column = 1 if sides == 1 else edge.side + 2
    end = " end" if edge.end == count else ""
    label, style, crossed = _crossed(edge)
    return (
        f'<span class="e{end}{crossed}" aria-hidden="true" '
        f'style="grid-area:{first}/{column}/{last}/{column + 1}{style}">{label}</span>'
    )


def _bent(edge: Edge, lane: int, count: int, sides: int) -> str:
    first = 1 if edge.start == ENTRY else 2 * edge.start + 2
    last = 2 * edge.end + 2
    side = "left" if sides == 2 and edge.side == 0 else "right"
    column = {"left": 1, "right": 2 if sides == 1 else 4}[side]
    ends = (" entry" if edge.start == ENTRY else "") + (" end" if edge.end == count else "")
    _, style, crossed = _crossed(edge)
    return (
        f'<span class="l {side}{ends}{crossed}" aria-hidden="true" '
        f'style="grid-area:{first}/{column}/{last}/{column + 1};--c:{lane}{style}"></span>'
    )


def _crossed(edge: Edge) -> tuple[str, str, str]:
    """Label, style and class of an edge whose values crossed ranks."""
    if not edge.crossed:
        return "", "", ""
    width = min(8.0, max(3.0, 1.5 * math.log10(edge.crossed) - 2))
    return f"<u>{short_bytes(edge.crossed)}</u>", f";--w:{width:.1f}px", " crossed"
