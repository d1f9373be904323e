"""Tells which nodes of a graph run in the forward pass and which in the backward pass.

A graph that AOTAutograd cut in two has one direction. A joint graph has forward, loss and backward
in one. There torch marks nodes while it traces:

- ``autograd_backward``: the autograd engine made the node. AOTAutograd marks all nodes of a
  backward pass, and so does ``make_fx`` under ``torch.compiler._patch_engine_backward()``.
- ``partitioner_tag``: AOTAutograd gives one to every node of its joint graph.

From the marks of a joint graph follows:

1. A marked node has the direction of its mark.
2. A node without a mark, in a graph that has marks of the engine alone, runs forward unless it
   reads a value of the backward pass: so torch itself reads such graphs. If it only casts, moves,
   scales or sends a gradient that the engine returned (an average over replicas), it is backward.
3. All else is unknown: nodes without a tag in a graph with tags, and what else is computed from
   gradients. So is a graph without any mark.
4. A node of the backward pass repeats the forward pass (activation checkpointing) if it is marked
   as a copy, or computes what a node of the forward pass computes: the same operators of the same
   inputs. What it sends are activations.

Graphs inside the graph have the direction of the node that calls them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import fx

Direction = Literal["forward", "backward", "unknown"]
NO_DIRECTION = "nothing says whether it runs in the forward or in the backward pass"

_OF_TAG: dict[Any, Direction] = {
    "is_forward": "forward",
    "must_be_in_forward": "forward",
    "is_backward": "backward",
    "must_be_in_backward": "backward",
}
aten = torch.ops.aten
_SAME: frozenset[Any] = frozenset({aten.detach.default, aten.alias.default})
KEEPS_VALUES: frozenset[Any] = _SAME | {
    torch.ops.prims.convert_element_type.default,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.t.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
}
"""Casts, views, copies and parts: a weight stays a weight."""
_SCALES: frozenset[Any] = frozenset({aten.mul.Tensor, aten.div.Tensor})
_SENDS = frozenset({"all_reduce", "reduce_scatter_tensor", "wait_tensor"})


class Directions:
    """The direction of each node of a graph, and of the graphs inside it; see the module.

    Args:
        gm: an aten graph.
        direction: "forward" or "backward" for a graph that has one direction, or "joint".
    """

    def __init__(self, gm: fx.GraphModule, direction: str) -> None:
        self._direction = direction
        self._found: dict[fx.Node, Direction] = {}
        self._repeats: set[fx.Node] = set()
        self.has_marks = direction != "joint"
        """Something says which nodes are the backward pass."""
        if direction == "joint":
            nodes = [node for graph in _graphs(gm) for node in graph.nodes]
            self.has_marks = any(_mark(node) is not None for node in nodes)
            self._has_tags = any("partitioner_tag" in node.meta for node in nodes)
            self._read(gm, "unknown")
            self._find_repetitions(gm)

    def of(self, node: fx.Node) -> Direction:
        """The pass in which a node runs."""
        if self._direction == "joint":
            return self._found.get(node, "unknown")
        return "backward" if self._direction == "backward" else "forward"

    def is_recomputed(self, node: fx.Node) -> bool:
        """The backward pass runs this part of the forward pass again; it must give the values of
        the first time.
        """
        if self.of(node) != "backward":
            return False
        is_marked = node.meta.get("partitioner_tag") == "is_forward"
        return is_marked or node in self._repeats

    def is_forward(self, node: fx.Node) -> bool:
        """A node computes a value of the forward pass, in whichever pass it runs."""
        return self.of(node) == "forward" or self.is_recomputed(node)

    def kind_of(self, node: fx.Node) -> str:
        """What a policy calls the traffic of a node: "activations" or "gradients", or "unknown"."""
        if self.of(node) == "unknown":
            return "unknown"
        return "activations" if self.is_forward(node) else "gradients"

    def _read(self, gm: fx.GraphModule, outer: Direction) -> None:
        """Note the directions of a graph's nodes; ``outer``: where the node runs that calls it."""
        for node in gm.graph.nodes:
            self._found[node] = self._direction_of(node, outer)
        for attribute, body in _inner(gm):
            callers = {self._found[user] for user in attribute.users}
            self._read(body, callers.pop() if len(callers) == 1 else "unknown")

    def _direction_of(self, node: fx.Node, outer: Direction) -> Direction:
        mark = _mark(node)
        if mark is not None or outer != "unknown":
            return mark or outer
        if self._has_tags or not self.has_marks:
            return "unknown"
        reads = {self._found[x] for x in node.all_input_nodes}
        if reads <= {"forward"}:
            return "forward"
        return "backward" if reads == {"backward"} and _handles_one(node) else "unknown"

    def _find_repetitions(self, gm: fx.GraphModule) -> None:
        """Nodes of the backward pass that compute what a node of the forward pass computes."""
        numbers: dict[object, int] = {}
        number_of: dict[fx.Node, int] = {}
        of_forward: set[int] = set()
        for node in gm.graph.nodes:
            if node.target in _SAME:
                number_of[node] = number_of[node.args[0]]
                continue
            number = numbers.setdefault(_computation(node, number_of), len(numbers))
            number_of[node] = number
            if self._found[node] == "forward":
                of_forward.add(number)
            elif "recompute" in node.meta or number in of_forward:
                self._repeats.add(node)  # of those that run in the backward pass


def _mark(node: fx.Node) -> Direction | None:
    if node.meta.get("autograd_backward"):
        return "backward"
    return _OF_TAG.get(node.meta.get("partitioner_tag"))


def _handles_one(node: fx.Node) -> bool:
    """It casts, moves, scales or sends one tensor."""
    is_known = node.target in KEEPS_VALUES | _SCALES
    is_known |= getattr(node.target, "_opname", "") in _SENDS
    return is_known and len(node.all_input_nodes) == 1


def _computation(node: fx.Node, number_of: dict[fx.Node, int]) -> object:
    """Equal for two nodes that compute the same: operators and inputs, as text."""
    if node.op in ("placeholder", "output"):
        return node.name
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
        return value.code if isinstance(value, fx.GraphModule) else node.target
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda x: f"%{number_of[x]}")
    return str(node.target), repr(arguments)


def _inner(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    for node in gm.graph.find_nodes(op="get_attr"):
        body = operator.attrgetter(str(node.target))(gm)
        if isinstance(body, fx.GraphModule):
            yield node, body


def _graphs(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    yield gm.graph
    for _, body in _inner(gm):
        yield from _graphs(body)
