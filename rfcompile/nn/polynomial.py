"""Polynomial attention in tensor code: the weights, and the product with the values.

No N x N matrix is kept: a block of queries at a time computes its scores, and backward computes
them again. :mod:`rfcompile.nn.polynomial_linear` is the form whose cost grows with N alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["sequence", "row", "learned"]
Form = Literal["auto", "quadratic", "linear"]

MASKED = -5000.0
"""A score or an additive mask at or below it is a mask: such are written as -10,000, -1e9,
``finfo.min`` and -inf, and softmax gives each of them weight 0."""

# ---- weights -----------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """In float32, what is narrower."""
    return x if x.dtype == torch.float64 else x.float()


def row_factors(count: Tensor, power: int, scale: str, like: Tensor) -> Tensor:
    """What the powers in a row of attention weights are multiplied by, as wide as ``wide(like)``.

    "sequence": ``1 / sqrt(N)``, the paper's. "row" and "learned": ``1 / sqrt(n (2p - 1)!!)``: the
    row of ``n`` visible keys has then the expected squared L2 norm 1 for scores of N(0, 1).

    Args:
        count: keys that a row sees (N for "sequence"), of any shape; a row without any counts 1.
    """
    spread = 1 if scale == "sequence" else math.prod(range(1, 2 * power, 2))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (count.clamp(min=1).to(dtype) * spread).rsqrt()


def is_masked(scores: Tensor) -> Tensor:
    """NaN is no mask: it stays NaN."""
    return scores <= MASKED


def weights_of(scores: Tensor, power: int, scale: str, gain: Tensor | None = None) -> Tensor:
    """``gain * factor * s^p`` along the last axis, 0 where masked; computed as wide(scores).

    Args:
        scores: ``[.., rows, keys]``, their masks added; dtype out = dtype in.
    Source: arXiv:2410.18613, activation x^p / sqrt(N); counting visible keys, ``(2p - 1)!!`` and
    the gain are ours.
    """
    visible = ~is_masked(scores)
    count = visible.sum(-1, keepdim=True)
    if scale == "sequence":
        count = torch.full_like(count, scores.shape[-1])
    factors = row_factors(count, power, scale, scores)
    if gain is not None:
        factors = factors * wide(gain)
    # Masked before the power: the gradient of an infinite power times 0 would be NaN.
    kept = wide(torch.where(visible, scores, 0.0))
    return (kept.pow(power) * factors).to(scores.dtype)


def visible_keys(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """How many keys each row sees, broadcastable to ``[.., L, 1]``; the mask is ``[.., S]``."""
    rows, keys = q.shape[-2], k.shape[-2]
    if is_causal:
        return torch.arange(1, rows + 1, device=q.device).clamp(max=keys)[:, None]
    if mask is None:
        return torch.full((1, 1), keys, device=q.device)
    seen = mask if mask.dtype == torch.bool else ~is_masked(mask)
    return seen.sum(-1, keepdim=True)


# ---- one block of queries against one block of keys --------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What an attention computes with: ``sum_j factors_i (scale q_i k_j + mask_ij)^p v_j``.

    Args:
        q: ``[.., L, E]``, k: ``[.., S, E]``, v: ``[.., S, V]``, of the same leading sizes.
        factors: ``[.., L or 1, 1]``, of wide(q), broadcast to q's leading sizes, as the mask is.
        mask: ``[.., L or 1, S]`` bool (True: seen) or float (added); None: all are seen.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    factors: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    power: int

    def blocks(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Rows, and the keys that they may see."""
        L, S = self.q.shape[-2], self.k.shape[-2]
        for start in range(0, L, rows):
            end = min(start + rows, L)
            yield slice(start, end), slice(0, min(end, S) if self.is_causal else S)

    def scores(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """``scale q k + mask`` of a block, as wide(q), 0 where hidden, and where that is."""
        q = self.q[..., rows, :] * self.scale  # first, so that float16 does not overflow
        scores = wide(q @ self.k[..., keys, :].mT)
        hidden = None
        if self.mask is not None:
            mask = rows_of(self.mask, rows)[..., keys]
            hidden = ~mask if mask.dtype == torch.bool else is_masked(mask)
            if mask.dtype != torch.bool:
                scores = scores + mask
        if self.is_causal and keys.stop > rows.start + 1:
            every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            hidden = every.triu(rows.start - keys.start + 1)
        return (scores if hidden is None else scores.masked_fill(hidden, 0)), hidden

    def forward(self, rows: slice, keys: slice) -> Tensor:
        weights = self.scores(rows, keys)[0].pow(self.power) * rows_of(self.factors, rows)
        return weights.to(self.v.dtype) @ self.v[..., keys, :]

    def backward(self, rows: slice, keys: slice, g: Tensor, into: Gradients) -> None:
        """Add to the gradients what that of the block's output, ``g``, gives."""
        scores, hidden = self.scores(rows, keys)
        at, slope = scores.pow(self.power), self.power * scores.pow(self.power - 1)
        factors, narrow = rows_of(self.factors, rows), self.q.dtype
        q, k, v = self.q[..., rows, :], self.k[..., keys, :], self.v[..., keys, :]
        into.v[..., keys, :] += (at * factors).to(narrow).mT @ g
        by_weight = wide(g @ v.mT)
        add_sum(rows_of(into.factors, rows), (at * by_weight).sum(-1, keepdim=True))
        by_score = by_weight * factors * slope
        if hidden is not None:
            by_score = by_score.masked_fill(hidden, 0)
        if into.mask is not None:
            add_sum(rows_of(into.mask, rows)[..., keys], by_score)
        by_score = (by_score * self.scale).to(narrow)
        into.q[..., rows, :] += by_score @ k
        into.k[..., keys, :] += by_score.mT @ q


@dataclass(frozen=True)
class Gradients:
    """Of a :class:`Problem`, as wide(q), filled block by block."""

    q: Tensor
    k: Tensor
    v: Tensor
    factors: Tensor
    mask: Tensor | None

    @staticmethod
    def of(p: Problem, *, mask: bool) -> Gradients:
        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=p.factors.dtype, device=x.device)

        of_mask = zeros(p.mask) if mask and p.mask is not None else None
        return Gradients(zeros(p.q), zeros(p.k), zeros(p.v), zeros(p.factors), of_mask)


def rows_of(x: Tensor, rows: slice) -> Tensor:
    return x if x.shape[-2] == 1 else x[..., rows, :]


def add_sum(total: Tensor, part: Tensor) -> None:
    """``total += part`` summed over the axes that ``total`` was broadcast along."""
    total += part.sum_to_size(total.shape)


# ---- all of it ---------------------------------------------------------------------------------

BLOCK = 1 << 21
"""Scores that are in memory at once: 8 MB of float32."""


def forward(p: Problem) -> Tensor:
    """``[.., L, V]`` in the dtype of ``v``."""
    parts = [p.forward(rows, keys) for rows, keys in p.blocks(_rows_at_once(p))]
    return torch.cat(parts, -2) if parts else p.v.new_zeros((*p.q.shape[:-1], p.v.shape[-1]))


def backward(p: Problem, g: Tensor, *, mask: bool = False) -> Gradients:
    """The gradients; that of the mask only if asked for."""
    found = Gradients.of(p, mask=mask)
    for rows, keys in p.blocks(_rows_at_once(p)):
        p.backward(rows, keys, g[..., rows, :], found)
    return found


def _rows_at_once(p: Problem) -> int:
    return max(16, BLOCK // max(1, math.prod(p.q.shape[:-2]) * p.k.shape[-2]))
