"""The formulas of ``arithmetic.py`` as Triton kernels: one launch for each operator.

A program codes ``BLOCK`` groups of one payload row. Its groups are a tuple of ``K`` tiles
``[BLOCK, R]``: tile k holds elements ``k R .. (k + 1) R`` of each group. So codes that share a
byte, and elements that the first axis of a rotation joins, meet in one thread.

Nothing is computed in another order than in ``arithmetic.py``: a butterfly adds the same pairs, and
rows are added from the first to the last. So the bytes are the same, for the reasons given there.

Arguments in capitals are constants of a kernel; ``F`` is a :class:`Layout`. Sizes and seeds are
arguments: one kernel serves them all.
"""

# Triton compiles these functions: it knows no annotation but tl.constexpr and no starred tuple.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import NamedTuple

import triton
from triton import language as tl

from rfcompile.codec import bitmath

_EXPONENT = tl.constexpr(bitmath.EXPONENT_BITS)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_NAN_SCALE = tl.constexpr(bitmath.NAN_SCALE)
_MIN_SCALE = tl.constexpr(bitmath.MIN_SCALE)
_ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2**23. Added to a value below 2**22 it leaves the nearest integer in the low bits, ties to
even, and costs a sixth of what a conversion does."""
_ROUNDER_BITS = tl.constexpr(0x4B400000)
_COUNTER = tl.constexpr(8388608.0)
"""2**23: an integer below it, put in its low bits, is added to it."""
_COUNTER_BITS = tl.constexpr(0x4B000000)


class Layout(NamedTuple):
    """What the kernels must know of a format, as constants."""

    bits: int
    planes: tuple[int, ...]
    group: int
    """Elements a group: E."""
    is_mid_rise: bool
    is_stochastic: bool
    saturates: bool
    clip_over_half_range: float
    zero_offset: float
    axes: tuple[tuple[int, int, int], ...]
    """Of the rotation: size, steps in a tile from one element to the next (0: tiles are), and signs
    as bits, 1 for a negative one. Without a rotation empty."""


# ---- the four operators --------------------------------------------------------------------------


@triton.jit
def quantize(
    x_ptr, payload_ptr, M, row_stride, G, codes_size, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of ``M`` elements, ``row_stride`` apart, to payload rows of ``G`` groups."""
    row, first = _place(G, BLOCK)
    parts = _load_values(x_ptr + row * row_stride, M, first, F, K, BLOCK)
    if F.saturates:
        parts = _clamp_to_finite(parts, K)
    for a in tl.static_range(1, len(F.axes)):
        parts = _turn_inner(parts, F, a, False, K, BLOCK)
    if len(F.axes) > 0:
        parts = _turn_tiles(parts, F, False, K)
    _store_codes(parts, payload_ptr, row, first, G, codes_size, seed, F, LARGEST_SCALE, K, BLOCK)


