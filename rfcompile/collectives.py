"""Quantized collectives as plain tensor functions, and as differentiable operators around them.

The ``*_wire`` functions are what travels: codec operators and functional collectives only. The
``quantize_collectives`` pass traces them into graphs; the operators ``rfcompile::all_reduce`` and so on
run them eagerly and give them a gradient, which is quantized too.

Every rank decodes the same bytes: the owner of a shard sends itself its payload through the
collective and decodes that, never the values it still holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rfcompile import ops
from rfcompile.errors import PolicyError, ShapeError
from rfcompile.formats import QuantFormat, as_format
from rfcompile.process_groups import agree, resolve

c10d = torch.ops._c10d_functional
REDUCTIONS = ("sum", "avg")
SEGMENT_BYTES = 2**18
"""A large all-reduce is cut into up to 8 segments of at least this payload, so that coding overlaps
sending.

Measured with benchmarks/slow_link.py: 4 to 8 segments of a 16 MB tensor are best at 4 bits.
"""


# ---- what travels --------------------------------------------------------------------------


def all_reduce_wire(
    x: Tensor, fmt: str, op: str, world: int, group: str, segments: int = 1, site: str = "all_reduce"
) -> Tensor:
    """Two-shot all-reduce: quantize, all_to_all, requantize the sum, all_gather, dequantize.

    ``x`` any shape; the result has its shape and dtype and is bit-identical on every rank.
    """
    format = QuantFormat.parse(fmt)
    n = x.numel()
    unit = world * segments * format.group_elements(8)
    flat = _padded(x.reshape(-1), (n + unit - 1) // unit * unit - n)
    rows_SWM = flat.reshape(segments, world, -1)
    flags = _nonfinite_flags(x, format, world, group)
    sent = []
    for s in range(segments):
        payload = _checked(ops.quantize(rows_SWM.select(0, s), fmt), flags, site)
        sent.append(_exchange(payload, world, group))
    gathered = []
    for s in range(segments):
        total = ops.requantize(c10d.wait_tensor(sent[s]), fmt, op == "avg")
        gathered.append(c10d.all_gather_into_tensor(total, world, group))
    # float16 is cast outside, so that a sum beyond its range becomes Inf as in an exact all-reduce.
    decoded = x.dtype if x.dtype != torch.float16 else torch.float32
    parts = [ops.dequantize(c10d.wait_tensor(g), fmt, decoded).reshape(-1) for g in gathered]
    result = parts[0] if segments == 1 else torch.cat(parts)
    return result.to(x.dtype).narrow(0, 0, n).reshape(x.shape)


def reduce_scatter_wire(
    x: Tensor, fmt: str, op: str, world: int, group: str, site: str = "reduce_scatter"
) -> Tensor:
    """Reduce along dim 0: quantize, all_to_all, dequantize the sum. ``[W * d, ...]`` to ``[d, ...]``."""
    shape = (x.shape[0] // world, *x.shape[1:])
    m = x.numel() // world
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(ops.quantize(x.reshape(world, m), fmt), flags, site)
    received = c10d.wait_tensor(_exchange(payload, world, group))
    return ops.dequantize_sum(received, fmt, x.dtype, op == "avg").narrow(0, 0, m).reshape(shape)


def all_gather_wire(x: Tensor, fmt: str, world: int, group: str, site: str = "all_gather") -> Tensor:
    """Gather along dim 0: quantize, all_gather, dequantize. ``[d, ...]`` to ``[W * d, ...]``."""
    shape = (world * x.shape[0], *x.shape[1:]) if x.dim() else (world,)
    m = x.numel()
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(ops.quantize(x.reshape(1, m), fmt), flags, site)
    gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(payload, world, group))
    return ops.dequantize(gathered, fmt, x.dtype).narrow(1, 0, m).reshape(shape)


def all_to_all_wire(
    x: Tensor,
    fmt: str,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: str,
    site: str = "all_to_all",
) -> Tensor:
    """Exchange along dim 0, ``input_splits[r]`` rows to rank r: quantize, all_to_all, dequantize."""
    world = len(input_splits)
    format = QuantFormat.parse(fmt)
    inner = x.shape[1:].numel()
    flags = _nonfinite_flags(x, format, world, group)
    if _all_equal((*input_splits, *output_splits)):
        m = input_splits[0] * inner
        payload = _checked(ops.quantize(x.reshape(world, m), fmt), flags, site)
        received = c10d.wait_tensor(_exchange(payload, world, group))
        values = ops.dequantize(received, fmt, x.dtype).narrow(1, 0, m)
        return values.reshape((sum(output_splits), *x.shape[1:]))
    sent = [format.row_bytes(rows * inner) for rows in input_splits]
    got = [format.row_bytes(rows * inner) for rows in output_splits]
    pieces = [
        ops.quantize(part.reshape(1, -1) if part.numel() else part.reshape(1, 0), fmt).reshape(-1)
        for part in x.split(list(input_splits))
    ]
    payload = _checked(torch.cat(pieces), flags, site)
    received = c10d.wait_tensor(c10d.all_to_all_single(payload, got, sent, group))
    parts = []
    for piece, rows in zip(received.split(got), output_splits, strict=True):
        decoded = ops.dequantize(piece.reshape(1, -1) if piece.numel() else piece.reshape(1, 0), fmt, x.dtype)
        parts.append(decoded.narrow(1, 0, rows * inner).reshape((rows, *x.shape[1:])))
    return torch.cat(parts)


def broadcast_wire(
    x: Tensor, fmt: str, src: int, world: int, group: str, site: str = "broadcast"
) -> Tensor:
    """Send rank ``src``'s values (``src`` counts within the group); it decodes its own payload too."""
    m = x.numel()
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(ops.quantize(x.reshape(1, m), fmt), flags, site)
    received = c10d.wait_tensor(c10d.broadcast(payload, src, group))
    return ops.dequantize(received, fmt, x.dtype).narrow(1, 0, m).reshape(x.shape)


