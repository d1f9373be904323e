"""Computes the two factors of a weight: drawn anew, or fitted to the old weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rfcompile.errors import NonFiniteError
from rfcompile.nn.low_rank import low_rank_weight
from rfcompile.rewrites.low_rank.svd import leading_svd


@dataclass(frozen=True)
class Factors:
    """``low_rank_weight(left, right, omega, gain)``; ``error`` and ``svd_error`` of a fit are
    ``|W - fit|_F / |W|_F`` of this one and of the best plain product of the same rank.
    """

    left: Tensor
    right: Tensor
    omega: float | None
    gain: float
    error: float | None = None
    svd_error: float | None = None

    @property
    def spread(self) -> float:
        """Standard deviation of the phase ``omega left @ right``, in radians; 0 without a sine."""
        product = torch.mm(self.left, self.right)
        return 0.0 if self.omega is None else self.omega * float(product.std(correction=0))


def omega_for(spread: float, inputs: int, rank: int) -> float:
    """``spread * n_in / sqrt(rank)``: the phase of factors drawn from N(0, 1 / n_in) has this
    standard deviation, in radians.

    Source: ours. The paper gives no rule. Below 1 the sine is nearly the identity and the weight of
    low rank; above 2 pi it is a hash, hard to optimize. Omega and the scale of the factors are one
    degree of freedom, so at a given spread omega only says how fast the factors learn.
    """
    return spread * inputs / math.sqrt(rank)


def drawn(
    weight: Tensor, rank: int, omega: float | None, gain: float | None, generator: torch.Generator
) -> Factors:
    """New factors, elements N(0, 1 / n_in); a weight of zeros (the end of a branch) starts at zero.

    Args:
        weight: [out, in], of which only shape and zeros matter.
        omega: None: no sine.
        gain: None: ``sqrt(n_in)``, for which the weight has the scale of usual ones, about
            ``0.7 / sqrt(n_in)``; without a sine the gain that gives the same.

    Source: the gain is the authors' code's; the rest is ours.
    """
    outputs, inputs = weight.shape
    std = inputs**-0.5
    left = std * torch.randn(outputs, rank, generator=generator)
    right = std * torch.randn(rank, inputs, generator=generator)
    if gain is None:
        gain = inputs**0.5 if omega is not None else math.sqrt(2 * rank / inputs)
    if not weight.any():
        left = torch.zeros_like(left)
    return Factors(left, right, omega, gain)


def fitted(
    weight: Tensor,
    rank: int,
    omega: float | None,
    gain: float | None,
    generator: torch.Generator,
    steps: int,
) -> Factors:
    """The factors nearest to a weight, by ``|W - fit|_F``; without a sine exactly the nearest, but
    for what :func:`~rfcompile.rewrites.low_rank.svd.leading_svd` says of large matrices.

    With one: the truncated SVD of ``arcsin(g W) / omega``, clipped to where arcsin is defined, then
    ``steps`` of Adam with a cosine schedule; the best of them all is kept, so the fit is never
    worse than its start. Without a gain both ``1 / max|W|``, where the start is nearly a plain
    SVD, and ``0.7 / std(W)``, where the sine bends, are fitted, and the better one is taken.

    Raises:
        NonFiniteError: the weight has NaN or Inf.

    Source: ours.
    """
    if not bool(weight.isfinite().all()):
        raise NonFiniteError("the fit of a weight", rule="Mend it, or LowRank(start='fresh').")
    if not weight.any():
        return drawn(weight, rank, omega, gain, generator)
    # Of a largest element of 1, so that no norm overflows or vanishes.
    wide = weight if weight.dtype is torch.float64 else weight.float()
    peak = float(wide.abs().max())
    exact = (wide / peak).float()
    left, right, rest = _truncated(exact, rank)
    svd_error = float(rest / exact.norm())
    if omega is None:
        scale = 1.0 if gain is None else gain
        root = (scale * peak) ** 0.5
        return Factors(left * root, right * root, None, scale, svd_error, svd_error)
    gains = [1.0] if gain is None else [gain * peak]
    if gain is None and float(exact.std(correction=0)) > 0:
        gains.append(math.sqrt(0.5) / float(exact.std(correction=0)))
    fits = [_fitted(exact, rank, omega, g, steps) for g in gains]
    error, left, right, best = min(fits, key=lambda fit: fit[0])
    return Factors(left, right, omega, best / peak, error, svd_error)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Balanced factors of the nearest matrix of this rank, and its distance."""
    u, values, v = leading_svd(matrix, rank)
    root = values.sqrt()
    # FSDP2 takes no other parameters.
    left, right = (u * root).contiguous(), (root[:, None] * v).contiguous()
    return left, right, torch.linalg.norm(matrix - left @ right)


def _fitted(
    weight: Tensor, rank: int, omega: float, gain: float, steps: int
) -> tuple[float, Tensor, Tensor, float]:
    # In factors of the phase itself, of which omega takes nothing: one learning rate suits all.
    left, right, _ = _truncated(torch.asin((gain * weight).clamp(-1, 1)), rank)
    best = (math.inf, left, right)
    with torch.enable_grad():
        left, right = left.clone().requires_grad_(), right.clone().requires_grad_()
        optimizer = torch.optim.Adam([left, right], lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        for step in range(steps + 1):
            error = (low_rank_weight(left, right, 1.0, gain) - weight).norm() / weight.norm()
            if float(error.detach()) < best[0]:
                best = (float(error.detach()), left.detach().clone(), right.detach().clone())
            if step < steps:
                optimizer.zero_grad()
                error.square().backward()
                optimizer.step()
                schedule.step()
    return best[0], best[1] / omega**0.5, best[2] / omega**0.5, gain
