"""joint_pass on graphs with forward and backward in one: real ranks, directions, errors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.errors import (
    CaptureError,
    OptionError,
    RankMismatchError,
    UnquantizedSiteError,
)
from rfcompile.find.directions import NO_DIRECTION, Directions
from rfcompile.graph.wire_bytes import wire_bytes
from rfcompile.inductor.joint_pass import JointPass
from rfcompile.report.report import Report
from rfcompile.wire.process_groups import simulated
from tests import joint
from tests.joint import FEATURES, ROWS, StepGraph
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

POLICY = rf.Policy(activations="8b:g32", gradients="4b:g32", weights="8b:g64", min_bytes=0)
SPECS = {kind: getattr(POLICY, kind) for kind in ("activations", "gradients", "weights")}
SHARDED = [("forward", "weights")] * 6 + [("backward", "gradients")] * 6
PARALLEL = [("forward", "activations")] * 2 + [("backward", "gradients")]
SHARE = 0.1
"""Of what exact training gains, quantized training may lose so much: a check of sanity."""


def sites_of(report: Report) -> list[tuple[str, str]]:
    return [(site.direction, site.kind) for site in report.sites]


# ---- on ranks ------------------------------------------------------------------------------------


def data(rank: Rank, *, shared: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0 if shared else rank.index)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    return x, x.roll(1, 0).tanh()


class _Copied(torch.autograd.Function):
    """What enters a tensor-parallel block: its gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return rf.all_reduce(gradient, SPECS["gradients"])


class _Summed(torch.autograd.Function):
    """What leaves one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rf.all_reduce(x, SPECS["activations"])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def parallel_by_hand(rank: Rank, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tensor-parallel model, written out with the eager collectives."""
    parameters = []
    for block in joint.net():
        up, bias, down = (
            parameter.detach().chunk(2, dim)[rank.index].clone().requires_grad_()
            for parameter, dim in ((block.up.weight, 0), (block.up.bias, 0), (block.down.weight, 1))
        )
        parameters += [up, bias, down]
        copied = _Copied.apply(x)  # type: ignore[no-untyped-call]
        branch = F.linear(F.relu(F.linear(copied, up, bias)), down)
        x = x + _Summed.apply(branch)  # type: ignore[no-untyped-call]
    loss = F.mse_loss(x, y)
    return loss.detach(), list(torch.autograd.grad(loss, parameters))


def sharded_by_hand(rank: Rank, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    model, weights = joint.net(), {}
    for name, parameter in model.named_parameters():
        shard = parameter.detach().chunk(rank.world)[rank.index].contiguous()
        weights[name] = rf.all_gather(shard, SPECS["weights"]).requires_grad_()
    loss = F.mse_loss(functional_call(model, weights, (x,)), y)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    scattered = [rf.reduce_scatter(g, SPECS["gradients"], op="avg") for g in gradients]
    return loss.detach(), scattered


MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any], Any]] = {
    "sharded": (joint.sharded, sharded_by_hand, SHARDED),
    "tensor parallel": (joint.tensor_parallel, parallel_by_hand, PARALLEL),
}


Step = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def by_make_fx(model: nn.Module, x: Tensor, y: Tensor, graph_pass: JointPass) -> Step:
    step = StepGraph(model, x, y)
    assert graph_pass(step.gm, ()) is step.gm
    return step


def by_aot(model: nn.Module, x: Tensor, y: Tensor, graph_pass: JointPass) -> Step:
    forward = joint.exported(model, x, graph_pass)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss = F.mse_loss(forward(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return loss.detach(), [joint.local(g) for g in gradients]

    return step


def trained(model: nn.Module, step: Callable[..., Any], x: Tensor, y: Tensor) -> list[float]:
    losses = []
    for _ in range(12):
        loss, gradients = step(x, y)
        total = funcol.all_reduce(loss, "avg", dist.group.WORLD)
        losses.append(total.item())
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            joint.local(parameter).sub_(gradient, alpha=0.5)
    return losses


def train(rank: Rank, name: str, way: str) -> dict[str, Any]:
    make = {"make_fx": by_make_fx, "aot": by_aot}[way]
    parallelize, by_hand, _ = MODELS[name]
    mesh = init_device_mesh("cpu", (rank.world,))
    x, y = data(rank, shared=name == "tensor parallel")
    run: dict[str, Any] = {}
    for what, policy in (("exact", rf.Policy()), ("quantized", POLICY)):
        model = parallelize(joint.net(), mesh)
        # Descriptors name the parameters of AOTAutograd's graph.
        number = len(list(model.parameters())) if way == "make_fx" else None
        rf.reports(clear=True)
        step = make(model, x, y, rf.joint_pass(policy, parameters=number))
        found, gradients = step(x, y)
        run[f"{what} losses"] = trained(model, step, x, y)
        for path, parameter in model.named_parameters():
            rank.assert_same(whole(parameter), path)
    loss, by_rf = by_hand(rank, x, y)
    run["is by hand"] = [
        torch.equal(a, b) for a, b in zip([found, *gradients], [loss, *by_rf], strict=True)
    ]
    run["report"] = rf.merge_reports(rf.reports())
    run["bytes of the graph"] = wire_bytes(run["report"].graphs[0].after)
    return run


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("sharded", "make_fx"),
        ("tensor parallel", "aot"),
        pytest.param("sharded", "aot", marks=pytest.mark.slow),
        pytest.param("tensor parallel", "make_fx", marks=pytest.mark.slow),
    ],
)
def test_steps_on_ranks_are_what_the_eager_functions_give(
    ranks: RunRanks, name: str, way: str
) -> None:
    for run in ranks(2, train, name, way):
        assert all(run["is by hand"])
        report = run["report"]
        assert sites_of(report) == MODELS[name][2]
        assert report.num_quantized == report.num_sites
        exact, quantized = run["exact losses"], run["quantized losses"]
        assert exact[-1] < 0.8 * exact[0]
        assert abs(quantized[-1] - exact[-1]) <= SHARE * (exact[0] - exact[-1])
        assert report.bytes_after == run["bytes of the graph"] < report.bytes_before / 3


