"""Models that do in training mode what they do in eval mode, and others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfcompile.graph.calls import trains_as_it_evaluates

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(8, 8), nn.Linear(8, 8)


class Same(Base):
    """A transformer's layer with dropout and attention."""

    def forward(self, x: Tensor) -> Tensor:
        rate = 0.5 if self.training else 0.0
        x = x + F.dropout(self.f(x), training=self.training)
        return x + F.scaled_dot_product_attention(x, x, self.g(x), dropout_p=rate)


class OtherLine(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.f(x)
        return x + self.f(x)


class OtherFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        act = torch.tanh if self.training else torch.sigmoid
        return act(self.f(x))


class OtherTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        z = self.g(x)
        return x + (y if self.training else z)


class OneMore(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return y + torch.rand_like(y) if self.training else y


class NotInTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("call eval() first")
        return self.f(x)


@pytest.mark.parametrize("training", [False, True])
def test_the_same_in_both_modes(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    for model in (Same(), nn.Sequential(Same(), nn.Dropout()), layer):
        model.train(training)
        assert trains_as_it_evaluates(model, ((X,), {}))
        assert model.training == training


@pytest.mark.parametrize("kind", [OtherLine, OtherFunction, OtherTensor, OneMore, NotInTraining])
def test_something_else_in_training(kind: type[nn.Module]) -> None:
    assert not trains_as_it_evaluates(kind(), ((X,), {}))


def test_state_and_random_numbers_stay() -> None:
    model = nn.Sequential(Same(), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trains_as_it_evaluates(model, ((X,), {}))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
