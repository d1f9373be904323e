"""Finds the tensors of a graph that are statistics and must stay exact.

A quantized activation is off by a little in each of thousands of features, and what reads it next
is a contraction, which averages that. A statistic stands for a whole row (or for all rows of a
feature): the sum under a softmax, a maximum, a norm's mean square, a picked logit, a count. Nothing
averages its error, and what is computed from it (a loss, a norm, who routes where) is wrong for the
whole row. It is also small: one value where traffic has a row. So a statistic stays exact unless a
pattern of ``sites`` names its module.

The rule. Values are followed through the graph; what a value is, its last contraction or reduction
says. (A contraction: matrices, convolutions, attention, pooling; see ``dataflow.py``.)

1. Traffic: what a contraction or an embedding gives, and what comes from outside the graph.
2. A reduction over the features gives a statistic: sum, mean, amax, logsumexp, var, norm, any,
   top-k. So does one over everything, and in a forward graph one over all but the features (how
   often experts are chosen, the moments of a batch norm) or, of what adds up (squares and
   probabilities), over anything: the load of experts, the moments of an instance norm. Other sums
   keep the features and stay traffic: over the experts of a token, over a sequence, over the
   positions of a map. The features are the last axis; after a convolution the axis 1; a
   permutation moves them. A sum over a product of factors that are both broadcast is a contraction
   that is written out.
   So do picks of single values: ``gather`` and ``index`` along the features, an index of size 1
   along any axis that is not repeated for the features, single values of rows that were flattened
   into one axis, a diagonal. And where the features were sorted, any part of them is a top-k;
   where they were scaled or added up along the row (softmax, norms, ``cumsum``), a single one of
   them stands for the row. All of them together are traffic.
   A contraction that is such a sum counts as one (``products.py``): what weighs statistics and
   counts by counts, a dot product of each row, a matrix times a vector, one row or column of a
   constant, a pooling over all features.
3. A max or min all-reduce gives a statistic, and so do the further results of attention (its
   logsumexp) and norms (mean and rstd).
4. A count is what comes from booleans, integers and positions only; it is exact as well. (Integers
   that a cast made of floats are what the floats were.)
5. Elementwise operations, casts, views, collectives and selections of rows pass on what they read.
   Of operands of different origin those that fill the result decide: a statistic before traffic,
   traffic before a count, so masks and weights of rows change nothing. A statistic or count that is
   broadcast, or spread by ``scatter``, does not decide where a full-size operand is traffic:
   ``x * rsqrt(mean(x**2))`` is traffic. A tensor that holds both side by side (``cat``, a slice
   that is written into a buffer) is exact in a forward graph: quantizing it would change the
   statistic.
6. From outside (graph inputs, kernels that torch does not know): integers are counts, and a tensor
   with one value a row (``[..., 1]``) is a statistic, but for parameters. What the forward graph
   saved for the backward graph is what it was there.
7. Gradients. A reduction over rows (axis 0) gives a weight's gradient, which is traffic. One over
   the features gives the gradient of a statistic. And as data flows the other way, what a forward
   pass reduced a backward pass spreads: a collective of a backward graph sends a statistic's
   gradient too if its result is broadcast over the features or over all rows, and no contraction
   reads it before. What is recomputed from the forward pass follows the forward rule.
8. A single element is a statistic whatever made it: a loss, a squared norm of all gradients.

All of this depends on the graph alone, so ranks that run the same program decide alike.

Limits. A graph break right before a collective hides what made its input: shapes other than
``[..., 1]`` and a single element then count as traffic. One column of a matrix product
(``logits[:, 0]``) is traffic as the whole is, and so are gathered logits. Some statistics look the
same as traffic and are quantized: what ``h @ v[:, None]`` sums with weights that are not constant
(a head of one output), sums of groups of features by a matrix of zeros and ones (a rotation), what
a convolution with a constant kernel sums, values that a mask picks, and gradients of a few sorted
values. Some traffic looks the same as statistics and is exact, which is safe: a pooling that is
written as a mean over the last axis of a tensor from outside, a bias gradient in a forward graph
(compiled autograd), ``W @ x`` for a single vector, scores of one query with one key, and standard
deviations or squares that are pooled over positions. The bodies of loops are read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rfcompile.find.axes import (
    arguments_of,
    axis_named,
    broadcast_axes,
    has_one_element,
    has_tensor,
    is_boolean,
    is_same_size,
    is_square,
    moved_axis,
    part_of_axis,
    picks_single_values,
    puts,
    puts_single_values,
    reduced_axes,
    shape_of,
    shape_of_each,
    shared_axes,
    value_of,
)
from rfcompile.find.dataflow import bodies, is_contraction, is_custom, is_pooling, operator_name
from rfcompile.find.directions import Directions
from rfcompile.find.foreign import foreign_call
from rfcompile.find.operator_kinds import (
    ADDING,
    CONSTANTS,
    COUNTING,
    LOSSES,
    MOMENTS,
    NORMS_OF_ROWS,
    PROBABILITIES,
    REDUCING,
    REPEATING,
    SCALING,
    SCANNING,
    SELECTING,
    SIDE_BY_SIDE,
    VALUE_AND_MASK,
    VALUE_AND_POSITION,
)
from rfcompile.find.origins import (
    CONSTANT,
    KEEPS_EXACT,
    TRAFFIC,
    Kind,
    Origin,
    Result,
    Row,
    either,
    from_outside,
    kind_of,
    reduced_to,
    repeated,
    statistic,
    text_of,
)
from rfcompile.find.products import is_product, of_a_pooling, of_a_product
from rfcompile.find.uses import Uses


class Statistics:
    """What the values of a graph are, graphs inside it included; see the module.

    Args:
        gm: an aten graph.
        direction: "forward", "backward" or "joint".
        parameters: names of the placeholders that are parameters.
        saved: of placeholders that another graph returned, by name; see :meth:`returned`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        direction: str,
        parameters: frozenset[str] = frozenset(),
        saved: Mapping[str, Origin] | None = None,
    ) -> None:
        self._gm, self.directions = gm, Directions(gm, direction)
        self._parameters, self._saved = parameters, saved or {}
        self._results: dict[fx.Node, Result] = {}
        self._read(gm, {})
        self._uses = Uses(gm, self._origin) if direction != "forward" else None

    def why_exact(self, tensor: object, node: fx.Node) -> str:
        """Why ``tensor`` must travel exactly in the collective or transfer ``node``, or "".

        The text starts with "a statistic".
        """
        origin, is_forward = self._origin(tensor), self.directions.is_forward(node)
        if origin.kind in KEEPS_EXACT and (origin.kind is not Kind.SPREAD or is_forward):
            return f"a statistic: {origin.why}"
        # Not of an all_to_all: each rank has a size of its own, and all must decide alike.
        is_one_element = value_of(tensor) is not None and has_one_element(shape_of(tensor))
        if is_one_element and "all_to_all" not in operator_name(node):
            return "a statistic: a single element"
        use = self._uses.of(node) if self._uses and not is_forward else None
        if use and use.spreads and not use.is_contracted:
            return f"a statistic: the gradient of one, {use.spreads} spreads it again"
        return ""

    def returned(self) -> dict[str, Origin]:
        """Of what the graph returns, by name of the node: ``saved`` of its backward graph."""
        outputs = tree_leaves(self._gm.graph.output_node().args)
        return {x.name: self._origin(x) for x in outputs if isinstance(x, fx.Node)}

    def _origin(self, value: object) -> Origin:
        result = self._results.get(value, CONSTANT) if isinstance(value, fx.Node) else CONSTANT
        return max(result, key=kind_of, default=CONSTANT) if isinstance(result, tuple) else result

    # ---- what a value was made of ----------------------------------------------------------------

    def _read(self, gm: fx.GraphModule, bound: Mapping[fx.Node, Origin]) -> tuple[Origin, ...]:
        """Note the results of a graph's nodes and return what it returns."""
        for node in gm.graph.nodes:
            if node.op == "output":
                return tuple(map(self._origin, tree_leaves(node.args[0])))
            result = bound[node] if node in bound else self._result(node)
            # Of a graph that is called more than once all calls send what one of them must.
            self._results[node] = either(self._results.get(node, result), result)
        return ()

    def _result(self, node: fx.Node) -> Result:
        if node.op == "placeholder":
            if node.name in self._saved:
                return self._saved[node.name]
            return from_outside(value_of(node), "a graph input", node.name in self._parameters)
        if node.op == "get_attr":
            is_constant = has_one_element(shape_of(node))
            return CONSTANT if is_constant else from_outside(value_of(node), "a constant", True)
        if not has_tensor(node):
            return CONSTANT
        name = operator_name(node)
        if name == "getitem":
            return self._item(node.args[0], node.args[1])
        called = list(bodies(node))
        if called:
            return self._call(called)
        if (foreign := foreign_call(node)) is not None:
            arrived = self._origin(foreign.sent)
            value = value_of(node)
            return (arrived,) * len(value) if isinstance(value, (tuple, list)) else arrived
        if is_product(node):
            left, right = map(self._origin, node.args[:2])
            return of_a_product(node, left, right, self.directions.is_forward(node))
        if is_pooling(node) and "backward" not in name:
            return of_a_pooling(node, self._origin(node.args[0]))
        if isinstance(node.target, torch._ops.HigherOrderOperator) or is_contraction(node):
            return _of_a_kernel(node, name)
        return self._of_an_operator(node, name)

    def _item(self, source: object, number: Any) -> Origin:
        result = self._results.get(source) if isinstance(source, fx.Node) else None
        if isinstance(result, tuple) and isinstance(number, int) and number < len(result):
            return result[number]
        return self._origin(source)

    def _call(self, called: list[tuple[str, fx.GraphModule, list[Any]]]) -> Result:
        result: Result | None = None
        for _, body, arguments in called:
            inputs = body.graph.find_nodes(op="placeholder")
            bound = {p: self._origin(a) for p, a in zip(inputs, arguments, strict=False)}
            returned = self._read(body, bound)
            result = returned if result is None else either(result, returned)
        assert result is not None
        return result

    def _of_an_operator(self, node: fx.Node, name: str) -> Result:
        operands = [x for x in node.all_input_nodes if x in self._results and has_tensor(x)]
        first = self._origin(operands[0]) if operands else CONSTANT
        count = Origin(Kind.COUNT, f"a count made by {text_of(node)}")
        if name in CONSTANTS:
            return CONSTANT
        if name in COUNTING or is_boolean(node):
            return count
        if name.startswith(("embedding", "_embedding", "rand")):
            return TRAFFIC
        if not operands:
            return from_outside(value_of(node), f"made by {text_of(node)}", False)
        if name in LOSSES:
            return statistic(f"made by {text_of(node)}")
        if name in REDUCING and len(operands) == 1:
            reduced = self._reduced(node, name, first)
            several = isinstance(value_of(node), (tuple, list))
            return (reduced, count) if several and name in VALUE_AND_POSITION else reduced
        if name in VALUE_AND_POSITION | VALUE_AND_MASK and len(operands) == 1:
            return _passed_on(node, name, first), count
        if "norm" in name and isinstance(value_of(node), (tuple, list)):
            moments = statistic(f"made by {text_of(node)}")
            if "backward" in name:
                return TRAFFIC
            return replace(first, row=_row(node, name, first)), *(moments,) * 4
        if name == "all_reduce" and arguments_of(node).get("reduce_op") not in ("sum", "avg"):
            op = arguments_of(node).get("reduce_op")
            made = Origin(Kind.SPREAD, f"made by a {op} all_reduce")
            return made if first.kind is Kind.TRAFFIC else first
        if name.endswith("_coalesced") or name == "batch_p2p_ops":
            return tuple(map(self._origin, operands))
        if first.kind is Kind.TRAFFIC and _picks(node, first):
            return statistic(f"made by {text_of(node)} over features")
        if name in SELECTING or (len(operands) == 1 and name not in REPEATING):
            return _passed_on(node, name, first)
        return self._combined(node, name, operands)

    def _reduced(self, node: fx.Node, name: str, x: Origin) -> Origin:
        if x.kind in (Kind.CONSTANT, Kind.COUNT):
            return x
        rank, axes = len(shape_of(node.args[0])), reduced_axes(node)
        if name in ADDING and axes <= x.paired:
            return TRAFFIC
        summed = replace(x, adds_up=x.adds_up or name in MOMENTS)
        over = reduced_to(summed, rank, axes, self.directions.is_forward(node))
        if over:
            return statistic(f"made by {text_of(node)} over {over}")
        is_kept = len(shape_of(node)) == rank
        shift = 0 if is_kept else sum(axis > x.features for axis in axes)
        return replace(x, features=min(x.features + shift, -1), paired=frozenset(), row=Row.PLAIN)

    def _combined(self, node: fx.Node, name: str, operands: list[fx.Node]) -> Origin:
        """Of an operation that reads several tensors, or repeats one."""
        parts = [(x, self._origin(x), _is_smaller(node, name, x)) for x in operands]
        kinds = {origin.kind for _, origin, _ in parts}
        if name in SIDE_BY_SIDE and Kind.TRAFFIC in kinds and not kinds.isdisjoint(KEEPS_EXACT):
            if not self.directions.is_forward(node):
                return TRAFFIC
            exact = next(origin for _, origin, _ in parts if origin.kind in KEEPS_EXACT)
            return statistic(f"beside other values in one tensor: {exact.why}")
        seen = [(repeated(o) if smaller else o, smaller) for _, o, smaller in parts]
        result, _ = max(seen, key=lambda part: (part[0].kind, not part[1]))
        if result.kind is not Kind.TRAFFIC:
            return replace(result, features=-1)
        factors = [(shape_of(x), smaller) for x, o, smaller in parts if o.kind is Kind.TRAFFIC]
        if len(factors) > 1 and all(smaller for *_, smaller in parts):
            return replace(result, paired=shared_axes([shape for shape, _ in factors]))
        wide = [o for _, o, smaller in parts if o.kind is Kind.TRAFFIC and not smaller] or [result]
        row = min(o.row for o in wide)
        if any(_scales_rows(x, o, node, result.features) for x, o, smaller in parts if smaller):
            row = max(row, Row.MIXED)
        return replace(result, adds_up=all(o.adds_up for o in wide), row=row)


