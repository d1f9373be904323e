"""The page of two graphs: side by side, what changed coloured, what crosses ranks thick."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.text import read_statement
from rfcompile.graph.wire_bytes import tensor_bytes
from rfcompile.report.page.blocks import (
    COLLECTIVE,
    GRAPH,
    MODULE,
    TRAFFIC,
    WIRE,
    Block,
    Flow,
    graph_of,
)
from rfcompile.report.page.document import Cell, Column, Fact, Line, Page, Texts
from rfcompile.report.page.plots import bars
from rfcompile.report.page.rows import Row, rows_of
from rfcompile.report.page.texts import short_bytes

ARROWS = "Arrows follow the values; inputs, parameters and what is kept for later have none."
UNKNOWN = (
    "format of what is exact, kurtosis, SQNR and predicted loss: a graph has no numbers "
    "(rf.explain measures a model, rf.score and rf.plan predict the loss)"
)


@dataclass(frozen=True)
class Side:
    """One side: graph texts by name, joined with an empty line, and what is known of the lines."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    facts: LineFacts

    def roots(self) -> tuple[Block, list[Flow]]:
        """The tree of all graphs, and the values that flow."""
        graphs, first = [], 0
        for name, text in zip(self.names, self.texts, strict=True):
            count = len(text.splitlines())
            graphs.append(graph_of(text, self._part(first, count), name, first))
            first += count + 1
        flows = [flow for graph in graphs for flow in graph.flows]
        if len(graphs) == 1:
            return graphs[0].root, flows
        return Block("", "", "", GRAPH, children=[graph.root for graph in graphs]), flows

    def _part(self, first: int, count: int) -> LineFacts:
        part, facts = slice(first, first + count), self.facts
        return LineFacts(facts.sent[part], facts.modules[part], facts.sources[part], facts.classes)

    def shown(self, lines: Sequence[str]) -> Texts:
        """The statements for the panel: all lines, which may have other names than the graphs."""
        found = (read_statement(line) for line in lines)
        sizes = tuple(tensor_bytes(s.type) if s and s.type else None for s in found)
        none = ("",) * len(lines)
        return Texts(tuple(lines), sizes, self.facts.sources or none, self.facts.modules or none)


def model_rows(sides: Sequence[Side]) -> Row:
    """The rows of one side, or of two that are compared."""
    trees = [side.roots() for side in sides]
    root = rows_of([tree for tree, _ in trees], [flows for _, flows in trees])
    if len(sides[0].names) > 1:
        root.edges = []  # nothing flows between the graphs but what autograd keeps
    for row in root.walk():
        for i, block in enumerate(row.sides):
            if block is not None and block.line is None:
                block.badge = _sums(row, i)
    return root


def _sums(row: Row, side: int) -> str:
    """What a box says of the operators within on one side: how many are new, what they send."""
    inner = [r for r in row.walk() if r.sides[side] is not None and not r.children]
    only = sum(r.state in ("added", "removed") for r in inner)
    blocks = [block for r in inner if (block := r.sides[side]) is not None]
    sent = sum(block.sent or 0 for block in blocks if block.kind != WIRE)
    coded = sum(block.sent or 0 for block in blocks if block.kind == WIRE)
    sign = "+" if side else "\N{MINUS SIGN}"
    parts = [f"{sign}{only}"] if only and len(row.sides) > 1 else []
    parts += [f"sends {short_bytes(sent)}"] if sent else []
    parts += [f"would send {short_bytes(coded)}"] if coded else []
    return " \N{MIDDLE DOT} ".join(parts)


def diff_page(
    before: Side,
    after: Side,
    shown: tuple[Sequence[str], Sequence[str]],
    *,
    tiles: Mapping[str, str],
    counts: Sequence[tuple[str, int, int]],
    unified: Sequence[str],
) -> Page:
    """The page of :class:`~rfcompile.report.diff.GraphDiff`.

    Args:
        shown: the lines of both, with the same names for what both have.
        counts: (operator, calls before, calls after) where these differ.
        unified: the lines of the unified diff, without its head.
    """
    root = model_rows((before, after))
    sides = (before, after)
    texts = tuple(side.shown(lines) for side, lines in zip(sides, shown, strict=True))
    rows = [*root.walk()]
    changed = [
        row
        for row in rows
        if not row.children
        and row.block.line is not None
        and (row.block.kind in TRAFFIC or row.state != "same")
    ]
    return Page(
        title="Graph diff",
        tiles=(*tiles.items(), *_fake_wires(rows)),
        model=root,
        arrows=ARROWS,
        facts={row.number: _facts(row) for row in rows if row.block.line is None},
        unknown={row.number: UNKNOWN for row in rows if row.block.kind in TRAFFIC},
        texts=texts,
        table_title="Operators that send or changed",
        columns=tuple(Column(title, is_number) for title, is_number in _COLUMNS),
        lines=tuple(_line(i, row, texts) for i, row in enumerate(changed)),
        plots=tuple(_plots(rows)),
        sections=(("Operators", _counts(counts)), ("Statements", statements(unified))),
    )


