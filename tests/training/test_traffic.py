"""quantize_traffic on real ranks: each thing gets its own door, and one handle has all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rfcompile as rf
from rfcompile.distributed import quantize_ddp, quantize_fsdp, quantize_pipeline_stage
from rfcompile.errors import (
    HookError,
    NonFiniteError,
    OptionError,
    PolicyError,
    RankMismatchError,
    StateError,
)
from rfcompile.training import quantize_states
from rfcompile.wire import default_policy as defaults
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

POLICY = rf.Policy(weights=8, gradients=4, activations=8, optimizer_state=8, min_bytes=0)
WIDTH = 16


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


def sharded(net: Net) -> Net:
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    return net


def batch(rank: Rank, step: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank.index))


def train(rank: Rank, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> Tensor:
    found = [getattr(p, "full_tensor", lambda p=p: p)().flatten() for p in model.parameters()]
    return torch.cat([x.detach() for x in found])


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def anywhere(report: rf.Report) -> rf.Report:
    """The report, whatever the process group is called."""
    return replace(report, sites=tuple(replace(site, group="") for site in report.sites))


# ---- each thing gets its door ------------------------------------------------------------------


def check_ddp_and_optimizer(rank: Rank) -> None:
    one, other = DistributedDataParallel(Net()), DistributedDataParallel(Net())
    mine, theirs = adam(one), adam(other)
    handle = rf.quantize_traffic([one, mine], POLICY, error_feedback=True)
    doors = [quantize_ddp(other, POLICY, error_feedback=True), quantize_states(theirs, POLICY)]
    train(rank, one, mine)
    train(rank, other, theirs)
    assert torch.equal(values(one), values(other))
    rank.assert_same(values(one))
    report, parts = handle.report(), rf.merge_reports(doors[1], doors[0])
    assert list(handle.handles) == ["optimizer 0", "ddp 0"]
    assert anywhere(report) == anywhere(parts)
    assert report.num_quantized == report.num_sites - 6  # the counters of AdamW's steps
    assert report.bytes_after < report.bytes_before / 5
    state = handle.state_dict()
    assert list(state) == ["ddp 0"]
    theirs_state = doors[0].state_dict()
    assert state["ddp 0"].keys() == theirs_state.keys()
    assert all(torch.equal(state["ddp 0"][k], theirs_state[k]) for k in theirs_state)
    assert any(x.abs().max() > 0 for x in theirs_state.values())
    handle.load_state_dict(state)
    again = handle.state_dict()["ddp 0"]
    assert all(torch.equal(again[k], theirs_state[k]) for k in theirs_state)
    error = error_of(lambda: handle.load_state_dict({"ddp 1": {}}))
    assert isinstance(error, StateError)
    assert "Here are optimizer 0, ddp 0" in str(error)
    handle.remove()
    handle.remove()
    assert handle.report().num_quantized == 0
    assert handle.report().notes == ("removed: from then on everything is exact",)
    exact = DistributedDataParallel(Net())
    exact.module.load_state_dict(one.module.state_dict())
    one.zero_grad()
    for model in (one, exact):
        model(batch(rank, 9)).square().mean().backward()  # pays what error feedback still owes
    one.zero_grad()
    exact.zero_grad()
    for model in (one, exact):
        model(batch(rank, 10)).square().mean().backward()
    for p, q in zip(one.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    again_quantized = rf.quantize_traffic(one, POLICY)  # DDP takes one hook, once: it has ours
    quantize_ddp(exact, POLICY)
    for model in (one, exact):
        model.zero_grad()
        model(batch(rank, 11)).square().mean().backward()
    for p, q in zip(one.parameters(), exact.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert again_quantized.report().num_quantized == again_quantized.report().num_sites > 0


def check_fsdp(rank: Rank) -> None:
    one, other = sharded(Net()), sharded(Net())
    mine, theirs = adam(one), adam(other)
    outer = nn.Sequential(one)  # modules with fully_shard are somewhere inside
    handle = rf.quantize_traffic(outer, POLICY, weight_delta=True)
    quantize_fsdp(other, POLICY, weight_delta=True)
    train(rank, one, mine)
    train(rank, other, theirs)
    assert torch.equal(values(one), values(other))
    rank.assert_same(values(one))
    report = handle.report()
    assert report.num_quantized == report.num_sites > 0
    assert "weight_delta" in report.policy
    assert not any("no FSDP unit" in note for note in report.notes)
    handle.remove()
    rf.quantize_traffic(one, POLICY).remove()  # they take another one


def check_pipeline(rank: Rank) -> None:
    gradients, reports = [], []
    for door in ("traffic", "stage"):
        module = Net(rank.index)
        stage: Any = PipelineStage(module, rank.index, rank.world, torch.device("cpu"))
        schedule = Schedule1F1B(stage, 4, loss_fn=F.mse_loss)
        if door == "traffic":
            handle: Any = rf.quantize_traffic((schedule, stage, adam(module)), POLICY)
            assert list(handle.handles) == ["optimizer 0", "stage 0"]
        else:
            handle = quantize_pipeline_stage(stage, POLICY)
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(3))
        schedule.step(*([x] if rank.index == 0 else []), target=x, losses=[])
        gradients.append([p.grad for p in module.parameters()])
        reports.append(anywhere(handle.report()))
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert reports[0].sites == reports[1].sites
    assert reports[0].num_quantized == reports[0].num_sites > 0


def check_schedule_of_several_stages(rank: Rank) -> None:
    """A module of a stage may be sharded: it gets its own door, once."""
    mesh = init_device_mesh("cpu", (rank.world, 1), mesh_dim_names=("stages", "shards"))
    parts = [Net(i) for i in range(2)]
    for part in parts:
        fully_shard(part, mesh=mesh["shards"])
    stages = [
        PipelineStage(
            part,
            rank.index + i * rank.world,
            2 * rank.world,
            torch.device("cpu"),
            group=mesh.get_group("stages"),
        )
        for i, part in enumerate(parts)
    ]
    handle = rf.quantize_traffic([ScheduleInterleaved1F1B(stages, 4), *parts], POLICY)
    assert list(handle.handles) == ["stage 0", "stage 1", "fsdp 0", "fsdp 1"]
    assert type(stages[1]).__name__ == "QuantizedPipelineStage"
    handle.remove()


@pytest.mark.parametrize(
    "check",
    [check_ddp_and_optimizer, check_fsdp, check_pipeline, check_schedule_of_several_stages],
    ids=lambda check: check.__name__,
)
def test_each_thing_gets_its_door(ranks: RunRanks, check: Any) -> None:
    ranks(2, check)


# ---- what is refused ---------------------------------------------------------------------------


def check_all_or_nothing(rank: Rank) -> None:
    ddp, net = DistributedDataParallel(Net()), sharded(Net())
    optimizer, other = adam(net), adam(ddp)
    train(rank, net, optimizer, 1)
    train(rank, ddp, other, 1)
    if rank.index == 1:  # only here the second optimizer is refused
        other.state[next(ddp.parameters())]["exp_avg"].fill_(float("nan"))
    strict = rf.Policy(optimizer_state=rf.QuantFormat(8, nonfinite="raise"), min_bytes=0)
    error = error_of(lambda: rf.quantize_traffic([ddp, net, optimizer, other], strict))
    assert isinstance(error, NonFiniteError)
    assert str(error).startswith("rank 1: ")
    for each in (optimizer, other):  # as if nothing had been asked
        quantize_states(each, POLICY).remove()
    error = error_of(
        lambda: rf.quantize_traffic([ddp, net, optimizer], 4 + 4 * rank.index)  # ranks differ
    )
    assert isinstance(error, RankMismatchError)
    quantize_states(optimizer, POLICY).remove()
    quantize_fsdp(net, POLICY).remove()
    for _ in range(2):
        quantize_ddp(ddp, POLICY).remove()


def check_a_hook_that_is_there(rank: Rank) -> None:
    free, taken, net = (
        DistributedDataParallel(Net()),
        DistributedDataParallel(Net()),
        sharded(Net()),
    )
    quantize_ddp(taken, POLICY)
    error = error_of(lambda: rf.quantize_traffic([net, free, taken], POLICY))
    assert isinstance(error, HookError)
    assert "it has the communication hook 'quantized_hook'" in str(error)
    rf.quantize_traffic([net, free], POLICY)  # neither has lost its place


def bare(kind: type[nn.Module]) -> nn.Module:
    """A module of this class; torch makes no FSDP1 module without a GPU."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def check_what_no_door_is_for(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (rank.world,))
    parallel = parallelize_module(Net(), mesh, {"first": ColwiseParallel()})
    one_of_each = init_device_mesh("cpu", (rank.world, 1), mesh_dim_names=("replicas", "shards"))
    replicas = Net()
    fully_shard(replicas, mesh=one_of_each)
    refused: list[tuple[Any, str]] = [
        (parallel, r"its parameters are DTensors, whose collectives are in graphs: torch\.compile"),
        (Net(), "it is neither in DistributedDataParallel nor sharded by fully_shard"),
        (
            bare(FullyShardedDataParallel),
            "FSDP1 takes no quantized communication: use fully_shard",
        ),
        (replicas, f"has {rank.world} replicas of one shard each"),
        ("model", "str cannot be quantized: give a module that is wrapped in"),
    ]
    for thing, message in refused:
        error = error_of(lambda thing=thing: rf.quantize_traffic(thing, POLICY))
        assert isinstance(error, HookError)
        assert re.search(message, str(error))


