"""How many directions a matrix has: stable rank, numerical rank, and what an error can do to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-3


def effective_ranks(matrix: Tensor) -> tuple[float, int]:
    """The stable rank ``|W|_F^2 / |W|_2^2`` and the numerical rank: how many singular values exceed
    ``1e-3`` of the largest.

    The numerical rank of ``sin(omega U V)`` rises long before its stable rank does, so by itself it
    says little. Zeros have rank 0. One decomposition in float32: O(m n min(m, n)) operations.

    Args:
        matrix: [m, n], any floating dtype. With NaN or Inf in it the ranks are NaN and 0.
    """
    if not bool(matrix.isfinite().all()):
        return math.nan, 0
    values = torch.linalg.svdvals(matrix.detach().float())
    if values.numel() == 0 or values[0] == 0:
        return 0.0, 0
    stable = float((values / values[0]).square().sum())
    return stable, int((values > TOLERANCE * values[0]).sum())


def stable_rank_bounds(matrix: Tensor, error: Tensor) -> tuple[float, float]:
    """Between which values the stable rank of ``matrix + error`` lies, whatever the error's sign.

    ``((|A|_F - |E|_F) / (|A|_2 + |E|_2))^2`` and ``((|A|_F + |E|_F) / (|A|_2 - |E|_2))^2``; the
    upper one is infinite where ``|E|_2 >= |A|_2``.

    Source: ours, the triangle inequality. Theorem 3.1 of arXiv:2505.21895 states such a bound of
    quantized adapters; its constants are not known to us.
    """
    size, off = (float(torch.linalg.norm(x.detach().double())) for x in (matrix, error))
    peak, peak_off = (float(torch.linalg.svdvals(x.detach().double())[0]) for x in (matrix, error))
    total = peak + peak_off
    low = (max(size - off, 0.0) / total) ** 2 if total else 0.0
    high = ((size + off) / (peak - peak_off)) ** 2 if peak > peak_off else math.inf
    return low, high
