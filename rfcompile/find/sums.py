"""Reads the many ways to write a sum, a copy or a scaled copy of a tensor as one.

Nothing is rewritten: an analysis must leave the graph, and its numbers, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rfcompile.find.axes import is_one
from rfcompile.find.dataflow import Value, is_contraction, is_pooling, words

# ---- sums --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summand:
    """One term of a sum.

    Args:
        factors: the values it is the product of; one: the term is that value, times a number.
        operand: the argument of the operator that it comes in; of a stack, which tensor.
        is_negative: it is subtracted.
        is_contraction: the sum's operator itself contracts the factors, as ``addmm`` does.
    """

    factors: tuple[Value, ...]
    operand: int
    is_negative: bool = False
    is_contraction: bool = False


_ADD_PRODUCT = words("addcmul addcdiv addr")
_ADD_CONTRACTION = words("addmm baddbmm addbmm addmv")


def summands(value: Value) -> tuple[Summand, ...]:
    """The terms that an operator adds, two or more; () for any other operator.

    ::

        a + b, a.add_(b), add(a, b, alpha=2)    -> a, b
        a - b                                   -> a, -b
        addcmul(a, b, c), addmm(a, b, c), ...   -> a, b c
        lerp(a, b, w), a + w * (b - a)          -> a, b      unless w is computed from data: a gate
        index_add(a, 0, i, b)                   -> a, b
        stack([a, b]).sum(0)                    -> a, b
    """
    operator = value.operator
    first, second = value.argument(0, "input", "self"), value.argument(1, "other", "end")
    if not isinstance(first, Value):
        return ()
    if operator in ("add", "sub", "rsub") and isinstance(second, Value):
        return _binary(value, first, second)
    if operator in _ADD_PRODUCT or operator in _ADD_CONTRACTION:
        given = dict(enumerate(value.node.args)) | value.node.kwargs
        nodes = [node for key, node in given.items() if key not in (0, "input", "self")]
        factors = tuple(value.operands[n] for n in nodes if isinstance(n, fx.Node))
        product = Summand(factors, 1, is_contraction=operator in _ADD_CONTRACTION)
        return (Summand((first,), 0), product)
    if operator == "lerp" and isinstance(second, Value):
        weight = value.argument(2, "weight")
        return () if _is_gate(weight, first) else (Summand((first,), 0), Summand((second,), 1))
    if operator in ("index_add", "scatter_add"):
        added = value.argument(3, "source", "src")
        return (Summand((first,), 0), Summand((added,), 3)) if isinstance(added, Value) else ()
    if operator in ("sum", "mean") and first.operator == "stack":
        return _stacked(value, first)
    return ()


def _binary(value: Value, a: Value, b: Value) -> tuple[Summand, ...]:
    alpha = value.argument(2, "alpha", default=1)
    is_difference = (value.operator != "add") != (isinstance(alpha, (int, float)) and alpha < 0)
    if is_difference:
        start, end = (a, b) if value.operator == "rsub" else (b, a)
        if _is_inside_mixture(value, start, end):
            return ()
        return (Summand((a,), 0, a is start), Summand((b,), 1, b is start))
    for operand, start, change in ((0, a, b), (1, b, a)):
        weight, target = _change(start, change)
        if target is not None:
            # Without a weight, start cancels: a straight-through estimator.
            if weight is None or _is_gate(weight, start):
                return ()
            return (Summand((start,), operand), Summand((target,), 1 - operand))
    return (Summand((a,), 0), Summand((b,), 1))


def _is_gate(weight: Any, tensor: Value) -> bool:
    return isinstance(weight, Value) and not _is_gain(weight, tensor)


def _change(start: Value, change: Value) -> tuple[Any, Value | None]:
    """``weight, end`` if a change is ``weight * (end - start)``; weight None is no weight."""
    change = _unwrapped(change)
    candidates: list[tuple[Any, Any]] = [(None, change)]
    if change.operator == "mul":
        x, y = change.argument(0), change.argument(1, "other")
        candidates = [(x, y), (y, x)]
    for weight, difference in candidates:
        if isinstance(difference, Value) and _unwrapped(difference).operator == "sub":
            end = _unwrapped(difference).argument(0)
            if _unwrapped(difference).argument(1, "other") is start and isinstance(end, Value):
                return weight, end
    return None, None


def _is_inside_mixture(difference: Value, start: Value, end: Value) -> bool:
    """Whether ``end - start`` is there only for ``start + weight * (end - start)``."""
    readers = list(difference.users)
    for reader in readers:
        if reader.operator == "mul" or reader.operator in _COPIES:
            readers += reader.users
        elif reader.operator != "add" or start not in reader.operands.values():
            return False
    return bool(readers)


def _unwrapped(value: Value) -> Value:
    while value.operator in _COPIES and (source := carried(value)) is not None:
        value = source
    return value


def _stacked(value: Value, stack: Value) -> tuple[Summand, ...]:
    axis = stack.argument(1, "dim", default=0)
    if value.argument(1, "dim") not in (axis, [axis], (axis,)):
        return ()
    tensors = [stack.operands.get(node) for node in stack.argument(0, "tensors")]
    return tuple(Summand((t,), i) for i, t in enumerate(tensors) if t is not None)


# ---- copies ------------------------------------------------------------------------------------

_NEGATED = words("neg negative")
_COPIES = words(
    "to _to_copy type type_as float half bfloat16 double convert_element_type contiguous clone "
    "alias detach lift_fresh lift_fresh_copy view_as requires_grad masked_fill Identity "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout "
    "native_dropout Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout "
    "wait_tensor redistribute from_local to_local full_tensor fake_wire"
)
_LAYOUTS = words(
    "view view_copy reshape reshape_as _unsafe_view permute transpose t T mT movedim swapaxes "
    "unsqueeze squeeze flatten unflatten Flatten Unflatten expand expand_as roll flip pad "
    "constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle"
)
_PARTS = words("slice select narrow split split_with_sizes chunk unbind tensor_split")
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm")
_NORM_MODULES = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "InstanceNorm")


def is_negation(value: Value) -> bool:
    """It is ``-x``."""
    return value.operator in _NEGATED


def is_part(value: Value) -> bool:
    """It takes some of the positions or channels of a tensor, as slicing does."""
    if value.operator == "getitem":
        source = value.argument(0)
        return isinstance(source, Value) and (
            source.operator in _PARTS or not isinstance(source.meta, (tuple, list))
        )
    return value.operator in _PARTS


def carried(value: Value) -> Value | None:
    """The tensor of which this is a copy: cast, reshaped, cut, dropped out or scaled; else None.

    Scaled means times a number (``-x`` too) or a gain: a learned vector, a mask, anything that is
    not computed from the tensor and spreads over it. A gate that is computed from data is no gain.
    """
    first = value.argument(0, "input", "self")
    if not isinstance(first, Value):
        second = value.argument(1, "other")
        if value.operator in ("add", "mul") and isinstance(second, Value):
            return second
        return None
    operator = value.operator
    if operator == "getitem" or operator in _COPIES | _LAYOUTS | _PARTS | _NEGATED:
        return first
    if operator in ("add", "sub", "mul", "div"):
        return _scaled(value, first, value.argument(1, "other"))
    if operator in ("setitem", "index_put"):  # positions set to a number are masked
        return first if len(value.operands) == 1 else None
    return None


def _scaled(value: Value, a: Value, b: Any) -> Value | None:
    if not isinstance(b, Value):
        return a if a is not b else None
    if value.operator == "mul" and _is_gain(a, b) and not _is_gain(b, a):
        return b
    return a if value.operator in ("mul", "div") and _is_gain(b, a) else None


def _is_gain(factor: Value, tensor: Value) -> bool:
    if factor.is_random:
        return True  # dropout, stochastic depth
    if factor.is_mixed or factor.comes_from(tensor):
        return False
    return factor.meta is None or is_smaller(factor, tensor)


def is_smaller(value: Value, other: Value) -> bool:
    """Whether it spreads over ``other`` when the two are combined, as far as shapes are known."""
    a, b = value.meta, other.meta
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    # A symbolic size is never 1: torch specializes on that.
    pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
    return a.dim() < b.dim() or any(is_one(m) and not is_one(n) for m, n in pairs)


# ---- projections -------------------------------------------------------------------------------


def projected(value: Value) -> Value | None:
    """The main input of a norm, a resampling or a convolution; None for other operators."""
    name = value.operator
    bare = name.removeprefix("_").removeprefix("native_").removeprefix("miopen_")
    is_norm = bare.startswith(_NORMS) or name.startswith(_NORM_MODULES) or "batch_norm" in name
    if is_norm or is_resampling(value) or is_convolution(value):
        first = value.argument(0, "input", "self")
        return first if isinstance(first, Value) else None
    return None


def is_norm(value: Value) -> bool:
    return projected(value) is not None and not is_resampling(value) and not is_convolution(value)


def is_resampling(value: Value) -> bool:
    return is_pooling(value.node) or value.operator.startswith(("upsample", "interpolate"))


def is_convolution(value: Value) -> bool:
    name = value.operator.lower()
    return is_contraction(value.node) and "conv" in name and "transpose" not in name