_COLUMNS = (
    *(("#", True), ("operator", False), ("where", False), ("module", False), ("tensor", False)),
    *(("bytes", True), ("sends before", True), ("sends after", True), ("line of code", False)),
)
_WHERE = {"added": "after", "removed": "before", "same": "both", "changed": "both"}


def _fake_wires(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """What fake wires code: bytes as they are, and in their formats."""
    wires = [block for row in rows if (block := row.sides[1]) is not None and block.kind == WIRE]
    if wires:
        exact = sum(tensor_bytes(block.note) or 0 for block in wires)
        coded = sum(block.sent or 0 for block in wires)
        yield "on fake wires, if it were sent", f"{exact:,} -> {coded:,} bytes"


def _line(i: int, row: Row, texts: Sequence[Texts]) -> Line:
    block = row.block
    assert block.line is not None
    side = texts[0 if row.sides[0] is not None else 1]
    size = side.sizes[block.line]
    sent = [_sent(part) for part in row.sides]
    cells = (
        Cell(str(i), i),
        Cell(block.label),
        Cell(_WHERE[row.state]),
        Cell(side.modules[block.line]),
        Cell(block.note),
        Cell("" if size is None else f"{size:,}", size),
        *sent,
        Cell(side.sources[block.line]),
    )
    return Line(cells, row.number)


def _sent(block: Block | None) -> Cell:
    if block is None or block.sent == 0:
        return Cell("", 0 if block else None)
    if block.sent is None:
        return Cell("unknown")
    return Cell(f"{block.sent:,}" + (" if sent" if block.kind == WIRE else ""), block.sent)


def _facts(row: Row) -> list[Fact]:
    facts = [Fact("box", tuple(block.label if block else "" for block in row.sides))]
    if row.block.kind == MODULE:
        facts.append(Fact("module", tuple(block.key if block else "" for block in row.sides)))
    if row.block.note:
        facts.append(Fact("class", tuple(block.note if block else "" for block in row.sides)))
    leaves = [r for r in row.walk() if not r.children]
    counts, sent = [], []
    for side in range(len(row.sides)):
        there = [block for r in leaves if (block := r.sides[side]) is not None]
        counts.append(str(len(there)))
        total = sum(block.sent or 0 for block in there if block.kind != WIRE)
        unknown = any(block.sent is None for block in there)
        sent.append(f"{total:,} bytes" + (" and what is unknown" if unknown else ""))
    return [*facts, Fact("operators", tuple(counts)), Fact("a rank sends", tuple(sent))]


def _plots(rows: Sequence[Row]) -> list[str]:
    totals: dict[str, list[float]] = {}
    for row in rows:
        for side, block in enumerate(row.sides):
            if block is not None and block.kind == COLLECTIVE and block.sent:
                totals.setdefault(block.label, [0.0, 0.0])[side] += block.sent
    if not totals:
        return []
    before, after = zip(*totals.values(), strict=True)
    series = [("before", "c5", before), ("after", "c0", after)]
    return [bars("Bytes that a rank sends, by operator", [*totals], series)]


def _counts(counts: Sequence[tuple[str, int, int]]) -> str:
    if not counts:
        return "<p>The same calls before and after.</p>"
    rows = "".join(
        f"<tr><td><code>{escape(op)}</code></td><td>{old}</td><td>{new}</td>"
        f'<td class="{"plus" if new > old else "minus"}">{new - old:+}</td></tr>'
        for op, old, new in counts
    )
    head = "<tr><th>operator</th><th>before</th><th>after</th><th>change</th></tr>"
    return f'<table class="counts"><thead>{head}</thead><tbody>{rows}</tbody></table>'


def statements(unified: Sequence[str]) -> str:
    """The HTML of a unified diff of graph texts."""
    if not unified:
        return "<p>No change.</p>"
    body = "".join(f'<span class="{kind}">{text}</span>' for kind, text in map(_diff_line, unified))
    return f"<pre><code>{body}</code></pre>"


def _diff_line(line: str) -> tuple[str, str]:
    if line.startswith("@@"):
        return "hunk", escape(line)
    kind = {"+": "add", "-": "del"}.get(line[0], "")
    return kind, f"{line[0]} {_colored(line[1:])}"


def _colored(line: str) -> str:
    """HTML of a line of a graph text, with its type dimmed and its operator set off."""
    s = read_statement(line)
    text = escape(line)
    if s and s.type:
        text = text.replace(f": {escape(s.type)}", f"<i>: {escape(s.type)}</i>", 1)
    if s and s.is_call:
        text = text.replace(f"= {escape(s.target)}(", f"= <b>{escape(s.target)}</b>(", 1)
    return text
