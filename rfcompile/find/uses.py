"""Finds the gradients that a backward graph spreads over the features again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from rfcompile.find.axes import (
    has_tensor,
    is_boolean,
    is_spread,
    puts,
    puts_single_values,
    shape_of,
)
from rfcompile.find.dataflow import bodies, is_contraction, operator_name
from rfcompile.find.operator_kinds import (
    CONSTANTS,
    COUNTING,
    REDUCING,
    REPEATING,
    SELECTING,
    SIDE_BY_SIDE,
    SPREADING,
)
from rfcompile.find.origins import TRAFFIC, Origin, text_of
from rfcompile.find.products import passes_on, spreads


@dataclass(frozen=True)
class Use:
    """What the next operations do with a value, until one of them decides.

    Args:
        spreads: the operation that repeats it over the features or over all rows; "" if none does.
        is_contracted: a contraction reads it.
    """

    spreads: str = ""
    is_contracted: bool = False

    def __or__(self, other: Use) -> Use:
        return Use(self.spreads or other.spreads, self.is_contracted or other.is_contracted)


class Uses:
    """The use of each value of a graph, graphs inside it included.

    Args:
        gm: the graph; origin: what a value of it is.
    """

    def __init__(self, gm: fx.GraphModule, origin: Callable[[object], Origin]) -> None:
        self._origin = origin
        self._uses: dict[fx.Node, Use] = {}
        self._look_ahead(gm, Use())

    def of(self, node: fx.Node) -> Use:
        return self._uses.get(node, Use())

    def _look_ahead(self, gm: fx.GraphModule, returned: Use) -> None:
        """Note how each value of a graph is used; ``returned``: what it returns, outside of it."""
        for node in reversed(gm.graph.nodes):
            use = Use()
            for user in node.users:
                use |= returned if user.op == "output" else self._use(node, user)
            self._uses[node] = self.of(node) | use
            for _, body, _ in bodies(node):
                self._look_ahead(body, use)

    def _use(self, node: fx.Node, user: fx.Node) -> Use:
        name = operator_name(user)
        called = list(bodies(user))
        if called:
            use = Use()
            for _, body, arguments in called:
                inputs = body.graph.find_nodes(op="placeholder")
                for p, argument in zip(inputs, arguments, strict=False):
                    use |= self._uses[p] if argument is node else Use()
            return use
        if is_contraction(user):
            return self._in_a_contraction(node, user)
        if name.startswith("embedding"):
            return Use(is_contracted=True)
        operands = [x for x in user.all_input_nodes if has_tensor(x)]
        is_reduced = name in REDUCING and len(operands) == 1
        if is_reduced or name in CONSTANTS | COUNTING or is_boolean(user):
            return Use()
        if name in SPREADING or puts_single_values(user, node):
            return Use(text_of(user))
        is_elementwise = len(operands) > 1 or name in REPEATING
        is_elementwise &= name not in SELECTING | SIDE_BY_SIDE and not puts(user)
        if is_elementwise and is_spread(shape_of(node), shape_of(user)):
            return Use(text_of(user))
        return self._uses[user]

    def _in_a_contraction(self, node: fx.Node, user: fx.Node) -> Use:
        others = [x for x in user.all_input_nodes if x is not node and has_tensor(x)]
        other = self._origin(others[0]) if len(others) == 1 else TRAFFIC
        if spreads(user, node, other):
            return Use(text_of(user))
        return self._uses[user] if passes_on(user, other) else Use(is_contracted=True)
