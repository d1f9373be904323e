"""What operations do to the axes of tensors: which they reduce, broadcast, move or pick from.

Axes count from the end: -1 is the last one. A size is 1 only where the graph says so as a number,
so symbolic sizes are never compared and no guard is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rfcompile.passes.dataflow import operator_name, words

Shape = tuple[Any, ...]

_VIEWS = words("view reshape _unsafe_view unsqueeze squeeze flatten unflatten")
_PICKING = words("gather take_along_dim index _unsafe_index")


def value_of(node: object) -> Any:
    """The fake tensor of a node, or a tuple of them; None where there is none."""
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("val", node.meta.get("example_value"))


def bytes_of(value: Any) -> int | None:
    """Of a tensor; None where its size is symbolic."""
    size = value.numel() * value.element_size()
    return size if isinstance(size, int) else None


def shape_of(node: object) -> Shape:
    """The shape of a node's tensor; () where there is none."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def has_one_element(shape: Shape) -> bool:
    return all(map(is_one, shape))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator's call by name, defaults too."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return dict(node.kwargs)
    schema = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {**defaults, **given, **node.kwargs}


def reduced_axes(node: fx.Node) -> frozenset[int]:
    """The axes that a reduction removes or makes 1: all of them if it names none."""
    arguments = arguments_of(node)
    rank = len(shape_of(node.args[0]))
    dims = arguments.get("dim", arguments.get("dims"))
    if dims is None or dims == []:
        return frozenset(range(-rank, 0))
    return frozenset(_from_end(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def broadcast_axes(shape: Shape, result: Shape) -> frozenset[int]:
    """Axes of the result along which a tensor of this shape is repeated."""
    padded = (1,) * (len(result) - len(shape)) + shape
    pairs = enumerate(zip(padded, result, strict=False), -len(result))
    return frozenset(axis for axis, (a, b) in pairs if is_one(a) and not is_one(b))


def is_spread(shape: Shape, result: Shape) -> bool:
    """One value a row is repeated over the features, or one a feature over all rows."""
    axes = broadcast_axes(shape, result)
    rows = {axis for axis in range(-len(result), -1) if not is_one(result[axis])}
    return -1 in axes or bool(rows and rows <= axes)


def shared_axes(shapes: Sequence[Shape]) -> frozenset[int]:
    """The axes that none of these shapes is broadcast along."""
    rank = min(map(len, shapes))
    return frozenset(a for a in range(-rank, 0) if not any(is_one(shape[a]) for shape in shapes))


def picks_single_values(node: fx.Node) -> bool:
    """A gather or an index takes values out of rows, instead of whole rows or all of a row."""
    if operator_name(node) not in _PICKING:
        return False
    shape = shape_of(node.args[0])
    arguments = arguments_of(node)
    if "indices" in arguments:
        return len(shape) > 1 and _names_every_axis(arguments["indices"], len(shape))
    is_last = len(shape) > 1 and _from_end(arguments.get("dim", 0), len(shape)) == -1
    return is_last and _differ(shape_of(node), shape, -1)


def puts_single_values(node: fx.Node, values: fx.Node) -> bool:
    """A scatter or index_put writes one or a few values into each row of a larger tensor."""
    arguments = arguments_of(node)
    shape = shape_of(node)
    if "indices" in arguments:
        is_put = arguments.get("values") is values
        return is_put and len(shape) > 1 and _names_every_axis(arguments["indices"], len(shape))
    is_put = arguments.get("src") is values and values is not node.args[0]
    is_last = is_put and len(shape) > 1 and _from_end(arguments.get("dim", 0), len(shape)) == -1
    return is_last and _differ(shape_of(values), shape, -1)


def moved_axis(node: fx.Node, axis: int) -> int:
    """Where an axis of the first operand is in the result; the last one where that is not known."""
    name = operator_name(node)
    before, after = shape_of(node.args[0]), shape_of(node)
    place = axis + len(before)
    if name == "permute" or (name == "transpose" and isinstance(node.args[1], (list, tuple))):
        order: Any = node.args[1]
        return [_from_end(dim, len(before)) for dim in order].index(axis) - len(before)
    if name in ("transpose", "t", "mT", "swapaxes"):
        one, other = node.args[1:3] if len(node.args) > 2 else (-2, -1)
        pair = [_from_end(one, len(before)), _from_end(other, len(before))]  # type: ignore[arg-type]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if name not in _VIEWS:
        return axis if len(after) == len(before) else -1
    if axis == -1:
        wide = [a for a in range(-len(after), 0) if not is_one(after[a])]
        return wide[-1] if wide and before and not is_one(before[-1]) else -1
    is_kept = len(after) > place and all(not _differ(before, after, i) for i in range(place + 1))
    return place - len(after) if is_kept else -1


def _from_end(dim: int, rank: int) -> int:
    return dim if dim < 0 else dim - rank


def _differ(one: Shape, other: Shape, axis: int) -> bool:
    return str(one[axis]) != str(other[axis])


def _names_every_axis(indices: Sequence[Any], rank: int) -> bool:
    """Positions for every axis; masks are none."""
    values = [value_of(index) for index in indices]
    return len(values) == rank and all(
        isinstance(value, torch.Tensor) and value.dtype not in (torch.bool, torch.uint8)
        for value in values
    )
