"""GraphDiff: the difference of two graphs, as text, as an HTML page or as JSON.

All of it is read from graph texts, so a stored text compares as well as a graph in memory.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from rfcompile.errors import CaptureError
from rfcompile.graph.pipeline import Record
from rfcompile.graph.text import graph_text, read_statement, read_statements
from rfcompile.graph.wire_bytes import wire_bytes
from rfcompile.report.table import TableReport

Graph = fx.GraphModule | ExportedProgram | Record | str


@dataclass(frozen=True)
class GraphDiff(TableReport):
    """Two graphs and what differs; printing it gives :meth:`text`.

    ``removed`` and ``added`` count the calls of each operator that the second graph has fewer or
    more of. ``wire_bytes_before`` and ``wire_bytes_after`` are what one rank sends in all
    collectives; see :func:`~rfcompile.graph.wire_bytes.wire_bytes`, also for when they are None.
    """

    before: str
    after: str
    removed: dict[str, int]
    added: dict[str, int]
    wire_bytes_before: int | None
    wire_bytes_after: int | None

    @property
    def changed(self) -> bool:
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
        before, after = self.before.split("\n\n"), self.after.split("\n\n")
        if len(before) != len(after):
            before, after = [self.before], [self.after]
        renamed = [with_names_of(old, new) for old, new in zip(before, after, strict=True)]
        sides = ("\n\n".join(before).splitlines(), "\n\n".join(renamed).splitlines())
        return list(difflib.unified_diff(*sides, "before", "after", lineterm=""))

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

    def to_dict(self) -> dict[str, Any]:
        """The fields, ``changed``, and the lines of the diff, as plain data."""
        return {"changed": self.changed, **vars(self), "lines": self.lines()}

    def html(self) -> str:
        """A page that needs no other file, for light and dark screens."""
        return _page(self)


def diff(before: Graph, after: Graph) -> GraphDiff:
    """Compare two graphs.

    Args:
        before, after: a GraphModule, an ExportedProgram, a graph text, or a Record of the pass
            runner, which stands for its first graph as ``before`` and for its last as ``after``.

    Raises:
        CaptureError: an argument is none of these.
    """
    old = before.steps[0].before if isinstance(before, Record) and before.steps else before
    new = after.steps[-1].after if isinstance(after, Record) and after.steps else after
    old_text, new_text = _text_of(old), _text_of(new)
    old_counts, new_counts = op_counts(old_text), op_counts(new_text)
    return GraphDiff(
        old_text,
        new_text,
        removed=dict(sorted((old_counts - new_counts).items())),
        added=dict(sorted((new_counts - old_counts).items())),
        wire_bytes_before=wire_bytes(old_text),
        wire_bytes_after=wire_bytes(new_text),
    )


def _text_of(graph: object) -> str:
    if isinstance(graph, str):
        return graph.strip("\n")  # a text read from a file ends in one
    if isinstance(graph, Record):
        graph = graph.gm
    if isinstance(graph, ExportedProgram):
        graph = graph.graph_module
    if isinstance(graph, fx.GraphModule):
        return graph_text(graph)
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


# ---- the page --------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #636c76; --page: #ffffff; --card: #f6f8fa;
  --line: #d1d9e0; --add: #dafbe1; --add-ink: #116329; --del: #ffebe9; --del-ink: #a40e26;
  --op: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --page: #0d1117;
  --card: #151b23; --line: #3d444d; --add: #12301f; --add-ink: #56d364; --del: #3c1618;
  --del-ink: #ff8f88; --op: #79c0ff; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1.5rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem 1rem; }
.tile span { display: block; color: var(--dim); font-size: .8rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: right; }
th { color: var(--dim); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
code, pre { font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: 0; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem 0; }
pre > code { display: inline-block; min-width: 100%; }
pre span { display: block; padding: 0 1rem; }
pre i { color: var(--dim); font-style: normal; }
pre b { color: var(--op); font-weight: 500; }
.add { background: var(--add); } .del { background: var(--del); }
.hunk { color: var(--dim); border-block: 1px solid var(--line); }
.hunk:first-child { border-top: 0; }
.plus { color: var(--add-ink); } .minus { color: var(--del-ink); }
summary { cursor: pointer; color: var(--dim); margin: 1.5rem 0 .5rem; }
"""


def _page(d: GraphDiff) -> str:
    calls = [sum(op_counts(text).values()) for text in (d.before, d.after)]
    tiles = {
        "operator calls": f"{calls[0]:,} -> {calls[1]:,}",
        "bytes on the wire, sent by a rank": d.wire_text(),
    }
    rows = "".join(
        f"<tr><td><code>{escape(op)}</code><td>{old}<td>{new}"
        f'<td class="{"plus" if new > old else "minus"}">{new - old:+}'
        for op, old, new in d.count_rows()
    )
    table = f"<table><tr><th>operator<th>before<th>after<th>change{rows}</table>"
    shown = _pre([_diff_line(line) for line in d.lines()[2:]]) if d.changed else "<p>No change."
    whole = "".join(
        f"<details><summary>{title}</summary>"
        f"{_pre([('', _colored(line)) for line in text.splitlines()])}</details>"
        for title, text in (("Whole graph before", d.before), ("Whole graph after", d.after))
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Graph diff</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style><h1>Graph diff</h1><div class=tiles>"
        + "".join(f"<div class=tile><span>{k}</span>{escape(v)}</div>" for k, v in tiles.items())
        + f"</div><h2>Operators</h2>{table if rows else '<p>The same calls before and after.'}"
        + f"<h2>Statements</h2>{shown}{whole}</html>\n"
    )


def _pre(lines: list[tuple[str, str]]) -> str:
    body = "".join(f'<span class="{kind}">{text}</span>' for kind, text in lines)
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