def default_segments(x: Tensor, fmt: QuantFormat) -> int:
    """How many pipelined segments an all-reduce of ``x`` uses unless told: a power of two up to 8."""
    size = x.numel()
    if not isinstance(size, int):
        return 1
    segments = 1
    while segments < 8 and fmt.payload_bytes(size) >= 2 * segments * SEGMENT_BYTES:
        segments *= 2
    return segments


def _exchange(payload_WB: Tensor, world: int, group: str) -> Tensor:
    return c10d.all_to_all_single(payload_WB, [1] * world, [1] * world, group)


def _padded(flat: Tensor, padding: int) -> Tensor:
    return flat if statically_known_true(padding == 0) else F.pad(flat, (0, padding))


def _all_equal(splits: Sequence[int]) -> bool:
    return all(statically_known_true(split == splits[0]) for split in splits)


def _nonfinite_flags(x: Tensor, fmt: QuantFormat, world: int, group: str) -> Tensor | None:
    """With nonfinite="raise": one byte a rank, 1 where that rank's ``x`` holds NaN or Inf."""
    if fmt.nonfinite != "raise":
        return None
    return c10d.wait_tensor(c10d.all_gather_into_tensor(ops.nonfinite_flag(x), world, group))


def _checked(payload: Tensor, flags: Tensor | None, site: str) -> Tensor:
    return payload if flags is None else ops.require_finite(payload, flags, site)


# ---- operators with a gradient ---------------------------------------------------------------


