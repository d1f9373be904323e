"""The formulas of ``arithmetic.py`` as Triton kernels, where a row has one scale.

A row has ``E = K R`` elements; tile k of ``triton_parts.py`` holds T elements of the run ``k R ..
(k + 1) R``, from ``piece T`` on. To code a row takes two launches: programs, P of a row, each find
the largest magnitude of some pieces, then they code these pieces. A format that saturates takes
one launch more, before them: Inf becomes the largest finite magnitude.
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
def quantize_limits(
    x_ptr, limits_ptr, M, row_stride, R, pieces, P, F: tl.constexpr, K: tl.constexpr
):
    """Of each program the bits of the largest finite magnitude, int32 ``[rows, P]``."""
    row, first = _place(P)
    largest = tl.zeros((1, F.group // K), tl.int32)
    for piece in range(first, pieces, P):
        parts = _load_values(x_ptr + row * row_stride, M, R, piece, F, K)
        largest = tl.maximum(largest, finite_magnitude(parts, K))
    _store_largest(largest, limits_ptr, row, first, P)


@triton.jit
def quantize_peaks(
    x_ptr, limits_ptr, peaks_ptr, M, row_stride, R, pieces, P,
    F: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of each program the bits of the largest magnitude after rotation, int32 ``[rows, P]``."""
    row, first = _place(P)
    limit = _limit(limits_ptr, row, P, F, PROGRAMS)
    largest = tl.zeros((1, F.group // K), tl.int32)
    for piece in range(first, pieces, P):
        parts = _load_values(x_ptr + row * row_stride, M, R, piece, F, K)
        largest = tl.maximum(largest, magnitude(_turned(parts, limit, F, K), K))
    _store_largest(largest, peaks_ptr, row, first, P)


@triton.jit
def quantize(
    x_ptr, limits_ptr, peaks_ptr, payload_ptr, M, row_stride, R, pieces, P, codes_size, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, PROGRAMS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows of ``M`` elements, ``row_stride`` apart, to payload rows."""
    row, first = _place(P)
    limit = _limit(limits_ptr, row, P, F, PROGRAMS)
    scale = scale_of(_largest(peaks_ptr, row, P, PROGRAMS), F, LARGEST_SCALE)
    row_ptr = payload_ptr + row * (codes_size + 2)
    for piece in range(first, pieces, P):
        parts = _turned(_load_values(x_ptr + row * row_stride, M, R, piece, F, K), limit, F, K)
        _store_codes(parts, scale, row_ptr, row, R, piece, seed, F, K)
    _store_scale(scale[0], row_ptr + codes_size, first)


@triton.jit
def dequantize(
    payload_ptr, out_ptr, R, pieces, codes_size,
    F: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Payload rows to rows of ``K R`` elements; ``LARGEST``: see :func:`within`."""
    row, piece = _place(pieces)
    parts = _load_levels(payload_ptr + row * (codes_size + 2), R, piece, codes_size, F, K)
    _store_values(turn_back(parts, F, K, 1), out_ptr, row, R, piece, F, LARGEST, K)


@triton.jit
def dequantize_sum(
    payload_ptr, out_ptr, R, pieces, codes_size, rows, share,
    F: tl.constexpr, AVERAGES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sum of ``rows`` payload rows, times ``share`` if ``AVERAGES``."""
    row, piece = _place(pieces)
    parts = turn_back(_sum_levels(payload_ptr, R, piece, codes_size, rows, F, K), F, K, 1)
    if AVERAGES:
        parts = scaled(parts, share, K)
    _store_values(parts, out_ptr, row, R, piece, F, None, K)


@triton.jit
def requantize_peaks(
    payload_ptr, peaks_ptr, R, pieces, P, codes_size, rows, share,
    F: tl.constexpr, AVERAGES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Of each program the bits of the largest magnitude of the sum, int32 ``[1, P]``."""
    row, first = _place(P)
    largest = tl.zeros((1, F.group // K), tl.int32)
    for piece in range(first, pieces, P):
        parts = _sum_levels(payload_ptr, R, piece, codes_size, rows, F, K)
        if AVERAGES:
            parts = scaled(parts, share, K)
        is_there = _run(R, piece, F.group // K)[2]  # beyond a run a code of 0 is no value of 0
        largest = tl.maximum(largest, tl.where(is_there, magnitude(parts, K), 0))
    _store_largest(largest, peaks_ptr, row, first, P)


@triton.jit
def requantize(
    payload_ptr, peaks_ptr, total_ptr, R, pieces, P, codes_size, rows, share, seed,
    F: tl.constexpr, LARGEST_SCALE: tl.constexpr, AVERAGES: tl.constexpr,
    PROGRAMS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The sum of ``rows`` payload rows coded again, in the rotated domain."""
    row, first = _place(P)
    scale = scale_of(_largest(peaks_ptr, row, P, PROGRAMS), F, LARGEST_SCALE)
    for piece in range(first, pieces, P):
        parts = _sum_levels(payload_ptr, R, piece, codes_size, rows, F, K)
        if AVERAGES:
            parts = scaled(parts, share, K)
        _store_codes(parts, scale, total_ptr, row, R, piece, seed, F, K)
    _store_scale(scale[0], total_ptr + codes_size, first)


# ---- where a program works -----------------------------------------------------------------------


@triton.jit
def _place(programs):
    """The row, int64, and which one of its programs this is."""
    program = tl.program_id(0)
    row = program // programs
    return row.to(tl.int64), program - row * programs


@triton.jit
def _wide(factor, COUNT: tl.constexpr):
    """``COUNT * factor``, which may be beyond int32."""
    return tl.full((), COUNT, tl.int64) * factor


@triton.jit
def _run(R, piece, T: tl.constexpr):
    """Where in a run the piece begins, its places ``[1, T]`` and which of them there are."""
    begin = _wide(piece, T)
    place = tl.arange(0, T)[None, :]
    return begin, place, place < tl.minimum(R - begin, T).to(tl.int32)


# ---- largest magnitudes --------------------------------------------------------------------------


@triton.jit
def _store_largest(largest, partial_ptr, row, first, P):
    place = row * P + first + tl.zeros((1, 1), tl.int32)
    tl.store(partial_ptr + place, tl.max(largest, 1, keep_dims=True))


@triton.jit
def _largest(partial_ptr, row, P, PROGRAMS: tl.constexpr):
    """Of what the programs of a row found, ``[1, 1]``."""
    place = tl.arange(0, PROGRAMS)[None, :]
    return tl.max(tl.load(partial_ptr + row * P + place, place < P, 0), 1, keep_dims=True)


@triton.jit
def _limit(limits_ptr, row, P, F: tl.constexpr, PROGRAMS: tl.constexpr):
    limit = tl.zeros((1, 1), tl.int32)
    if F.saturates:
        limit = _largest(limits_ptr, row, P, PROGRAMS)
    return limit


@triton.jit
def _turned(parts, limit, F: tl.constexpr, K: tl.constexpr):
    if F.saturates:
        parts = clamped(parts, limit, K)
    return turn(parts, F, K, 1)


# ---- values and levels ---------------------------------------------------------------------------


@triton.jit
def _load_values(row_ptr, M, R, piece, F: tl.constexpr, K: tl.constexpr):
    """Zeros follow the last element of a row."""
    T: tl.constexpr = F.group // K
    begin, place, _ = _run(R, piece, T)
    parts = ()
    for k in tl.static_range(K):
        start = _wide(R, k) + begin
        left = tl.minimum(tl.minimum(M - start, R - begin), T).to(tl.int32)
        parts = parts + (tl.load(row_ptr + start + place, place < left, 0.0).to(tl.float32),)
    return parts


@triton.jit
def _store_values(
    parts, out_ptr, row, R, piece, F: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr
):
    begin, place, is_there = _run(R, piece, F.group // K)
    out_ptr += row * _wide(R, K) + begin + place
    for k in tl.static_range(K):
        value = within(parts[k], LARGEST).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + _wide(R, k), value, is_there)


@triton.jit
def _load_levels(row_ptr, R, piece, codes_size, F: tl.constexpr, K: tl.constexpr):
    LOW: tl.constexpr = F.planes[0]
    begin, place, is_there = _run(R, piece, F.group // K)
    plane_ptr = row_ptr + begin + place
    codes = load_plane(plane_ptr, is_there, _wide(R, 1), LOW, K)
    if len(F.planes) > 1:
        plane_ptr += _wide(R, K * LOW // 8)
        tops = load_plane(plane_ptr, is_there, _wide(R, 1), F.planes[1], K)
        codes = joined(codes, tops, LOW, K)
    scale_ptr = row_ptr + codes_size + tl.zeros((1, 1), tl.int32)
    return levels_of(codes, tl.load(scale_ptr), tl.load(scale_ptr + 1), F, K)


@triton.jit
def _sum_levels(row_ptr, R, piece, codes_size, rows, F: tl.constexpr, K: tl.constexpr):
    total = _load_levels(row_ptr, R, piece, codes_size, F, K)
    for _ in range(1, rows):
        row_ptr += codes_size + 2
        total = added(total, _load_levels(row_ptr, R, piece, codes_size, F, K), K)
    return total


# ---- codes ---------------------------------------------------------------------------------------


@triton.jit
def _store_codes(parts, scale, row_ptr, row, R, piece, seed, F: tl.constexpr, K: tl.constexpr):
    LOW: tl.constexpr = F.planes[0]
    begin, place, is_there = _run(R, piece, F.group // K)
    levels = ()
    for k in tl.static_range(K):
        first = (row * _wide(R, K) + _wide(R, k) + begin).to(tl.int32)
        levels = levels + (level_of(parts[k], scale[1], scale[2], first + place, seed, F),)
    plane_ptr = row_ptr + begin + place
    store_plane(levels, plane_ptr, is_there, _wide(R, 1), 0, LOW, F, K)
    if len(F.planes) > 1:
        plane_ptr += _wide(R, K * LOW // 8)
        store_plane(levels, plane_ptr, is_there, _wide(R, 1), LOW, F.planes[1], F, K)


@triton.jit
def _store_scale(scale, scale_ptr, first):
    """By the first program of a row."""
    scale_ptr += tl.zeros((1, 1), tl.int32)
    store_scale(scale, scale_ptr, scale_ptr + 1, first == 0)
