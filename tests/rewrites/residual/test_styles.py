"""Residual-free models of code that is written, wrapped or cast in other ways than most is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import rfcompile as rf
from rfcompile.errors import ResidualError
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.training import optimizers
from tests.zoo import Block

X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def sites_of(model: nn.Module) -> list[ResidualSite]:
    return [module for module in model.modules() if isinstance(module, ResidualSite)]


def roles(model: nn.Module) -> dict[str, str]:
    return {item.parameter: item.rule for item in rf.training.residual_report(model).initialized}


class Two(nn.Module):
    """Two blocks of width 16, each of attention and MLP."""

    first: nn.Module
    second: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(16), Block(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


# ---- dtypes and shapes -------------------------------------------------------------------------


class Narrow(nn.Module):
    """The branch is one vector of a sequence, in half the precision of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).mean(1, keepdim=True).bfloat16()


@pytest.mark.parametrize("mode", ["free", "mix"])
def test_a_sum_keeps_its_shape_and_dtype(mode: str) -> None:
    new = rf.transform(Narrow(), residual=mode, example_inputs=(X,))
    branch = new.linear(X).mean(1, keepdim=True).bfloat16().float().expand_as(X)
    if mode == "mix":
        branch = branch @ sites_of(new)[0].weight.T
    torch.testing.assert_close(new(X), branch)
    assert new(X).dtype == torch.float32
    traced = fx.symbolic_trace(new)
    assert torch.equal(traced(X), new(X))
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(X), new(X))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixing_starts_orthogonal_in_any_dtype(dtype: torch.dtype) -> None:
    new = rf.transform(Two().to(dtype), residual="mix", example_inputs=(X.to(dtype),))
    for site in sites_of(new):
        assert site.weight.dtype == dtype
        gram = site.weight.float() @ site.weight.float().T
        # A row of 16 numbers below 1, each rounded by at most half the dtype's spacing.
        assert float((gram - torch.eye(16)).detach().abs().max()) <= 16 * torch.finfo(dtype).eps


# ---- regions -----------------------------------------------------------------------------------


class Cast(Two):
    """Autocast around a method, and a region in it that is exempt."""

    @torch.autocast("cpu", dtype=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.autocast("cpu", enabled=False):
            return self.second(x.float())


class WithoutGradients(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.first(x)
        return self.second(x)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Cast, WithoutGradients])
@pytest.mark.parametrize("mode", ["anneal", "free", "mix"])
def test_regions(cls: type[nn.Module], mode: str) -> None:
    model = cls().eval()
    new = rf.transform(model, residual=mode, example_inputs=(X,))
    report = rf.training.residual_report(new)
    assert len(report.sites) == 4
    assert report.notes == ()
    if mode == "anneal":
        assert torch.equal(new(X), model(X))
        return
    plain = rf.transform(Two(), residual=mode, example_inputs=(X,))
    assert roles(new) == roles(plain)
    assert [t.name for t in report.temperatures] == [
        "first.attention.qkv.temperature",
        "second.attention.qkv.temperature",
    ]
    new(X).float().sum().backward()
    assert new.get_parameter("second.attention.qkv.weight").grad is not None


# ---- parameters --------------------------------------------------------------------------------


def test_a_weight_under_two_names_is_initialized_once() -> None:
    model = Two()
    model.second.mlp = model.first.get_submodule("mlp")
    new = rf.transform(model, residual="free", example_inputs=(X,))
    assert {name for name, rule in roles(new).items() if rule == "mlp"} == {
        "first.mlp.0.weight",
        "first.mlp.2.weight",
    }
    assert rf.training.residual_report(new).notes == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_computed_weights_are_told_and_tempered(parametrize: Callable[..., nn.Module]) -> None:
    model = Two()
    parametrize(model.get_submodule("first.attention.qkv"))
    new = rf.transform(model, residual="free", example_inputs=(X,))
    report = rf.training.residual_report(new)
    assert report.temperatures[0].name == "first.attention.qkv.temperature"
    assert "first.attention.qkv.weight" not in roles(new)
    (note,) = report.notes
    assert "first.attention.qkv.parametrizations.weight.original" in note


@pytest.mark.slow
def test_buffers_stay_as_they_are() -> None:
    class Counting(Two):
        steps: Tensor
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.mean = self.mean + 1
            return super().forward(x) * self.steps

    for mode in ("anneal", "free"):
        model = Counting()
        new = rf.transform(model, residual=mode, example_inputs=(X,))
        optimizers(model, example_inputs=(X,))
        for one in (model, new):
            assert not one.get_buffer("steps").any()
            assert not one.get_buffer("mean").any()


# ---- wrappers ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap", [checkpoint_wrapper, lambda block: torch.compile(block, backend="eager")]
)
def test_wrapped_blocks(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain = rf.transform(Two().eval(), residual="free", example_inputs=(X,))
    model = Two().eval()
    model.first, model.second = wrap(model.first), wrap(model.second)
    wrapped = [type(model.first), type(model.second)]
    new = rf.transform(model, residual="free", example_inputs=(X,))
    assert [type(new.first), type(new.second)] == wrapped
    assert roles(new) == roles(plain)
    new.load_state_dict(dict(zip(new.state_dict(), plain.state_dict().values(), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(new(X), plain(X))
    hidden = {id(p) for p in optimizers(new, example_inputs=(X,)).param_groups[0]["params"]}
    assert hidden == {
        id(new.get_parameter(name)) for name, rule in roles(new).items() if rule != "zero"
    }
    torch._dynamo.reset()


@pytest.mark.slow
def test_transform_in_inference_mode_gives_a_model_to_train() -> None:
    model = Two()
    with torch.inference_mode():
        new = rf.transform(model, residual="free", example_inputs=(X.clone(),))
    new(X).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


# ---- additions that serve several places -------------------------------------------------------


class Swapped(Block):
    def plus(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def forward(self, x: Tensor) -> Tensor:
        x = self.plus(x, self.attention(self.norm_1(x)))
        return self.plus(self.mlp(self.norm_2(x)), x)


class AlsoPositions(Swapped):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.positions = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plus(x, self.positions)
        return self.plus(x, self.attention(self.norm_1(x)))


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (
            Swapped,
            r"styles\.py:\d+ serves .* in 2 of its 2 calls, .* left or the right\. .* all 2 are",
        ),
        (
            AlsoPositions,
            r"styles\.py:\d+ serves .* in 1 of its 2 calls, .* on the left\. .* all 1 are",
        ),
    ],
)
def test_an_addition_that_is_not_the_same_each_time(cls: Any, text: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), cls(16))
    with pytest.raises(ResidualError, match=text):
        rf.transform(model, residual="free", example_inputs=(X,))
    graph = torch.export.export(model, (X,)).module()
    assert torch.equal(rf.transform(graph, residual="anneal")(X), model(X))


def test_a_module_that_loops_over_its_submodules_by_another_name() -> None:
    class Loop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in nn.Module.children(self):
                x = x + layer(x)
            return x

    model = Loop(nn.Linear(16, 16), nn.Linear(16, 16))
    before = copy.copy(model._modules)
    with pytest.raises(ResidualError, match=r"does not run once .* in an nn\.ModuleList"):
        rf.transform(model, residual="free", example_inputs=(X,))
    assert model._modules == before
