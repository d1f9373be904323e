"""One reading of the many ways to write a sum, a copy, or a scaled copy of a tensor.

Nothing is rewritten: an analysis must leave the graph, and its numbers, as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rfcompile.passes.dataflow import Value, is_contraction, is_pooling, words

# ---- sums --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summand:
    """One term of a sum.

    Args:
        factors: the values it is the product of; one: the term is that value, times a number.
        operand: which argument of the operator it is; in ``stack([..]).sum``, which tensor.
        is_negative: it is subtracted.
        is_contraction: the sum's operator itself contracts the factors, as ``addmm`` does.
    """

    factors: tuple[Value, ...]
    operand: int
    is_negative: bool = False
    is_contraction: bool = False


_PRODUCTS = {  # summand + product of the next two arguments
    **dict.fromkeys(("addcmul", "addcdiv", "addr"), False),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "addmv"), True),
}


def summands(value: Value) -> tuple[Summand, ...]:
    """The terms that an operator adds; () for any other operator.

    ::

        a + b, a.add_(b), add(a, b, alpha=2)    -> a, b
        a - b                                   -> a, -b
        addcmul(a, b, c), addmm(a, b, c), ...   -> a, b c
        lerp(a, b, w), a + w * (b - a)          -> a, b      unless w is computed from data: a gate
        index_add(a, 0, i, b)                   -> a, b
        stack([a, b]).sum(0)                    -> a, b
    """
    first = value.argument(0, "input", "self")
    match value.operator:
        case "add" | "sub" | "rsub":
            return _binary(value, first, value.argument(1, "other"))
        case "addcmul" | "addcdiv" | "addr" | "addmm" | "baddbmm" | "addbmm" | "addmv":
            factors = tuple(f for f in _rest(value) if isinstance(f, Value))
            product = Summand(factors, 1, is_contraction=_PRODUCTS[value.operator])
            return (Summand((first,), 0), product) if isinstance(first, Value) else ()
        case "lerp":
            return _mixture(first, value.argument(1, "end"), value.argument(2, "weight"))
        case "index_add" | "scatter_add":
            added = value.argument(3, "source", "src")
            return _terms(first, added) if isinstance(added, Value) else ()
        case "sum" | "mean":
            return _stacked(value, first)
    return ()


def _binary(value: Value, a: Any, b: Any) -> tuple[Summand, ...]:
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return ()
    if value.operator == "rsub":
        a, b = b, a
    alpha = value.argument(2, "alpha", default=1)
    is_difference = (value.operator != "add") != (isinstance(alpha, (int, float)) and alpha < 0)
    if is_difference:
        return () if _is_inside_mixture(value, a, b) else _terms(a, b, is_negative=True)
    for start, change in ((a, b), (b, a)):
        weight, inner = _weighted(_unwrapped(change))
        if inner.operator == "sub":
            end, same = inner.argument(0), inner.argument(1, "other")
            if same is start and isinstance(end, Value):
                # Without a weight, start cancels: a straight-through estimator.
                return () if weight is None else _mixture(start, end, weight)
    return _terms(a, b)


def _terms(a: Any, b: Any, is_negative: bool = False) -> tuple[Summand, ...]:
    if not (isinstance(a, Value) and isinstance(b, Value)):
        return ()
    return (Summand((a,), 0), Summand((b,), 1, is_negative))


def _mixture(start: Any, end: Any, weight: Any) -> tuple[Summand, ...]:
    """``(1 - weight) start + weight end``; a weight computed from data gates, it does not add."""
    if isinstance(weight, Value) and not _is_gain(weight, start):
        return ()
    return _terms(start, end)


def _is_inside_mixture(difference: Value, end: Value, start: Value) -> bool:
    """Whether ``end - start`` is there only for ``start + weight * (end - start)``."""
    readers = list(difference.users)
    for reader in readers:
        if reader.operator == "mul" or carried(reader) is difference:
            readers += reader.users
        elif reader.operator != "add" or start not in reader.operands.values():
            return False
    return bool(readers)


def _weighted(value: Value) -> tuple[Any, Value]:
    """``weight, v`` of ``weight * v`` where v is a difference; None is no weight."""
    if value.operator == "mul":
        a, b = value.argument(0), value.argument(1, "other")
        for weight, inner in ((a, b), (b, a)):
            if isinstance(inner, Value) and _unwrapped(inner).operator == "sub":
                return weight, _unwrapped(inner)
    return None, value


def _unwrapped(value: Value) -> Value:
    while value.operator in _COPIES and (source := carried(value)) is not None:
        value = source
    return value


def _stacked(value: Value, stack: Any) -> tuple[Summand, ...]:
    if not isinstance(stack, Value) or stack.operator != "stack":
        return ()
    axis = stack.argument(1, "dim", default=0)
    axes = value.argument(1, "dim", default=None)
    if axes not in (axis, [axis], (axis,)):
        return ()
    tensors = [stack.operands.get(node) for node in stack.argument(0, "tensors")]
    return tuple(Summand((t,), i) for i, t in enumerate(tensors) if t is not None)


def _rest(value: Value) -> tuple[Any, Any]:
    return (
        value.argument(1, "tensor1", "mat1", "batch1", "mat", "vec1"),
        value.argument(2, "tensor2", "mat2", "batch2", "vec", "vec2"),
    )


# ---- copies ------------------------------------------------------------------------------------

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

    Scaled means times a number or a gain: a learned vector, a mask, anything that is not computed
    from the tensor and spreads over it. A gate that is computed from data is no gain.
    """
    first = value.argument(0, "input", "self")
    if not isinstance(first, Value):
        second = value.argument(1, "other")
        if value.operator in ("add", "mul") and isinstance(second, Value):
            return second
        return None
    operator = value.operator
    if operator in _COPIES or operator in _LAYOUTS or operator in _PARTS or operator == "getitem":
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
    return a.dim() < b.dim() or any(_is_one(m) and not _is_one(n) for m, n in pairs)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


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
