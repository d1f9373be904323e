"""Finds the places in a graph where a tensor is sent to other ranks."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines _c10d_functional
from torch import fx

from rfcompile.errors import ProcessGroupError
from rfcompile.find.axes import bytes_of
from rfcompile.find.directions import KEEPS_VALUES, Directions
from rfcompile.find.foreign import ForeignCall, foreign_call
from rfcompile.torch_versions import reduction_name
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.process_groups import name_of, resolve

c10d = torch.ops._c10d_functional

KNOWN: dict[Any, str] = {
    c10d.all_reduce.default: "all_reduce",
    c10d.reduce_scatter_tensor.default: "reduce_scatter",
    c10d.all_gather_into_tensor.default: "all_gather",
    c10d.all_to_all_single.default: "all_to_all",
    c10d.broadcast.default: "broadcast",
}
WAIT = c10d.wait_tensor.default
TRANSFERS = {"isend", "irecv", "batch_p2p_ops"}
"""Between two ranks: ``quantize_transfers.py``."""


@dataclass(frozen=True)
class Collective:
    """One collective of a graph.

    Args:
        node: the call; wait: the wait_tensor that reads it, None unless that is its only reader.
        kind: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, or the operator's own
            name where it is none of these.
        sent: the node of the tensor that is sent, or what the operator has there.
        input: that tensor (a fake tensor).
        op: the reduction, "" where there is none.
        group: torch's name of the process group; world: its size, 0 where that is unknown.
        foreign: of an operator that :func:`~rfcompile.register_collective` got, else None.
    """

    node: fx.Node
    wait: fx.Node | None
    kind: str
    sent: Any
    input: torch.Tensor
    op: str
    group: str
    world: int
    foreign: ForeignCall | None = None

    @property
    def result(self) -> fx.Node | None:
        """The node of what arrived; None where that is not one node."""
        return self.foreign.result if self.foreign else self.wait

    @property
    def is_known(self) -> bool:
        """Its kind is one that bytes are counted for."""
        return self.foreign is not None or self.node.target in KNOWN


def find_collectives(gm: fx.GraphModule) -> tuple[Collective, ...]:
    """All functional and all registered collectives in order of appearance, also those no rewrite
    knows.

    Graphs inside the graph (``torch.cond``, ``nested_compile_region``) are searched where they are
    first referred to.
    """
    found = []
    for node in all_nodes(gm):
        if _is_collective(node):
            found.append(_describe(node))
        elif (call := foreign_call(node)) is not None:
            found.append(_describe_foreign(call))
    return tuple(found)


def all_nodes(gm: fx.GraphModule, seen: set[fx.GraphModule] | None = None) -> Iterator[fx.Node]:
    """Of the graph and of those inside it, each once."""
    seen = set() if seen is None else seen
    for node in gm.graph.nodes:
        yield node
        if node.op == "get_attr":
            inner = operator.attrgetter(str(node.target))(gm)
            if isinstance(inner, fx.GraphModule) and inner not in seen:
                seen.add(inner)
                yield from all_nodes(inner, seen)


def traffic_kind(
    c: Collective, directions: Directions, parameters: frozenset[str] | None = frozenset()
) -> str:
    """What a policy calls it: "activations", "gradients" or, of a parameter, "weights".

    "unknown" where its direction is, and where it gathers what may be a parameter (``parameters``
    is None).
    """
    source = _input_of(c.sent) if c.kind == "all_gather" else None
    if source is not None:
        is_tangent = directions.of(source) == "backward"
        if parameters is None and not is_tangent:
            return "unknown"
        if source.name in (parameters or ()):
            return "weights"
    return directions.kind_of(c.node)


def size_to_compare(c: Collective) -> int | None:
    """Bytes, for min_bytes; None if not known. All ranks must come to the same decision, and in an
    all_to_all each has a size of its own."""
    return None if c.kind == "all_to_all" else bytes_of(c.input)


def sent_by_each(c: Collective) -> int | None:
    """Bytes that one rank sends in a collective, None where that is not known."""
    size = bytes_of(c.input)
    if not c.is_known or size is None:
        return size if isinstance(size, int) else None
    if not c.world:
        return None
    if c.kind == "all_to_all":
        rows = rows_to_others(c)
        row_bytes = c.input.shape[1:].numel() * c.input.element_size()
        return None if rows is None else sum(rows) * row_bytes
    return sent_bytes(c.kind, size, c.world)


def splits(c: Collective) -> list[Any]:
    """The sizes of an all_to_all, output splits first, as numbers or symbolic numbers."""
    sizes: Any = [*c.node.args[1], *c.node.args[2]]  # type: ignore[misc]
    return [size.meta["val"] if isinstance(size, fx.Node) else size for size in sizes]


def rows_to_others(c: Collective) -> list[int] | None:
    """Rows of dim 0 that an all_to_all sends to each other rank, None where they are symbolic."""
    sizes = splits(c)[c.world :]
    if not all(isinstance(size, int) for size in sizes):
        return None
    me = resolve(c.group).rank()
    return [size for rank, size in enumerate(sizes) if rank != me]


def _input_of(value: object) -> fx.Node | None:
    """The graph input that a tensor is, cast or moved."""
    while isinstance(value, fx.Node) and value.target in KEEPS_VALUES:
        value = value.args[0]
    return value if isinstance(value, fx.Node) and value.op == "placeholder" else None


def _is_collective(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "_dtensor":
        return "alltoall" in target._opname
    # What waits for or wraps a tensor has no group, whatever torch calls it.
    has_group = any(argument.name == "group_name" for argument in target._schema.arguments)
    return target.namespace == "_c10d_functional" and has_group and target._opname not in TRANSFERS


def _describe(node: fx.Node) -> Collective:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [argument.name for argument in target._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    sent = next(iter(arguments.values()))
    while isinstance(sent, (list, tuple)) and sent:  # coalesced: the first tensor stands for all
        sent = sent[0]
    waits = [user for user in node.users if user.target is WAIT]
    group = arguments.get("group_name", "")
    if isinstance(group, fx.Node):  # torch.compiler.config.compile_on_one_rank
        group = f"%{group.name}"
    return Collective(
        node=node,
        wait=waits[0] if len(waits) == 1 and len(node.users) == 1 else None,
        kind=KNOWN.get(target, target._opname),
        sent=sent,
        input=_value_of(sent),
        op=reduction_name(arguments.get("reduce_op", "")),
        group=name_of(group) if group else "",
        world=_world_size(arguments, group),
    )


def _describe_foreign(call: ForeignCall) -> Collective:
    return Collective(
        node=call.node,
        wait=None,
        kind=call.operator.kind,
        sent=call.sent,
        input=_value_of(call.sent),
        op=call.operator.reduce,
        group=call.group,
        world=_world_size({}, call.group) if call.group else 0,
        foreign=call,
    )


def _value_of(sent: object) -> torch.Tensor:
    value = sent.meta["val"] if isinstance(sent, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else torch.empty(0)


def _world_size(arguments: dict[str, Any], group: Any) -> int:
    if "group_size" in arguments:
        return int(arguments["group_size"])
    try:
        return int(resolve(group or None).size())
    except ProcessGroupError:
        return 0
