"""The oracle of ``make test-zoo`` on models whose residual adds were counted by reading them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import differences, residual_adds
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["nanogpt", "convnext", "resnet"])
def test_copied_skips_are_seen(name: str) -> None:
    entry = ZOO[name]
    copied = sum(number for kind, number in entry.kinds.items() if kind != "projection")
    assert len(residual_adds(entry.build().eval(), entry.inputs())) == copied


class Sum(nn.Module):
    """One sum, spelled as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "in place":
                return self.linear(x).add_(x)
            case "scaled and moved":
                return self.linear(x).t() + 0.5 * x.t().contiguous()
            case "late":
                y = self.linear(x)
                return self.linear(y.relu()) + self.linear(y) + x
            case "no contraction":
                return x + x.relu()
            case "beside":
                return self.linear(x) + self.linear(x.relu())
            case "gated":
                return self.linear(x) + x * x.sigmoid()
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    ("how", "number"),
    [
        *(("in place", 1), ("scaled and moved", 1), ("late", 1)),
        *(("no contraction", 0), ("beside", 0), ("gated", 0)),
    ],
)
def test_what_is_a_residual_add(how: str, number: int) -> None:
    assert len(residual_adds(Sum(how), {"x": torch.randn(4, 4)})) == number


def test_lines_are_compared_with_those_that_led_to_an_add() -> None:
    seen: Any = [["helper.py:1", "model.py:5"], ["model.py:9"], ["model.py:9"]]
    assert differences(seen, ["model.py:5", "model.py:9", "model.py:9"]) == ([], [])
    assert differences(seen, ["model.py:9", "other.py:2"]) == (
        ["helper.py:1", "model.py:9"],
        ["other.py:2"],
    )
