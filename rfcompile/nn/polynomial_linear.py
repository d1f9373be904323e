"""Polynomial attention of power 1 and 2 whose cost grows linearly with the tokens.

``(q k)^p = phi(q) phi(k)``, phi being the vector itself or its products in pairs, so that
``sum_j (q k_j)^p v_j = phi(q) (sum_j phi(k_j) v_j^T)``: the sum is a state of fixed size. A causal
attention goes through the tokens chunk by chunk: earlier chunks are in the state, and its own is
done as the quadratic form does it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rfcompile.nn.polynomial import Gradients, Problem, add_sum, rows_of, wide

CHUNK = 128
"""Tokens whose features are in memory at once."""


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
    """ "auto": where it multiplies less (see ``benchmarks/companions.py``)."""
    if form != "auto" or not can_be_linear(p):
        return form == "linear" and can_be_linear(p)
    width, tokens = p.q.shape[-1], p.k.shape[-2] // (2 if p.is_causal else 1)
    return ADVANTAGE * num_features(width, p.power) * p.v.shape[-1] < tokens * (
        width + p.v.shape[-1]
    )


ADVANTAGE = 3.0
"""Two products an output, one to build the state and one to read it, and the features besides."""


def features(x: Tensor, power: int) -> Tensor:
    """``phi(x)`` of ``x`` as wide(x) with ``phi(x) . phi(y) = (x . y)^power``, for power 1 and 2.

    Error bound: the dot product of features of floats is within ``f eps |x|^p |y|^p`` of the power,
    ``f`` the number of features; unlike that of the power itself the bound does not get smaller
    where ``x . y`` is small.
    """
    x = wide(x)
    if power == 1:
        return x
    pairs = (left.unsqueeze(-1) * right.unsqueeze(-2) for left, right, _ in _pairs(x))
    return torch.cat([pair.flatten(-2) for pair in pairs], -1)


def features_backward(x: Tensor, g: Tensor, power: int) -> Tensor:
    if power == 1:
        return g
    x = wide(x)
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
    weight = torch.full(x.shape[-1:], math.sqrt(2.0), dtype=x.dtype, device=x.device)
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
        (*p.k.shape[:-2], num_features(p.k.shape[-1], p.power), p.v.shape[-1]),
        dtype=p.factors.dtype,
    )


def forward(p: Problem) -> Tensor:
    """As the quadratic form's, up to rounding."""
    p = _without_mask(p)
    parts = []
    for rows, state in _states(p):
        queries = features(wide(p.q[..., rows, :]) * p.scale, p.power)
        part = queries @ state * rows_of(p.factors, rows)
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
            state += features(p.k[..., chunk, :], p.power).mT @ wide(p.v[..., chunk, :])
    for rows in _chunks(p.q.shape[-2]):
        yield rows, state
        chunk = next(keys, slice(0, 0))
        if p.is_causal:  # not in place: who differentiates backward keeps each
            state = state + features(p.k[..., chunk, :], p.power).mT @ wide(p.v[..., chunk, :])


def _own(p: Problem, rows: slice) -> slice:
    """The keys of a chunk of rows; none beyond the last key."""
    return slice(min(rows.start, p.k.shape[-2]), min(rows.stop, p.k.shape[-2]))


def backward(p: Problem, g: Tensor) -> Gradients:
    p = _without_mask(p)
    into = Gradients.of(p, mask=False)
    for rows, state in _states(p):
        factors, scaled = rows_of(p.factors, rows), wide(p.q[..., rows, :]) * p.scale
        queries, by_query = features(scaled, p.power), wide(g[..., rows, :]) @ state.mT
        add_sum(rows_of(into.factors, rows), (queries * by_query).sum(-1, keepdim=True))
        into.q[..., rows, :] += features_backward(scaled, by_query * factors, p.power) * p.scale
        if p.is_causal:
            p.backward(rows, _own(p, rows), g[..., rows, :], into)
    state = _state(p)  # from here on its gradient, that of the rows after a chunk or of all rows
    for rows in reversed(_chunks(p.q.shape[-2])):
        if p.is_causal:
            _scatter(p, _own(p, rows), state, into)
        queries = features(wide(p.q[..., rows, :]) * p.scale, p.power)
        state = state + queries.mT @ (g[..., rows, :] * rows_of(p.factors, rows))
    for keys in [] if p.is_causal else _chunks(p.k.shape[-2]):
        _scatter(p, keys, state, into)
    return into


def _scatter(p: Problem, keys: slice, state: Tensor, into: Gradients) -> None:
    k, v = p.k[..., keys, :], wide(p.v[..., keys, :])
    into.k[..., keys, :] += features_backward(k, v @ state.mT, p.power)
    into.v[..., keys, :] += features(k, p.power) @ state
