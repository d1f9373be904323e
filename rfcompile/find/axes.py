"""Tells what an operation does to the axes of a tensor: reduce, broadcast, move or pick.

Axes count from the end: -1 is the last one. A size is 1 only where the graph says so as a number,
so symbolic sizes are never compared and no guard is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rfcompile.find.dataflow import is_contraction, operator_name, words
from rfcompile.find.operator_kinds import REPEATING

Shape = tuple[Any, ...]

_VIEWS = words("view reshape _unsafe_view unsqueeze squeeze flatten unflatten")
_PICKING = words("gather take_along_dim index _unsafe_index index_select take diagonal")
_PUTTING = words("put index_put _unsafe_index_put index_add")
_UNCUTTING = words("select_scatter slice_scatter select_backward slice_backward")
_CUTTING = words("slice narrow split split_with_sizes chunk index _unsafe_index index_select")


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


def has_tensor(node: fx.Node) -> bool:
    """A node stands for a tensor or several; true where the graph has no shapes."""
    value = value_of(node)
    return value is None or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def is_boolean(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def shape_of_each(node: fx.Node) -> Shape:
    """The shape of a node's tensor, or of the first of its tensors."""
    value = value_of(node)
    return shape_of(node) if isinstance(value, torch.Tensor) or not value else tuple(value[0].shape)


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def has_one_element(shape: Shape) -> bool:
    return all(map(is_one, shape))


def is_square(node: fx.Node) -> bool:
    name, arguments = operator_name(node), node.args
    is_power = name == "pow" and len(arguments) > 1 and arguments[1] in (2, 2.0)
    return is_power or name == "square" or (name == "mul" and arguments[0] is arguments[1])


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


def axis_named(node: fx.Node) -> int:
    """The axis that an operation goes along; the last one if it names none."""
    return _from_end(arguments_of(node).get("dim", -1), len(shape_of(node.args[0])))


def is_same_size(before: Shape, axis: int, after: Shape, moved: int) -> bool:
    """An axis has the size that it had before an operation moved it."""
    is_there = -len(before) <= axis < 0 and -len(after) <= moved < 0
    return is_there and str(before[axis]) == str(after[moved])


def broadcast_axes(shape: Shape, result: Shape) -> frozenset[int]:
    """Axes of the result along which a tensor of this shape is repeated."""
    padded = (1,) * (len(result) - len(shape)) + shape
    pairs = enumerate(zip(padded, result, strict=False), -len(result))
    return frozenset(axis for axis, (a, b) in pairs if is_one(a) and not is_one(b))


def is_spread(shape: Shape, result: Shape) -> bool:
    """One value a row is repeated over the features, or one a feature over all rows."""
    axes = broadcast_axes(shape, result)
    *rows, features = [a for a in range(-len(result), 0) if not is_one(result[a])] or [-1]
    return features in axes or bool(rows and axes.issuperset(rows))


def shared_axes(shapes: Sequence[Shape]) -> frozenset[int]:
    """The axes that none of these shapes is broadcast along."""
    rank = min(map(len, shapes))
    return frozenset(a for a in range(-rank, 0) if not any(is_one(shape[a]) for shape in shapes))


def picks_single_values(node: fx.Node, features: int) -> bool:
    """A gather, an index or a diagonal takes values out of rows, instead of whole rows or all of a
    row. Where rows and features are one axis (``features`` is 0) whatever is picked is one.
    """
    name = operator_name(node)
    if name not in _PICKING:
        return False
    shape, arguments = shape_of(node.args[0]), arguments_of(node)
    if name == "take":
        return len(shape) > 1 or features == 0
    if name == "diagonal":
        pair = arguments.get("dim1", 0), arguments.get("dim2", 1)
        return features in {_from_end(dim, len(shape)) for dim in pair}
    if "indices" in arguments:
        is_wide = len(shape) > 1 or features == 0
        return is_wide and _names_every_axis(arguments["indices"], len(shape))
    axis = _from_end(arguments.get("dim", 0), len(shape))
    if features == 0 or name == "index_select":
        return features == 0 and _differ(shape_of(node), shape, axis)
    if axis == features:
        return _differ(shape_of(node), shape, axis)
    return _is_one_of(arguments.get("index"), shape_of(node), shape, axis)