def disagree(rank: Rank) -> tuple[type, str]:
    mesh = init_device_mesh("cpu", (rank.world,))
    step = StepGraph(joint.sharded(joint.net(), mesh), *data(rank, shared=False))
    error = error_of(lambda: rf.joint_pass(4 + 4 * rank.index, parameters=6)(step.gm))
    return type(error), str(error)


def test_ranks_that_differ_are_told(ranks: RunRanks) -> None:
    for kind, text in ranks(2, disagree):
        assert kind is RankMismatchError
        assert "joint graph" in text


# ---- what a graph says ---------------------------------------------------------------------------


@pytest.fixture
def world() -> Iterator[dist.ProcessGroup]:
    rf.reports(clear=True)
    with simulated(2):
        yield dist.group.WORLD
    rf.reports(clear=True)


def reduced(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def all_gathered(x: Tensor) -> Tensor:
    c10d = torch.ops._c10d_functional
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, dist.group.WORLD.group_name))


def marked(step: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """As ``StepGraph`` traces."""
    with (
        preserve_node_meta(),
        torch.autograd.set_multithreading_enabled(False),
        torch.compiler._non_strict_tracing_context(),
        torch.compiler._patch_engine_backward(),
    ):
        return make_fx(step, tracing_mode="fake")(*args)


def report_on(gm: fx.GraphModule, **options: Any) -> Report:
    rf.reports(clear=True)
    rf.joint_pass(POLICY, **options)(gm)
    return rf.merge_reports(rf.reports())


X, WEIGHT = torch.randn(ROWS, FEATURES), torch.randn(FEATURES, FEATURES)


FORWARD, BACKWARD = ("forward", "activations"), ("backward", "gradients")


def gradient_of(weight: Tensor, x: Tensor) -> Tensor:
    """With an all-reduce in the forward pass, whose gradient is an all-reduce."""
    return gradient_through(reduced, weight, x)


def gradient_through(inner: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor) -> Tensor:
    leaf = weight.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(inner(x @ leaf).square().mean(), [leaf])
    return gradient


def test_a_graph_without_marks_is_an_error(world: dist.ProcessGroup) -> None:
    gm = make_fx(gradient_of, tracing_mode="fake")(WEIGHT, X)
    with pytest.raises(CaptureError, match=r"none of the nodes .* with 2 collectives, has a mark"):
        rf.joint_pass(POLICY)(gm)
    without = make_fx(lambda x: x + 1, tracing_mode="fake")(X)
    assert rf.joint_pass(POLICY)(without) is without


def test_a_gradient_that_is_averaged_after_the_backward_pass_is_one(
    world: dist.ProcessGroup,
) -> None:
    gm = marked(lambda weight, x: reduced(gradient_of(weight, x).t().contiguous() / 2), WEIGHT, X)
    assert sites_of(report_on(gm)) == [FORWARD, BACKWARD, BACKWARD]


def test_what_is_computed_from_gradients_afterwards_is_not_guessed(
    world: dist.ProcessGroup,
) -> None:
    def step(weight: Tensor, x: Tensor) -> Tensor:
        updated = weight - 0.1 * gradient_of(weight, x)
        return all_gathered(updated)

    gm = marked(step, WEIGHT, X)
    report = report_on(gm)
    assert sites_of(report) == [FORWARD, BACKWARD, ("unknown", "unknown")]
    assert report.sites[2].reason == NO_DIRECTION
    assert report.num_quantized == 2
    with pytest.raises(UnquantizedSiteError, match="forward or in the backward pass"):
        report_on(marked(step, WEIGHT, X), strict=True)


def test_what_every_kind_leaves_exact_is_exact_for_that_reason(world: dist.ProcessGroup) -> None:
    def step(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        updated = weight - 0.1 * gradient_of(weight, x)
        return all_gathered(updated), all_gathered(updated.argmax(1))

    rf.joint_pass(rf.Policy(min_bytes=10**6, gradients=4), strict=False)(marked(step, WEIGHT, X))
    *_, late, integers = rf.merge_reports(rf.reports()).sites
    assert (late.kind, late.why) == ("unknown", "policy")
    assert (integers.kind, integers.why) == ("unknown", "dtype")

    def picks(weight: Tensor, x: Tensor) -> Tensor:
        return all_gathered(gradient_of(weight, x).argmax(1))

    assert report_on(marked(picks, WEIGHT, X), strict=True).num_quantized == 2


def test_a_node_without_a_tag_among_tags_is_not_guessed(world: dist.ProcessGroup) -> None:
    gm = marked(gradient_of, WEIGHT, X)
    for node in gm.graph.nodes:
        node.meta.pop("autograd_backward", None)
        node.meta["partitioner_tag"] = "is_forward"
    first, _ = [n for n in gm.graph.nodes if "all_reduce" in str(n.target)]
    del first.meta["partitioner_tag"]
    assert sites_of(report_on(gm)) == [("unknown", "unknown"), FORWARD]


def test_what_a_checkpoint_computes_again_are_activations(world: dist.ProcessGroup) -> None:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(lambda x: reduced(x.sin()).cos(), x, use_reentrant=False)

    gm = marked(partial(gradient_through, inner), WEIGHT, X)
    assert sites_of(report_on(gm)) == [FORWARD, ("backward", "activations"), BACKWARD]


def test_a_copy_that_is_marked_as_computed_again(world: dist.ProcessGroup) -> None:
    """As passes for activation memory copy nodes, and may erase the first."""
    gm = marked(gradient_of, WEIGHT, X)
    first, _ = [n for n in gm.graph.nodes if "all_reduce" in str(n.target)]
    first.meta |= {"autograd_backward": True, "recompute": "MUST_RECOMPUTE"}
    assert sites_of(report_on(gm)) == [("backward", "activations"), BACKWARD]


def gathered(weight: Tensor, x: Tensor) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return y * all_gathered(weight).sum(0)

    return gradient_through(inner, weight, x)


def test_an_input_that_may_be_a_parameter_is_not_guessed(world: dist.ProcessGroup) -> None:
    (site,) = report_on(marked(gathered, WEIGHT, X)).sites
    assert (site.kind, site.format, site.why) == ("unknown", None, "out of reach")
    assert "nothing says whether that is a parameter" in site.reason
    places: list[tuple[Any, str]] = [(1, "weights"), ([0], "weights"), ([1], "activations")]
    for parameters, kind in places:
        (site,) = report_on(marked(gathered, WEIGHT, X), parameters=parameters).sites
        assert (site.kind, site.format) == (kind, SPECS[kind].spec)


def test_a_tangent_is_no_parameter(world: dist.ProcessGroup) -> None:
    """AOTAutograd's joint graph takes it as an input, and marks it."""
    gm = make_fx(lambda tangents_1: all_gathered(tangents_1), tracing_mode="fake")(X)
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_backward"
    assert sites_of(report_on(gm)) == [BACKWARD]


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "2", [0.5], [-1]])
def test_parameters_are_places(wrong: Any) -> None:
    with pytest.raises(OptionError, match="number of leading inputs"):
        rf.joint_pass(4, parameters=wrong)


