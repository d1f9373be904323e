"""Polynomial attention in tensor code: the weights, and their product with the values in blocks.

No N x N matrix is kept: a block of queries at a time computes its scores, and backward computes
them again. For powers 1 and 2 there is also a form whose cost grows with N alone.
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


def row_factors(count: Tensor, power: int, scale: str) -> Tensor:
    """What the powers in a row of attention weights are multiplied by, float32.

    "sequence": ``1 / sqrt(N)``, the paper's. "row" and "learned": ``1 / sqrt(n (2p - 1)!!)``: the
    row of ``n`` visible keys has then the expected squared L2 norm 1 for scores of N(0, 1).

    Args:
        count: keys that a row sees (N for "sequence"), of any shape; a row without any counts 1.
    """
    spread = 1 if scale == "sequence" else math.prod(range(1, 2 * power, 2))
    return (count.clamp(min=1).float() * spread).rsqrt()


def is_masked(scores: Tensor) -> Tensor:
    """NaN is no mask: it stays NaN."""
    return scores <= MASKED


def weights_of(scores: Tensor, power: int, scale: str, gain: Tensor | None = None) -> Tensor:
    """``gain * factor * s^p`` along the last axis, 0 for masked scores; computed in float32.

    Args:
        scores: ``[.., rows, keys]``, their masks added; dtype out = dtype in.
    Source: arXiv:2410.18613, activation x^p / sqrt(N); counting visible keys, ``(2p - 1)!!`` and
    the gain are ours.
    """
    visible = ~is_masked(scores)
    count = visible.sum(-1, keepdim=True)
    if scale == "sequence":
        count = torch.full_like(count, scores.shape[-1])
    factors = row_factors(count, power, scale)
    if gain is not None:
        factors = factors * gain.float()
    # Masked before the power: the gradient of an infinite power times 0 would be NaN.
    kept = torch.where(visible, scores, 0.0).float()
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
        factors: ``[.., L or 1, 1]`` float32, broadcast to q's leading sizes, as the mask is.
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
        """``scale q k + mask`` of a block in float32, 0 where hidden, and where that is."""
        scores = (self.q[..., rows, :] @ self.k[..., keys, :].mT).float() * self.scale
        hidden = None
        if self.mask is not None:
            mask = _rows(self.mask, rows)[..., keys]
            hidden = ~mask if mask.dtype == torch.bool else is_masked(mask)
            if mask.dtype != torch.bool:
                scores = scores + mask
        if self.is_causal and keys.stop > rows.start + 1:
            every = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            hidden = every.triu(rows.start - keys.start + 1)
        return (scores if hidden is None else scores.masked_fill(hidden, 0)), hidden

    def forward(self, rows: slice, keys: slice) -> Tensor:
        weights = self.scores(rows, keys)[0].pow(self.power) * _rows(self.factors, rows)
        return weights.to(self.v.dtype) @ self.v[..., keys, :]

    def backward(self, rows: slice, keys: slice, g: Tensor, into: Gradients) -> None:
        """Add to the gradients what that of the block's output, ``g``, gives."""
        scores, hidden = self.scores(rows, keys)
        at, slope = scores.pow(self.power), self.power * scores.pow(self.power - 1)
        factors, narrow = _rows(self.factors, rows), self.q.dtype
        q, k, v = self.q[..., rows, :], self.k[..., keys, :], self.v[..., keys, :]
        into.v[..., keys, :] += (at * factors).to(narrow).mT @ g
        by_weight = (g @ v.mT).float()
        _add(_rows(into.factors, rows), (at * by_weight).sum(-1, keepdim=True))
        by_score = by_weight * factors * slope
        if hidden is not None:
            by_score = by_score.masked_fill(hidden, 0)
        if into.mask is not None:
            _add(_rows(into.mask, rows)[..., keys], by_score)
        by_score = (by_score * self.scale).to(narrow)
        into.q[..., rows, :] += by_score @ k
        into.k[..., keys, :] += by_score.mT @ q


