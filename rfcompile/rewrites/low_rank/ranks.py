"""Measures of the rank of a matrix: stable rank, numerical rank, and bounds of their change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rfcompile.rewrites.low_rank.svd import EXACT_UP_TO, leading_svd

TOLERANCE = 1e-3


def effective_ranks(matrix: Tensor) -> tuple[float, int]:
    """The stable rank ``|W|_F^2 / |W|_2^2`` and the numerical rank: how many singular values exceed
    ``1e-3`` of the largest.

    The numerical rank of ``sin(omega U V)`` rises long before its stable rank does, so by itself it
    says little. Zeros have rank 0. O(m n min(m, n)) operations: up to 1024 rows or columns a
    decomposition in float32. A larger matrix is not decomposed: the largest singular value is that
    of :func:`~rfcompile.rewrites.low_rank.svd.leading_svd`; the others are counted by the signs of
    pivots of ``W W^T - (1e-3 |W|_2)^2`` in float64 (Sylvester's law of inertia).

    Args:
        matrix: [m, n], any floating dtype. With NaN or Inf in it the ranks are NaN and 0.
    """
    if not bool(matrix.isfinite().all()):
        return math.nan, 0
    exact = _scaled(matrix)
    if not exact.any():
        return 0.0, 0
    if min(exact.shape) > EXACT_UP_TO:
        stable, peak = _stable(exact)
        return stable, _above(exact, TOLERANCE * peak)
    values = torch.linalg.svdvals(exact)
    stable = float((values / values[0]).square().sum())
    return stable, int((values > TOLERANCE * values[0]).sum())


def stable_rank(matrix: Tensor) -> float:
    """The first of :func:`effective_ranks`, in O(m n) operations where the matrix is large."""
    if not bool(matrix.isfinite().all()):
        return math.nan
    exact = _scaled(matrix)
    return _stable(exact)[0] if exact.any() else 0.0


def _scaled(matrix: Tensor) -> Tensor:
    """In float32, with elements of at most 1, whose squares neither overflow nor vanish."""
    exact = matrix.detach()
    exact = exact if exact.dtype is torch.float64 else exact.float()
    return (exact / exact.abs().max()).float() if exact.any() else exact.float()


def _stable(matrix: Tensor) -> tuple[float, float]:
    """The stable rank and the largest singular value."""
    peak = float(leading_svd(matrix, 1)[1])
    return float((matrix / peak).square().sum()), peak


def _above(matrix: Tensor, bound: float) -> int:
    """How many singular values exceed a bound: the eigenvalues of ``W W^T - bound^2`` above 0."""
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()).double()
    gram = wide @ wide.t()
    gram.diagonal().sub_(bound * bound)
    decomposed, pivots = torch.linalg.ldl_factor(gram)
    single = pivots > 0  # a pivot of two rows has one eigenvalue above 0 and one below
    return int((decomposed.diagonal()[single] > 0).sum() + (~single).sum() // 2)


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
