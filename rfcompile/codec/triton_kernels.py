"""The formulas of ``arithmetic.py`` as Triton kernels, where a scale is for a group: one launch for
each operator.

A program codes ``BLOCK`` groups of one payload row: tile k of ``triton_parts.py`` holds elements
``k R .. (k + 1) R`` of each group.
"""

# Triton compiles these functions: it knows no annotation but tl.constexpr and no starred tuple.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005

from __future__ import annotations

import triton
from triton import language as tl

from rfcompile.codec.triton_parts import (
    added,
    clamped,
    finite_magnitude,
    joined,
    level_of,
    levels_of,
    load_plane,
    magnitude,
    scale_of,
    scaled,
    store_plane,
    store_scale,
    turn,
    turn_back,
    within,
)

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
        parts = clamped(parts, tl.max(finite_magnitude(parts, K), 1, keep_dims=True), K)
    parts = turn(parts, F, K, BLOCK)
    _store_codes(parts, payload_ptr, row, first, G, codes_size, seed, F, LARGEST_SCALE, K, BLOCK)


@triton.jit
def dequantize(
    payload_ptr, out_ptr, G, codes_size,
    F: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Payload rows to rows of ``G * E`` elements; ``LARGEST``: see :func:`within`."""
    row, first = _place(G, BLOCK)
    row_ptr = payload_ptr + row * (codes_size + 2 * G)
    parts = _load_levels(row_ptr, first, G, codes_size, F, K, BLOCK)
    parts = turn_back(parts, F, K, BLOCK)
    _store_values(parts, out_ptr, row, first, G, F, LARGEST, K, BLOCK)


@triton.jit
def dequantize_sum(
    payload_ptr, out_ptr, G, codes_size, rows, share,
    F: tl.constexpr, AVERAGES: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of ``rows`` payload rows, times ``share`` if ``AVERAGES``."""
    row, first = _place(G, BLOCK)
    parts = _sum_levels(payload_ptr, first, G, codes_size, rows, F, K, BLOCK)
    parts = turn_back(parts, F, K, BLOCK)
    if AVERAGES:
        parts = scaled(parts, share, K)
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
        parts = scaled(parts, share, K)
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
    R: tl.constexpr = F.group // K
    out_ptr += (row * G + first) * F.group
    for k in tl.static_range(K):
        value = within(parts[k], LARGEST)
        place = _tile(F.group, R, BLOCK) + k * R
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, value, _groups_left(G, first, BLOCK))


@triton.jit
def _load_levels(
    row_ptr, first, G, codes_size, F: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    R: tl.constexpr = F.group // K
    LOW: tl.constexpr = F.planes[0]
    is_group = _groups_left(G, first, BLOCK)
    codes = load_plane(row_ptr + _bytes(first, LOW, F, R, BLOCK), is_group, R, LOW, K)
    if len(F.planes) > 1:
        place = _plane_size(G, LOW, F) + _bytes(first, F.planes[1], F, R, BLOCK)
        tops = load_plane(row_ptr + place, is_group, R, F.planes[1], K)
        codes = joined(codes, tops, LOW, K)
    scales_ptr = row_ptr + codes_size + first + tl.arange(0, BLOCK)[:, None]
    low, high = tl.load(scales_ptr, is_group, 0), tl.load(scales_ptr + G, is_group, 0)
    return levels_of(codes, low, high, F, K)


@triton.jit
def _bytes(first, WIDTH: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Where in a plane the first byte of each place of the program's groups is."""
    SIZE: tl.constexpr = F.group * WIDTH // 8
    return first * SIZE + _tile(SIZE, R, BLOCK)


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
        total = added(total, levels, K)
    return total


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def _store_codes(
    parts, payload_ptr, row, first, G, codes_size, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = F.group // K
    LOW: tl.constexpr = F.planes[0]
    row_ptr = payload_ptr + row * (codes_size + 2 * G)
    is_group = _groups_left(G, first, BLOCK)
    peak = tl.max(magnitude(parts, K), 1, keep_dims=True)
    scale, inverse, is_finite = scale_of(peak, F, LARGEST_SCALE)
    levels = ()
    for k in tl.static_range(K):
        place = (row * G + first).to(tl.int32) * F.group + _tile(F.group, R, BLOCK) + k * R
        levels = levels + (level_of(parts[k], inverse, is_finite, place, seed, F),)
    plane_ptr = row_ptr + _bytes(first, LOW, F, R, BLOCK)
    store_plane(levels, plane_ptr, is_group, R, 0, LOW, F, K)
    if len(F.planes) > 1:
        plane_ptr = row_ptr + _plane_size(G, LOW, F) + _bytes(first, F.planes[1], F, R, BLOCK)
        store_plane(levels, plane_ptr, is_group, R, LOW, F.planes[1], F, K)
    scales_ptr = row_ptr + codes_size + first + tl.arange(0, BLOCK)[:, None]
    store_scale(scale, scales_ptr, scales_ptr + G, is_group)
