"""Linears whose weight is computed from two factors: the formula and the base module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rfcompile.errors import StateError


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


class FactoredLinear(nn.Module):
    """A linear with ``omega`` (None: no sine) and ``gain``, which are numbers and no tensors.

    Without them its factors say nothing: a fit chooses its gain from the weights, an adapter from
    alpha. So they are in the state_dict, as ``_extra_state``: float64 [omega or 0, gain].
    """

    omega: float | None
    gain: float

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.omega or 0.0, self.gain], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        fits = isinstance(state, Tensor) and state.shape == (2,) and bool(state.isfinite().all())
        if not fits or state[0] < 0 or state[1] <= 0:
            rule = f"It is {state}, not [omega or 0, gain]: save the state_dict anew."
            raise StateError("damaged scales of a weight of two factors", ["_extra_state"], rule)
        omega, self.gain = state.tolist()
        self.omega = omega or None
