"""The formulas quantize, dequantize, dequantize_sum and requantize, as pure tensor code.

Eager kernels, Inductor's lowering, collectives and tests all call these functions, and their bytes
are the same everywhere: scales are rounded by integer arithmetic (a cast could be optimized away),
reciprocals are snapped to 15 bits (devices divide differently), and no product feeds a sum unless
it is exact (a fused multiply-add would round differently).

Shapes: C chunks (payload rows), M elements a row, G groups a row, E elements a group (``G * E >=
M``, the rest is padding), K parts a group, R = E / K elements a part, B bytes a row.

Payload row: for each plane of the codes ``[G, E * width / 8]`` bytes, then the low bytes of the
scales ``[G]``, then their high bytes ``[G]``. In a plane of ``width`` bits, byte ``b`` of a group
holds the code bits of elements ``b, b + E * width / 8, b + 2 E * width / 8, ...``, low bits first.

Only ``select``, ``narrow`` and ``unsqueeze`` are used to index: Python indexing does not trace on
a device that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rfcompile.codec.bitmath import floor_to_int, noise, scale_bits
from rfcompile.codec.formats import SCALE_BYTES, QuantFormat
from rfcompile.codec.rotation import axes_of, rotate_parts, unrotate_parts
from rfcompile.errors import PayloadError

VECTOR = 16
"""float32 lanes of the widest CPU vectors."""

Pack = Callable[[Sequence[Tensor], Sequence[int]], Tensor]
"""``pack(pieces, counts)``: see :func:`pack_reference`."""


def pack_reference(pieces: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """Lay pieces side by side: ``counts[f]`` pieces ``[C, G, R]`` are field f ``[C, G, count, R]``.

    Returns ``[C, sum of field sizes]``. Inductor's lowering writes each piece in place instead.
    """
    fields, start = [], 0
    for count in counts:
        group = list(pieces[start : start + count])
        start += count
        field = group[0] if count == 1 else torch.stack(group, 2)
        fields.append(field.reshape(field.shape[0], -1))
    return fields[0] if len(fields) == 1 else torch.cat(fields, 1)


# ---- quantize ------------------------------------------------------------------------------


def quantize(x_CM: Tensor, fmt: QuantFormat, seed: int = 0, pack: Pack = pack_reference) -> Tensor:
    """Code each row of ``x_CM`` by ``fmt``.

    Formula: see :class:`~rfcompile.QuantFormat`. Args: float32, bfloat16 or float16 ``[C, M]``, any
    stride; ``seed`` is added to the format's (stochastic rounding only). Returns uint8 ``[C, B]``.
    """
    x_CGE = _groups(x_CM, fmt)
    if fmt.rotate is not None:
        x_CGE = _turn_inner_axes(x_CGE, fmt, pack, inverse=False)
    return _quantize_groups(x_CGE, fmt, seed, x_CM.dtype, pack, rotate=True)


def steps(x_CM: Tensor, fmt: QuantFormat) -> Tensor:
    """The grid step that :func:`quantize` takes for each element, float32 ``[C, M]``.

    Without rotation only: there a step belongs to rotated values.
    """
    x_CGE = _groups(x_CM, fmt)
    scale_CG1 = scale_bits(_peak([x_CGE.float()]), fmt, x_CM.dtype)[0].view(torch.float32)
    return scale_CG1.expand(x_CGE.shape).flatten(1).narrow(1, 0, x_CM.shape[1])


def _groups(x_CM: Tensor, fmt: QuantFormat) -> Tensor:
    """The rows as groups ``[C, G, E]``, padded with zeros, and finite where ``fmt`` says so."""
    C, M = x_CM.shape
    E = fmt.group_elements(M)
    G = (M + E - 1) // E if fmt.group_size is not None else 1
    padding = G * E - M
    if not statically_known_true(padding == 0):
        x_CM = F.pad(x_CM, (0, padding))
    x_CGE = x_CM.reshape(C, G, E)
    return _clamp_to_finite(x_CGE) if fmt.nonfinite == "saturate" else x_CGE


def _quantize_groups(
    x_CGE: Tensor, fmt: QuantFormat, seed: int, dtype: torch.dtype, pack: Pack, *, rotate: bool
) -> Tensor:
    C, G, E = x_CGE.shape
    if statically_known_true(E == 0):  # one scale a tensor, and the tensor is empty
        return x_CGE.new_zeros((C, G * SCALE_BYTES), dtype=torch.uint8)
    # Pieces of a byte and the maximum are taken over the same range R, so one loop does both.
    K = fmt.num_parts if rotate else 8 // fmt.planes[-1]
    if rotate and x_CGE.device.type == "cpu":  # runs of one vector: the loop over R is one step
        K = max([K, *(k for k in (2, 4, 8) if E % (k * VECTOR) == 0)])
    x_CGKR = x_CGE.reshape(C, G, K, E // K)
    parts = [x_CGKR.select(2, k).float() for k in range(K)]
    if rotate and fmt.rotate is not None:
        parts = rotate_parts(parts, axes_of(fmt.rotate)[0], fmt.seed)
    scale_CG1, inverse_CG1, is_finite_CG1 = scale_bits(_peak(parts), fmt, dtype)
    levels = [
        _level(part, inverse_CG1, is_finite_CG1, fmt, seed, k * (E // K), E)
        for k, part in enumerate(parts)
    ]
    # A code is a level plus half the number of codes: that only changes the highest bit, so it is
    # added in the last plane, and there once a byte.
    pieces, counts, low = [], [], 0
    for width in fmt.planes:
        plane = [level >> low for level in levels] if low else levels
        if low + width < fmt.bits:
            pieces += _bytes_of([level & (2**width - 1) for level in plane], width, 0)
        else:
            pieces += _bytes_of(plane, width, 2 ** (width - 1))
        counts.append(K * width // 8)
        low += width
    scales = _bytes_of_scales(scale_CG1)
    return pack(pieces + scales, counts + [1] * len(scales))


def _bytes_of_scales(scale_CG1: Tensor) -> list[Tensor]:
    """The low bytes, then the high ones; each of the pieces becomes a field of its own."""
    if scale_CG1.device.type != "cpu":  # [C, G, 1], the shape of the maximum: one launch for both
        return [((scale_CG1 >> shift) & 255).to(torch.uint8) for shift in (16, 24)]
    # One piece [C, 2, G], vectors of groups.
    shifts = torch.arange(16, 32, 8, dtype=torch.int32, device=scale_CG1.device).view(2, 1)
    return [((scale_CG1.select(2, 0).unsqueeze(1) >> shifts) & 255).to(torch.uint8)]


def _peak(parts: list[Tensor]) -> Tensor:
    """Largest magnitude of a group, ``[C, G, 1]``; NaN if it holds one.

    Compared as integers: the order of magnitudes is that of their bits, with NaN on top.
    """
    peak = parts[0].view(torch.int32) & 0x7FFFFFFF
    for part in parts[1:]:
        peak = torch.maximum(peak, part.view(torch.int32) & 0x7FFFFFFF)
    return peak.view(torch.float32).amax(-1, keepdim=True)


def _level(
    x: Tensor,
    inverse: Tensor,
    is_finite: Tensor,
    fmt: QuantFormat,
    seed: int,
    first: int,
    group: int,
) -> Tensor:
    """Signed codes as int32; one and the same, the lowest, throughout a non-finite group."""
    t = x * inverse
    half = 2 ** (fmt.bits - 1)
    low = -half if fmt.is_mid_rise else 1 - half
    if fmt.rounding == "stochastic":
        # All in integers: x * inverse + noise would be fused on some devices and not on others.
        sixteenths = floor_to_int(t * 65536.0) - (32768 if fmt.is_mid_rise else 0)
        level = (sixteenths + noise(x, fmt.seed + seed, first, group)) >> 16
    else:
        level = floor_to_int(t) if fmt.is_mid_rise else torch.round(t).to(torch.int32)
    # What integer a NaN becomes differs between devices: in its group only the lowest code is left.
    top = is_finite * (half - 1 - low) + low
    return torch.minimum(torch.clamp(level, low), top)


def _bytes_of(values: list[Tensor], width: int, offset: int) -> list[Tensor]:
    """Join the ``width``-bit codes ``values + offset`` of a group's parts into bytes, low first."""
    per_byte = 8 // width
    stride = len(values) // per_byte
    offsets = sum(offset << (width * i) for i in range(per_byte))
    result = []
    for k in range(stride):
        total = values[k]
        for i in range(1, per_byte):
            total = total + (values[i * stride + k] << (width * i))
        result.append((total + offsets if offset else total).to(torch.uint8))
    return result