def _of_a_kernel(node: fx.Node, name: str) -> Result:
    """Of a contraction, or of an operator whose inside is not known."""
    value = value_of(node)
    is_outside = is_custom(node) or not is_contraction(node)
    if is_outside:
        leaves = tree_leaves(value)
        origins = tuple(from_outside(leaf, f"made by {text_of(node)}", False) for leaf in leaves)
        return origins if isinstance(value, (tuple, list)) else max(origins, key=kind_of)
    if "conv" in name or "convolution" in name:
        return replace(TRAFFIC, features=min(1 - len(shape_of(node)), -1))
    if isinstance(value, (tuple, list)) and "attention" in name and "backward" not in name:
        return TRAFFIC, *(statistic(f"made by {text_of(node)}"),) * (len(value) - 1)
    return TRAFFIC


def _passed_on(node: fx.Node, name: str, x: Origin) -> Origin:
    """Of an operation that changes or moves the values of one tensor."""
    if x.kind is not Kind.TRAFFIC:
        return x
    before, after = shape_of(node.args[0]), shape_of_each(node)
    is_same_shape = str(after) == str(before)
    features = moved_axis(node, x.features) if name not in SELECTING else x.features
    is_whole = is_same_size(before, x.features, after, features)
    return Origin(
        Kind.TRAFFIC,
        features=features,
        paired=x.paired if is_same_shape else frozenset(),
        adds_up=x.adds_up or name in PROBABILITIES or is_square(node),
        row=_row(node, name, x) if is_whole else Row.PLAIN,
    )


