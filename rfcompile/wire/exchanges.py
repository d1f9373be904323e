"""Each quantized collective as a sequence of codec operators and functional collectives.

The ``quantize_collectives`` pass traces these functions into graphs. ``collectives.py`` runs them
eagerly and gives them a gradient.

Every rank decodes the same bytes: the rank that owns a shard also sends its payload to itself
through the collective, and decodes this payload. The owner never uses its exact values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rfcompile.codec import operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.gathers import start_gather

c10d = torch.ops._c10d_functional
_wait: Callable[..., Tensor] = c10d.wait_tensor
_all_to_all: Callable[..., Tensor] = c10d.all_to_all_single

SEGMENT_BYTES = 2**18
SEGMENTS = (8, 4, 2)
"""On a CPU a large all-reduce is cut into the first of these numbers of segments that gives each
at least ``SEGMENT_BYTES`` of payload, so that coding overlaps sending.

Measured with benchmarks/slow_link.py: 4 to 8 segments of a 16 MB tensor are best at 4 bits.
"""


def all_reduce_wire(
    x: Tensor,
    fmt: str,
    op: str,
    world: int,
    group: str,
    segments: int = 0,
    site: str = "all_reduce",
    seed: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    """Two-shot all-reduce: quantize, all_to_all, requantize the sum, all_gather, dequantize.

    ``x`` any shape; the result has its shape and dtype and is bit-identical on every rank.
    ``segments=0`` takes :func:`default_segments`. ``seed`` is for the stochastic rounding of this
    rank.

    ``residual``, float32 like ``x``, receives what quantization takes from this rank's own ``x``:
    ``x - C(x)`` with ``C`` the round trip of the codec.
    """
    format = QuantFormat.parse(fmt)
    segments = segments or default_segments(x.numel(), format, x.device)
    n = x.numel()
    unit = world * segments * format.group_elements(8)
    padding = (n + unit - 1) // unit * unit - n
    fits = statically_known_true(padding == 0)
    padded = x if fits else F.pad(x.reshape(-1), (0, padding))
    rows = padded.reshape(segments * world, -1)
    flags = _nonfinite_flags(x, format, world, group)
    sent, payloads = [], []
    for segment in [rows] if segments == 1 else rows.split(world):
        payloads.append(_checked(operators.quantize(segment, fmt, seed), flags, site))
        sent.append(_exchange(payloads[-1], world, group))
    if residual is not None:  # while the payloads travel
        own = torch.cat([operators.dequantize(payload, fmt, torch.float32) for payload in payloads])
        residual.copy_((rows - own).view(-1).narrow(0, 0, n).view_as(x))
    gathered = []
    for received in sent:
        total = operators.requantize(_wait(received), fmt, op == "avg", seed)
        gathered.append(start_gather(total, world, group))
    # float16 is cast outside, so that a sum beyond its range becomes Inf as in an exact all-reduce.
    decoded = x.dtype if x.dtype != torch.float16 else torch.float32
    parts = [operators.dequantize(_wait(payload), fmt, decoded) for payload in gathered]
    result = (parts[0] if segments == 1 else torch.cat(parts)).to(x.dtype)
    return (result if fits else result.reshape(-1).narrow(0, 0, n)).reshape(x.shape)


def reduce_scatter_wire(
    x: Tensor,
    fmt: str,
    op: str,
    world: int,
    group: str,
    site: str = "reduce_scatter",
    seed: int = 0,
) -> Tensor:
    """Reduce along dim 0, ``[W d, ..]`` to ``[d, ..]``: quantize, all_to_all, dequantize_sum.

    ``seed`` is for the stochastic rounding of this rank.
    """
    shape = (x.shape[0] // world, *x.shape[1:])
    m = x.numel() // world
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(operators.quantize(x.reshape(world, m), fmt, seed), flags, site)
    received = _wait(_exchange(payload, world, group))
    total = operators.dequantize_sum(received, fmt, x.dtype, op == "avg")
    return _first(total, 0, m).reshape(shape)


def all_gather_wire(
    x: Tensor, fmt: str, world: int, group: str, site: str = "all_gather"
) -> Tensor:
    """Gather along dim 0: quantize, all_gather, dequantize. ``[d, ...]`` to ``[W * d, ...]``."""
    shape = (world * x.shape[0], *x.shape[1:]) if x.dim() else (world,)
    rows = finish_all_gather(start_all_gather(x, fmt, world, group, site), fmt, x.dtype, x.numel())
    # A view where rows have one element; results are contiguous, as the fake kernels promise.
    return rows.reshape(shape).contiguous()


def start_all_gather(x: Tensor, fmt: str, world: int, group: str, site: str) -> Tensor:
    """Quantize and send; :func:`finish_all_gather` waits for the payloads and decodes them."""
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(operators.quantize(x.reshape(1, x.numel()), fmt), flags, site)
    return start_gather(payload, world, group)


def finish_all_gather(sent: Tensor, fmt: str, dtype: torch.dtype, size: int) -> Tensor:
    """What :func:`start_all_gather` sent of ``size`` elements, decoded: ``[W, size]``."""
    return _first(operators.dequantize(_wait(sent), fmt, dtype), 1, size)


def all_to_all_wire(
    x: Tensor,
    fmt: str,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: str,
    site: str = "all_to_all",
) -> Tensor:
    """Send ``input_splits[r]`` rows of dim 0 to rank r: quantize, all_to_all, dequantize."""
    world = len(input_splits)
    format = QuantFormat.parse(fmt)
    inner = x.shape[1:].numel()
    flags = _nonfinite_flags(x, format, world, group)
    if _all_equal((*input_splits, *output_splits)):
        m = input_splits[0] * inner
        payload = _checked(operators.quantize(x.reshape(world, m), fmt), flags, site)
        received = _wait(_exchange(payload, world, group))
        values = _first(operators.dequantize(received, fmt, x.dtype), 1, m)
        return values.reshape((sum(output_splits), *x.shape[1:])).contiguous()
    sent = [format.row_bytes(rows * inner) for rows in input_splits]
    got = [format.row_bytes(rows * inner) for rows in output_splits]
    pieces = [
        operators.quantize(part.reshape(1, rows * inner), fmt).reshape(-1)
        for part, rows in zip(x.split(list(input_splits)), input_splits, strict=True)
    ]
    payload = _checked(torch.cat(pieces), flags, site)
    received = _wait(_all_to_all(payload, got, sent, group))
    parts = []
    for piece, size, rows in zip(received.split(got), got, output_splits, strict=True):
        decoded = operators.dequantize(piece.reshape(1, size), fmt, x.dtype)
        parts.append(_first(decoded, 1, rows * inner).reshape((rows, *x.shape[1:])))
    return torch.cat(parts)


def broadcast_wire(
    x: Tensor, fmt: str, src: int, world: int, group: str, site: str = "broadcast"
) -> Tensor:
    """Send rank ``src``'s values (``src`` counts in the group); it decodes its own payload too."""
    m = x.numel()
    flags = _nonfinite_flags(x, QuantFormat.parse(fmt), world, group)
    payload = _checked(operators.quantize(x.reshape(1, m), fmt), flags, site)
    received = _wait(c10d.broadcast(payload, src, group))
    return _first(operators.dequantize(received, fmt, x.dtype), 1, m).reshape(x.shape)