def _clamp_to_finite(x_CGE: Tensor) -> Tensor:
    if statically_known_true(x_CGE.shape[-1] == 0):  # one scale a tensor, and the tensor is empty
        return x_CGE
    magnitude = x_CGE.abs()
    peak = torch.where(magnitude == float("inf"), 0.0, magnitude).amax(-1, keepdim=True)
    # A group of zeros and Inf has no end of the grid: it stays as it is and decodes to NaN.
    return torch.where(peak == 0, x_CGE, torch.maximum(torch.minimum(x_CGE, peak), -peak))


# ---- dequantize ----------------------------------------------------------------------------


def dequantize(
    payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype, pack: Pack = pack_reference
) -> Tensor:
    """Decode every row: ``x = (u - zero_offset) * s``.

    Returns ``dtype`` ``[C, G * E]``, padding included.
    """
    values = _rotated_back(_levels(payload_CB, fmt), fmt, pack)
    if fmt.rotate is not None and dtype == torch.float16:
        # The errors of a whole block may meet in one element and carry it past 65504.
        values = torch.clamp(values, -torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype).flatten(1)


def dequantize_sum(
    payload_CB: Tensor,
    fmt: QuantFormat,
    dtype: torch.dtype,
    average: bool = False,
    pack: Pack = pack_reference,
) -> Tensor:
    """Decode the rows and add them up in float32, row 0 first; ``average`` divides by their number.

    Returns ``dtype`` ``[G * E]``, padding included. With rotation the sum is rotated back once.
    """
    total = _rotated_back(_sum_of_levels(payload_CB, fmt), fmt, pack)
    return _averaged(total, payload_CB, average).to(dtype).flatten()


