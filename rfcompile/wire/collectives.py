"""The public collectives (all_reduce, ...): quantized, differentiable, with their operators.

``exchanges.py`` says what each collective sends. This file turns the exchanges into operators
(``rfcompile::all_reduce``, ...) with fake kernels and gradients, and into public functions. The
collective of a gradient is quantized too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

from rfcompile.codec import operators
from rfcompile.codec.compiling import before_compiling
from rfcompile.codec.derivatives import differentiable
from rfcompile.codec.formats import QuantFormat, as_format
from rfcompile.errors import OptionError, ShapeError, TransportError
from rfcompile.wire.exchanges import (
    all_gather_wire,
    all_reduce_wire,
    all_to_all_wire,
    broadcast_wire,
    reduce_scatter_wire,
)
from rfcompile.wire.policy import check_segments
from rfcompile.wire.process_groups import agree, check_source, resolve

REDUCTIONS = ("sum", "avg")

# ---- operators with a gradient ---------------------------------------------------------------


def define_operator(
    schema: str, wire: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> OpOverload[..., Tensor]:
    """An operator that runs ``wire`` eagerly, and that compilers may replace by it."""
    name = schema.split("(")[0]
    operators.LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    operators.LIBRARY.impl(name, _with_errors(name, wire), "CompositeExplicitAutograd")
    operators.LIBRARY.impl(name, fake, "Meta")
    overload: OpOverload[..., Tensor] = getattr(torch.ops.rfcompile, name).default
    DECOMPOSITIONS[overload] = wire
    return overload


def _with_errors(name: str, wire: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The wire for eager use: what its process group raises is a TransportError."""
    parameters = tuple(inspect.signature(wire).parameters)
    if "group" not in parameters:
        return wire
    place = parameters.index("group")

    @functools.wraps(wire)
    def run(*args: Any) -> Tensor:
        try:
            return wire(*args)
        except RuntimeError as error:
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                raise  # of this package, or of torch's tracing
            reason = f"{type(error).__name__}: {error}"
            raise TransportError(name, args[place], reason) from error

    return run


DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {}
"""What each operator is made of, for compilers that can see through it."""