def check_one_rank_without_ddp(rank: Rank) -> None:
    thing = DistributedDataParallel(Net()) if dist.get_rank() else None
    net = thing or Net()
    if thing is None:
        DistributedDataParallel(Net())  # its constructor sends
    error = error_of(lambda: rf.quantize_traffic(net, POLICY))
    assert isinstance(error, HookError)
    assert str(error).startswith("rank 0: Net cannot be quantized")


@pytest.mark.parametrize(
    "check",
    [
        check_all_or_nothing,
        check_a_hook_that_is_there,
        check_what_no_door_is_for,
        check_one_rank_without_ddp,
    ],
    ids=lambda check: check.__name__,
)
def test_what_is_refused(ranks: RunRanks, check: Any) -> None:
    ranks(2, check)


@pytest.fixture
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RFCOMPILE_POLICY", "RFCOMPILE_BITS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(defaults._Default, "policy", None)
    monkeypatch.setattr(defaults._Default, "compiled", None)


@pytest.mark.usefixtures("_no_default")
def test_the_policy_is_the_default_one() -> None:
    optimizer = adam(Net())
    with pytest.raises(PolicyError, match="set a default one"):
        rf.quantize_traffic(optimizer)
    rf.set_default_policy({"optimizer_state": 8})
    with rf.quantize_traffic(optimizer) as handle:
        assert "optimizer_state=8b" in handle.report().policy
    assert handle.report().notes == ("removed: from then on everything is exact",)