def requantize(
    payload_CB: Tensor,
    fmt: QuantFormat,
    average: bool = False,
    seed: int = 0,
    pack: Pack = pack_reference,
) -> Tensor:
    """Code the sum (or mean) of the rows again, still in the rotated domain: uint8 ``[1, B]``."""
    total = _averaged(_sum_of_levels(payload_CB, fmt), payload_CB, average)
    return _quantize_groups(total.flatten(2), fmt, seed + 1, torch.float32, pack, rotate=False)


def _levels(payload_CB: Tensor, fmt: QuantFormat) -> Tensor:
    """The grid values a payload stands for, float32 ``[C, G, ...]``, in the rotated domain.

    The dimensions after the second are places in a group. Whoever reads them flattens them once, at
    the end: a loop over E would read the codes byte by byte.
    """
    C, B = payload_CB.shape
    G, E = groups_of(B, fmt)
    # uint8 to int32 on two vectors is scalar code in the CPU backend; elsewhere int32 is natural.
    integer = torch.uint8 if payload_CB.device.type == "cpu" else torch.int32
    per_byte = 8 // fmt.planes[-1]  # of the narrowest plane
    whole = (C, G, per_byte, E // per_byte)
    code, offset, weight = None, 0, 1.0
    for width in fmt.planes:
        P = 8 // width
        size = E * width // 8
        plane = payload_CB.narrow(1, offset, G * size).view(C, G, 1, per_byte // P, E // per_byte)
        plane = plane.to(integer)
        if P > 1:
            shifts = torch.arange(0, 8, width, dtype=integer, device=payload_CB.device)
            plane = (plane >> shifts.view(P, 1, 1)) & (2**width - 1)
        value = plane.to(torch.float32)
        # The wide plane is [P1, K1, R], a narrow one [P2, K2, R]: both are [per_byte, R].
        code = value if code is None else code.reshape(whole) + value.reshape(whole) * weight
        offset = offset + G * size
        weight = weight * 2**width
    assert code is not None
    low = payload_CB.narrow(1, offset, G).to(torch.int32)
    high = payload_CB.narrow(1, offset + G, G).to(torch.int32)
    scale = ((low << 16) | (high << 24)).view(torch.float32)
    scale = scale.view(C, G, *([1] * (code.dim() - 2)))
    return (code - fmt.zero_offset) * scale


def _sum_of_levels(payload_CB: Tensor, fmt: QuantFormat) -> Tensor:
    """The sum of the rows of :func:`_levels`, float32 ``[1, G, ...]``."""
    levels = _levels(payload_CB, fmt)
    total = levels.select(0, 0)
    for c in range(1, payload_CB.shape[0]):
        total = total + levels.select(0, c)
    return total.unsqueeze(0)


def _averaged(total: Tensor, payload_CB: Tensor, average: bool) -> Tensor:
    # Only after rotating back: this product is not exact, so no sum may follow it.
    return total * (1.0 / payload_CB.shape[0]) if average else total


def _rotated_back(values: Tensor, fmt: QuantFormat, pack: Pack) -> Tensor:
    """The values of :func:`_levels` in the domain of the tensor, ``[C, G, ...]``."""
    if fmt.rotate is None:
        return values
    values_CGE = values.flatten(2)
    C, G, E = values_CGE.shape
    K = fmt.num_parts
    values_CGKR = values_CGE.reshape(C, G, K, E // K)
    parts = [values_CGKR.select(2, k) for k in range(K)]
    parts = unrotate_parts(parts, axes_of(fmt.rotate)[0], fmt.seed)
    return _turn_inner_axes(pack(parts, [K]).reshape(C, G, E), fmt, pack, inverse=True)


def _turn_inner_axes(x_CGE: Tensor, fmt: QuantFormat, pack: Pack, *, inverse: bool) -> Tensor:
    """Rotate along every axis of a block but the first, which the codec's parts run along."""
    assert fmt.rotate is not None
    C, G, E = x_CGE.shape
    turn = unrotate_parts if inverse else rotate_parts
    first, *inner = axes_of(fmt.rotate)
    after = fmt.rotate // first  # elements of a group that follow one step of the axis
    for n in inner:
        after //= n
        x = x_CGE.reshape(C, G * (E // (n * after)), n, after)
        parts = turn([x.select(2, i).float() for i in range(n)], n, fmt.seed)
        x_CGE = pack(parts, [n]).reshape(C, G, E)
    return x_CGE


def groups_of(row_bytes: int, fmt: QuantFormat) -> tuple[int, int]:
    """Groups in a payload row of ``row_bytes`` bytes, and elements in a group."""
    if fmt.group_size is None:
        return 1, (row_bytes - SCALE_BYTES) * 8 // fmt.bits
    return row_bytes // (fmt.group_size * fmt.bits // 8 + SCALE_BYTES), fmt.group_size


def in_one_piece(payload_CB: Tensor, fmt: QuantFormat) -> tuple[Tensor, int, int, int]:
    """A payload for a kernel: contiguous, its rows, its groups and the elements of a group."""
    C, B = payload_CB.shape
    return payload_CB.contiguous(), C, *groups_of(B, fmt)


def check_payload(payload: Tensor, fmt: QuantFormat, row_numel: int, rows: int) -> None:
    """Raise PayloadError unless ``payload`` is uint8 ``[rows, row_bytes]`` in some shape."""
    expected = rows * fmt.row_bytes(row_numel)
    if payload.dtype != torch.uint8 or payload.numel() != expected:
        raise PayloadError(
            f"{payload.numel()} elements of {payload.dtype}",
            f"{expected} bytes for {rows} x {row_numel} elements",
            fmt.spec,
            "pass the tensor that quantize returned, with the shape that was quantized.",
        )
