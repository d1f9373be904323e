"""GraphDiff: the difference of two graphs, as text, as an HTML page or as JSON.

All of it is read from graph texts, so a stored text compares as well as a graph in memory. Modules
and lines of code, which a text does not tell, are kept beside it where a graph was given.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx
from torch.export import ExportedProgram

from rfcompile.errors import CaptureError
from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.pipeline import Record
from rfcompile.graph.text import graph_text, read_statement, read_statements
from rfcompile.report.page.document import Page
from rfcompile.report.page.of_diff import Side, diff_page
from rfcompile.report.page.paged import PagedReport
from rfcompile.report.report import GraphChange

Graph = fx.GraphModule | ExportedProgram | Record | str


@dataclass(frozen=True)
class GraphDiff(PagedReport):
    """Two graphs and what differs; printing it gives :meth:`text`.

    Args:
        before, after: the texts of the graphs, several with an empty line between.
        removed, added: calls of each operator that the second graph has fewer or more of.
        wire_bytes_before, wire_bytes_after: what one rank sends in all collectives; see
            :func:`~rfcompile.graph.wire_bytes.wire_bytes`, also for when they are None.
        graphs: names of the graphs of a text, such as "forward" and "backward".
        facts_before, facts_after: what is known of the lines of both.
    """

    before: str
    after: str
    removed: dict[str, int]
    added: dict[str, int]
    wire_bytes_before: int | None
    wire_bytes_after: int | None
    graphs: tuple[str, ...] = ("graph",)
    facts_before: LineFacts = field(default=LineFacts(), compare=False, repr=False)
    facts_after: LineFacts = field(default=LineFacts(), compare=False, repr=False)

    IN_JSON: ClassVar = ("changed", "lines")

    @property
    def changed(self) -> bool:
        """The texts differ."""
        return self.before != self.after

    def text(self) -> str:
        """The unified diff, the operators whose number of calls changed, and the bytes sent."""
        if not self.changed:
            return "no change"
        rows = self.count_rows()
        width = max((len(op) for op, _, _ in rows), default=0)
        table = [f"{op:{width}}  {b:5} -> {a:<5} {a - b:+}" for op, b, a in rows]
        blocks = (self.lines(), table, [f"bytes on the wire, sent by a rank: {self.wire_text()}"])
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def lines(self) -> list[str]:
        """The unified diff.

        In it the second graph has the first one's names wherever a statement has stayed, so that
        one new ``add`` does not rename all later ones. Several graphs (forward and backward) stand
        in a text with an empty line between; each is compared with its counterpart.
        """
        unified = difflib.unified_diff(*self._shown(), "before", "after", lineterm="")
        return list(unified)

    def _shown(self) -> tuple[list[str], list[str]]:
        """The lines of both texts, the second one with the names of the first."""
        before, after = self._texts()
        renamed = [with_names_of(old, new) for old, new in zip(before, after, strict=True)]
        return "\n\n".join(before).splitlines(), "\n\n".join(renamed).splitlines()

    def count_rows(self) -> list[tuple[str, int, int]]:
        """(operator, calls before, calls after) where these differ."""
        before, after = op_counts(self.before), op_counts(self.after)
        return [(op, before[op], after[op]) for op in sorted({*self.removed, *self.added})]

    def wire_text(self) -> str:
        """The bytes sent, as in "8,192 -> 1,088 (7.5x less)"."""
        before, after = self.wire_bytes_before, self.wire_bytes_after
        text = " -> ".join("unknown" if n is None else f"{n:,}" for n in (before, after))
        if not before or not after or before == after:
            return text
        less = before > after
        ratio = before / after if less else after / before
        return f"{text} ({ratio:.1f}x {'less' if less else 'more'})"

    def as_page(self) -> Page:
        """Both graphs as boxes side by side, what changed, what crosses ranks, the unified diff."""
        calls = [sum(op_counts(text).values()) for text in (self.before, self.after)]
        shown = self._shown()
        unified = difflib.unified_diff(*shown, "before", "after", lineterm="")
        return diff_page(
            *self._sides(),
            shown,
            tiles={
                "operator calls": f"{calls[0]:,} -> {calls[1]:,}",
                "bytes on the wire, sent by a rank": self.wire_text(),
            },
            counts=self.count_rows(),
            unified=[*unified][2:],
        )

    def _sides(self) -> tuple[Side, Side]:
        before, after = self._texts()
        names = self.graphs
        if len(names) != len(before):
            names = tuple(f"graph {i + 1}" for i in range(len(before)))
        old, new = self.facts_before, self.facts_after
        return Side(names, tuple(before), old), Side(names, tuple(after), new)

    def _texts(self) -> tuple[list[str], list[str]]:
        """The graphs of both texts, as pairs; each text as a whole where they are no pairs."""
        before, after = self.before.split("\n\n"), self.after.split("\n\n")
        is_paired = len(before) == len(after)
        return (before, after) if is_paired else ([self.before], [self.after])


def diff_of_changes(changes: Sequence[GraphChange]) -> GraphDiff:
    """What the passes changed in the graphs of a report, one or several."""
    return _compared(
        ("\n\n".join(c.before for c in changes), LineFacts.joined(c.facts_before for c in changes)),
        ("\n\n".join(c.after for c in changes), LineFacts.joined(c.facts_after for c in changes)),
        tuple(change.direction for change in changes),
    )


def diff(before: Graph, after: Graph) -> GraphDiff:
    """Compare two graphs.

    Args:
        before, after: a GraphModule, an ExportedProgram, a graph text, or a Record of the pass
            runner, which stands for its first graph as ``before`` and for its last as ``after``.

    Raises:
        CaptureError: an argument is none of these.
    """
    if isinstance(before, Record) and before.steps:
        old = before.steps[0].before, before.facts_before
    else:
        old = _text_of(before)
    if isinstance(after, Record) and after.steps:
        new = after.steps[-1].after, after.facts_after
    else:
        new = _text_of(after)
    return _compared(old, new)


def _compared(
    before: tuple[str, LineFacts],
    after: tuple[str, LineFacts],
    graphs: tuple[str, ...] = ("graph",),
) -> GraphDiff:
    old_counts, new_counts = op_counts(before[0]), op_counts(after[0])
    return GraphDiff(
        before[0],
        after[0],
        removed=dict(sorted((old_counts - new_counts).items())),
        added=dict(sorted((new_counts - old_counts).items())),
        wire_bytes_before=before[1].sent_bytes,
        wire_bytes_after=after[1].sent_bytes,
        graphs=graphs,
        facts_before=before[1],
        facts_after=after[1],
    )


def _text_of(graph: object) -> tuple[str, LineFacts]:
    if isinstance(graph, str):
        text = graph.strip("\n")  # one that was read from a file ends in one
        return text, LineFacts.of_text(text)
    if isinstance(graph, Record):
        graph = graph.gm
    if isinstance(graph, ExportedProgram):
        graph = graph.graph_module
    if isinstance(graph, fx.GraphModule):
        text = graph_text(graph)
        return text, LineFacts.of(graph, text)
    raise CaptureError(
        f"diff got a {type(graph).__name__}, which holds no graph: give a torch.fx.GraphModule, an "
        "ExportedProgram (torch.export.export makes one of a module), a Record or a graph text."
    )


def op_counts(text: str) -> Counter[str]:
    """How often a graph text calls each operator, method or module."""
    return Counter(s.target for s in read_statements(text) if s.is_call)


# ---- names ---------------------------------------------------------------------------------

_WORD = re.compile(
    r"""'(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | (?<![\w.]) [A-Za-z_]\w* (?![\w.=('"])""", re.X
)
"""A quoted text (to step over it), or a word that may be the name of a node."""


