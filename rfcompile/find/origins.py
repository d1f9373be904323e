"""Origin: whether a value of a graph is a statistic or traffic, and what follows from that."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import fx

from rfcompile.find.axes import has_one_element, is_one
from rfcompile.graph.text import target_text


class Kind(IntEnum):
    """What a value is; of the operands of an operation the highest decides."""

    CONSTANT = 0
    COUNT = 1
    SPREAD = 2
    """A statistic at the size of traffic: broadcast, or the maximum over ranks."""
    TRAFFIC = 3
    STATISTIC = 4


class Row(IntEnum):
    """What one value of traffic knows of its row."""

    PLAIN = 0
    MIXED = 1
    """All of it: a softmax, a norm or a running sum went over the features."""
    SORTED = 2
    """Its place in it, so the first few are a top-k."""


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Args:
        kind: see above; why: of what it was made, unless it is traffic.
        features: the axis of the features, from the end; 0 where rows and features are one axis.
        paired: axes over which a sum would be a contraction, from the end.
        adds_up: it is a square, or comes from a softmax, an exp or a sigmoid: a sum of it over
            whatever axis measures something.
        row: what one value knows of its row.
        is_assumed: only its shape says that it is a statistic; broadcast it may be a scale.
    """

    kind: Kind
    why: str = ""
    features: int = -1
    paired: frozenset[int] = frozenset()
    adds_up: bool = False
    row: Row = Row.PLAIN
    is_assumed: bool = False


Result = Origin | tuple[Origin, ...]
CONSTANT = Origin(Kind.CONSTANT)
TRAFFIC = Origin(Kind.TRAFFIC)
KEEPS_EXACT = (Kind.COUNT, Kind.SPREAD, Kind.STATISTIC)


def statistic(why: str) -> Origin:
    return Origin(Kind.STATISTIC, why)


def kind_of(origin: Origin) -> Kind:
    return origin.kind


def from_outside(value: Any, what: str, is_parameter: bool) -> Origin:
    """Of what only dtype and shape tell about."""
    if not isinstance(value, torch.Tensor):
        return CONSTANT
    if not (value.is_floating_point() or value.is_complex()):
        return Origin(Kind.COUNT, f"a count: {what} of integers")
    shape = tuple(value.shape)
    if not is_parameter and has_one_element(shape):
        return statistic(f"{what} of a single element")
    if not is_parameter and is_one(shape[-1]):
        return Origin(Kind.STATISTIC, f"{what} with one value a row", is_assumed=True)
    return TRAFFIC


def reduced_to(x: Origin, rank: int, axes: Collection[int], is_forward: bool) -> str:
    """What a reduction of traffic over these axes went over if it makes a statistic, or ""."""
    kept = set(range(-rank, 0)) - set(axes)
    if not kept:
        return "all elements"
    if x.features in axes:
        return "features" if is_forward or -rank not in axes else ""
    return "rows" if is_forward and (kept == {x.features} or x.adds_up) else ""


def repeated(x: Origin) -> Origin:
    """Of a value that is broadcast to a larger tensor."""
    if x.kind is not Kind.STATISTIC:
        return x
    return TRAFFIC if x.is_assumed else replace(x, kind=Kind.SPREAD)


def either(one: Result, other: Result) -> Result:
    """Of a value that is one or the other, whichever keeps it exact."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(max(pair, key=kind_of) for pair in zip(one, other, strict=True))
    if isinstance(one, tuple) or isinstance(other, tuple):
        return one
    return max(one, other, key=kind_of)


def text_of(node: fx.Node) -> str:
    """What a node calls, without its overload: "aten.sum"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return target_text(node)