def all_reduce_sent_bytes(size: int, fmt: QuantFormat, world: int, segments: int) -> int:
    """Bytes one rank sends in :func:`all_reduce_wire` of ``size`` elements."""
    unit = world * segments * fmt.group_elements(8)
    payload = fmt.payload_bytes(-(-size // unit) * unit, world * segments)
    exchange = sent_bytes("all_to_all", payload, world)
    gather = sent_bytes("all_gather", payload // world, world)
    return exchange + gather + flag_sent_bytes(fmt, world)


def reduce_scatter_sent_bytes(size: int, fmt: QuantFormat, world: int) -> int:
    """Bytes one rank sends in :func:`reduce_scatter_wire` of ``size`` elements."""
    payload = fmt.payload_bytes(size, world)
    return sent_bytes("all_to_all", payload, world) + flag_sent_bytes(fmt, world)


def all_gather_sent_bytes(size: int, fmt: QuantFormat, world: int) -> int:
    """Bytes one rank sends in :func:`all_gather_wire` of ``size`` elements a rank."""
    payload = fmt.payload_bytes(size)
    return sent_bytes("all_gather", payload, world) + flag_sent_bytes(fmt, world)


def flag_sent_bytes(fmt: QuantFormat, world: int) -> int:
    """Bytes one rank sends to say that its values are finite, with nonfinite="raise"."""
    return sent_bytes("all_gather", 1, world) if fmt.nonfinite == "raise" else 0


def default_segments(size: int | torch.SymInt, fmt: QuantFormat, device: torch.device) -> int:
    """How many pipelined segments an all-reduce of ``size`` elements uses unless told: 1, 2, 4, 8.

    One off the CPU: there each segment adds launches and two collective calls, and coding takes
    little of the time. Several only where that cannot change a value, so that dynamic sizes, which
    have one, give the same.
    """
    by_place = fmt.group_size is None or fmt.rounding == "stochastic"
    if device.type != "cpu" or by_place or not isinstance(size, int):
        return 1
    return segments_of(fmt.payload_bytes(size))


def segments_of(payload_bytes: int) -> int:
    """Of an all-reduce on a CPU whose whole tensor has so large a payload: 1, 2, 4 or 8."""
    for segments in SEGMENTS:
        if payload_bytes >= segments * SEGMENT_BYTES:
            return segments
    return 1


def _exchange(payload_WB: Tensor, world: int, group: str) -> Tensor:
    return _all_to_all(payload_WB, [1] * world, [1] * world, group)


def _first(x: Tensor, dim: int, n: int) -> Tensor:
    """The first ``n`` along ``dim``: what follows is padding, where there is any."""
    return x if statically_known_true(x.shape[dim] == n) else x.narrow(dim, 0, n)


def _all_equal(splits: Sequence[int]) -> bool:
    return all(statically_known_true(split == splits[0]) for split in splits)


def _nonfinite_flags(x: Tensor, fmt: QuantFormat, world: int, group: str) -> Tensor | None:
    """With nonfinite="raise": one byte a rank, 1 where that rank's ``x`` holds NaN or Inf."""
    if fmt.nonfinite != "raise":
        return None
    return _wait(start_gather(operators.nonfinite_flag(x), world, group))


def _checked(payload: Tensor, flags: Tensor | None, site: str) -> Tensor:
    return payload if flags is None else operators.require_finite(payload, flags, site)