@dataclass(frozen=True)
class Gradients:
    """Of a :class:`Problem`, in float32, filled block by block."""

    q: Tensor
    k: Tensor
    v: Tensor
    factors: Tensor
    mask: Tensor | None

    @staticmethod
    def of(p: Problem, *, mask: bool) -> Gradients:
        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device)

        of_mask = zeros(p.mask) if mask and p.mask is not None else None
        return Gradients(zeros(p.q), zeros(p.k), zeros(p.v), zeros(p.factors), of_mask)


def _rows(x: Tensor, rows: slice) -> Tensor:
    return x if x.shape[-2] == 1 else x[..., rows, :]


def _add(total: Tensor, part: Tensor) -> None:
    """``total += part`` summed over the axes that ``total`` was broadcast along."""
    total += part.sum_to_size(total.shape)


# ---- all of it ---------------------------------------------------------------------------------

BLOCK = 1 << 21
"""Scores that are in memory at once: 8 MB of float32."""
CHUNK = 128
"""Tokens whose features the linear form has in memory at once."""


def forward(p: Problem, form: str = "auto") -> Tensor:
    """``[.., L, V]`` in the dtype of ``v``."""
    if is_linear(p, form):
        return _linear_forward(_without_mask(p))
    parts = [p.forward(rows, keys) for rows, keys in p.blocks(_rows_at_once(p))]
    return torch.cat(parts, -2) if parts else p.v.new_zeros((*p.q.shape[:-1], p.v.shape[-1]))


def backward(p: Problem, g: Tensor, *, mask: bool = False, form: str = "auto") -> Gradients:
    """The gradients; that of the mask only if asked for."""
    found = Gradients.of(p, mask=mask)
    if is_linear(p, form) and not mask:
        _linear_backward(_without_mask(p), g, found)
        return found
    for rows, keys in p.blocks(_rows_at_once(p)):
        p.backward(rows, keys, g[..., rows, :], found)
    return found


