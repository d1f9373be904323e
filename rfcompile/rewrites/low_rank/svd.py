"""Computes the largest singular values and vectors of large matrices."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 1024
_MORE, _STEPS = 8, 12


def leading_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` [m, rank], singular values [rank] in descending order, and ``V^T`` [rank, n].

    Up to 1024 rows or columns, and where the basis below would not be smaller than the matrix:
    the truncated decomposition. Otherwise the best approximation within a block Krylov space of
    ``12 (rank + 8)`` directions: the values are then at most the exact ones, and nearest to them
    where the spectrum falls; of a square Gaussian matrix, whose spectrum hardly does, they are
    within 1 % (measured). O(m n rank) operations. Deterministic.

    Args:
        matrix: float32 or float64, finite.

    Source: Musco and Musco, arXiv:1504.05477, algorithm 2; block and steps are ours.
    """
    block = rank + _MORE
    if min(matrix.shape) <= max(EXACT_UP_TO, block * _STEPS):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], values[:rank], v[:rank]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], block, generator=generator, dtype=matrix.dtype)
    blocks = [torch.linalg.qr(matrix @ start.to(matrix.device))[0]]
    for _ in range(_STEPS - 1):
        blocks.append(torch.linalg.qr(matrix @ (matrix.t() @ blocks[-1]))[0])
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    u, values, v = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ u[:, :rank], values[:rank], v[:rank]
