"""Inserts the nodes of a traced function into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Decompositions = Mapping[Any, Callable[..., Any]]
"""Those that the graph went through already: what is put into it goes through them too."""


def origin_of(node: fx.Node) -> dict[str, Any]:
    """The metadata of a node, without that on its own inputs and result."""
    return {k: v for k, v in node.meta.items() if k not in ("val", "eager_input_vals")}


def splice(
    function: Callable[..., Tensor],
    inputs: Sequence[fx.Node],
    like: fx.Node,
    before: Callable[[fx.Node], fx.Node],
    decompositions: Decompositions,
) -> fx.Node:
    """Insert ``function(*inputs)`` and return the node of its result.

    Args:
        inputs: tensors first of all; symbolic sizes too.
        like: the new nodes get its metadata, but values of their own.
        before: the node before which to insert a copy of a traced node.
    """
    values = [node.meta["val"] for node in inputs]
    fake_mode = values[0].fake_mode
    with fake_mode:
        body = make_fx(
            function,
            decomposition_table=decompositions,
            tracing_mode="symbolic" if fake_mode.shape_env is not None else "fake",
        )(*values)
    given = iter(inputs)
    copies: dict[fx.Node, Any] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(given)
        elif node.op != "output":
            with like.graph.inserting_before(before(node)):
                copies[node] = like.graph.node_copy(node, copies.__getitem__)
            copies[node].meta = origin_of(like) | {"val": node.meta.get("val")}
    (output,) = body.graph.find_nodes(op="output")
    result: fx.Node = copies[output.args[0]]
    return result
