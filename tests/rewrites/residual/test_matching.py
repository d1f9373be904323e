"""What is added tells which site stands for which add, or nothing does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfcompile.graph.capture import Inputs, in_mode, program_of
from rfcompile.passes.find_residuals import find_residuals
from rfcompile.passes.open_residuals import OpenedSite
from rfcompile.rewrites.residual import surgery
from rfcompile.rewrites.residual.matching import matched_sites
from rfcompile.rewrites.residual.surgery import open_sites
from tests.zoo import NanoGPT, tokens

WIDTH = 8
X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.randn(WIDTH))


class WithBias(Base):
    """One of two adds of a statement is residual."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias + self.f(x)


class Minus(Base):
    def forward(self, x: Tensor) -> Tensor:
        x -= self.f(x)
        return torch.lerp(x, self.f(x), 0.5)


class Twice(Base):
    """A loop: one site for two adds."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.f(x) + x
        return x


class OfZeros(Base):
    """With these parameters nothing is added, and every sum is the same."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.f.weight)
        nn.init.zeros_(self.f.bias)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias + self.f(x)


class Doubled(Base):
    """The same sum, computed twice."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)) * (x + self.f(x))


class TimesZero(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.f(x)


class Stacked(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, self.f(x)]).sum(0)


def both_ways(
    model: nn.Module, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any, int]:
    """What values tell, what a second capture tells, and how many captures there were."""
    told: list[Any] = []
    captures: list[Any] = []
    second = surgery._opened

    def by_values(*args: Any) -> Any:
        found = matched_sites(*args)
        told.append(copy.copy(found))
        told.append(second(args[0], args[1], args[2].graph_module, args[3], ("block",)))
        return found

    def by_capture(*args: Any) -> Any:
        captures.append(args)
        return second(*args)

    monkeypatch.setattr(surgery, "matched_sites", by_values)
    monkeypatch.setattr(surgery, "_opened", by_capture)
    open_sites(model, inputs)
    return told[0], told[1], len(captures)


@pytest.mark.parametrize("kind", [WithBias, Minus, Twice, Doubled, OfZeros, NanoGPT])
def test_values_tell_what_a_second_capture_tells(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: Inputs = ((), tokens()) if kind is NanoGPT else ((X,), {})
    by_values, by_capture, captures = both_ways(kind(), inputs, monkeypatch)
    assert by_values == by_capture
    assert captures == 0


def test_parameters_stay() -> None:
    model = OfZeros()
    open_sites(model, ((X,), {}))
    assert not any(parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [TimesZero, Stacked])
def test_where_values_do_not_tell_the_model_is_captured_again(
    kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_values, by_capture, captures = both_ways(kind(), ((X,), {}), monkeypatch)
    assert by_values is None
    assert len(by_capture) == 1
    assert captures == 1


def test_sites_that_were_there_before() -> None:
    model = nn.Sequential(WithBias(), WithBias())
    opened, _ = open_sites(model, ((X,), {}))
    with in_mode(model, training=False):
        program = program_of(model, ((X,), {}))
    wanted = list(find_residuals(program.graph_module))
    found = matched_sites(model, ((X,), {}), program, wanted)
    assert found == [OpenedSite(add.module, add) for add in wanted]
    assert [site.path for site in found] == [site.path for site in opened]


def test_a_model_that_does_not_run_tells_nothing() -> None:
    model = WithBias()
    opened, _ = open_sites(model, ((X,), {}))
    program = program_of(model, ((X,), {}))
    wanted = [site.add for site in opened]
    assert matched_sites(model, ((X[..., :3],), {}), program, wanted) is None


class Noisy(Base):
    """Random in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.rand_like(x)
        return x + self.f(x)


def test_random_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    by_values, by_capture, captures = both_ways(Noisy(), ((X,), {}), monkeypatch)
    assert by_values == by_capture
    assert captures == 0
    model = Noisy()
    state = torch.random.get_rng_state()
    open_sites(model, ((X,), {}))
    assert torch.equal(torch.random.get_rng_state(), state)