def test_options_that_nothing_is_there_for() -> None:
    optimizer = adam(Net())
    with pytest.raises(OptionError, match=r"error_feedback=True .* no DistributedDataParallel"):
        rf.quantize_traffic(optimizer, 8, error_feedback=True)
    with pytest.raises(OptionError, match=r"weight_delta=True .* no module with fully_shard"):
        rf.quantize_traffic(optimizer, 8, weight_delta=True)
    with pytest.raises(OptionError, match=r"things=\[\] is not supported: give a DDP or FSDP2"):
        rf.quantize_traffic([], 8)
    with rf.quantize_traffic((optimizer, [optimizer]), 8) as handle:
        assert list(handle.handles) == ["optimizer 0"]
    with quantize_states(optimizer, 8), pytest.raises(StateError, match="quantized already"):
        rf.quantize_traffic(optimizer, 8)


# ---- what the report says of the rest ----------------------------------------------------------


def check_notes(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (1, rank.world), mesh_dim_names=("shards", "parts"))
    net = Net()
    parallelize_module(
        net, mesh["parts"], {"first": ColwiseParallel(), "layers.0": ColwiseParallel()}
    )
    for layer in net.layers:
        fully_shard(layer, mesh=mesh["shards"])
    with rf.quantize_traffic(net, POLICY) as handle:
        outside, eager = handle.report().notes[-2:]
        assert outside.startswith("first.weight, first.bias: in no FSDP unit")
        assert eager.startswith("first, layers.0: tensor parallel and in no compiled module")
        net.first.compile(backend="rfquant")
        assert handle.report().notes[-1].startswith("layers.0: tensor parallel")
        net.layers[0].compile(backend="rfquant")
        assert "tensor parallel" not in str(handle.report())


def test_notes_on_what_no_hook_reaches(ranks: RunRanks) -> None:
    ranks(2, check_notes)
