"""Skips that fade: the schedule, its checkpoint, and what is left at the end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import ResidualError
from rfcompile.training import SkipAnnealer, finalize

X = torch.randn(3, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def annealed() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(Block(), Block())
    return model, rf.transform(model, residual="anneal", example_inputs=(X,))


def gains(model: nn.Module) -> list[float]:
    return [p.item() for name, p in model.named_parameters() if name.endswith(".gain")]


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_gain_goes_from_one_to_zero(shape: Any) -> None:
    original, model = annealed()
    annealer = SkipAnnealer(model, 4, warmup=2, shape=shape)
    assert torch.equal(model(X), original(X))
    seen = []
    for _ in range(7):
        seen.append(annealer.gain)
        assert gains(model) == pytest.approx([annealer.gain] * 2, abs=1e-7)  # float32
        annealer.step()
    linear = [1 - n / 4 for n in range(4)]
    cosine = [(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)]
    assert seen == [1, 1, *(linear if shape == "linear" else cosine), 0]
    assert annealer.is_done
    assert gains(model) == [0, 0]


def test_gains_belong_to_the_schedule_not_to_the_optimizer() -> None:
    _, model = annealed()
    SkipAnnealer(model, 4)
    model(X).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.endswith(".gain")


def test_a_checkpoint_goes_on_where_it_stopped() -> None:
    _, model = annealed()
    annealer = SkipAnnealer(model, 8, shape="linear")
    for _ in range(3):
        annealer.step()
    _, resumed = annealed()
    other = SkipAnnealer(resumed, 100)
    other.load_state_dict(annealer.state_dict())
    assert gains(resumed) == gains(model) == [1 - 3 / 8] * 2
    other.step()
    assert other.gain == 1 - 4 / 8


def test_finalize_leaves_the_branches() -> None:
    original, model = annealed()
    annealer = SkipAnnealer(model, 1)
    pattern = r"2 of 2 gains are not 0 \(0.residual_0: 1, 1.residual_0: 1\): step the SkipAnnealer"
    with pytest.raises(ResidualError, match=pattern) as caught:
        finalize(model)
    assert caught.value.left == ("0.residual_0", "1.residual_0")
    annealer.step()
    faded = model(X)
    assert finalize(model) is model
    assert torch.equal(model(X), faded)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert rf.find_residuals(model, example_inputs=(X,)) == ()


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"steps": 0}, "steps=0, warmup=0, shape='cosine' is no schedule: steps is at least 1"),
        ({"steps": 1, "warmup": -1}, "warmup=-1"),
        ({"steps": 1, "shape": "step"}, "shape='step' is no schedule"),
    ],
)
def test_a_schedule_that_is_none(arguments: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ResidualError, match=pattern):
        SkipAnnealer(annealed()[1], **arguments)


def test_a_model_without_gains() -> None:
    with pytest.raises(ResidualError, match=r"Linear has no residual site with a gain: pass what"):
        SkipAnnealer(nn.Linear(2, 2), 4)
    with pytest.raises(ResidualError, match="Linear has no residual site with a gain to finalize"):
        finalize(nn.Linear(2, 2))
