"""The formula of a low-rank weight, with a sine or without; every path of the package calls it."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_weight(left: Tensor, right: Tensor, omega: float | None, gain: float) -> Tensor:
    """``sin(omega * left @ right) / gain``, element by element; ``left @ right / gain`` without
    omega.

    Dense: a call forms the phase and the weight, and training keeps the phase for the backward
    pass: ``out * in`` elements each, as the weight and its gradient would take.

    Args:
        left: [out, rank]. right: [rank, in]. Of one dtype, which the weight has too.
        omega: in radians a unit of ``left @ right``; None: no sine.
        gain: what the weight is divided by, so that no element exceeds ``1 / gain``.

    Error: in bfloat16 the phase is rounded to 8 bits, so an element is off by up to
    ``2**-8 * |phase| / gain``, and by the rounding of the factors. Inf and NaN give NaN.

    Source: Efficient Learning With Sine-Activated Low-rank Matrices, arXiv:2403.19243, eq. 3, its
    g our ``gain``; there omega and g are fixed, too.
    """
    if omega is None:
        return torch.mm(torch.div(left, gain), right)
    return torch.div(torch.sin(torch.mm(torch.mul(left, omega), right)), gain)