def _contiguous_like(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_all_reduce_op = define_operator(
    "all_reduce(Tensor x, str format, str op, int world, str group, int segments=0) -> Tensor",
    all_reduce_wire,
    _contiguous_like,
)
_reduce_scatter_op = define_operator(
    "reduce_scatter(Tensor x, str format, str op, int world, str group) -> Tensor",
    reduce_scatter_wire,
    lambda x, format, op, world, group: x.new_empty((x.shape[0] // world, *x.shape[1:])),
)
_all_gather_op = define_operator(
    "all_gather(Tensor x, str format, int world, str group) -> Tensor",
    all_gather_wire,
    lambda x, format, world, group: x.new_empty((world * x.shape[0], *x.shape[1:])),
)
_all_to_all_op = define_operator(
    "all_to_all(Tensor x, str format, SymInt[] output_splits, SymInt[] input_splits, str group)"
    " -> Tensor",
    all_to_all_wire,
    lambda x, format, outputs, inputs, group: x.new_empty((sum(outputs), *x.shape[1:])),
)
_broadcast_op = define_operator(
    "broadcast(Tensor x, str format, int src, int world, str group) -> Tensor",
    broadcast_wire,
    _contiguous_like,
)

# Asked at run time: ranks share a cache of compiled graphs, whose key knows no rank.
operators.LIBRARY.define("is_rank(Tensor like, int rank, str group) -> Tensor")
operators.LIBRARY.impl(
    "is_rank",
    lambda like, rank, group: torch.full(
        (), resolve(group).rank() == rank, dtype=torch.bool, device=like.device
    ),
    "CompositeExplicitAutograd",
)
operators.LIBRARY.impl(
    "is_rank", lambda like, rank, group: like.new_empty((), dtype=torch.bool), "Meta"
)
_is_rank: OpOverload[..., Tensor] = torch.ops.rfcompile.is_rank.default
"""Whether this rank is ``rank`` of the group, as a bool on the device of ``like``."""


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Those of the gradient's collective: it has the format's grid for gradients."""
    _, fmt, *rest = inputs
    ctx.arguments = (QuantFormat.parse(fmt).for_kind("gradients").spec, *rest)


def _all_reduce_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (_all_reduce(grad, *ctx.arguments), *[None] * len(ctx.arguments))


def _reduce_scatter_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmt, op, world, group = ctx.arguments
    full = _all_gather(grad, fmt, world, group)
    return (full / world if op == "avg" else full, None, None, None, None)


def _all_gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmt, world, group = ctx.arguments
    return (_reduce_scatter(grad, fmt, "sum", world, group), None, None, None)


def _all_to_all_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmt, outputs, inputs, group = ctx.arguments
    return (_all_to_all(grad, fmt, inputs, outputs, group), None, None, None, None)


def _broadcast_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    fmt, src, world, group = ctx.arguments
    total = _all_reduce(grad, fmt, "sum", world, group)
    kept = torch.where(_is_rank(total, src, group), total, 0)
    return (kept, None, None, None, None)


def _differentiable(
    op: OpOverload[..., Tensor], backward: Callable[..., Any]
) -> Callable[..., Tensor]:
    return differentiable(operators.LIBRARY, op, _save_arguments, backward)


_all_reduce = _differentiable(_all_reduce_op, _all_reduce_backward)
_reduce_scatter = _differentiable(_reduce_scatter_op, _reduce_scatter_backward)
_all_gather = _differentiable(_all_gather_op, _all_gather_backward)
_all_to_all = _differentiable(_all_to_all_op, _all_to_all_backward)
_broadcast = _differentiable(_broadcast_op, _broadcast_backward)


# ---- the public functions ----------------------------------------------------------------------


Formatish = QuantFormat | str | int


def _spec_of(fmt: Formatish) -> str:
    format = as_format(fmt)
    if format is None:
        rule = "give a format; torch.distributed has the exact collective."
        raise OptionError("fmt", fmt, rule)
    return format.spec


def _prepare(
    x: Tensor, fmt: Formatish, group: Any, name: str, how: str = "", *, first_dim: int = 0
) -> tuple[str, Any, int, str]:
    """Check the arguments, and that the other ranks have the same.

    Args:
        how: the other arguments that all ranks share.
        first_dim: from this dimension on all ranks have the same shape. Compiled graphs compare no
            shapes: which of them are dynamic may differ between ranks.
    """
    if torch.compiler.is_compiling():
        before_compiling()
    operators.check_codec_input(x, f"the input of {name}")
    spec = _spec_of(fmt)
    process_group = resolve(group)
    dtype = str(x.dtype).removeprefix("torch.")
    plan = " ".join(word for word in (name, spec, how, dtype) if word)
    if not torch.compiler.is_compiling():
        plan += str(list(x.shape[first_dim:]))
    agree(process_group.group_name, plan)
    return spec, process_group, process_group.size(), process_group.group_name


ReduceOp = str | Any
"""A text, or a ``torch.distributed.ReduceOp``."""


def _op_name(op: ReduceOp) -> str:
    if isinstance(op, str):
        if op in REDUCTIONS:
            return op
    elif dist.is_available():
        if op == dist.ReduceOp.SUM:
            return "sum"
        if op == dist.ReduceOp.AVG:
            return "avg"
    rule = f"a quantized reduction is one of {', '.join(REDUCTIONS)}, or ReduceOp.SUM or AVG."
    raise OptionError("op", op, rule)


def all_reduce(
    x: Tensor,
    fmt: Formatish,
    group: Any = None,
    *,
    op: ReduceOp = "sum",
    segments: int | None = None,
) -> Tensor:
    """Sum (or average) ``x`` over the ranks of ``group`` in format ``fmt``.

    Args:
        x: float32, bfloat16 or float16, any shape and stride; the same shape on every rank.
        fmt: a QuantFormat, bits, or a text such as ``"4b:g64"``. If the format names no grid, ``x``
            travels on the grid of activations, and its gradient on the grid of gradients, which
            keeps zeros. To average gradients with this function, name that grid (``"4b:tread"``).
        group: a ProcessGroup, the name of a group, or None for the default group.
        op: "sum" or "avg", or ``ReduceOp.SUM`` or ``AVG`` of torch.distributed.
        segments: number of pipelined segments, so that one segment is coded while another is sent.
            None: on a CPU chosen by size, on other devices one.

    Returns:
        A new tensor like ``x``, bit-identical on every rank. With one rank: an exact copy.

    Error: the values of each rank are rounded once, and their sum is rounded once. Let ``e`` be the
    format's :meth:`~rfcompile.QuantFormat.max_error`, ``a_r`` the largest magnitude of the group of
    elements on rank r, and ``a`` the largest magnitude of the group in the (rounded) sum. The error
    is at most ``e * (sum a_r + a)``.

    The first call with a new format, dtype, shape or argument makes all ranks compare them. Later
    calls with the same values send no such message. An argument that is wrong on one rank alone is
    an error on that rank, at once. The other ranks, if the process of that rank lives on, fail at
    the timeout.

    Raises:
        DtypeError, FormatError, OptionError, ProcessGroupError, NonFiniteError.
        RankMismatchError: on every rank, if ranks differ in the first call with new values.
        TransportError: a rank died or did not answer within the timeout of the group, or some ranks
            call with known values while others call with new ones.
    """
    op = _op_name(op)
    check_segments(segments)
    how = f"{op} segments={segments}"
    spec, _, world, name = _prepare(x, fmt, group, "all_reduce", how)
    if world == 1 or x.numel() == 0:
        return x.clone()
    return _all_reduce(x, spec, op, world, name, segments or 0)


def reduce_scatter(x: Tensor, fmt: Formatish, group: Any = None, *, op: ReduceOp = "sum") -> Tensor:
    """Sum (or average) over ranks; rank r keeps slice r of dim 0: ``[W d, ..] -> [d, ..]``.

    ``W`` is the number of ranks. Arguments and exceptions are those of :func:`all_reduce`. The
    error is one rounding, ``e * sum a_r``.

    Raises:
        ShapeError: dim 0 does not divide by the number of ranks.
    """
    op = _op_name(op)
    spec, _, world, name = _prepare(x, fmt, group, "reduce_scatter", op)
    if x.dim() == 0 or x.shape[0] % world:
        raise ShapeError(
            "the input of reduce_scatter",
            x.shape,
            f"dim 0 must divide by the {world} ranks; pad it.",
        )
    if world == 1:
        return x.clone()
    if x.numel() == 0:
        return x.narrow(0, 0, x.shape[0] // world).clone()
    return _reduce_scatter(x, spec, op, world, name)


def all_gather(x: Tensor, fmt: Formatish, group: Any = None) -> Tensor:
    """Concatenate the ranks' tensors along dim 0: ``[d, ..] -> [W d, ..]``, equal on every rank.

    ``W`` is the number of ranks. Arguments and exceptions are those of :func:`all_reduce`. The
    error is one rounding, ``e * a_r``.
    """
    spec, _, world, name = _prepare(x, fmt, group, "all_gather")
    if x.dim() == 0:
        x = x.reshape(1)
    if world == 1:
        return x.clone()
    if x.numel() == 0:
        return x.new_empty((world * x.shape[0], *x.shape[1:]))
    return _all_gather(x, spec, world, name)


def all_to_all(
    x: Tensor,
    fmt: Formatish,
    group: Any = None,
    *,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> Tensor:
    """Send ``input_splits[r]`` rows of dim 0 to rank r, and get ``output_splits[r]`` rows back.

    Without splits dim 0 is cut evenly, on all ranks. If one rank gives splits, every rank must give
    splits. Then the ranks do not compare dim 0: as in torch, the caller must make ``output_splits``
    equal to what the other ranks send. The part that a rank sends to itself is rounded like the
    rest.

    Arguments and exceptions are those of :func:`all_reduce`. The error is one rounding, ``e * a``.

    Raises:
        ShapeError: the splits do not fit.
    """
    is_even = input_splits is None and output_splits is None
    how, first_dim = ("evenly", 0) if is_even else ("in splits", 1)
    spec, _, world, name = _prepare(x, fmt, group, "all_to_all", how, first_dim=first_dim)
    rows = x.shape[0] if x.dim() else 0
    if input_splits is None or output_splits is None:
        if x.dim() == 0 or rows % world:
            raise ShapeError(
                "the input of all_to_all",
                x.shape,
                f"dim 0 must divide by the {world} ranks; or give input_splits and output_splits.",
            )
        input_splits = input_splits or [rows // world] * world
        output_splits = output_splits or [rows // world] * world
    if len(input_splits) != world or len(output_splits) != world or sum(input_splits) != rows:
        raise ShapeError(
            "the input of all_to_all",
            x.shape,
            f"input_splits={list(input_splits)} must hold one number for each of the {world} ranks "
            f"and add up to dim 0; output_splits={list(output_splits)} likewise one a rank.",
        )
    if world == 1:
        return x.clone()
    return _all_to_all(x, spec, list(output_splits), list(input_splits), name)


def broadcast(x: Tensor, fmt: Formatish, group: Any = None, *, src: int = 0) -> Tensor:
    """Give every rank the values of rank ``src``; rank ``src`` itself gets the rounded values, too.

    ``src`` is a rank of the group. Arguments and exceptions are those of :func:`all_reduce`. The
    error is one rounding, ``e * a``.

    Raises:
        OptionError: ``src`` is no rank of the group.
    """
    world = resolve(group).size()
    check_source(src, world)
    spec, _, world, name = _prepare(x, fmt, group, "broadcast", f"src={src}")
    if world == 1 or x.numel() == 0:
        return x.clone()
    return _broadcast(x, spec, src, world, name)
