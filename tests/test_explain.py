"""explain: the sites of a model, their bytes and measures, and that looking changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.errors import BoundaryError, CaptureError, OptionError
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.process_groups import simulated

X = torch.randn(16, 64)


class Block(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.drop = nn.Dropout(0.1)
        self.down = nn.Linear(96, 64)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x + self.down(self.drop(torch.relu(self.up(x)))))


class Net(nn.Module):
    def __init__(
        self,
        wrap: Callable[[Tensor], Any] = lambda y: y,
        unwrap: Callable[[Any], Any] = lambda o: o,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(wrap) for _ in range(2))
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = self.unwrap(layer(x))
        return x


@dataclass
class Output:
    """A result that pytree does not know."""

    hidden: Tensor


def places(report: rf.Report) -> list[tuple[str, str]]:
    return [(site.direction, site.module) for site in report.sites]


BOTH_WAYS = [
    ("forward", "layers.0"),
    ("backward", "layers.0"),
    ("forward", "layers.1"),
    ("backward", "layers.1"),
]


# ---- what it says -----------------------------------------------------------------------------


def test_sites_and_bytes() -> None:
    report = rf.explain(Net(), bits=4, example_inputs=(X,))

    assert places(report) == BOTH_WAYS
    assert (report.num_sites, report.num_quantized, report.skipped) == (4, 4, ())
    for site in report.sites:
        assert (site.collective, site.shape, site.dtype) == ("boundary", (16, 64), "f32")
        assert site.kind == ("activations" if site.direction == "forward" else "gradients")
        grid = "rise" if site.direction == "forward" else "tread"
        assert site.format == f"4b:g128:{grid}"
        assert site.bytes_before == 16 * 64 * 4
        assert site.bytes_after == rf.QuantFormat(4).payload_bytes(16 * 64) == 8 * (64 + 2)
    assert report.bytes_before == 4 * 4096
    assert report.bytes_after == 4 * 528
    lines = str(report).splitlines()
    assert lines[0] == "4 of 4 sites quantized, 16.38 kB -> 2.11 kB sent by each rank (7.76x less)"
    policy = "activations=4b:g128:rise gradients=4b:g128:tread weights=4b:g128:tread"
    assert lines[1] == f"policy: {policy} optimizer_state=4b:g128:tread min_bytes=0"
    assert report.notes == ()
    assert places(rf.explain(Net(), bits=4, example_inputs={"x": X})) == BOTH_WAYS


@pytest.mark.parametrize(("bits", "at_least"), [(8, 43.5), (4, 19.7), (3, 14.1), (2, 9.0)])
def test_measures_of_gaussian_activations(bits: int, at_least: float) -> None:
    """The codec promises ``at_least`` dB on 2^20 Gaussian values; kurtosis 0 +- 5 sigma.

    The standard deviation of the excess kurtosis of n Gaussian values is sqrt(24 / n).
    """
    identity = nn.Sequential(nn.Identity())
    x = torch.randn(1024, 1024)
    (site,) = rf.explain(identity, rf.Wire(bits, modules=["0"]), example_inputs=(x,)).sites
    assert site.sqnr_db is not None
    assert site.kurtosis is not None
    assert at_least <= site.sqnr_db <= at_least + 1.5
    assert abs(site.kurtosis) < 5 * math.sqrt(24 / x.numel())


def test_reasons() -> None:
    policy = rf.Policy(
        activations=4,
        gradients=None,
        min_bytes=10**5,
        sites={"layers.0": 8, "layers.1": None, "head": "8b:g32"},
    )
    report = rf.explain(Net(), rf.Wire(policy), example_inputs=(X,))
    found = [(s.direction, s.module, s.format, s.reason, s.eligible) for s in report.sites]
    named = "sites['layers.1'] says exact"
    assert found == [
        ("forward", "layers.0", "8b:g128:tread", "", True),
        ("backward", "layers.0", "8b:g128:tread", "", True),
        ("forward", "layers.1", None, named, False),
        ("backward", "layers.1", None, named, False),
    ]
    assert all(site.bytes_after == site.bytes_before for site in report.skipped)

    by_kind = rf.explain(Net(), rf.Wire(rf.Policy(gradients=4, min_bytes=0)), example_inputs=(X,))
    assert [s.reason for s in by_kind.skipped] == ["the policy sends activations exact"] * 2
    assert not any(s.eligible for s in by_kind.skipped)

    by_size = rf.explain(Net(), rf.Wire(rf.Policy.of(bits=4, min_bytes=4097)), example_inputs=(X,))
    assert {s.reason for s in by_size.skipped} == {"4096 bytes < min_bytes=4097"}
    assert all(s.eligible for s in by_size.skipped)
    assert (
        rf.explain(
            Net(), rf.Wire(rf.Policy.of(bits=4, min_bytes=4096)), example_inputs=(X,)
        ).num_quantized
        == 4
    )


def test_boundaries() -> None:
    assert rf.explain(Net(), rf.Wire(4, modules=["layers.1.up"]), example_inputs=(X,)).sites[
        0
    ].shape == (16, 96)
    report = rf.explain(
        Net(), rf.Wire(4, modules=lambda path, _: path.endswith("down")), example_inputs=(X,)
    )
    assert places(report)[::2] == [("forward", "layers.0.down"), ("forward", "layers.1.down")]


@pytest.mark.slow
def test_branches_are_attention_and_mlp() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        use_cache=False,
    )
    config.num_hidden_layers = 2
    model = transformers.LlamaForCausalLM(config)
    report = rf.explain(model, rf.Wire(4, modules="branches"))  # with its dummy_inputs
    assert [s.module for s in report.sites if s.direction == "forward"] == [
        f"model.layers.{i}.{branch}" for i in range(2) for branch in ("self_attn", "mlp")
    ]
    assert report.num_quantized == 8


def test_only_what_has_a_gradient_comes_back() -> None:
    forward = BOTH_WAYS[::2]
    with torch.no_grad():
        assert places(rf.explain(Net(), bits=4, example_inputs=(X,))) == forward
    with torch.inference_mode():
        assert places(rf.explain(Net(), bits=4, example_inputs=(X,))) == forward
    assert places(rf.explain(Net().requires_grad_(False), bits=4, example_inputs=(X,))) == forward


def test_a_recomputed_block_is_counted_once() -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    assert places(rf.explain(Checkpointed(), bits=4, example_inputs=(X,))) == BOTH_WAYS


def test_blocks_called_twice_are_two_sites() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(super().forward(x))

    assert places(rf.explain(Twice(), bits=4, example_inputs=(X,))) == BOTH_WAYS * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_that_cannot_travel(dtype: torch.dtype) -> None:
    report = rf.explain(
        Net(lambda y: y.to(dtype), lambda o: o.real.float()), bits=4, example_inputs=(X,)
    )
    name = "f64" if dtype == torch.float64 else "c64"
    assert [(s.dtype, s.format, s.eligible) for s in report.sites] == [(name, None, False)] * 4
    assert {s.reason for s in report.sites} == {f"{name} data is not quantized"}


def test_boundaries_where_nothing_travels_are_noted() -> None:
    class Unused(Net):
        def forward(self, x: Tensor) -> Any:
            first, second = self.layers
            first(x)
            return type(second).forward(second, x)[0]  # runs neither hooks nor its own forward

    report = rf.explain(
        Unused(lambda y: (y.long(), None), lambda o: o), bits=4, example_inputs=(X,)
    )
    assert report.sites == ()
    assert report.notes == (
        "nothing travels at layers.0: its output is or directly holds no floating-point tensor",
        "nothing travels at layers.1: the model did not call it",
    )
    assert "note: nothing travels at layers.1" in str(report)


def test_an_empty_batch_and_constants_make_valid_json() -> None:
    for model, x in ((Net(), X[:0]), (Net(lambda y: y * 0), X)):
        report = rf.explain(model, bits=4, example_inputs=(x,))
        plain = json.loads(report.json(), parse_constant=pytest.fail)
        assert plain["sites"][0]["kurtosis"] is None
        assert plain["num_quantized"] == 4
    assert report.sites[0].sqnr_db == math.inf


def test_a_rewritten_model_says_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    model = nn.Sequential(*(Block() for _ in range(3)))
    x = torch.randn(4, 16)
    free = rf.transform(model, residual="free", example_inputs=(x,))
    report = rf.explain(free, bits=4, example_inputs=(x,))
    assert report.notes == ("3 of 3 residual adds rewritten: free",)
    assert rf.explain(model, bits=4, example_inputs=(x,)).notes == ()
    (rewrite,) = rf.rewrites_of(free)
    assert rewrite is rf.training.residual_report(free)


def test_a_graph_is_explained_without_running() -> None:
    exported = torch.export.export(Net().eval(), (X,)).module()
    for graph, args in ((exported, ()), (fx.symbolic_trace(Net()), (X,))):
        report = rf.explain(graph, bits=4, example_inputs=(*args,))
        assert places(report) == BOTH_WAYS[::2]
        assert report.bytes_after == 2 * 528
        assert report.graphs[0].after.count("rfcompile.fake_wire") == 2
    with pytest.raises(CaptureError, match="the graph has no shapes"):
        rf.explain(fx.symbolic_trace(Net()), bits=4)


def test_what_stays_in_a_graph_has_its_reason() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=50, use_cache=False
    )
    ids = torch.arange(8).reshape(1, 8)
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    report = rf.explain(torch.export.export(model, (), inputs, strict=False).module(), bits=4)
    assert report.num_quantized == 4
    assert {s.reason for s in report.skipped} == {"it is not the hidden state of the block"}
    assert {s.shape for s in report.skipped} == {(1, 4, 8, 8)}, "position biases"
    assert not any(s.eligible for s in report.skipped)


# ---- what it leaves alone ---------------------------------------------------------------------


def test_looking_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Sequential(Block(), Block()))
    model(X).sum().backward()
    loss = model(X).sum()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    random_state = torch.get_rng_state()

    rf.explain(model, bits=2, example_inputs=(X,))

    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)  # type: ignore[arg-type]
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    loss.backward()  # a pending backward pass still works


def test_it_is_the_model_that_transform_gives() -> None:
    wired = rf.transform(Net(), bits=4)
    assert rf.explain(wired, bits=8, example_inputs=(X,)).sites[0].format == "8b:g128:tread"


def test_compiled_models_run_eagerly() -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        raise AssertionError("explain compiled a model that has nothing to compile")

    compiled = torch.compile(Net(), backend=backend)
    assert places(rf.explain(compiled, bits=4, example_inputs=(X,))) == BOTH_WAYS
    in_place = Net()
    in_place.compile(backend=backend)
    in_place.layers[0].compile(backend=backend)
    assert places(rf.explain(in_place, bits=4, example_inputs=(X,))) == BOTH_WAYS


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output(y),
        lambda y: {"loss": y.mean(), "more": (y, [y.to(torch.complex64)])},
        lambda y: (y, y.long()),
    ],
)
def test_the_backward_pass_starts_from_any_output(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(Net):
        def forward(self, x: Tensor) -> Any:
            return wrap(super().forward(x))

    reached: list[Tensor] = []
    model = Wrapped()
    model.layers[0].up.weight.register_hook(reached.append)  # type: ignore[union-attr]
    rf.explain(model, bits=4, example_inputs=(X,))
    assert len(reached) == 1


# ---- models with collectives ------------------------------------------------------------------


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Returns(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Output:
        return Output(self.body(x))


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_a_tensor_parallel_model_on_simulated_ranks() -> None:
    with simulated(4):
        plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
        mesh = init_device_mesh("cpu", (4,))
        body = parallelize_module(nn.Sequential(Parallel(), Parallel()), mesh, plan)
        model = torch.compile(Returns(body))  # unwrapped: another backend is no obstacle
        random_state = torch.get_rng_state()
        report = rf.explain(model, rf.Wire({"bits": 4, "min_bytes": 0}), example_inputs=(X,))
        change = rf.diff(report)

    assert change.removed["_c10d_functional.all_reduce.default"] == 3
    assert change.wire_bytes_before == report.bytes_before
    assert change.wire_bytes_after == report.bytes_after
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in body.parameters())
    assert [(s.direction, s.collective, s.module) for s in report.sites] == [
        ("forward", "all_reduce", "body.0.down"),
        ("forward", "all_reduce", "body.1.down"),
        ("backward", "all_reduce", "body.1.up"),
    ]
    payload = rf.QuantFormat(4).payload_bytes(16 * 64, 4)
    for site in report.sites:
        fmt = "4b:g128:rise" if site.direction == "forward" else "4b:g128:tread"
        assert (site.world_size, site.shape, site.format) == (4, (16, 64), fmt)
        assert site.bytes_before == sent_bytes("all_reduce", 16 * 64 * 4, 4) == 6144
        expected = sent_bytes("all_to_all", payload, 4) + sent_bytes("all_gather", payload // 4, 4)
        assert site.bytes_after == expected
        assert site.source.startswith("tests/test_explain.py:")
        assert site.sqnr_db is None


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_a_model_without_collectives_beside_a_process_group() -> None:
    with simulated(2):
        report = rf.explain(
            nn.Sequential(nn.ReLU()), rf.Wire(4, modules=["0"]), example_inputs=(X,)
        )
    assert places(report) == [("forward", "0")]


# ---- errors -----------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(CaptureError, match="Net has no example inputs"):
        rf.explain(Net(), bits=4)
    with pytest.raises(OptionError, match="give bits") as caught:
        rf.explain(Net(), example_inputs=(X,))
    assert caught.value.option == "bits"
    with pytest.raises(OptionError, match=r"model=.* is not supported"):
        rf.explain(torch.relu, bits=4, example_inputs=(X,))  # type: ignore[arg-type]
    with pytest.raises(BoundaryError, match="has no repeated blocks"):
        rf.explain(nn.Linear(64, 2), bits=4, example_inputs=(X,))
    broken = X.clone()
    broken[0, 0] = torch.nan
    report = rf.explain(Net(), bits=4, example_inputs=(broken,))
    assert math.isnan(report.sites[0].sqnr_db or 0)