def _row(node: fx.Node, name: str, x: Origin) -> Row:
    """What a value knows of its row after an operation on traffic."""
    if name in NORMS_OF_ROWS:
        return max(x.row, Row.MIXED)
    if name in SCALING | SCANNING | {"sort"} and axis_named(node) == x.features:
        return max(x.row, Row.SORTED if name == "sort" else Row.MIXED)
    return x.row


def _scales_rows(operand: fx.Node, x: Origin, node: fx.Node, features: int) -> bool:
    """A statistic of each row is broadcast over its features."""
    is_statistic = x.kind in (Kind.STATISTIC, Kind.SPREAD)
    return is_statistic and features in broadcast_axes(shape_of(operand), shape_of(node))


def _picks(node: fx.Node, x: Origin) -> bool:
    """One value a row is taken, or of a row that is sorted a few."""
    part = part_of_axis(node, x.features)
    is_part = part == "one" if x.row is Row.MIXED else part != "all" and x.row is Row.SORTED
    return is_part or picks_single_values(node, x.features)


def _is_smaller(node: fx.Node, name: str, operand: fx.Node) -> bool:
    """The operand is repeated, or put into a larger tensor."""
    if name in SIDE_BY_SIDE:
        return False
    if puts(node):
        return puts_single_values(node, operand)
    return bool(broadcast_axes(shape_of(operand), shape_of(node)))
