"""LineFacts: what is known of each line of a graph text beside the text itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import fx

from rfcompile.graph.places import module_calls, source_of
from rfcompile.graph.text import nested_graphs
from rfcompile.graph.wire_bytes import sent_by_line

T = TypeVar("T")


@dataclass(frozen=True)
class LineFacts:
    """For each line of a graph text: its module, its line of code, the bytes that it sends.

    Args:
        sent: bytes that one rank sends in it, 0 for most lines, None where they are unknown.
        modules: dotted paths, "" for the outermost module; empty where only the text is known. Of
            a node that tells none, the path that its neighbours have in common.
        sources: "file.py:12", "" where it is unknown; empty as ``modules`` are.
        classes: "package.module.Class" of each path that was called.
    """

    sent: tuple[int | None, ...] = ()
    modules: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    classes: Mapping[str, str] = field(default_factory=dict)

    @property
    def sent_bytes(self) -> int | None:
        """Of all lines; None where those of one are unknown."""
        known = [sent for sent in self.sent if sent is not None]
        return sum(known) if len(known) == len(self.sent) else None

    @classmethod
    def of(cls, gm: fx.GraphModule, text: str) -> LineFacts:
        """The facts of ``text``, which is ``graph_text(gm)``.

        Bytes are known while the process groups are: take the facts where the graph is made.
        """
        modules: list[str | None] = []
        sources = []
        classes: dict[str, str] = {}
        for node in _nodes_by_line(gm):
            calls = module_calls(node) if node else ()
            classes.update((call.path, call.cls) for call in calls)
            modules.append(calls[-1].path if calls else None)
            sources.append(source_of(node) if node else "")
        return cls(tuple(sent_by_line(text)), tuple(_filled(modules)), tuple(sources), classes)

    @classmethod
    def of_text(cls, text: str) -> LineFacts:
        """What a text alone tells."""
        return cls(tuple(sent_by_line(text)))

    @classmethod
    def joined(cls, parts: Iterable[LineFacts]) -> LineFacts:
        """Those of several texts that stand in one with an empty line between."""
        parts = list(parts)
        is_known = all(part.modules for part in parts)
        return cls(
            _with_gaps([part.sent for part in parts], 0),
            _with_gaps([part.modules for part in parts], "") if is_known else (),
            _with_gaps([part.sources for part in parts], "") if is_known else (),
            {path: name for part in parts for path, name in part.classes.items()},
        )


def _filled(modules: Sequence[str | None]) -> Iterator[str]:
    """A node of which no module is known (a sum of gradients) belongs to what holds the modules
    before and after it.
    """
    following: list[str | None] = []
    after: str | None = None
    for module in reversed(modules):
        after = module if module is not None else after
        following.append(after)
    before: str | None = None
    for module, after in zip(modules, reversed(following), strict=True):
        before = module if module is not None else before
        if module is None and before is not None and after is not None:
            both = zip(before.split("."), after.split("."), strict=False)
            yield ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))
        else:
            yield module or ""


def _with_gaps(parts: list[tuple[T, ...]], gap: T) -> tuple[T, ...]:
    joined = [item for part in parts for item in (gap, *part)]
    return tuple(joined[1:])


def _nodes_by_line(gm: fx.GraphModule) -> Iterator[fx.Node | None]:
    """The node of each line of the text; None for the head of a nested graph."""
    yield from gm.graph.nodes
    for inner in nested_graphs(gm).values():
        yield None
        yield from _nodes_by_line(inner)
