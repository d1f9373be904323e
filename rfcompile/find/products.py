"""Finds matrix products and poolings that are sums in another form.

Undecomposed graphs keep them, as on CUDA: ``einsum("td,td->t", h, h)`` is a bmm, and a masked sum
is a matrix with a mask. A real matrix stays traffic: one query over many keys, a head of one
output, one-hot rows times a table.
"""

from __future__ import annotations

import re

from torch import fx

from rfcompile.find.axes import is_one, shape_of, shape_of_each
from rfcompile.find.dataflow import is_custom, is_pooling, operator_name, words
from rfcompile.find.origins import (
    TRAFFIC,
    Kind,
    Origin,
    kind_of,
    reduced_to,
    repeated,
    statistic,
    text_of,
)

_PRODUCTS = words("mm bmm mv dot vdot")
_DISTANCES = words("cdist _cdist_forward _euclidean_dist")
_DISTANCES_BACK = words("_cdist_backward")


def is_product(node: fx.Node) -> bool:
    is_known = operator_name(node) in _PRODUCTS | _DISTANCES and not is_custom(node)
    return is_known and len(node.args) > 1 and all(map(shape_of, node.args[:2]))


def of_a_product(node: fx.Node, left: Origin, right: Origin, is_forward: bool) -> Origin:
    """Of the product of two matrices or vectors, or their distance.

    What is added up is no traffic if neither operand is, if one operand is constant (or weighs
    squares or probabilities) and leaves one value a row, if both leave one, or if one is a vector.
    """
    shapes = shape_of(node.args[0]), shape_of(node.args[1])
    is_outer = is_one(shapes[0][-1])
    if left.kind in _NARROW and right.kind in _NARROW:
        x = max(left, right, key=kind_of)
        if x.kind is Kind.STATISTIC and not is_forward:
            return TRAFFIC  # the gradient of a matrix
        return repeated(x) if is_outer else x
    if is_outer:
        return TRAFFIC
    summed = _summed_axes(node)
    rows = [_leaves_one(shape, axis) for shape, axis in zip(shapes, summed, strict=True)]
    is_dot = all(rows) or operator_name(node) == "mv"
    for i, (x, weight) in enumerate(((left, right), (right, left))):
        is_sum = rows[1 - i] and (
            weight.kind is Kind.CONSTANT or (x.adds_up and weight.kind in _NARROW)
        )
        if x.kind is Kind.TRAFFIC and (is_sum or is_dot):
            axes = {summed[i]} | ({-3 - summed[i]} if rows[i] and len(shapes[i]) > 1 else set())
            over = reduced_to(x, len(shapes[i]), axes, is_forward)
            if over:
                return statistic(f"made by {text_of(node)} over {over}")
    return TRAFFIC


def of_a_pooling(node: fx.Node, x: Origin) -> Origin:
    """Pooling keeps the features, unless it is over all of them."""
    if x.kind in (Kind.COUNT, Kind.STATISTIC):
        return x
    if x.kind is not Kind.TRAFFIC:
        return TRAFFIC
    if _is_over_features(node, shape_of_each(node), shape_of(node.args[0])):
        return statistic(f"made by {text_of(node)} over features")
    return Origin(Kind.TRAFFIC, features=x.features)


def spreads(user: fx.Node, gradient: fx.Node, other: Origin) -> bool:
    """The contraction ``user`` of a backward graph repeats a gradient over the features."""
    name, before, after = operator_name(user), shape_of(gradient), shape_of(user)
    if is_pooling(user):
        return user.args[0] is gradient and _is_over_features(user, before, after)
    is_dot = len(before) == 3 and is_one(before[-1]) and is_one(before[-2])
    if name in _DISTANCES_BACK or name == "bmm":
        wide = [size for size in after[-2:] if not is_one(size)]
        if is_dot and wide:
            return True
    is_sum = name in _PRODUCTS and other.kind is Kind.CONSTANT
    return is_sum and len(before) > 1 and is_one(before[_summed_axis(user, gradient)])


def passes_on(user: fx.Node, other: Origin) -> bool:
    """A contraction weighs a gradient with a count: each row of a mask takes its sum's."""
    return operator_name(user) in _PRODUCTS and other.kind in (Kind.CONSTANT, Kind.COUNT)


_NARROW = (Kind.CONSTANT, Kind.COUNT, Kind.STATISTIC)


def _summed_axes(node: fx.Node) -> tuple[int, int]:
    right = shape_of(node.args[1])
    return -1, -1 if operator_name(node) in _DISTANCES or len(right) == 1 else -2


def _summed_axis(node: fx.Node, operand: fx.Node) -> int:
    return _summed_axes(node)[0 if node.args[0] is operand else 1]


def _leaves_one(shape: tuple[object, ...], summed: int) -> bool:
    """The operand's own axis in the result has size 1, or it is a vector and has none."""
    return len(shape) == 1 or is_one(shape[-3 - summed])


def _is_over_features(node: fx.Node, pooled: tuple[object, ...], whole: tuple[object, ...]) -> bool:
    """All of a row became one value, and no axis of channels is left beside it."""
    digit = re.search(r"([123])d", operator_name(node))
    spatial = int(digit[1]) if digit else len(whole)
    if len(whole) <= spatial or not is_one(whole[-1 - spatial]) or is_one(whole[-1]):
        return False
    return all(map(is_one, pooled[-spatial:]))