@triton.jit
def dequantize(
    payload_ptr, out_ptr, G, codes_size,
    F: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Payload rows to rows of ``G * E`` elements; ``LARGEST``: see :func:`_store_values`."""
    row, first = _place(G, BLOCK)
    row_ptr = payload_ptr + row * (codes_size + 2 * G)
    parts = _load_levels(row_ptr, first, G, codes_size, F, K, BLOCK)
    parts = _turn_back(parts, F, K, BLOCK)
    _store_values(parts, out_ptr, row, first, G, F, LARGEST, K, BLOCK)


@triton.jit
def dequantize_sum(
    payload_ptr, out_ptr, G, codes_size, rows, share,
    F: tl.constexpr, AVERAGES: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of ``rows`` payload rows, times ``share`` if ``AVERAGES``."""
    row, first = _place(G, BLOCK)
    parts = _sum_levels(payload_ptr, first, G, codes_size, rows, F, K, BLOCK)
    parts = _turn_back(parts, F, K, BLOCK)
    if AVERAGES:
        parts = _scaled(parts, share, K)
    _store_values(parts, out_ptr, row, first, G, F, None, K, BLOCK)


@triton.jit
def requantize(
    payload_ptr, total_ptr, G, codes_size, rows, share, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, AVERAGES: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of ``rows`` payload rows coded again, in the rotated domain."""
    row, first = _place(G, BLOCK)
    parts = _sum_levels(payload_ptr, first, G, codes_size, rows, F, K, BLOCK)
    if AVERAGES:
        parts = _scaled(parts, share, K)
    _store_codes(parts, total_ptr, row, first, G, codes_size, seed, F, LARGEST_SCALE, K, BLOCK)


# ---- where a program works -----------------------------------------------------------------------


@triton.jit
def _place(G, BLOCK: tl.constexpr):
    """The program's row, and its first group there, both int64."""
    blocks = tl.cdiv(G, BLOCK)
    program = tl.program_id(0)
    row = program // blocks
    return row.to(tl.int64), (program - row * blocks).to(tl.int64) * BLOCK


@triton.jit
def _tile(STRIDE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets ``[BLOCK, R]`` of runs that lie ``STRIDE`` apart."""
    return tl.arange(0, BLOCK)[:, None] * STRIDE + tl.arange(0, R)[None, :]


@triton.jit
def _groups_left(G, first, BLOCK: tl.constexpr):
    """Which of the program's groups there are, ``[BLOCK, 1]``."""
    return tl.arange(0, BLOCK)[:, None] < tl.minimum(G - first, BLOCK).to(tl.int32)


# ---- values and levels ---------------------------------------------------------------------------


@triton.jit
def _load_values(row_ptr, M, first, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros follow the last element of a row."""
    R: tl.constexpr = F.group // K
    place = _tile(F.group, R, BLOCK)
    left = tl.minimum(M - first * F.group, BLOCK * F.group).to(tl.int32)
    parts = ()
    for k in tl.static_range(K):
        x = tl.load(row_ptr + first * F.group + place + k * R, place + k * R < left, 0.0)
        parts = parts + (x.to(tl.float32),)
    return parts


@triton.jit
def _store_values(
    parts, out_ptr, row, first, G,
    F: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``LARGEST``: values beyond it become it, NaN stays; None: they are stored as they are."""
    R: tl.constexpr = F.group // K
    out_ptr += (row * G + first) * F.group
    for k in tl.static_range(K):
        value = parts[k]
        if LARGEST is not None:
            value = tl.where(value > LARGEST, LARGEST, value)
            value = tl.where(value < -LARGEST, -LARGEST, value)
        place = _tile(F.group, R, BLOCK) + k * R
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, value, _groups_left(G, first, BLOCK))


@triton.jit
def _load_levels(
    row_ptr, first, G, codes_size, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    is_group = _groups_left(G, first, BLOCK)
    codes = _load_plane(row_ptr, first, is_group, F.planes[0], F, K, BLOCK)
    if len(F.planes) > 1:
        plane_ptr = row_ptr + _plane_size(G, F.planes[0], F)
        tops = _load_plane(plane_ptr, first, is_group, F.planes[1], F, K, BLOCK)
        joined = ()
        for k in tl.static_range(K):
            joined = joined + (codes[k] + (tops[k] << F.planes[0]),)
        codes = joined
    scales_ptr = row_ptr + codes_size + first + tl.arange(0, BLOCK)[:, None]
    low = tl.load(scales_ptr, is_group, 0).to(tl.int32)
    high = tl.load(scales_ptr + G, is_group, 0).to(tl.int32)
    scale = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
    levels = ()
    for k in tl.static_range(K):
        code = (codes[k] | _COUNTER_BITS).to(tl.float32, bitcast=True) - _COUNTER
        levels = levels + ((code - F.zero_offset) * scale,)
    return levels


@triton.jit
def _load_plane(
    plane_ptr, first, is_group,
    WIDTH: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` bits of each code, as int32 tiles."""
    R: tl.constexpr = F.group // K
    STRIDE: tl.constexpr = K * WIDTH // 8
    plane_ptr += first * (F.group * WIDTH // 8) + _tile(F.group * WIDTH // 8, R, BLOCK)
    bytes = ()
    for j in tl.static_range(STRIDE):
        bytes = bytes + (tl.load(plane_ptr + j * R, is_group, 0).to(tl.int32),)
    codes = ()
    for k in tl.static_range(K):
        codes = codes + ((bytes[k % STRIDE] >> (k // STRIDE * WIDTH)) & ((1 << WIDTH) - 1),)
    return codes


@triton.jit
def _plane_size(G, WIDTH: tl.constexpr, F: tl.constexpr):
    """Bytes; beyond int32 where ``G`` times 8 times the group is."""
    return tl.full((), F.group * WIDTH // 8, tl.int64) * G


@triton.jit
def _sum_levels(
    row_ptr, first, G, codes_size, rows, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    total = _load_levels(row_ptr, first, G, codes_size, F, K, BLOCK)
    for _ in range(1, rows):
        row_ptr += codes_size + 2 * G
        levels = _load_levels(row_ptr, first, G, codes_size, F, K, BLOCK)
        added = ()
        for k in tl.static_range(K):
            added = added + (total[k] + levels[k],)
        total = added
    return total


@triton.jit
def _scaled(parts, factor, K: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        result = result + (parts[k] * factor,)
    return result


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def _store_codes(
    parts, payload_ptr, row, first, G, codes_size, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = F.group // K
    row_ptr = payload_ptr + row * (codes_size + 2 * G)
    is_group = _groups_left(G, first, BLOCK)
    scale, inverse, is_finite = _scale(_peak(parts, K), F, LARGEST_SCALE)
    levels = ()
    for k in tl.static_range(K):
        place = (row * G + first).to(tl.int32) * F.group + _tile(F.group, R, BLOCK) + k * R
        levels = levels + (_level(parts[k], inverse, is_finite, place, seed, F),)
    if len(F.planes) == 1:
        _store_plane(levels, row_ptr, first, is_group, 0, F.planes[0], F, K, BLOCK)
    else:
        low: tl.constexpr = F.planes[0]
        _store_plane(levels, row_ptr, first, is_group, 0, low, F, K, BLOCK)
        plane_ptr = row_ptr + _plane_size(G, low, F)
        _store_plane(levels, plane_ptr, first, is_group, low, F.planes[1], F, K, BLOCK)
    scales_ptr = row_ptr + codes_size + first + tl.arange(0, BLOCK)[:, None]
    tl.store(scales_ptr, ((scale >> 16) & 255).to(tl.uint8), is_group)
    tl.store(scales_ptr + G, ((scale >> 24) & 255).to(tl.uint8), is_group)


@triton.jit
def _store_plane(
    levels, plane_ptr, first, is_group, LOW: tl.constexpr, WIDTH: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` bits of each code, from bit ``LOW`` on.

    A code is a level plus half the number of codes, which only its highest bit shows.
    """
    R: tl.constexpr = F.group // K
    STRIDE: tl.constexpr = K * WIDTH // 8
    HALF: tl.constexpr = 1 << (WIDTH - 1) if F.bits == LOW + WIDTH else 0
    plane_ptr += first * (F.group * WIDTH // 8) + _tile(F.group * WIDTH // 8, R, BLOCK)
    for j in tl.static_range(STRIDE):
        byte = tl.zeros((BLOCK, R), tl.int32)
        for i in tl.static_range(8 // WIDTH):
            code = ((levels[i * STRIDE + j] >> LOW) + HALF) & ((1 << WIDTH) - 1)
            byte |= code << (WIDTH * i)
        tl.store(plane_ptr + j * R, byte.to(tl.uint8), is_group)


@triton.jit
def _peak(parts, K: tl.constexpr):
    """The bits of a group's largest magnitude ``[BLOCK, 1]``; those of a NaN are the largest."""
    peak = parts[0].to(tl.int32, bitcast=True) & _MAGNITUDE
    for k in tl.static_range(1, K):
        peak = tl.maximum(peak, parts[k].to(tl.int32, bitcast=True) & _MAGNITUDE)
    return tl.max(peak, 1, keep_dims=True)


@triton.jit
def _scale(peak, F: tl.constexpr, LARGEST_SCALE: tl.constexpr):
    """The step as float32 bits, ``1 / step``, int32 1 for a finite group: ``scale_bits``."""
    bits = (peak.to(tl.float32, bitcast=True) * F.clip_over_half_range).to(tl.int32, bitcast=True)
    bits = bits & _MAGNITUDE
    rounded = tl.minimum(tl.maximum(bits, _MIN_SCALE), LARGEST_SCALE)
    rounded = (rounded + 0xFFFF) & -65536
    inverse = (1.0 / rounded.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True)
    inverse = (inverse + 0xFF + ((inverse >> 9) & 1)) & -512
    stored = tl.where(bits >= _EXPONENT, _NAN_SCALE, tl.where(bits == 0, 0, rounded))
    return stored, inverse.to(tl.float32, bitcast=True), (bits < _EXPONENT).to(tl.int32)


@triton.jit
def _level(x, inverse, is_finite, place, seed, F: tl.constexpr):
    HALF: tl.constexpr = 1 << (F.bits - 1)
    LOW: tl.constexpr = -HALF if F.is_mid_rise else 1 - HALF
    t = x * inverse
    if F.is_stochastic:
        whole = (t * 65536.0).to(tl.int32)
        whole -= (t * 65536.0 < whole.to(tl.float32)).to(tl.int32)  # the floor, as in floor_to_int
        level = (whole - (32768 if F.is_mid_rise else 0) + _noise(x, place, seed)) >> 16
    else:
        rounded = t + _ROUNDER
        level = rounded.to(tl.int32, bitcast=True) - _ROUNDER_BITS
        if F.is_mid_rise:
            level -= (t < rounded - _ROUNDER).to(tl.int32)
    # What integer a NaN becomes differs between devices: in its group only the lowest is left.
    return tl.minimum(tl.maximum(level, LOW), is_finite * (HALF - 1 - LOW) + LOW)


@triton.jit
def _noise(x, place, seed):
    """``bitmath.noise``; ``seed`` is multiplied already."""
    v = seed ^ (place * -0x61C8864F) ^ x.to(tl.int32, bitcast=True)
    v = (v ^ ((v >> 16) & 0xFFFF)) * 0x7FEB352D
    v = (v ^ ((v >> 15) & 0x1FFFF)) * -0x7B935975
    return (v >> 16) & 0xFFFF


@triton.jit
def _clamp_to_finite(parts, K: tl.constexpr):
    """Inf becomes the largest finite magnitude; a group with a NaN or only zeros beside Inf stays.

    Its peak is not finite then, whatever its Inf becomes.
    """
    peak = tl.zeros_like(parts[0]).to(tl.int32)
    for k in tl.static_range(K):
        magnitude = parts[k].to(tl.int32, bitcast=True) & _MAGNITUDE
        peak = tl.maximum(peak, tl.where(magnitude == _EXPONENT, 0, magnitude))
    peak = tl.max(peak, 1, keep_dims=True)
    clamps = (peak > 0) & (peak < _EXPONENT)
    result = ()
    for k in tl.static_range(K):
        bits = parts[k].to(tl.int32, bitcast=True)
        is_inf = (bits & _MAGNITUDE) == _EXPONENT
        clamped = tl.where(is_inf & clamps, (bits & ~_MAGNITUDE) | peak, bits)
        result = result + (clamped.to(tl.float32, bitcast=True),)
    return result


# ---- rotation ------------------------------------------------------------------------------------


@triton.jit
def _turn_back(parts, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    if len(F.axes) > 0:
        parts = _turn_tiles(parts, F, True, K)
    for a in tl.static_range(1, len(F.axes)):
        parts = _turn_inner(parts, F, a, True, K, BLOCK)
    return parts


@triton.jit
def _turn_tiles(parts, F: tl.constexpr, BACK: tl.constexpr, K: tl.constexpr):
    """Along the first axis: elements of tiles ``K / N`` apart form a block."""
    N: tl.constexpr = F.axes[0][0]
    STRIDE: tl.constexpr = K // N
    if not BACK:
        parts = _with_signs(parts, F, 1.0 / N, K)
    for step in tl.static_range(N.bit_length() - 1):
        mixed = ()
        for i in tl.static_range(K):
            if i & (STRIDE << step):
                mixed = mixed + (parts[i - (STRIDE << step)] - parts[i],)
            else:
                mixed = mixed + (parts[i] + parts[i + (STRIDE << step)],)
        parts = mixed
    return _with_signs(parts, F, 1.0, K) if BACK else parts


@triton.jit
def _with_signs(parts, F: tl.constexpr, FACTOR: tl.constexpr, K: tl.constexpr):
    result = ()
    for i in tl.static_range(K):
        if (F.axes[0][2] >> (i // (K // F.axes[0][0]))) & 1:
            result = result + (parts[i] * -FACTOR,)
        else:
            result = result + (parts[i] * FACTOR,)
    return result


@triton.jit
def _turn_inner(
    parts, F: tl.constexpr, AXIS: tl.constexpr, BACK: tl.constexpr,
    K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Along an axis within the tiles: elements ``AFTER`` apart form a block."""
    R: tl.constexpr = F.group // K
    N: tl.constexpr = F.axes[AXIS][0]
    AFTER: tl.constexpr = F.axes[AXIS][1]
    place = (tl.arange(0, R)[None, :] // AFTER) % N
    sign = 1.0 - 2.0 * ((F.axes[AXIS][2] >> place) & 1).to(tl.float32)
    result = ()
    for k in tl.static_range(K):
        x = parts[k]
        if not BACK:
            x = x * (sign * (1.0 / N))
        for step in tl.static_range(N.bit_length() - 1):
            x = _mix_neighbours(x, AFTER << step, R, BLOCK)
        result = result + (x * sign if BACK else x,)
    return result


@triton.jit
def _mix_neighbours(x, APART: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Sums and differences of the elements that lie ``APART`` from one another."""
    pairs = tl.reshape(x, (BLOCK, R // (2 * APART), 2, APART))
    a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (BLOCK, R))
