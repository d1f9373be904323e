"""The outline of a model: its calls in order, with the types of their outputs."""

from __future__ import annotations

import torch
from torch import nn

from rfcompile.graph.outline import Called, outline_of, outlined
from tests.zoo import NanoGPT


class Reversed(nn.Module):
    """Calls its modules the other way round, one of them twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(self.first(x)))


def test_calls_are_in_the_order_in_which_they_began() -> None:
    model = Reversed()
    with outlined(model) as outline:
        model(torch.randn(3, 4))
    model(torch.randn(3, 4))
    assert outline.calls == (
        Called("", "Reversed", "f32[3, 2]"),
        Called("first", "Linear", "f32[3, 4]"),
        Called("last", "Linear", "f32[3, 2]"),
    )
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_model_that_did_not_run_is_outlined_as_it_is_held() -> None:
    calls = outline_of(NanoGPT())
    assert calls[0] == Called("", "NanoGPT")
    assert {"blocks", "blocks.0", "blocks.1"} <= {call.module for call in calls}
