"""quantize-boundaries: rewrites, near-misses, idempotence, numerics, and the same when compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import rfcompile as rf
from rfcompile.errors import BoundaryError, CaptureError, DtypeError
from rfcompile.graph.pipeline import run
from rfcompile.graph.text import graph_text
from rfcompile.passes.quantize_boundaries import QuantizeBoundaries
from rfcompile.report.report import Site

POLICY = rf.Policy(activations=4, gradients="8b:g64", min_bytes=0)
X = torch.randn(3, 40)


class Block(nn.Module):
    """Hands on its hidden state, and what ``extra`` makes of it and of the input."""

    def __init__(self, extra: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 40) / 6)
        self.extra = extra

    def forward(self, x: Tensor, *more: Any) -> Any:
        y = x + torch.relu(x @ self.weight)
        return y if self.extra is None else (y, self.extra(x, y))


class Net(nn.Module):
    def __init__(self, extra: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(extra) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        values: Any = (x,)
        for layer in self.layers:
            values = layer(*values)
            values = values if isinstance(values, tuple) else (values,)
        return values[0] if len(values) == 1 else values


def export(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    return torch.export.export(model, (x,), strict=False).module()


def rewritten(
    gm: fx.GraphModule, policy: rf.Policy = POLICY, boundaries: Any = "auto"
) -> tuple[fx.GraphModule, list[Site]]:
    record = run(gm, [QuantizeBoundaries(policy, boundaries)])
    (step,) = record.steps
    assert (step.changes == 0) == (step.before == step.after)
    return record.gm, [fact for fact in record.facts if isinstance(fact, Site)]


def wires(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    target = torch.ops.rfcompile.fake_wire.default
    return [node.args[1:] for node in gm.graph.find_nodes(op="call_function", target=target)]


# ---- rewrites ---------------------------------------------------------------------------------


def test_rewrites_what_leaves_a_block() -> None:
    gm, sites = rewritten(traced(Net()))

    assert graph_text(gm) == dedent("""\
        x: f32[3, 40]
        layers_0_weight: f32[40, 40] = self.layers.0.weight
        matmul: f32[3, 40] = operator.matmul(x, layers_0_weight)
        relu: f32[3, 40] = torch.relu(matmul)
        add: f32[3, 40] = operator.add(x, relu)
        fake_wire: f32[3, 40] = rfcompile.fake_wire.default(add, '4b:g128:rise', '8b:g64:tread')
        layers_1_weight: f32[40, 40] = self.layers.1.weight
        matmul_1: f32[3, 40] = operator.matmul(fake_wire, layers_1_weight)
        relu_1: f32[3, 40] = torch.relu(matmul_1)
        add_1: f32[3, 40] = operator.add(fake_wire, relu_1)
        fake_wire_1: f32[3, 40] = rfcompile.fake_wire.default(add_1, '4b:g128:rise', '8b:g64:tread')
        return fake_wire_1""")
    assert [(s.module, s.format, s.shape, s.bytes_before, s.bytes_after) for s in sites] == [
        ("layers.0", "4b:g128:rise", (3, 40), 480, 66),
        ("layers.1", "4b:g128:rise", (3, 40), 480, 66),
    ]
    assert all(site.collective == "boundary" and site.eligible for site in sites)


def traced(model: nn.Module, x: Tensor = X) -> fx.GraphModule:
    gm = fx.symbolic_trace(model)
    FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x)
    return gm


def test_all_readers_outside_a_block_share_one_wire() -> None:
    class Skips(Net):
        def forward(self, x: Tensor) -> Any:
            first = self.layers[0](x)
            return self.layers[1](first) + first * first.sum()

    gm, _ = rewritten(export(Skips()))
    wire, _ = gm.graph.find_nodes(op="call_function", target=torch.ops.rfcompile.fake_wire.default)
    assert len(wire.users) == 4  # matmul and add of the next block, mul, sum
    assert len(wire.args[0].users) == 1


def test_each_call_of_a_block_is_one() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(super().forward(x))

    assert len(wires(rewritten(export(Twice()))[0])) == 4
    assert len(wires(rewritten(traced(Twice()))[0])) == 4


def test_named_blocks_may_lie_in_one_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Any:
            return self.net(x).neg()

    paths = ("net", "net.layers.*")
    model = Outer()
    gm, sites = rewritten(export(model), boundaries=paths)
    assert [site.module for site in sites] == ["net.layers.0", "net.layers.1", "net"]
    assert torch.equal(gm(X), rf.transform(model, rf.Wire(POLICY, modules=paths))(X))


# ---- near-misses are kept ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reason", "eligible"),
    [
        (rf.Policy(min_bytes=0), "the policy sends activations exact", False),
        (rf.Policy.of(bits=4, min_bytes=481), "480 bytes < min_bytes=481", True),
        (rf.Policy.of(bits=4, sites={"l*": None}), "sites['l*'] says exact", False),
    ],
)
def test_what_the_policy_leaves_exact_is_kept_with_the_reason(
    policy: rf.Policy, reason: str, eligible: bool
) -> None:
    gm = export(Net())
    before = graph_text(gm)
    gm, sites = rewritten(gm, policy)
    assert graph_text(gm) == before
    assert [(s.format, s.reason, s.eligible) for s in sites] == [(None, reason, eligible)] * 2
    assert all(site.bytes_after == site.bytes_before == 480 for site in sites)


@pytest.mark.parametrize(
    ("extra", "shape"),
    [
        (lambda x, y: y.mean(), ()),  # a loss, computed after the hidden state
        (lambda x, y: x.softmax(-1), None),  # computed after it as well: this one wins
        (lambda x, y: (x * 0).sum(0), (40,)),
        (lambda x, y: y.argmax(-1), "not a float"),
    ],
)
def test_one_tensor_a_block_travels(extra: Any, shape: Any) -> None:
    gm, sites = rewritten(export(Net(extra)))
    assert len(wires(gm)) == 2
    kept = [site for site in sites if site.format is None]
    assert {s.reason for s in kept} <= {"it is not the hidden state of the block"}
    assert not any(site.eligible for site in kept)
    if shape not in (None, "not a float"):
        assert {site.shape for site in kept} == {shape}


def test_weights_are_not_computed_in_a_block() -> None:
    model = Net()
    model.layers[1].weight = model.layers[0].weight
    gm, sites = rewritten(export(model))
    assert len(wires(gm)) == len(sites) == 2
    assert torch.equal(gm(X), rf.transform(model, rf.Wire(POLICY))(X))


def test_errors() -> None:
    with pytest.raises(BoundaryError, match="no node of the graph belongs to a repeated block"):
        rewritten(export(Block()))
    with pytest.raises(BoundaryError, match=r"no module that is called matches 'layers\.2'"):
        rewritten(export(Net()), boundaries=("layers.0", "layers.2"))
    with pytest.raises(CaptureError, match="the graph has no shapes"):
        rewritten(fx.symbolic_trace(Net()))
    with pytest.raises(DtypeError, match=r"the output of module 'layers\.0'") as caught:
        rewritten(export(Net().double(), X.double()))
    assert caught.value.dtype == torch.float64
    assert caught.value.__notes__ == ["in the rfcompile pass 'quantize-boundaries'"]


# ---- a second run -----------------------------------------------------------------------------


def test_a_second_run_changes_nothing() -> None:
    for gm in (export(Net()), traced(Net()), export(rf.transform(Net(), rf.Wire(POLICY)))):
        once, sites = rewritten(gm)
        text = graph_text(once)
        record = run(once, [QuantizeBoundaries(POLICY)])
        assert record.steps[0].changes == 0
        assert graph_text(record.gm) == text
        assert list(record.facts) == sites


def test_another_policy_replaces_the_wires() -> None:
    gm, _ = rewritten(export(Net()))
    gm, _ = rewritten(gm, rf.Policy.of(bits=2, min_bytes=0, sites={"layers.0": None}))
    assert wires(gm) == [("2b:g128:rise", "2b:g128:tread")]
    gm, _ = rewritten(gm, rf.Policy())
    assert wires(gm) == []


# ---- numerics ---------------------------------------------------------------------------------


def test_values_are_the_round_trips_of_the_format() -> None:
    model = Net()
    gm, _ = rewritten(export(model))
    x = X
    for block in model.layers:
        y = block(x)
        x = rf.dequantize(rf.quantize(y, 4), 4, y.shape)
        bound = rf.QuantFormat(4).max_error() * y.abs().max()
        assert (x - y).abs().max() <= bound + 2**-120
    torch.testing.assert_close(gm(X), x, rtol=0, atol=0)


def test_values_and_gradients_are_those_of_the_hooks() -> None:
    model = Net()
    gm, _ = rewritten(copy.deepcopy(traced(model)))
    results = []
    for each in (gm, rf.transform(model, rf.Wire(POLICY))):
        y = each(X)
        grads = torch.autograd.grad(y.square().sum(), list(each.parameters()))
        results.append((y, grads))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


# ---- compiled ---------------------------------------------------------------------------------


def test_the_same_when_compiled_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Net(), (X,), dynamic_shapes={"x": {0: batch}}, strict=False)
    gm, (site,) = rewritten(program.module(), boundaries=("layers.0",))
    assert (site.bytes_before, site.bytes_after, site.format) == (None, None, "4b:g128:rise")
    assert isinstance(site.shape[0], str)
    assert site.shape[1] == 40

    compiled = torch.compile(gm, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 11):
        x = torch.randn(size, 40)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), gm(x), rtol=0, atol=0)
