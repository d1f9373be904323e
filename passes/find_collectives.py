"""Where tensors cross the wire in a graph: analysis only, shared by the rewrites of collectives."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives  # defines _c10d_functional
from torch import fx

from rfcompile.errors import ProcessGroupError
from rfcompile.process_groups import name_of, resolve
from rfcompile.torch_versions import reduction_name

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

aten = torch.ops.aten
_KEEPS_A_WEIGHT = frozenset(
    {
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
        aten.detach.default,
        aten.alias.default,
    }
)


@dataclass(frozen=True)
class Collective:
    """One collective of a graph.

    Args:
        node: the call; wait: the wait_tensor that reads it, None unless that is its only reader.
        kind: all_reduce, reduce_scatter, all_gather, all_to_all, broadcast, or the operator's own
            name where it is none of these.
        input: the tensor that is sent (a fake tensor).
        op: the reduction, "" where there is none.
        group: name of the process group; world: its size, 0 where that is unknown.
    """

    node: fx.Node
    wait: fx.Node | None
    kind: str
    input: torch.Tensor
    op: str
    group: str
    world: int


def find_collectives(gm: fx.GraphModule) -> tuple[Collective, ...]:
    """All functional collectives in order of appearance, also those no rewrite knows.

    Graphs inside the graph (``torch.cond``, ``nested_compile_region``) are searched where they are
    first referred to.
    """
    return tuple(_describe(node) for node in all_nodes(gm) if _is_collective(node))


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


def traffic_kind(c: Collective, direction: str, parameters: frozenset[str] = frozenset()) -> str:
    """What a policy calls it: "activations", "gradients" or, of a parameter, "weights"."""
    if c.kind == "all_gather" and _is_parameter(c.node.args[0], parameters):
        return "weights"
    # Activation checkpointing runs forward collectives again in the backward graph: they must
    # give the values of the first time.
    is_recomputed = c.node.meta.get("partitioner_tag") == "is_forward"
    return "gradients" if direction == "backward" and not is_recomputed else "activations"


def size_to_compare(c: Collective) -> int:
    """Bytes, for min_bytes; large if not known. All ranks must come to the same decision, and in
    an all_to_all each has a size of its own."""
    size = c.input.numel() * c.input.element_size()
    return size if isinstance(size, int) and c.kind != "all_to_all" else 2**62


def _is_parameter(value: object, parameters: frozenset[str]) -> bool:
    while isinstance(value, fx.Node) and value.target in _KEEPS_A_WEIGHT:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.name in parameters


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
        input=_value_of(sent),
        op=reduction_name(arguments.get("reduce_op", "")),
        group=name_of(group) if group else "",
        world=_world_size(arguments, group),
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
