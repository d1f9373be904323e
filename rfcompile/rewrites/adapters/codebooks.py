"""Codes of 1 to 8 bits for the values of a tensor, and the codebook of their values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rfcompile.errors import DtypeError, NonFiniteError, OptionError

Codebook = Literal["kmeans", "uniform"]
BITS = tuple(range(1, 9))
_ITERATIONS = 200


def codebook_of(x: Tensor, bits: int, kind: Codebook = "kmeans") -> tuple[Tensor, Tensor]:
    """Codes and levels: ``x`` becomes ``levels[codes]``, the nearest level of each value.

    "uniform": ``2**bits`` levels in even steps from the smallest to the largest value; an element
    is off by at most half a step, ``(max - min) / (2 (2**bits - 1))``, and a rounding to float32.
    "kmeans": Lloyd's algorithm, from the quantiles and from the uniform levels, the better of the
    two; so its squared error is at most that of "uniform". Where the tensor has no more
    distinct values than there are levels, these are the levels, and nothing is lost. Deterministic.

    Args:
        x: float32, float64, bfloat16 or float16, any shape.
        bits: 1 to 8.

    Returns:
        Codes, uint8 of the shape of ``x``, and levels, float32, ascending, ``2**bits`` at most.

    Raises:
        OptionError: bits or kind. DtypeError. NonFiniteError: ``x`` has NaN,
        Inf, or float64 values beyond float32.

    Source: k-means codebooks of adapters are those of arXiv:2505.21895; the start is ours.
    """
    if type(bits) is not int or bits not in BITS:
        raise OptionError("bits", bits, "choose one of 1 to 8.")
    if kind not in ("kmeans", "uniform"):
        raise OptionError("codebook", kind, "choose 'kmeans' or 'uniform'.")
    if not x.is_floating_point():
        raise DtypeError("the tensor", x.dtype, ["torch.float32", "torch.bfloat16"])
    values = x.detach().double().flatten()
    if not bool(values.isfinite().all()):
        rule = "Mend the factor; the codebook 'wire' carries it as NaN."
        raise NonFiniteError("a codebook", rule=rule)
    levels = _levels(values, 2**bits, kind).float()
    if not bool(levels.isfinite().all()):
        rule = "Its values exceed float32, in which levels are kept: scale the factor."
        raise NonFiniteError("a codebook", rule=rule)
    middles = (levels[1:].double() + levels[:-1].double()) / 2
    codes: Tensor = torch.searchsorted(middles, values)
    return codes.to(torch.uint8).view(x.shape), levels


def _levels(values: Tensor, number: int, kind: Codebook) -> Tensor:
    if values.numel() == 0:
        return values
    ordered = values.sort().values
    low, high = ordered[0], ordered[-1]
    steps = torch.linspace(0, 1, number, dtype=ordered.dtype, device=ordered.device)
    even: Tensor = low + (high - low) * steps
    if kind == "uniform":
        return even
    distinct: Tensor = ordered.unique_consecutive()
    if len(distinct) <= number:
        return distinct
    quantiles = ordered[((steps * (number - 1) + 0.5) / number * len(ordered)).long()]
    if len(quantiles.unique()) < number:  # the same value many times
        quantiles = distinct[(steps * (len(distinct) - 1)).long()]
    # Sums of sorted runs; centred, so that differences of sums keep their digits.
    centre = ordered.mean()
    found = [_lloyd(ordered - centre, start - centre) for start in (quantiles, even)]
    return min(found, key=lambda pair: pair[0])[1] + centre


def _lloyd(ordered: Tensor, levels: Tensor) -> tuple[float, Tensor]:
    """Squared error and levels after Lloyd's algorithm on sorted values.

    A cluster is a run of them. One that gets empty keeps its level, which does no harm.
    """
    sums = torch.nn.functional.pad(ordered.cumsum(0), (1, 0))
    ends = None
    for _ in range(_ITERATIONS):
        inner = torch.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2, right=True)
        new = torch.nn.functional.pad(inner, (1, 1))
        new[-1] = len(ordered)
        if ends is not None and torch.equal(ends, new):
            break
        ends, counts = new, new.diff()
        means = sums[new].diff() / counts.clamp(min=1)
        levels = torch.where(counts > 0, means, levels).sort().values
    codes = torch.searchsorted((levels[1:] + levels[:-1]) / 2, ordered)
    return float((levels[codes] - ordered).square().sum()), levels


# ---- codes as bytes ------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes below ``2**bits`` as a stream of bits, low bits first: uint8 ``[ceil(n * bits / 8)]``.

    The codec's planes do not serve here: they have neither 1 nor 7 bits, and pad to a group.
    """
    place = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes.reshape(-1, 1) >> place & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream << place).sum(1).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The codes, int64 [numel], of what :func:`pack_codes` returned."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = packed.unsqueeze(1) >> place & 1
    used = stream.flatten()[: numel * bits].view(numel, bits).long()
    return (used << torch.arange(bits, device=packed.device)).sum(1)
