"""Rows: what a page shows of one graph, or of two side by side, with what repeats folded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rfcompile.report.page.blocks import (
    COLLECTIVE,
    GROUP,
    MODULE,
    OPERATOR,
    TRAFFIC,
    Block,
    Flow,
)

OPEN_BOXES = 56
"""A page opens with at most so many boxes, unless its top level alone has more."""
FEW_OPERATORS = 3
"""From so many plain operators in a row on they are one box."""
FEW_LAYERS = 4
"""Layers that repeat more often stay folded at first."""
LONGEST_PATTERN = 8
CHUNK = 24
"""A level of more boxes than this that nothing else folds is cut into pieces of so many."""
ENTRY = -1
"""In an edge: the row that holds the rows."""


@dataclass(frozen=True)
class Edge:
    """Values that flow on one side from one row to another of the same level.

    ``start`` is ENTRY where they come from outside, ``end`` is the number of rows where they go
    there. ``crossed``: bytes that one rank sent for them, 0 where they stay on it.
    """

    side: int
    start: int
    end: int
    crossed: int


@dataclass(eq=False)
class Row:
    """A box, or two that correspond: one for each side, None where a side has none.

    ``times``: how many alike rows it stands for; ``number`` is its place on the page.
    """

    sides: tuple[Block | None, ...]
    children: list[Row] = field(default_factory=list)
    times: int = 0
    number: int = 0
    is_open: bool = False
    edges: list[Edge] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)

    @property
    def block(self) -> Block:
        return next(block for block in self.sides if block is not None)

    @property
    def state(self) -> str:
        """Of two sides: "added", "removed", "changed" (something within is) or "same"."""
        if None in self.sides:
            return "removed" if self.sides[0] is not None else "added"
        inner = any(child.state != "same" for child in self.children)
        return "changed" if inner else "same"

    def walk(self) -> Iterator[Row]:
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def num_boxes(self) -> int:
        """Of its children."""
        return sum(block is not None for child in self.children for block in child.sides)


def rows_of(sides: Sequence[Block], flows: Sequence[Sequence[Flow]] = ()) -> Row:
    """The rows of one graph, or of two that are compared.

    Args:
        sides: their roots.
        flows: the values that flow in each.
    """
    root = _merged([*sides])
    _fold(root)
    for number, row in enumerate(root.walk()):
        row.number = number
    for side, side_flows in enumerate(flows):
        _connect(root, side, side_flows)
    _open(root)
    return root


# ---- two sides ---------------------------------------------------------------------------------


def _merged(sides: Sequence[Block | None]) -> Row:
    row = Row(tuple(sides))
    lists = [block.children if block else [] for block in sides]
    if len(lists) == 1:
        row.children = [_merged([child]) for child in lists[0]]
        return row
    old, new = lists
    keys = ([block.key for block in old], [block.key for block in new])
    matcher = difflib.SequenceMatcher(None, *keys, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            pairs = zip(old[i:i_end], new[j:j_end], strict=True)
            row.children += [_merged(pair) for pair in pairs]
        else:
            row.children += [_merged((block, None)) for block in old[i:i_end]]
            row.children += [_merged((None, block)) for block in new[j:j_end]]
    return row


# ---- folding -----------------------------------------------------------------------------------


def _fold(row: Row) -> None:
    for child in row.children:
        _fold(child)
        _flatten_list(child)
    row.children = _operators_folded(row.children)
    if len(row.children) == 1 and row.children[0].block.kind == GROUP:
        row.children = row.children[0].children
    row.children = _runs_folded(row.children)
    if len(row.children) > OPEN_BOXES // len(row.sides):
        row.children = _cut(row.children)


def _group(rows: list[Row], label: str, times: int = 0) -> Row:
    def side(i: int) -> Block | None:
        parts = [row.sides[i] for row in rows]
        present = [part for part in parts if part is not None]
        if not present:
            return None
        key = f"{present[0].key} ... {present[-1].key}"
        notes = list(dict.fromkeys(part.note for part in present))
        is_alike = present[0].kind == MODULE and len(notes) <= 2
        return Block(key, label, ", ".join(notes) if is_alike else "", GROUP)

    return Row(tuple(side(i) for i in range(len(rows[0].sides))), rows, times)


def _operators_folded(rows: list[Row]) -> list[Row]:
    """Plain operators that follow one another on the same sides become one row."""
    found: list[Row] = []
    pending: list[Row] = []

    def flush() -> None:
        if len(pending) >= FEW_OPERATORS:
            found.append(_group([*pending], f"{len(pending)} operators"))
        else:
            found.extend(pending)
        pending.clear()

    for row in rows:
        is_plain = row.block.kind == OPERATOR
        if pending and not (is_plain and _where(row) == _where(pending[-1])):
            flush()
        if is_plain:
            pending.append(row)
        else:
            found.append(row)
    flush()
    return found


def _where(row: Row) -> tuple[bool, ...]:
    return tuple(block is not None for block in row.sides)


def _runs_folded(rows: list[Row]) -> list[Row]:
    """Modules that repeat, alone or in a pattern, become one row."""
    looks = [_look(row) for row in rows]
    found, i = [], 0
    while i < len(rows):
        period, times = _repeats(looks, i)
        run = rows[i : i + period * times]
        if times > 1 and len({row.block.key for row in run}) == len(run):
            first, last = run[0].block.label, run[-1].block.label
            found.append(_group(run, f"{first} ... {last}", times))
        else:
            found += run
        i += len(run)
    return found


def _look(row: Row) -> tuple[object, ...]:
    """What alike rows have in common: the name up to its number, the class, the sides."""
    block = row.block
    stem = block.key.rstrip("0123456789")
    if block.kind != MODULE or stem == block.key:
        return (id(row),)
    return (stem, block.note, _where(row))


def _repeats(looks: Sequence[object], start: int) -> tuple[int, int]:
    """The pattern that covers most from ``start`` on: its length, and how often it comes."""
    best = (1, 1)
    for period in range(1, LONGEST_PATTERN + 1):
        pattern, times = looks[start : start + period], 1
        if len(pattern) < period:
            break
        while looks[start + times * period : start + (times + 1) * period] == pattern:
            times += 1
        if times > 1 and times * period > best[0] * best[1]:
            best = (period, times)
    return best


def _flatten_list(row: Row) -> None:
    """A list of modules that holds one run is that run."""
    if len(row.children) == 1 and row.children[0].times and row.block.kind == MODULE:
        run = row.children[0]
        if not row.block.note or row.block.note in ("ModuleList", "Sequential"):
            for block, inner in zip(row.sides, run.sides, strict=True):
                if block is not None and inner is not None:
                    block.note = inner.note
            row.children, row.times = run.children, run.times


def _cut(rows: list[Row]) -> list[Row]:
    pieces = [rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)]
    return [
        _group(piece, f"{piece[0].block.label} ... {piece[-1].block.label}") for piece in pieces
    ]


# ---- edges -------------------------------------------------------------------------------------


def _connect(root: Row, side: int, flows: Sequence[Flow]) -> None:
    """An edge for each value, in the rows that hold both ends; further in and out as entry and end.

    An operator's own edge is crossed only where a collective gives it. That of a module is where
    what leaves it was sent within.
    """
    places: dict[int, _Place] = {}
    _find_places(root, side, [], places)
    found: dict[tuple[int, int, int], dict[int, int]] = {}
    for flow in flows:
        start = places[flow.definition]
        end = places[flow.use].chain if flow.use is not None else []
        for row, a, b in _steps(start.chain, end):
            is_operator = a != ENTRY and row.children[a].block.line is not None
            stays = is_operator and start.kind != COLLECTIVE
            values = found.setdefault((row.number, a, b), {})
            values[flow.definition] = 0 if stays else flow.crossed
    rows = {row.number: row for row in root.walk()}
    for (number, a, b), values in found.items():
        rows[number].edges.append(Edge(side, a, b, sum(values.values())))


Chain = list[tuple[Row, int]]
"""The way from the root to an operator: rows, and which of its children is next."""


@dataclass(frozen=True)
class _Place:
    chain: Chain
    kind: str


def _find_places(row: Row, side: int, chain: Chain, places: dict[int, _Place]) -> None:
    block = row.sides[side]
    if block is not None and block.line is not None:
        places[block.line] = _Place(chain, block.kind)
    for i, child in enumerate(row.children):
        _find_places(child, side, [*chain, (row, i)], places)


def _steps(start: Chain, end: Chain) -> Iterator[tuple[Row, int, int]]:
    """The edges of a value from one operator to another; ``end`` is empty if the graph returns."""
    shared = 0
    while shared < min(len(start), len(end)) and start[shared] == end[shared]:
        shared += 1
    meet = 1 if end else 0
    if end:
        yield start[shared][0], start[shared][1], end[shared][1]
    yield from ((row, i, len(row.children)) for row, i in start[shared + meet :])
    yield from ((row, ENTRY, i) for row, i in end[shared + meet :])


def connect_in_order(root: Row, sent: Mapping[str, int]) -> None:
    """Edges from each row to the next, as modules are called where no graph is known.

    Args:
        sent: bytes that one rank sends of the output of a module, by path.
    """
    for row in root.walk():
        count = len(row.children)
        for i in range(ENTRY, count if count else ENTRY):
            crossed = _sent_by(row.children[i], sent) if i != ENTRY else 0
            row.edges.append(Edge(0, i, i + 1, crossed))


def _sent_by(row: Row, sent: Mapping[str, int]) -> int:
    """Of the output of a row: its own, or that of the last row in it."""
    if row.block.kind == MODULE and row.block.key in sent:
        return sent[row.block.key]
    return _sent_by(row.children[-1], sent) if row.children else 0


# ---- what is open at first ---------------------------------------------------------------------


def _open(root: Row) -> None:
    """Level by level, as far as the boxes are not too many; plain operators stay folded."""
    shown, level = root.num_boxes, [root]
    while level and shown <= OPEN_BOXES:
        for row in level:
            row.is_open = True
        inner = [child for row in level for child in row.children]
        level = [row for row in inner if row.times <= FEW_LAYERS and not _is_plain(row)]
        shown += sum(row.num_boxes for row in level)


def _is_plain(row: Row) -> bool:
    """Nothing is to be seen in it but operators that both sides have."""
    inner = [*row.walk()][1:]
    modules = any(r.block.kind == MODULE for r in inner)
    traffic = any(r.block.kind in TRAFFIC for r in inner)
    return not inner or not (modules or traffic or row.state != "same")