def test_more_parameters_than_inputs(world: dist.ProcessGroup) -> None:
    with pytest.raises(OptionError, match="the graph has 2 inputs"):
        report_on(marked(gathered, WEIGHT, X), parameters=3)


def test_paths_that_the_tracer_noted_are_those_of_sites(world: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = joint.sharded(joint.net(), mesh)
    step = StepGraph(model, X, X)
    policy = rf.Policy(weights=8, gradients=8, min_bytes=0, sites={"1.up": None})
    rf.joint_pass(policy, parameters=6)(step.gm)
    exact = rf.merge_reports(rf.reports()).skipped
    assert {site.module for site in exact} == {"1.up"}
    assert [site.direction for site in exact] == ["forward"] * 2 + ["backward"] * 2


def test_nodes_of_graphs_inside_have_the_direction_of_who_calls_them() -> None:
    gm = make_fx(lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, [x]))(X)
    (call,) = [n for n in gm.graph.nodes if "cond" in str(n.target)]
    call.meta["partitioner_tag"] = "is_backward"
    directions = Directions(gm, "joint")
    for attribute in gm.graph.find_nodes(op="get_attr"):
        body = operator.attrgetter(attribute.target)(gm)
        assert {directions.of(node) for node in body.graph.nodes} == {"backward"}


def test_lists_of_passes_name_it() -> None:
    assert rf.joint_pass(4).__name__ == "quantize_collectives_pass"