def _rows_at_once(p: Problem) -> int:
    return max(16, BLOCK // max(1, math.prod(p.q.shape[:-2]) * p.k.shape[-2]))


# ---- the linear form ---------------------------------------------------------------------------
# s^p is an inner product of features of q and k: themselves, or their products in pairs.


def num_features(width: int, power: int) -> int:
    """``d``, or pairs: d (d + 1) / 2 and those of one group of ``GROUP`` features twice."""
    if power == 1:
        return width
    return sum(min(GROUP, width - a) * (width - a) for a in range(0, width, GROUP))


GROUP = 8
"""Pairs are made group by group, as outer products: gathering each once took ten times as long."""


def can_be_linear(p: Problem) -> bool:
    """Power 1 or 2, and every row sees the same keys, or all before it."""
    same_keys = p.mask is None or (p.mask.dtype == torch.bool and p.mask.shape[-2] == 1)
    return p.power <= 2 and same_keys and p.q.shape[-2] > 0


def is_linear(p: Problem, form: str) -> bool:
    """"auto": where it multiplies less (see ``benchmarks/companions.py``)."""
    if form != "auto" or not can_be_linear(p):
        return form == "linear" and can_be_linear(p)
    width, tokens = p.q.shape[-1], p.k.shape[-2] // (2 if p.is_causal else 1)
    return ADVANTAGE * num_features(width, p.power) * p.v.shape[-1] < tokens * (
        width + p.v.shape[-1]
    )


ADVANTAGE = 3.0
"""Two products an output, one to build the state and one to read it, and the features besides."""


def features(x: Tensor, power: int) -> Tensor:
    """``phi(x)`` in float32 with ``phi(x) . phi(y) = (x . y)^power``, for power 1 and 2.

    Error bound: the dot product of features of floats is within ``f eps |x|^p |y|^p`` of the power,
    ``f`` the number of features; unlike that of the power itself the bound does not get smaller
    where ``x . y`` is small.
    """
    x = x.float()
    if power == 1:
        return x
    pairs = (left.unsqueeze(-1) * right.unsqueeze(-2) for left, right, _ in _pairs(x))
    return torch.cat([pair.flatten(-2) for pair in pairs], -1)


def features_backward(x: Tensor, g: Tensor, power: int) -> Tensor:
    if power == 1:
        return g
    x = x.float()
    grad, start = torch.zeros_like(x), 0
    for number, (left, right, weight) in enumerate(_pairs(x)):
        first, size = number * GROUP, left.shape[-1] * right.shape[-1]
        part = g[..., start : start + size].unflatten(-1, (left.shape[-1], right.shape[-1]))
        grad[..., first : first + GROUP] += (part * right.unsqueeze(-2)).sum(-1)
        grad[..., first:] += (part * left.unsqueeze(-1)).sum(-2) * weight
        start += size
    return grad


def _pairs(x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A group of features, and it with all later ones, which count twice."""
    weight = torch.full(x.shape[-1:], math.sqrt(2.0), device=x.device)
    weight[:GROUP] = 1
    for start in range(0, x.shape[-1], GROUP):
        by = weight[: x.shape[-1] - start]
        yield x[..., start : start + GROUP], x[..., start:] * by, by


def _without_mask(p: Problem) -> Problem:
    """Keys that nobody sees become zeros: so do their weights."""
    if p.mask is None:
        return p
    hidden = ~p.mask.mT
    k, v = p.k.masked_fill(hidden, 0), p.v.masked_fill(hidden, 0)
    return Problem(p.q, k, v, p.factors, None, p.is_causal, p.scale, p.power)


def _chunks(size: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, size)) for i in range(0, size, CHUNK)]


def _state(p: Problem) -> Tensor:
    return p.k.new_zeros(
        (*p.k.shape[:-2], num_features(p.k.shape[-1], p.power), p.v.shape[-1]), dtype=torch.float32
    )


def _linear_forward(p: Problem) -> Tensor:
    parts = []
    for rows, state in _states(p):
        queries = features(p.q[..., rows, :] * p.scale, p.power)
        part = queries @ state * _rows(p.factors, rows)
        if p.is_causal:
            part = part + p.forward(rows, _own(p, rows))
        parts.append(part.to(p.v.dtype))
    return torch.cat(parts, -2)


def _states(p: Problem) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of rows with ``sum_j phi(k_j) v_j^T`` of the keys that all of its rows see."""
    state = _state(p)
    keys = iter(_chunks(p.k.shape[-2]))
    if not p.is_causal:
        for chunk in keys:
            state += features(p.k[..., chunk, :], p.power).mT @ p.v[..., chunk, :].float()
    for rows in _chunks(p.q.shape[-2]):
        yield rows, state
        chunk = next(keys, slice(0, 0))
        if p.is_causal:
            state += features(p.k[..., chunk, :], p.power).mT @ p.v[..., chunk, :].float()


def _own(p: Problem, rows: slice) -> slice:
    """The keys of a chunk of rows; none beyond the last key."""
    return slice(min(rows.start, p.k.shape[-2]), min(rows.stop, p.k.shape[-2]))


def _linear_backward(p: Problem, g: Tensor, into: Gradients) -> None:
    for rows, state in _states(p):
        factors, scaled = _rows(p.factors, rows), p.q[..., rows, :] * p.scale
        queries, by_query = features(scaled, p.power), g[..., rows, :].float() @ state.mT
        _add(_rows(into.factors, rows), (queries * by_query).sum(-1, keepdim=True))
        into.q[..., rows, :] += features_backward(scaled, by_query * factors, p.power) * p.scale
        if p.is_causal:
            p.backward(rows, _own(p, rows), g[..., rows, :], into)
    state = _state(p)  # from here on its gradient, that of the rows after a chunk or of all rows
    for rows in reversed(_chunks(p.q.shape[-2])):
        if p.is_causal:
            _scatter(p, _own(p, rows), state, into)
        queries = features(p.q[..., rows, :] * p.scale, p.power)
        state += queries.mT @ (g[..., rows, :] * _rows(p.factors, rows))
    for keys in [] if p.is_causal else _chunks(p.k.shape[-2]):
        _scatter(p, keys, state, into)


def _scatter(p: Problem, keys: slice, state: Tensor, into: Gradients) -> None:
    k, v = p.k[..., keys, :], p.v[..., keys, :].float()
    into.k[..., keys, :] += features_backward(k, v @ state.mT, p.power)
    into.v[..., keys, :] += features(k, p.power) @ state
