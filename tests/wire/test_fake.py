"""The fake wire: its operator, its gradient, non-finite values, its hook, and watching it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.codec import operators
from rfcompile.codec.formats import BITS
from rfcompile.errors import DtypeError, NonFiniteError, RFCompileWarning
from rfcompile.wire.fake import FakeWire, fake_wire, round_trip, watch, wire_arguments

SPEC = "4b:g32:rise"
INPUTS = {
    "plain": torch.randn(3, 50),
    "transposed": torch.randn(6, 4).t(),
    "expanded": torch.randn(3, 1).expand(3, 40),
    "empty": torch.randn(0, 5),
    "scalar": torch.randn(()),
    "bfloat16": torch.randn(2, 3, 33).bfloat16(),
    "float16": torch.randn(65).half(),
}


def by_codec(x: Tensor, spec: str) -> Tensor:
    return rf.dequantize(rf.quantize(x, spec), spec, x.shape, x.dtype)


def grad_of(output: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(output, x, weight)
    return grad


# ---- the operator -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize(("forward", "backward"), [(SPEC, "8b"), (SPEC, ""), ("", "2b:g16")])
def test_opcheck(name: str, forward: str, backward: str) -> None:
    x = INPUTS[name].detach().requires_grad_(name != "expanded")
    torch.library.opcheck(fake_wire, (x, forward, backward))
    torch.library.opcheck(fake_wire, (INPUTS[name], forward, backward, "a place"))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("spec", [*(f"{bits}b" for bits in BITS), "8b:tensor", "3b:g64:h16:stoch"])
def test_values_are_those_of_the_codec_and_gradients_too(name: str, spec: str) -> None:
    x = INPUTS[name].detach().clone().requires_grad_()
    weight = torch.randn(x.shape).to(x.dtype)

    y = fake_wire(x, spec, SPEC)

    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.is_contiguous()
    assert torch.equal(y, by_codec(x.detach(), spec))
    assert torch.equal(round_trip(x.detach(), spec), y)
    assert torch.equal(grad_of(y, x, weight), by_codec(weight, SPEC))


def test_an_empty_format_is_exact_and_a_copy() -> None:
    x = torch.randn(4, 6).t().requires_grad_()
    y = fake_wire(x, "", "")
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(grad_of(y, x, torch.ones(6, 4)), torch.ones(6, 4))


def test_fake_tensors_get_a_contiguous_result() -> None:
    with FakeTensorMode():
        y = fake_wire(torch.empty(4, 6).t(), SPEC, SPEC)
    assert (y.shape, y.stride()) == ((6, 4), (4, 1))


def test_only_codec_dtypes_travel() -> None:
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(DtypeError, match="the input of here has dtype") as caught:
            fake_wire(torch.ones(4).to(dtype), SPEC, SPEC, "here")
        assert caught.value.dtype == dtype


# ---- non-finite values -----------------------------------------------------------------------


def test_nan_spoils_its_group_and_no_other() -> None:
    x = torch.randn(96)
    x[40] = torch.nan
    y = fake_wire(x, SPEC, "")
    assert y[32:64].isnan().all()
    assert y[:32].isfinite().all()
    assert y[64:].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_raise_in_forward_and_backward(bad: float) -> None:
    spec = "4b:raise"
    x = torch.randn(200, requires_grad=True)
    y = fake_wire(x, spec, spec, "layer 3")
    assert torch.equal(grad_of(y, x, torch.ones(200)), by_codec(torch.ones(200), "4b"))

    broken = torch.randn(200)
    broken[77] = bad
    with pytest.raises(NonFiniteError, match=r"NaN or Inf in the input of layer 3\.") as caught:
        fake_wire(broken, spec, spec, "layer 3")
    assert (caught.value.site, caught.value.ranks) == ("layer 3", None)
    y = fake_wire(x, spec, spec, "layer 3")
    with pytest.raises(NonFiniteError, match=r"layer 3, backward\."):
        grad_of(y, x, broken)
    with pytest.raises(NonFiniteError, match=r"the input of a fake wire\."):
        fake_wire(broken, spec, "")


def test_saturate_keeps_the_group() -> None:
    x = torch.randn(32)
    x[5] = torch.inf
    y = fake_wire(x, "8b:g32:saturate", "")
    assert y.isfinite().all()
    assert y[5] == y.max()


# ---- arguments from a policy ------------------------------------------------------------------


def test_wire_arguments() -> None:
    policy = rf.Policy(
        activations=4, gradients="8b:raise", min_bytes=100, sites={"a": None, "b": 2}
    )
    assert wire_arguments(policy, "a", 1000) == ()
    assert wire_arguments(policy, "b", 1) == ("2b:g128:rise", "2b:g128:tread")
    assert wire_arguments(policy, "c", 99) == ()
    assert wire_arguments(policy, "c", 100) == (
        "4b:g128:rise",
        "8b:g128:tread:raise",
        "the fake wire at 'c'",
    )
    assert wire_arguments(rf.Policy(gradients=4), "c", 10**6) == ("", "4b:g128:tread")


def test_blocks_share_compiled_code() -> None:
    """A wire names its module in the graph only where an error needs the name."""
    compiled = []

    def backend(gm: Any, inputs: Any) -> Any:
        compiled.append(gm)
        return gm

    model = rf.transform(nn.Sequential(*[nn.Sequential(nn.ReLU()) for _ in range(4)]), bits=4)
    for block in model.children():
        block.compile(backend=backend, fullgraph=True)
    x = torch.randn(64)
    expected = x
    for _ in range(4):
        expected = by_codec(expected.relu(), "4b")
    assert torch.equal(model(x), expected)
    assert len(compiled) <= 2


# ---- the hook ---------------------------------------------------------------------------------


def hook(policy: rf.Policy, module: str = "layers.0") -> FakeWire:
    return FakeWire(module, policy)


ALL = rf.Policy.of(bits=4, min_bytes=0)


def test_the_hook_prints_and_pickles() -> None:
    wire = hook(rf.Policy(activations=4, min_bytes=0))
    assert repr(wire) == "FakeWire('layers.0', forward=4b:g128:rise, backward=exact)"
    assert repr(hook(rf.Policy())) == "FakeWire('layers.0', forward=exact, backward=exact)"
    assert repr(pickle.loads(pickle.dumps(wire))) == repr(wire)


def test_the_first_floating_point_tensor_travels() -> None:
    ints, h, aux = torch.arange(4), torch.randn(40), torch.randn(3)
    output = hook(ALL)(nn.Identity(), (), (ints, None, h, aux))
    assert output[0] is ints
    assert output[3] is aux
    assert torch.equal(output[2], by_codec(h, "4b"))


def test_the_output_of_the_module_is_not_changed() -> None:
    given: dict[Any, Any] = {"n": 1, "h": torch.randn(4)}
    kept = dict(given)
    changed = hook(ALL)(nn.Identity(), (), given)
    assert given == kept
    assert list(changed) == ["n", "h"]
    items = [torch.randn(4)]
    assert hook(ALL)(nn.Identity(), (), items)[0] is not items[0]


def test_small_or_exact_tensors_are_handed_on_as_they_are() -> None:
    x = torch.randn(4)
    assert hook(rf.Policy.of(bits=4, min_bytes=17))(nn.Identity(), (), x) is x
    assert hook(rf.Policy.of(bits=4, min_bytes=16))(nn.Identity(), (), x) is not x
    assert hook(rf.Policy())(nn.Identity(), (), x.double()).dtype == torch.float64
    named = rf.Policy.of(bits=4, min_bytes=10**9, sites={"layers.*": 2})
    assert hook(named)(nn.Identity(), (), x) is not x


@pytest.mark.parametrize("output", [None, 3, torch.arange(4), ((torch.randn(4),),), {}])
def test_nothing_to_send_is_a_warning(output: Any) -> None:
    with pytest.warns(RFCompileWarning, match=r"nothing travels at 'layers\.0': its output, a"):
        assert hook(ALL)(nn.Identity(), (), output) is output


def test_the_warning_comes_while_compiling_too() -> None:
    model = rf.transform(nn.Sequential(nn.Identity()), rf.Wire(4, modules=["0"]))
    with pytest.warns(RFCompileWarning, match="nothing travels at '0'"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.arange(4))


# ---- watching ---------------------------------------------------------------------------------


def test_watching_collects_what_crosses_and_only_there() -> None:
    x = torch.randn(4, requires_grad=True)
    wire = hook(ALL)
    wire.send(x)
    with watch() as outer:
        wire.send(x * 1)
        with watch() as inner:
            wire.send(x.detach())
            wire(nn.Identity(), (), None)
            unusual = wire.send(x.detach().double())
        wire.send(x)
    wire.send(x)
    assert [c.has_gradient for c in outer] == [True, True]
    assert [c.tensor is None for c in inner] == [False, True, False]
    assert not any(c.has_gradient for c in inner)
    assert {c.module for c in (*outer, *inner)} == {"layers.0"}
    assert unusual.dtype == torch.float64, "what cannot travel is reported, not refused"
    assert all(c.tensor is None or not c.tensor.requires_grad for c in (*outer, *inner))


def test_watching_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="on the way"), watch():
        raise RuntimeError("on the way")
    wire = hook(ALL)
    with pytest.raises(DtypeError):
        wire.send(torch.randn(3).double())


def test_the_operator_is_one_of_the_package() -> None:
    assert torch.ops.rfcompile.fake_wire.default is fake_wire
    assert fake_wire._schema.name == "rfcompile::fake_wire"
    assert operators.LIBRARY.ns == "rfcompile"


# ---- where it stands in a module ----------------------------------------------------------------


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x


class Calling(nn.Module):
    """Calls its blocks in one of the ways that models do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(Doubling() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.way == "module":
                x = block(x)
            elif self.way == "forward":
                x = block.forward(x)
            else:
                x = checkpoint(block.forward, x, use_reentrant=False)
        return x


class CallingLikeOthers(nn.Module):
    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.blocks = nn.ModuleList(Doubling() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


@pytest.mark.parametrize("way", ["module", "forward", "checkpoint"])
def test_a_wire_is_in_the_path_of_every_call(way: str) -> None:
    x = torch.randn(40)
    expected = x
    for _ in range(3):
        expected = by_codec(expected + expected, "4b")
    model = Calling(way)
    wired = rf.transform(model, bits=4)
    for twin in (wired, copy.deepcopy(wired), pickle.loads(pickle.dumps(wired))):
        assert torch.equal(twin(x), expected)
    compiled = torch.compile(wired, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(rf.transform(wired, bits=4)(x), expected), "a wire in place of the first"
    assert rf.explain(model, bits=4, example_inputs=(x,)).num_quantized == 3
    assert rf.explain(wired, bits=4, example_inputs=(x,)).num_quantized == 3
    assert torch.equal(model(x), 8 * x), "the model that was given"


def call_class(block: nn.Module, x: Tensor) -> Tensor:
    return Doubling.forward(block, x)


def call_method(block: nn.Module, x: Tensor) -> Tensor:
    return block.forward(x)


@pytest.mark.parametrize("call", [call_class, call_method])
def test_wires_that_did_not_run_are_named_once(call: Callable[[nn.Module, Tensor], Tensor]) -> None:
    wired = rf.transform(CallingLikeOthers(call), bits=4)
    x = torch.randn(40)
    message = r"3 of 3 fake wires did not run .* CallingLikeOthers: 'blocks.0', 'blocks.1', 'blo"
    with pytest.warns(RFCompileWarning, match=message):
        wired(x)
    assert torch.equal(wired(x), 8 * x)
