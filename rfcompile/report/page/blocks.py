"""Blocks: a graph or a model as a tree of modules, with its operators as leaves."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rfcompile.codec.formats import QuantFormat
from rfcompile.graph.line_facts import LineFacts
from rfcompile.graph.outline import Called
from rfcompile.graph.text import Statement, read_statement
from rfcompile.graph.wire_bytes import sent_by_line, tensor_bytes

MODULE, OPERATOR, GROUP, GRAPH = "module", "operator", "group", "graph"
QUANTIZE, DEQUANTIZE, COLLECTIVE, WIRE = "quantize", "dequantize", "collective", "wire"
TRAFFIC = (QUANTIZE, DEQUANTIZE, COLLECTIVE, WIRE)
"""The kinds of operators that have a colour."""

_VIEWS = ("view", "reshape", "slice", "narrow", "squeeze", "unsqueeze", "getitem", "clone", "split")
_NAME = re.compile(r"(?<![\w.'\"])[A-Za-z_]\w*(?![\w.=('\"])")


@dataclass
class Block:
    """A module, or an operator, of one graph.

    Args:
        key: what it is compared by: the path of a module; an operator with its type.
        label, note: what is written on it: a name, and its class or type.
        kind: MODULE, OPERATOR, one of TRAFFIC, GRAPH for a root, GROUP for several.
        line: number of its line in the text of the graph, None for modules.
        sent: bytes that one rank sends in it, None where unknown.
        badge: what else is written on it.
        strip: (class of the style sheet, text) of a cell for each site within.
    """

    key: str
    label: str
    note: str
    kind: str
    line: int | None = None
    sent: int | None = 0
    badge: str = ""
    strip: tuple[tuple[str, str], ...] = ()
    children: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Flow:
    """A value that one operator defines and another uses, by lines; ``use`` is None for the first
    that the graph returns (others are gradients, or kept for the backward pass). ``crossed``: bytes
    that one rank sent for it since it was last computed with.
    """

    definition: int
    use: int | None
    crossed: int


@dataclass(frozen=True)
class Graph:
    """One graph as a tree, and the values that flow between its lines."""

    root: Block
    flows: tuple[Flow, ...]


def kind_of(target: str) -> str:
    """What an operator does to traffic: one of TRAFFIC, or OPERATOR."""
    namespace, _, rest = target.partition(".")
    name = rest.split(".")[0]
    if namespace.startswith("_c10d_functional"):
        return COLLECTIVE
    if namespace != "rfcompile":
        return OPERATOR
    if name == "fake_wire":
        return WIRE
    if name.startswith("dequantize"):
        return DEQUANTIZE
    return QUANTIZE if "quantize" in name else COLLECTIVE


def graph_of(text: str, facts: LineFacts, title: str, first_line: int = 0) -> Graph:
    """The tree of a graph text.

    Args:
        title: the label of the root.
        first_line: the number of the first line, where several graphs count on.
    """
    root = Block(title, title, "", GRAPH)
    tree = _Tree(root, facts.classes)
    defined: dict[str, int] = {}
    crossed: dict[int, int] = {}
    flows: list[Flow] = []
    sent_by = facts.sent or tuple(sent_by_line(text))
    for i, line in enumerate(text.splitlines()):
        s = read_statement(line)
        if s is None:
            if line.startswith("return "):
                first = _used(line.partition("return ")[2], defined)[:1]
                flows += [Flow(d, None, crossed.get(d, 0)) for d in first]
            continue
        if not s.is_call:  # an input, or an attribute: a parameter, a graph inside the graph
            continue
        number, kind = first_line + i, kind_of(s.target)
        used = _used(s.arguments, defined)
        parent = tree.enter(facts.modules[i] if facts.modules else "", used, number)
        label = _short(s.target)
        sent = _would_send(s) if kind == WIRE else sent_by[i]
        parent.children.append(Block(f"{s.target} {s.type}", label, s.type, kind, number, sent))
        flows += [Flow(d, number, crossed.get(d, 0)) for d in used]
        before = max((crossed.get(d, 0) for d in used), default=0)
        carried = (sent or 0) + (before if _hands_on(s, kind) else 0)
        if carried:
            crossed[number] = carried
        defined[s.name] = number
    return Graph(root, tuple(flows))


def _hands_on(s: Statement, kind: str) -> bool:
    """The result is what was sent, coded otherwise or in another shape."""
    return kind in TRAFFIC or _short(s.target) in _VIEWS


def _would_send(s: Statement) -> int | None:
    """Bytes of the payload that a fake wire codes."""
    spec, size = re.search(r"'(.*?)'", s.arguments), tensor_bytes(s.type)
    sizes = s.type.partition("[")[2].rstrip("]")
    if spec is None or size is None:
        return None
    numel = math.prod(map(int, sizes.split(", "))) if sizes else 1
    return QuantFormat.parse(spec[1]).payload_bytes(numel) if spec[1] else size


def _used(arguments: str, defined: Mapping[str, int]) -> list[int]:
    """The lines that define what a statement uses, each once."""
    found = (defined.get(word) for word in _NAME.findall(arguments))
    return list(dict.fromkeys(line for line in found if line is not None))


def _short(target: str) -> str:
    """ "view" of "aten.view.default"."""
    parts = target.split(".")
    return parts[-2] if len(parts) > 2 else parts[-1]


def model_of(calls: Iterable[Called], title: str) -> Block:
    """The tree of a model that was outlined."""
    calls = list(calls)
    root = Block("", title, "", GRAPH)
    tree = _Tree(root, {call.module: call.cls for call in calls})
    for call in calls:
        tree.enter(call.module).note = call.cls
    return root


class _Tree:
    """Makes the blocks of modules as they are entered, one block for a module.

    A module that is entered again is a block again only if what it now uses was computed by a block
    that came after it: values flow down the page.
    """

    def __init__(self, root: Block, classes: Mapping[str, str]) -> None:
        self.root, self.classes = root, classes
        self.places: dict[int, list[int]] = {}

    def enter(self, path: str, used: Sequence[int] = (), line: int | None = None) -> Block:
        """The block of a path, for an operator of that line that uses the values of others."""
        block, place = self.root, list[int]()
        for prefix in _prefixes(path):
            depth = len(place)
            needed = [self.places[d][depth] for d in used if self.places[d][:depth] == place]
            found = [i for i, c in enumerate(block.children) if (c.kind, c.key) == (MODULE, prefix)]
            if not found or max(needed, default=0) > found[-1]:
                found = [len(block.children)]
                cls = self.classes.get(prefix, "").rpartition(".")[2]
                block.children.append(Block(prefix, _label(prefix), cls, MODULE))
            place.append(found[-1])
            block = block.children[found[-1]]
        if line is not None:
            self.places[line] = [*place, len(block.children)]
        return block


def _prefixes(path: str) -> Iterator[str]:
    """ "a", "a.b", "a.b.c" of "a.b.c"."""
    parts = path.split(".") if path else []
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _label(path: str) -> str:
    """The last part of a path; a number with what it counts."""
    parent, _, name = path.rpartition(".")
    return f"{parent.rpartition('.')[2]}.{name}" if name.isdigit() and parent else name
