"""Modules as graphs: the ways to give example inputs, what is captured, and what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rfcompile.errors import CaptureError, RFCompileError
from rfcompile.graph.capture import capture, inputs_of
from rfcompile.graph.text import graph_text

X, Y = torch.randn(2, 4), torch.randn(2, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, y: Tensor | None = None) -> Tensor:
        z: Tensor = self.linear(x)
        return z if y is None else z + y


class WithDummies(Model):
    dummy_inputs = {"x": X}  # noqa: RUF012  # as transformers has it


# ---- inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X,), (X,), {}),
        ([X, Y], (X, Y), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"y": Y}), (X,), {"y": Y}),
        (([X], {}), (X,), {}),
        (((), {"x": X}), (), {"x": X}),
        ((X, {"y": Y}), (X, {"y": Y}), {}),  # two arguments: the first is a tensor
        ((), (), {}),
    ],
)
def test_forms_of_example_inputs(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found_args, found_kwargs = inputs_of(Model(), given)
    assert isinstance(found_args, tuple)
    assert len(found_args) == len(args)
    assert all(a is b or a == b for a, b in zip(found_args, args, strict=True))
    assert found_kwargs.keys() == kwargs.keys()
    assert all(found_kwargs[k] is kwargs[k] for k in kwargs)
    assert found_kwargs is not given, "a copy"


def test_dummy_inputs_stand_in() -> None:
    args, kwargs = inputs_of(WithDummies(), None)
    assert args == ()
    assert kwargs["x"] is X
    assert inputs_of(WithDummies(), (Y,))[0][0] is Y, "what is given wins"


def test_inputs_that_are_none() -> None:
    with pytest.raises(CaptureError, match=r"Model has no example inputs: pass example_inputs=\(x"):
        inputs_of(Model(), None)
    for wrong in (3, "x", iter([X])):
        with pytest.raises(CaptureError, match=f"example_inputs is a {type(wrong).__name__}: pass"):
            inputs_of(Model(), wrong)
    assert issubclass(CaptureError, RFCompileError)
    assert issubclass(CaptureError, RuntimeError)


# ---- graphs ------------------------------------------------------------------------------------


def test_a_module_becomes_a_graph_with_shapes() -> None:
    gm = capture(Model(), ((X,), {"y": Y}))
    text = graph_text(gm)
    assert "linear: f32[2, 4] = aten.linear.default(x, p_linear_weight, p_linear_bias)" in text
    assert "add: f32[2, 4] = aten.add.Tensor(linear, y)" in text
    assert "y" not in graph_text(capture(WithDummies())).split("\n")[3]


def test_capturing_leaves_the_module_alone() -> None:
    model = nn.Sequential(Model(), nn.Dropout(0.5), nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    capture(model, X)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_is_itself() -> None:
    gm = fx.symbolic_trace(Model())
    assert capture(gm) is gm
    assert capture(gm, (X,)) is gm


def test_what_cannot_be_captured_keeps_its_cause() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"Branching cannot be captured by torch\.export") as e:
        capture(Branching(), (X,))
    assert 'torch.compile(model, backend="rfquant")' in str(e.value)
    assert e.value.__cause__ is not None
    with pytest.raises(CaptureError, match="Model cannot be captured"):
        capture(Model(), ((X,), {"z": Y}))