def define_operator(
    schema: str, wire: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> Any:
    """An operator that runs ``wire`` eagerly, and that compilers may replace by it."""
    name = schema.split("(")[0]
    ops.LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.LIBRARY.impl(name, wire, "CompositeExplicitAutograd")
    ops.LIBRARY.impl(name, fake, "Meta")
    overload = getattr(torch.ops.rfcompile, name).default
    DECOMPOSITIONS[overload] = wire
    return overload


DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {}
"""What each operator is made of, for compilers that can see through it."""


def _contiguous_like(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


_all_reduce = define_operator(
    "all_reduce(Tensor x, str format, str op, int world, str group, int segments=1) -> Tensor",
    all_reduce_wire,
    _contiguous_like,
)
_reduce_scatter = define_operator(
    "reduce_scatter(Tensor x, str format, str op, int world, str group) -> Tensor",
    reduce_scatter_wire,
    lambda x, format, op, world, group: x.new_empty((x.shape[0] // world, *x.shape[1:])),
)
_all_gather = define_operator(
    "all_gather(Tensor x, str format, int world, str group) -> Tensor",
    all_gather_wire,
    lambda x, format, world, group: x.new_empty((world * x.shape[0], *x.shape[1:])),
)
_all_to_all = define_operator(
    "all_to_all(Tensor x, str format, SymInt[] output_splits, SymInt[] input_splits, str group)"
    " -> Tensor",
    all_to_all_wire,
    lambda x, format, outputs, inputs, group: x.new_empty((sum(outputs), *x.shape[1:])),
)
_broadcast = define_operator(
    "broadcast(Tensor x, str format, int src, int world, str group) -> Tensor",
    broadcast_wire,
    _contiguous_like,
)


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


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
    is_source = resolve(group).rank() == src
    return (total if is_source else torch.zeros_like(total), None, None, None, None)


for _op, _backward in (
    (_all_reduce, _all_reduce_backward),
    (_reduce_scatter, _reduce_scatter_backward),
    (_all_gather, _all_gather_backward),
    (_all_to_all, _all_to_all_backward),
    (_broadcast, _broadcast_backward),
):
    torch.library.register_autograd(
        _op, _backward, setup_context=_save_arguments, lib=ops.LIBRARY
    )


# ---- the public functions ----------------------------------------------------------------------

BEFORE_COMPILING: list[Callable[[], object]] = []
"""Called when Dynamo traces one of the functions below: the package loads its lowerings here."""


@torch.compiler.assume_constant_result
def before_compiling() -> bool:
    """Run the hooks, for real, while Dynamo traces a caller."""
    for hook in BEFORE_COMPILING:
        hook()
    return True


Formatish = QuantFormat | str | int


@torch.compiler.assume_constant_result
def _spec_of(fmt: Formatish) -> str:
    format = as_format(fmt)
    assert format is not None
    return format.spec


def _prepare(x: Tensor, fmt: Formatish, group: Any, name: str) -> tuple[str, Any, int, str]:
    if torch.compiler.is_compiling():
        before_compiling()
    ops.check_codec_input(x, f"the input of {name}")
    spec = _spec_of(fmt)
    process_group = resolve(group)
    agree(process_group.group_name, f"{name} {spec}")
    return spec, process_group, process_group.size(), process_group.group_name


def _check_op(op: str) -> None:
    if op not in REDUCTIONS:
        raise PolicyError("op", op, f"a quantized reduction is one of {', '.join(REDUCTIONS)}.")


def all_reduce(
    x: Tensor, fmt: Formatish, group: Any = None, *, op: str = "sum", segments: int | None = None
) -> Tensor:
    """Sum (or average) ``x`` over the ranks of ``group`` in format ``fmt``.

    Args:
        x: float32, bfloat16 or float16, any shape and stride; the same shape on every rank.
        fmt: a QuantFormat, bits, or a text such as ``"4b:g64"``.
        group: a ProcessGroup, a group's name, or None for the default group.
        op: "sum" or "avg".
        segments: pipelined segments, so that coding overlaps sending; None chooses by size.

    Returns:
        A new tensor like ``x``, bit-identical on every rank. With one rank: a copy, exact.

    Error: each rank's values and then their sum are rounded once each: with ``e`` the format's
    :meth:`~rfcompile.QuantFormat.max_error`, ``a_r`` and ``a`` the largest magnitudes of the group
    on rank r and in the (rounded) sum, at most ``e * (sum a_r + a)``.

    Raises:
        DtypeError, FormatError, ProcessGroupError, RankMismatchError, NonFiniteError.
    """
    _check_op(op)
    spec, _, world, name = _prepare(x, fmt, group, "all_reduce")
    if world == 1 or x.numel() == 0:
        return x.clone()
    if segments is None:
        segments = default_segments(x, QuantFormat.parse(spec))
    out: Tensor = _all_reduce(x, spec, op, world, name, segments)
    return out


def reduce_scatter(x: Tensor, fmt: Formatish, group: Any = None, *, op: str = "sum") -> Tensor:
    """Sum (or average) over ranks, rank r keeping the r-th slice of dim 0: ``[W d, ..] -> [d, ..]``.

    Arguments, error and exceptions as :func:`all_reduce` (one rounding: ``e * sum a_r``), and
    ShapeError when dim 0 does not divide by the world size.
    """
    _check_op(op)
    spec, _, world, name = _prepare(x, fmt, group, "reduce_scatter")
    if x.dim() == 0 or x.shape[0] % world:
        raise ShapeError(
            "the input of reduce_scatter", x.shape, f"dim 0 must divide by the {world} ranks; pad it."
        )
    if world == 1:
        return x.clone()
    if x.numel() == 0:
        return x.narrow(0, 0, x.shape[0] // world).clone()
    out: Tensor = _reduce_scatter(x, spec, op, world, name)
    return out


def all_gather(x: Tensor, fmt: Formatish, group: Any = None) -> Tensor:
    """Concatenate the ranks' tensors along dim 0: ``[d, ..] -> [W d, ..]``, equal on every rank.

    Arguments and exceptions as :func:`all_reduce`; the error is one rounding, ``e * a_r``.
    """
    spec, _, world, name = _prepare(x, fmt, group, "all_gather")
    if x.dim() == 0:
        x = x.reshape(1)
    if world == 1:
        return x.clone()
    if x.numel() == 0:
        return x.new_empty((world * x.shape[0], *x.shape[1:]))
    out: Tensor = _all_gather(x, spec, world, name)
    return out


def all_to_all(
    x: Tensor,
    fmt: Formatish,
    group: Any = None,
    *,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> Tensor:
    """Send ``input_splits[r]`` rows of dim 0 to rank r, and get ``output_splits[r]`` from it.

    Without splits dim 0 is cut evenly. Arguments and exceptions as :func:`all_reduce`, and
    ShapeError when the splits do not fit; the error is one rounding, ``e * a``. What a rank sends
    itself is rounded like the rest.
    """
    spec, _, world, name = _prepare(x, fmt, group, "all_to_all")
    rows = x.shape[0] if x.dim() else 0
    if input_splits is None or output_splits is None:
        if x.dim() == 0 or rows % world:
            raise ShapeError(
                "the input of all_to_all", x.shape,
                f"dim 0 must divide by the {world} ranks; or give input_splits and output_splits.",
            )
        input_splits = input_splits or [rows // world] * world
        output_splits = output_splits or [rows // world] * world
    if len(input_splits) != world or len(output_splits) != world or sum(input_splits) != rows:
        raise ShapeError(
            "the input of all_to_all", x.shape,
            f"input_splits={list(input_splits)} must hold one number for each of the {world} ranks "
            f"and add up to dim 0; output_splits={list(output_splits)} likewise one a rank.",
        )
    if world == 1:
        return x.clone()
    out: Tensor = _all_to_all(x, spec, list(output_splits), list(input_splits), name)
    return out


def broadcast(x: Tensor, fmt: Formatish, src: int = 0, group: Any = None) -> Tensor:
    """Rank ``src``'s values on every rank, rank ``src`` included (``src`` counts in the group).

    Arguments and exceptions as :func:`all_reduce`; the error is one rounding, ``e * a``.
    """
    spec, _, world, name = _prepare(x, fmt, group, "broadcast")
    if world == 1 or x.numel() == 0:
        return x.clone()
    out: Tensor = _broadcast(x, spec, src, world, name)
    return out