def puts_single_values(node: fx.Node, values: fx.Node) -> bool:
    """A scatter or index_put writes one or a few values into each row of a larger tensor."""
    name, arguments, shape = operator_name(node), arguments_of(node), shape_of(node)
    given = [arguments.get(argument) for argument in ("values", "src", "source", "grad_output")]
    if not any(value is values for value in given):
        return False
    if name in ("put", "diagonal_scatter"):
        return len(shape) > 1
    if name in _UNCUTTING:
        is_last = _from_end(arguments["dim"], len(shape)) == -1 and not is_one(shape[-1])
        is_single = "select" in name or is_one(shape_of(values)[-1])
        return is_last and is_single and not _is_merged(node)
    if "indices" in arguments:
        is_wide = len(shape) > 1 or _is_unfolded(node)
        return is_wide and _names_every_axis(arguments["indices"], len(shape))
    if len(shape) == 1:
        return _is_unfolded(node)
    index, axis = arguments.get("index"), _from_end(arguments.get("dim", 0), len(shape))
    if len(shape_of(index)) < len(shape):  # index_add: of whole rows
        return False
    if axis == -1:
        return _differ(shape_of(values), shape, -1)
    return _is_one_of(index, shape_of(values), shape, axis)


def part_of_axis(node: fx.Node, axis: int) -> str:
    """How much of an axis of its operand an operation keeps: "one", "some" or "all" of it."""
    name, before, arguments = operator_name(node), shape_of(node.args[0]), arguments_of(node)
    if not -len(before) <= axis < 0 or is_one(before[axis]):
        return "all"
    if name in ("select", "unbind"):
        is_cut = _from_end(arguments.get("dim", 0), len(before)) == axis
        return "one" if is_cut else "all"
    after = shape_of_each(node)
    if name not in _CUTTING or len(after) != len(before) or not _differ(before, after, axis):
        return "all"
    return "one" if is_one(after[axis]) else "some"


def puts(node: fx.Node) -> bool:
    """It writes values into a larger tensor, by position."""
    name = operator_name(node)
    return "scatter" in name or name in _PUTTING


def moved_axis(node: fx.Node, axis: int) -> int:
    """Where an axis of the first operand is in the result; the last one where that is not known.

    0 is no axis: the features of a tensor whose rows and features became one axis.
    """
    name = operator_name(node)
    before, after = shape_of(node.args[0]), shape_of_each(node)
    place = axis + len(before)
    is_line = sum(not is_one(size) for size in after) <= 1
    if axis == 0:
        return 0 if is_line else -1
    if name == "permute" or (name == "transpose" and isinstance(node.args[1], (list, tuple))):
        order: Any = node.args[1]
        return [_from_end(dim, len(before)) for dim in order].index(axis) - len(before)
    if name in ("transpose", "t", "mT", "swapaxes"):
        one, other = node.args[1:3] if len(node.args) > 2 else (-2, -1)
        pair = [_from_end(one, len(before)), _from_end(other, len(before))]  # type: ignore[arg-type]
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if name in ("select", "unbind"):
        is_after = _from_end(arguments_of(node)["dim"], len(before)) > axis
        return min(axis + is_after, -1)
    if name in _VIEWS and is_line and sum(not is_one(size) for size in before) > 1:
        return 0
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


def _is_one_of(index: object, part: Shape, whole: Shape, axis: int) -> bool:
    """An index along an axis names one place for each value, not for each row."""
    return is_one(part[axis]) and not is_one(whole[axis]) and not _is_repeated(index)


def _is_repeated(index: object) -> bool:
    """An index is one of rows that was repeated for the features."""
    while isinstance(index, fx.Node):
        value = value_of(index)
        is_expanded = isinstance(value, torch.Tensor) and any(
            isinstance(stride, int) and stride == 0 and not is_one(size)
            for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        if is_expanded or operator_name(index) in REPEATING:
            return True
        index = index.all_input_nodes[0] if len(index.all_input_nodes) == 1 else None
    return False


def _is_unfolded(node: fx.Node) -> bool:
    """What is read of a tensor of one axis is a view with more of them."""
    return any(sum(not is_one(size) for size in shape_of(x)) > 1 for x in _views_of(node))


def _is_merged(node: fx.Node) -> bool:
    """The last axis is no row: a view joins it with another, as the pairs of a rotation."""
    return any(_differ(shape_of(x) or (1,), shape_of(node), -1) for x in _views_of(node))


def _views_of(node: fx.Node) -> list[fx.Node]:
    """The first views that are read of a tensor or of what has its shape."""
    found, seen = [], [node]
    for made in seen:
        for user in made.users:
            if operator_name(user) in _VIEWS:
                found.append(user)
            elif str(shape_of(user)) == str(shape_of(node)) and user not in seen:
                seen += [] if is_contraction(user) else [user]
    return found
