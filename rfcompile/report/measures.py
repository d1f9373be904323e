"""Measures of a tensor: excess kurtosis, SQNR after quantization, condition numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def excess_kurtosis(x: Tensor) -> float:
    """``E[(x - mean)^4] / Var[x]^2 - 3`` over all elements, in float64: 0 for a Gaussian.

    NaN for a constant, empty or non-finite tensor.
    """
    flat = x.detach().to(torch.float64).flatten()
    centred = flat - flat[:1]  # so that a constant becomes zeros, and not the error of its mean
    centred = centred - centred.mean()
    variance = centred.square().mean()
    return float(centred.pow(4).mean() / variance.square() - 3)


def sqnr_db(x: Tensor, decoded: Tensor) -> float:
    """Signal-to-quantization-noise ratio, ``10 log10(sum x^2 / sum (x - decoded)^2)``, in dB.

    Infinite for an exact copy (also of zeros), NaN for empty and non-finite tensors.
    """
    signal = x.detach().to(torch.float64)
    noise = (signal - decoded.detach().to(torch.float64)).square().sum()
    if noise == 0 and x.numel():
        return math.inf
    return float(10 * torch.log10(signal.square().sum() / noise))


def condition_numbers(x: Tensor) -> Tensor:
    """Largest over smallest of the min(n, d) singular values of each ``[n, d]`` in ``[.., n, d]``,
    in float64; infinite where the smallest is 0, NaN where a value is not finite.
    """
    matrices = x.detach().to(torch.float64).flatten(0, -3) if x.dim() > 2 else x.detach()[None]
    finite = matrices.isfinite().all(-1).all(-1)
    kept = torch.where(finite[:, None, None], matrices, 0).to(torch.float64)
    values: Tensor = torch.linalg.svdvals(kept)
    if not values.numel():
        return values.new_full((len(matrices),), math.nan)
    return torch.where(finite, values[:, 0] / values[:, -1], math.nan)


def condition_number(x: Tensor) -> float:
    """The geometric mean of :func:`condition_numbers`: of a batch of token matrices."""
    return float(condition_numbers(x).log().mean().exp())
