"""Finds the attentions of a graph: fused or written out, softmax or polynomial."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx
from torch.utils._pytree import tree_leaves

from rfcompile.find.dataflow import bodies, operator_name, words


@dataclass(frozen=True)
class Core:
    """The nodes of an attention: its operands [.., head, token, feature], and the result.

    ``weights`` is where weights are made of scores: the fused attention or the softmax. The key may
    be transposed: ``key_axes`` are those of its tokens and features. ``scores`` is the product of
    query and key, None in a fused attention.
    """

    weights: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    result: fx.Node
    key_axes: tuple[int, int] = (-2, -1)
    scores: fx.Node | None = None

    @property
    def is_fused(self) -> bool:
        return self.weights is self.result

    @property
    def kind(self) -> Literal["softmax", "polynomial"]:
        is_polynomial = operator_name(self.weights).startswith("polynomial")
        return "polynomial" if is_polynomial else "softmax"


_FUSED = words("scaled_dot_product_attention polynomial_attention")
SOFTMAX = words("softmax _softmax Softmax")
_WEIGHTS = SOFTMAX | {"polynomial_weights"}
_PRODUCT = words("matmul bmm baddbmm einsum")
_ELSEWHERE = _FUSED | words(
    "linear addmm mm convolution conv2d layer_norm rms_norm topk _grouped_mm"
)
"""What no attention has between its scores and its values."""


def cores_of(graph: fx.Graph) -> Iterator[Core]:
    """The attentions of a graph, fused or written out, in order."""
    for node in graph.nodes:
        name = operator_name(node)
        if name in _FUSED:
            q, k, v = (argument(node, i, s) for i, s in enumerate(("query", "key", "value")))
            yield Core(node, q, k, v, node)
        elif name in _WEIGHTS:
            scores = _nearest_product(node, lambda n: n.all_input_nodes)
            result = _nearest_product(node, lambda n: n.users)
            if scores is not None and result is not None:
                q, k = _nodes(scores)[-2:]
                yield Core(node, q, k, _nodes(result)[-1], result, (-1, -2), scores)


def all_cores(gm: fx.GraphModule) -> Iterator[Core]:
    """The attentions of a graph and of the graphs that it calls, each once, in order."""
    yield from _all_cores(gm.graph, set())


def _all_cores(graph: fx.Graph, known: set[fx.Graph]) -> Iterator[Core]:
    known.add(graph)
    cores = {core.weights: core for core in cores_of(graph)}
    for node in graph.nodes:
        if node in cores:
            yield cores[node]
        for _, body, _ in bodies(node):
            if body.graph not in known:
                yield from _all_cores(body.graph, known)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, by position or name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _nodes(call: fx.Node) -> list[fx.Node]:
    given = tree_leaves((call.args, call.kwargs))  # an einsum has its operands in a list
    return [argument for argument in given if isinstance(argument, fx.Node)]


def _nearest_product(
    start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> fx.Node | None:
    """The product of two tensors that is reached in the fewest steps."""
    reached = [start]
    for node in itertools.islice(reached, REACH):  # grows while it runs
        name = operator_name(node)
        if node is not start and name in _PRODUCT and len(_nodes(node)) > 1:
            return node
        if node is start or name not in _WEIGHTS | _ELSEWHERE:
            reached += [n for n in neighbours(node) if n not in reached]
    return None


REACH = 64
"""How many nodes (masks, casts, dropout) may lie around a softmax before its products."""
