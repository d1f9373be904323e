"""Launches of ``triton_tensors.py``: the codec operators on GPUs, where a row has one scale.

Two launches where a row is coded (one more if the format saturates), one where it is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec import arithmetic, triton_tensors
from rfcompile.codec.bitmath import largest_scale, mixed_seed
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.triton_launch import TILE, largest_of, layout_of, run

MOST_PROGRAMS = 2048
"""That look for the largest magnitude. Each of those that then code reads what all of its row have
found: so many are enough to keep a large GPU busy, and few enough to read."""


def quantize(x_CM: Tensor, payload_CB: Tensor, fmt: QuantFormat, seed: int) -> None:
    """``arithmetic.quantize`` of rows whose elements are side by side, into ``payload_CB``."""
    M = x_CM.shape[1]
    if M == 0:
        payload_CB.zero_()
        return
    at = _Pieces.of(payload_CB, fmt, fmt.num_parts)
    loop = (M, x_CM.stride(0), at.run, at.pieces, at.programs)
    peaks = limits = at.new_partials(x_CM)
    if fmt.nonfinite == "saturate":
        limits = at.new_partials(x_CM)
        at.code(triton_tensors.quantize_limits, x_CM, limits, *loop, at.layout)
    at.code(triton_tensors.quantize_peaks, x_CM, limits, peaks, *loop, at.layout, MOST_PROGRAMS)
    at.code(
        triton_tensors.quantize, x_CM, limits, peaks, payload_CB, *loop, at.codes,
        mixed_seed(fmt.seed + seed), at.layout, largest_scale(fmt, x_CM.dtype), MOST_PROGRAMS,
    )  # fmt: skip


def dequantize(payload_CB: Tensor, out: Tensor, fmt: QuantFormat) -> None:
    """``arithmetic.dequantize`` into ``out``."""
    at = _Pieces.of(payload_CB, fmt, fmt.num_parts)
    at.decode(
        triton_tensors.dequantize, at.rows, payload_CB, out, at.run, at.pieces, at.codes,
        at.layout, largest_of(fmt, out.dtype),
    )  # fmt: skip


def dequantize_sum(payload_CB: Tensor, out: Tensor, fmt: QuantFormat, average: bool) -> None:
    """``arithmetic.dequantize_sum`` into ``out``."""
    at = _Pieces.of(payload_CB, fmt, fmt.num_parts)
    at.decode(
        triton_tensors.dequantize_sum, 1, payload_CB, out, at.run, at.pieces, at.codes,
        at.rows, 1.0 / at.rows, at.layout, average,
    )  # fmt: skip


def requantize(
    payload_CB: Tensor, total: Tensor, fmt: QuantFormat, average: bool, seed: int
) -> None:
    """``arithmetic.requantize`` into ``total``, one row."""
    rows, E = payload_CB.shape[0], arithmetic.groups_of(payload_CB.shape[1], fmt)[1]
    if E == 0:
        total.zero_()
        return
    at = _Pieces.of(total, fmt, 8 // fmt.planes[-1])
    peaks = at.new_partials(payload_CB)
    loop = (at.run, at.pieces, at.programs, at.codes, rows, 1.0 / rows)
    at.code(triton_tensors.requantize_peaks, payload_CB, peaks, *loop, at.layout, average)
    at.code(
        triton_tensors.requantize, payload_CB, peaks, total, *loop,
        mixed_seed(fmt.seed + seed + 1), at.layout, largest_scale(fmt, torch.float32), average,
        MOST_PROGRAMS,
    )  # fmt: skip


@dataclass(frozen=True)
class _Pieces:
    """How programs share the rows of a payload.

    Args:
        rows, codes: of the payload, and bytes of the codes in a row.
        run: elements of each of the ``parts`` runs of a row: R.
        pieces: a run has so many, the last one may be shorter.
        programs: that code a row together: P.
    """

    rows: int
    codes: int
    run: int
    pieces: int
    programs: int
    parts: int
    layout: Any

    @classmethod
    def of(cls, payload_CB: Tensor, fmt: QuantFormat, parts: int) -> _Pieces:
        rows, E = payload_CB.shape[0], arithmetic.groups_of(payload_CB.shape[1], fmt)[1]
        pieces = -(-E // (parts * TILE))
        programs = max(1, min(pieces, MOST_PROGRAMS // max(rows, 1)))
        layout = layout_of(fmt, parts * TILE)
        return cls(rows, E * fmt.bits // 8, E // parts, pieces, programs, parts, layout)

    def new_partials(self, like: Tensor) -> Tensor:
        return like.new_empty((self.rows, self.programs), dtype=torch.int32)

    def code(self, kernel: Any, *arguments: Any) -> None:
        run(kernel, self.rows * self.programs, (*arguments, self.parts))

    def decode(self, kernel: Any, rows: int, *arguments: Any) -> None:
        run(kernel, rows * self.pieces, (*arguments, self.parts))