def with_names_of(before: str, after: str) -> str:
    """``after``, with the names of ``before`` in every statement that both have."""
    old, new = _Lines(before), _Lines(after)
    names = {
        new.defined[j]: old.defined[i]
        for i, j in _pairs((old.erased, old.targets), (new.erased, new.targets))
        if new.defined[j]
    }
    taken = {s.name for s in (*old.statements, *new.statements) if s and not s.target}
    taken.update(old.defined)
    for name in new.defined:
        if name and name not in names:
            names[name] = _free_name(name, taken)
            taken.add(names[name])
    return "\n".join(_rename(line, names) for line in new.lines)


class _Lines:
    """A graph text with what is compared: first whole lines without names, then only targets."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.statements = [read_statement(line) for line in self.lines]
        self.targets = [s.target if s else "" for s in self.statements]
        self.defined = [s.name if s and s.target else "" for s in self.statements]
        blank = dict.fromkeys(self.defined, "%")
        self.erased = [_rename(line, blank) for line in self.lines]


def _pairs(
    old: tuple[Sequence[str], ...], new: tuple[Sequence[str], ...]
) -> Iterator[tuple[int, int]]:
    """Places of lines that correspond, by the first keys; where these differ, by the next ones."""
    matcher = difflib.SequenceMatcher(None, old[0], new[0], autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag == "equal":
            yield from zip(range(i, i_end), range(j, j_end), strict=True)
        elif tag == "replace" and len(old) > 1:
            rest = _pairs(
                tuple(keys[i:i_end] for keys in old[1:]), tuple(keys[j:j_end] for keys in new[1:])
            )
            yield from ((i + di, j + dj) for di, dj in rest)


def _free_name(name: str, taken: set[str]) -> str:
    base, count = re.sub(r"_\d+$", "", name), 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def _rename(line: str, names: Mapping[str, str]) -> str:
    return _WORD.sub(lambda word: names.get(word[0], word[0]), line)
