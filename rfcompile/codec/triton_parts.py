"""What the Triton kernels of the codec share: values of a tile to codes and back, rotations.

The elements that a program works on are a tuple of ``K`` tiles ``[BLOCK, R]``: codes that share a
byte, and elements that the first axis of a rotation joins, lie in different tiles at one place. So
they meet in one thread.

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
    """Elements of all tiles of a row of ``BLOCK``: of a group, or of a piece of a tensor."""
    is_mid_rise: bool
    is_stochastic: bool
    saturates: bool
    clip_over_half_range: float
    zero_offset: float
    axes: tuple[tuple[int, int, int], ...]
    """Of the rotation: size, steps in a tile from one element to the next (0: tiles are), and signs
    as bits, 1 for a negative one. Without a rotation empty."""


# ---- values and levels ---------------------------------------------------------------------------


@triton.jit
def load_plane(plane_ptr, is_there, apart, WIDTH: tl.constexpr, K: tl.constexpr):
    """``WIDTH`` bits of each code, as int32 tiles; bytes of a place lie ``apart``."""
    STRIDE: tl.constexpr = K * WIDTH // 8
    bytes = ()
    for j in tl.static_range(STRIDE):
        bytes = bytes + (tl.load(plane_ptr + j * apart, is_there, 0).to(tl.int32),)
    codes = ()
    for k in tl.static_range(K):
        codes = codes + ((bytes[k % STRIDE] >> (k // STRIDE * WIDTH)) & ((1 << WIDTH) - 1),)
    return codes


@triton.jit
def joined(codes, tops, LOW: tl.constexpr, K: tl.constexpr):
    """Codes whose bits from ``LOW`` on are in another plane."""
    result = ()
    for k in tl.static_range(K):
        result = result + (codes[k] + (tops[k] << LOW),)
    return result


@triton.jit
def levels_of(codes, low, high, F: tl.constexpr, K: tl.constexpr):
    """The values on the grid; ``low`` and ``high`` are the bytes of the scale."""
    scale = (low.to(tl.int32) << 16) | (high.to(tl.int32) << 24)
    scale = scale.to(tl.float32, bitcast=True)
    levels = ()
    for k in tl.static_range(K):
        code = (codes[k] | _COUNTER_BITS).to(tl.float32, bitcast=True) - _COUNTER
        levels = levels + ((code - F.zero_offset) * scale,)
    return levels


@triton.jit
def added(parts, others, K: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        result = result + (parts[k] + others[k],)
    return result


@triton.jit
def scaled(parts, factor, K: tl.constexpr):
    result = ()
    for k in tl.static_range(K):
        result = result + (parts[k] * factor,)
    return result


@triton.jit
def within(value, LARGEST: tl.constexpr):
    """Values beyond ``LARGEST`` become it, NaN stays; None: all stay."""
    if LARGEST is not None:
        value = tl.where(value > LARGEST, LARGEST, value)
        value = tl.where(value < -LARGEST, -LARGEST, value)
    return value


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def store_plane(
    levels, plane_ptr, is_there, apart, LOW: tl.constexpr, WIDTH: tl.constexpr,
    F: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` bits of each code, from bit ``LOW`` on; bytes of a place go ``apart``.

    A code is a level plus half the number of codes, which only its highest bit shows.
    """
    STRIDE: tl.constexpr = K * WIDTH // 8
    HALF: tl.constexpr = 1 << (WIDTH - 1) if F.bits == LOW + WIDTH else 0
    for j in tl.static_range(STRIDE):
        byte = tl.zeros_like(levels[0])
        for i in tl.static_range(8 // WIDTH):
            code = ((levels[i * STRIDE + j] >> LOW) + HALF) & ((1 << WIDTH) - 1)
            byte |= code << (WIDTH * i)
        tl.store(plane_ptr + j * apart, byte.to(tl.uint8), is_there)


@triton.jit
def store_scale(scale, low_ptr, high_ptr, is_there):
    tl.store(low_ptr, ((scale >> 16) & 255).to(tl.uint8), is_there)
    tl.store(high_ptr, ((scale >> 24) & 255).to(tl.uint8), is_there)


@triton.jit
def magnitude(parts, K: tl.constexpr):
    """The bits of the largest magnitude at each place; those of a NaN are the largest."""
    largest = parts[0].to(tl.int32, bitcast=True) & _MAGNITUDE
    for k in tl.static_range(1, K):
        largest = tl.maximum(largest, parts[k].to(tl.int32, bitcast=True) & _MAGNITUDE)
    return largest


@triton.jit
def finite_magnitude(parts, K: tl.constexpr):
    """The same with 0 for Inf."""
    largest = tl.zeros_like(parts[0]).to(tl.int32)
    for k in tl.static_range(K):
        bits = parts[k].to(tl.int32, bitcast=True) & _MAGNITUDE
        largest = tl.maximum(largest, tl.where(bits == _EXPONENT, 0, bits))
    return largest


@triton.jit
def scale_of(peak, F: tl.constexpr, LARGEST_SCALE: tl.constexpr):
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
def level_of(x, inverse, is_finite, place, seed, F: tl.constexpr):
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
def clamped(parts, peak, K: tl.constexpr):
    """Inf becomes ``peak``, the largest finite magnitude; with a NaN or only zeros beside Inf all
    stays: its peak is not finite then, whatever its Inf becomes.
    """
    clamps = (peak > 0) & (peak < _EXPONENT)
    result = ()
    for k in tl.static_range(K):
        bits = parts[k].to(tl.int32, bitcast=True)
        is_inf = (bits & _MAGNITUDE) == _EXPONENT
        value = tl.where(is_inf & clamps, (bits & ~_MAGNITUDE) | peak, bits)
        result = result + (value.to(tl.float32, bitcast=True),)
    return result


# ---- rotation ------------------------------------------------------------------------------------


@triton.jit
def turn(parts, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate, if ``F`` does."""
    for a in tl.static_range(1, len(F.axes)):
        parts = _turn_inner(parts, F, a, False, K, BLOCK)
    if len(F.axes) > 0:
        parts = _turn_tiles(parts, F, False, K)
    return parts


@triton.jit
def turn_back(parts, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
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
