"""What the linears whose weight has two factors have in common: omega and the gain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rfcompile.errors import StateError


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
