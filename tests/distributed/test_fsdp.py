"""FSDP2 on real ranks: what rf.all_gather and rf.reduce_scatter give, on every rank.

The reference is a copy of the model on each rank: its weights are what ``rf.all_gather`` makes of
the shards, and the shards of the gradients must be bit for bit ``rf.reduce_scatter`` of its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

import rfcompile as rf
from rfcompile.distributed import FSDPHandle, quantize_fsdp
from rfcompile.distributed import weight_delta as differences
from rfcompile.distributed.fsdp_comms import (
    QuantizedAllGather,
    QuantizedReduceScatter,
    reduction_of,
)
from rfcompile.distributed.fsdp_units import units_of
from rfcompile.errors import (
    HookError,
    NonFiniteError,
    RankMismatchError,
    RFCompileError,
    TransportError,
)
from rfcompile.wire import exchanges
from rfcompile.wire.cost import sent_bytes
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks


REDUCES_AS_PARAMETERS = hasattr(MixedPrecisionPolicy, "_resolve_for_param")
"""torch 2.15: without reduce_dtype, gradients reduce in the dtype of the sharded parameters."""


class Block(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width + 1)
        self.down = nn.Linear(2 * width + 1, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return result


class Net(nn.Module):
    def __init__(self, width: int = 13, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.last(x)
        return result


def shard(module: Net, mesh: DeviceMesh | None = None, **options: Any) -> Net:
    for layer in module.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
    return module


def policy(weights: Any = "8b", gradients: Any = "4b", **options: Any) -> rf.Policy:
    return rf.Policy(weights=weights, gradients=gradients, **({"min_bytes": 0} | options))


def batch(rank: Rank, step: int, width: int = 13) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(100 * step + rank.index))


def backward(model: nn.Module, x: Tensor) -> None:
    loss: Tensor = model(x).float().square().mean()
    loss.backward()


def local(x: Any) -> Tensor:
    tensor: Tensor = x.detach().to_local()
    return tensor


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that this rank computes with, gathered as a forward pass would."""
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return found


class Reference:
    """What a step must give, by definition, from the exact shards."""

    def __init__(self, model: Net, plain: Net, policy: rf.Policy, rank: Rank, **dtypes: Any):
        self.model, self.plain, self.policy, self.rank = model, plain, policy, rank
        self.param_dtype = dtypes.get("param_dtype")
        self.reduce_dtype = dtypes.get("reduce_dtype")
        self.group: Any = dtypes.get("group")
        self.world = dist.get_world_size(self.group)
        if self.param_dtype:
            plain.to(self.param_dtype)

    def units(self) -> Iterator[list[tuple[list[str], Any, Any]]]:
        """The names of each unit that share both formats, weights' and gradients'."""
        names = [name for name, _ in self.plain.named_parameters()]
        layers = [[n for n in names if n.startswith(f"layers.{i}.")] for i in range(9)]
        for unit in [[n for n in names if not n.startswith("layers")], *filter(None, layers)]:
            groups: dict[Any, list[str]] = {}
            for name in unit:
                paths = (name, name.rpartition(".")[0], ".".join(name.split(".")[:2]))
                patterns = [self.policy.override_for(path) for path in paths]
                pattern = next(filter(None, patterns), "")
                named = pattern != ""
                site: Any = self.policy.sites[pattern] if named else None
                formats = (
                    tuple(site and site.for_kind(kind) for kind in ("weights", "gradients"))
                    if named
                    else (self.policy.weights, self.policy.gradients)
                )
                groups.setdefault(formats, []).append(name)
            yield [(group, *formats) for formats, group in groups.items()]

    def padded(self, name: str) -> int:
        shape = self.plain.get_parameter(name).shape
        return -(-shape[0] // self.world) * shape[1:].numel()

    def gather(self) -> None:
        """Give the copy the weights that the ranks must agree on."""
        with torch.no_grad():
            for names, fmt, _ in (part for unit in self.units() for part in unit):
                shards = []
                for name in names:
                    values = local(self.model.get_parameter(name)).flatten()
                    shards.append(F.pad(values, (0, self.padded(name) - len(values))))
                x = torch.cat(shards).to(self.param_dtype or torch.float32)
                rows = rf.all_gather(x, fmt, self.group) if fmt else self.exactly(x)
                columns = rows.view(self.world, -1).split([self.padded(n) for n in names], 1)
                for name, column in zip(names, columns, strict=True):
                    parameter = self.plain.get_parameter(name)
                    parameter.copy_(column.flatten()[: parameter.numel()].view_as(parameter))

    def exactly(self, x: Tensor) -> Tensor:
        rows = x.new_empty(self.world * len(x))
        dist.all_gather_into_tensor(rows, x, group=self.group)
        return rows

    def shards(self) -> dict[str, Tensor]:
        """This rank's shards of the mean gradients."""
        found = {}
        for names, _, fmt in (part for unit in self.units() for part in unit):
            rows = []
            for name in names:
                gradient = self.plain.get_parameter(name).grad
                assert gradient is not None
                padding = self.world * self.padded(name) - gradient.numel()
                rows.append(F.pad(gradient.flatten(), (0, padding)).view(self.world, -1))
            x = torch.cat(rows, 1).to(self.reduce_dtype or rows[0].dtype).flatten()
            if fmt:
                mine = rf.reduce_scatter(x, fmt, self.group, op="avg")
            else:
                mine = x.new_empty(len(x) // self.world)
                dist.reduce_scatter_tensor(mine, x, op=dist.ReduceOp.AVG, group=self.group)
            for name, piece in zip(names, mine.split([self.padded(n) for n in names]), strict=True):
                found[name] = piece
        return found

    def check_weights(self, what: object) -> None:
        self.gather()
        for name, weight in full_weights(self.model).items():
            assert torch.equal(weight, self.plain.get_parameter(name)), (what, name)
            self.rank.assert_same(weight, (what, name))

    def check_step(self, step: int, what: object, pieces: int = 1) -> None:
        self.gather()
        self.plain.zero_grad()
        self.model.zero_grad()
        for piece in range(pieces):
            x = batch(self.rank, 10 * step + piece)
            backward(self.plain, x if self.param_dtype is None else x.to(self.param_dtype))
            self.model.set_requires_gradient_sync(piece == pieces - 1)
            backward(self.model, x)
        for name, expected in self.shards().items():
            parameter = self.model.get_parameter(name)
            assert parameter.grad is not None
            got = local(parameter.grad).flatten()
            assert torch.equal(got, expected[: len(got)].to(got.dtype)), f"{what}: {name} {step}"


def check_training(
    rank: Rank, what: object, chosen: rf.Policy, model: Net | None = None, plain: Net | None = None,
    steps: int = 2, pieces: int = 1, **dtypes: Any,
) -> tuple[Net, FSDPHandle]:  # fmt: skip
    """Some steps of AdamW, each compared with the reference."""
    if model is None or plain is None:
        plain = Net()
        model = shard(copy.deepcopy(plain))
    handle = quantize_fsdp(model, chosen)
    reference = Reference(model, plain, chosen, rank, **dtypes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        reference.check_step(step, what, pieces)
        optimizer.step()
    reference.check_weights(what)
    return model, handle


# ---- every way of FSDP ---------------------------------------------------------------------------


def check_ways(rank: Rank) -> None:
    check_training(rank, "plain", policy(), steps=3)
    check_training(rank, "accumulated", policy(), pieces=3)
    sites = {"*.bias": None, "layers.1": "3b:g16", "layers.0.up.weight": "2b:h16", "nrm": None}
    model, handle = check_training(rank, "sites", policy("6b", "5b:tensor", sites=sites))
    formats = {(s.module, s.format) for s in handle.report().sites if "unit layers.0" in s.source}
    assert ("layers.0.up.weight", "2b:g128:tread:h16") in formats
    assert ("layers.0.up.bias ... layers.0.norm.bias", None) in formats
    reasons = {s.reason for s in handle.report().skipped}
    assert reasons == {"sites['*.bias'] says exact"}
    # A misspelt pattern applies to nothing.
    assert handle.report().patterns == dict.fromkeys(sites, True) | {"nrm": False}
    for reshard in (False, True, 1):
        plain = Net()
        model = shard(copy.deepcopy(plain), reshard_after_forward=reshard)
        _, handle = check_training(rank, reshard, policy(), model, plain)
        gathers = [s.direction for s in handle.report().sites if s.collective == "all_gather"]
        # A group of one rank gathers nothing.
        assert gathers.count("backward") == (4 if reshard is True else 0), reshard


def check_precision(rank: Rank) -> None:
    for param, reduce in (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, None),
        (torch.float16, None),
    ):
        plain = Net()
        mixed = MixedPrecisionPolicy(param_dtype=param, reduce_dtype=reduce)
        model = shard(copy.deepcopy(plain), mp_policy=mixed)
        chosen = policy("8b", "8b")
        wide = reduce or (torch.float32 if REDUCES_AS_PARAMETERS else param)
        if param == torch.float16:
            handle = quantize_fsdp(model, chosen)
            with recorded(QuantizedReduceScatter, "_reduced") as calls:
                backward(model, batch(rank, 0))
            # In float16, FSDP divides before and after the sum.
            assert {args[3] for args, _ in calls} == {"sum" if wide == param else "avg"}
            assert {args[1].dtype for args, _ in calls} == {wide}
            for args, result in calls:
                assert torch.equal(result, rf.reduce_scatter(args[1], args[2], op=args[3]))
        else:
            dtypes = {"param_dtype": param, "reduce_dtype": wide}
            _, handle = check_training(rank, (param, reduce), chosen, model, plain, **dtypes)
        sites = handle.report().sites
        assert {s.dtype for s in sites if s.collective == "all_gather"} != {"f32"}
        assert handle.report().num_quantized == len(sites)


def check_asynchronous(rank: Rank) -> None:
    """Gathers that FSDP starts early: in its order, and decoded when it waits."""
    plain = Net()
    model = shard(copy.deepcopy(plain))
    first, second, third = model.layers
    model.set_modules_to_forward_prefetch([first, second])
    first.set_modules_to_forward_prefetch([second, third])
    third.set_modules_to_backward_prefetch([second, first])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module._set_unshard_async_op(True)
    with recorded(QuantizedAllGather, "__call__") as calls:
        check_training(rank, "async", policy(sites={"*.bias": None}), model, plain, steps=1)
    order = [args[0].unit.label for args, _ in calls]
    assert order[:7] == [
        "(root)", "layers.0", "layers.1", "layers.2",  # forward
        "layers.2", "layers.1", "layers.0",
    ]  # fmt: skip
    assert all(isinstance(work, dist.Work) for _, work in calls[:7])
    handle = model.unshard(async_op=True)
    assert handle is not None
    handle.wait()
    rank.assert_same(model.first.weight)
    model.reshard()


def check_several_groups(rank: Rank) -> None:
    """A module whose parameters FSDP shards over several meshes, and one group of two modules."""
    model = Net(depth=2)
    fully_shard(list(model.layers))  # type: ignore[call-overload]
    fully_shard(model)
    handle = quantize_fsdp(model, policy("4b", "4b"))
    backward(model, batch(rank, 0))
    assert {s.source for s in handle.report().sites} == {"unit (root)", "unit layers.0"}
    for name, weight in full_weights(model).items():
        rank.assert_same(weight, name)
    one = Net(depth=0)
    pair = DeviceMesh.from_group(dist.new_group(), "cpu")
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
    except ImportError:  # torch 2.11
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
    from torch.distributed.tensor import Shard

    other = FSDPMeshInfo(pair, 0)

    def place(parameter: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), other) if parameter.dim() == 2 else None

    fully_shard(one, shard_placement_fn=place)
    handle = quantize_fsdp(one, policy("4b", "4b"))
    backward(one, batch(rank, 0))
    sources = {s.source for s in handle.report().sites}
    assert sources == {"unit (root) group 0", "unit (root) group 1"}


def check_dtypes_side_by_side(rank: Rank) -> None:
    """FSDP sends them as bytes; nothing is quantized, and everything is reported."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12, dtype=torch.bfloat16))
    model[1].requires_grad_(False)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    fully_shard(model)
    handle = quantize_fsdp(model, policy())
    for name, weight in full_weights(model).items():
        assert torch.equal(weight, expected[name])
    [site] = [s for s in handle.report().sites if s.collective == "all_gather"]
    assert site.dtype == "u8"
    assert site.reason.startswith("parameters of several dtypes")
    assert site.bytes_before == site.bytes_after

    double = shard(Net().double())
    handle = quantize_fsdp(double, policy())
    backward(double, batch(rank, 0).double())
    assert {s.reason for s in handle.report().sites} == {"f64 data is not quantized"}
    assert handle.report().num_sites == 4 + 3 + 4


def check_unused_and_frozen(rank: Rank) -> None:
    for sites in ({}, {"*.bias": None}):
        model = shard(Net())
        model.first.requires_grad_(False)
        handle = quantize_fsdp(model, policy(sites=sites))
        block = model.layers[1]
        block.forward = lambda x, block=block: block.norm(x + block.up(x)[..., :13])
        backward(model, batch(rank, 0))
        assert model.get_parameter("layers.1.up.weight").grad is not None
        assert model.get_parameter("layers.1.down.weight").grad is None
        assert model.first.weight.grad is None
        [site] = [
            s for s in handle.report().sites
            if s.source == "unit layers.1" and s.collective == "reduce_scatter"
        ]  # fmt: skip
        assert site.module == "layers.1 (gradients of some parameters)"
        assert (site.format is None) == bool(sites)
        assert ("is not known" in site.reason) == bool(sites)


def check_divide_factor(rank: Rank) -> None:
    mean = shard(Net(depth=1))
    quantize_fsdp(mean, policy())
    backward(mean, batch(rank, 0))
    for factor in (8.0, float(rank.world)):
        model = shard(Net(depth=1))
        quantize_fsdp(model, policy())
        with torch.no_grad():
            for new, old in zip(model.parameters(), mean.parameters(), strict=True):
                new.copy_(old)
        for module in (model, *model.layers):
            module.set_gradient_divide_factor(factor)
        backward(model, batch(rank, 0))
        for new, old in zip(model.parameters(), mean.parameters(), strict=True):
            assert torch.equal(local(new.grad) * factor, local(old.grad) * rank.world)
    assert reduction_of(dist.ReduceOp.MAX) is None


def check_offload(rank: Rank) -> None:
    plain = Net()
    model = shard(copy.deepcopy(plain), offload_policy=CPUOffloadPolicy(pin_memory=False))
    check_training(rank, "offload", policy(), model, plain)


@pytest.mark.parametrize(
    "check",
    [
        check_ways,
        check_precision,
        check_asynchronous,
        check_several_groups,
        check_dtypes_side_by_side,
        check_unused_and_frozen,
        check_divide_factor,
        check_offload,
    ],
)
def test_weights_and_gradients_are_those_of_the_eager_collectives(
    ranks: RunRanks, check: Callable[[Rank], None]
) -> None:
    ranks(2, check)


@contextlib.contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Arguments and results of the calls of ``owner.name``."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


# ---- compiled models -----------------------------------------------------------------------------


def check_compiled(rank: Rank) -> None:
    """What is sent is what the eager collectives give; the whole model, and block by block."""
    for whole in (False, True):
        plain = Net(depth=2)
        model = shard(copy.deepcopy(plain))
        if whole:
            handle = quantize_fsdp(model, policy())
            compiled = torch.compile(model, backend="aot_eager")
        else:
            for layer in model.layers:
                layer.compile(backend="aot_eager")
            handle = quantize_fsdp(model, policy())
            compiled = model
        Reference(model, plain, policy(), rank).check_weights(whole)
        with recorded(QuantizedReduceScatter, "_reduced") as calls:
            for step in range(2):
                backward(compiled, batch(rank, step))
        assert len(calls) == 2 * 3
        for args, result in calls:
            assert torch.equal(result, rf.reduce_scatter(args[1], args[2], op=args[3]))
        assert handle.report().num_quantized == handle.report().num_sites == 3 + 2 + 3
    assert quantize_fsdp(torch.compile(shard(Net(depth=1))), policy()).report().sites == ()


@pytest.mark.slow
def test_compiled_models(ranks: RunRanks) -> None:
    ranks(2, check_compiled)


# ---- values that are not finite, rounding, bytes, the way back -----------------------------------


def check_nonfinite(rank: Rank) -> None:
    for value in (float("nan"), float("inf")):
        model = shard(Net())
        quantize_fsdp(model, policy())
        if rank.index == 1:
            with torch.no_grad():
                local(model.get_parameter("layers.0.up.weight"))[0, 0] = value
        full = full_weights(model)
        bad = full["layers.0.up.weight"]
        assert bad.isnan().any()
        assert bad.isfinite().any()  # other groups are as they were
        assert full["layers.1.up.weight"].isfinite().all()
        for name, weight in full.items():
            rank.assert_same(weight, name)
        backward(model, batch(rank, 0))
        gradient = model.get_parameter("layers.0.up.weight").grad
        assert gradient is not None
        assert not local(gradient).isfinite().all()
    bad_weights, bad_gradients = ("8b:raise", "4b", "all-gather"), ("8b", "4b:raise", "reduce")
    for weights, gradients, what in (bad_weights, bad_gradients):
        model = shard(Net())
        quantize_fsdp(model, policy(weights, gradients))
        backward(model, batch(rank, 0))
        x = batch(rank, 0)
        if rank.index == 1:
            if what == "reduce":
                x[0, 0] = float("inf")
            else:
                with torch.no_grad():
                    local(model.get_parameter("layers.2.down.weight"))[0, 0] = float("inf")
        error = error_of(lambda model=model, x=x: backward(model, x))
        assert isinstance(error, NonFiniteError)
        assert error.ranks == (1,)
        assert re.search(rf"FSDP {what}.* of (layers\.2|\(root\)) on rank 1", str(error))


def check_stochastic(rank: Rank) -> None:
    model = shard(Net(depth=1))
    quantize_fsdp(model, policy("4b:stoch", "4b:stoch"))
    x = torch.randn(8, 13, generator=torch.Generator().manual_seed(0))  # equal on all ranks
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with (
            recorded(exchanges, "_all_to_all") as sent,
            recorded(exchanges, "start_gather") as gathered,
        ):
            backward(model, x)
        forward, again = gathered[1][0][0], gathered[2][0][0]
        assert torch.equal(forward, again)  # backward computes with the weights of forward
        mine, other = rank.gathered(sent[0][0][0])
        assert not torch.equal(mine, other)
        gradients.append(local(model.last.weight.grad))
    assert not torch.equal(*gradients)


def check_bytes(rank: Rank) -> None:
    sites = {"*.bias": None}
    for weights, gradients in (("8b", "4b"), ("4b:raise", "3b:raise"), (None, "8b:tensor")):
        model = shard(Net())
        handle = quantize_fsdp(model, policy(weights, gradients, sites=sites))
        assert "no pass has run yet" in handle.report().notes[0]
        backward(model, batch(rank, 0))
        with (
            recorded(exchanges, "_all_to_all") as exchanged,
            recorded(exchanges, "start_gather") as gathered,
            recorded(type(handle._comms[0][0].inner), "__call__") as exact_gathers,
            recorded(type(handle._comms[0][1].inner), "__call__") as exact_reductions,
        ):
            backward(model, batch(rank, 1))
        world = rank.world
        sent = sum(sent_bytes("all_to_all", args[0].nbytes, world) for args, _ in exchanged)
        sent += sum(sent_bytes("all_gather", args[0].nbytes, world) for args, _ in gathered)
        sent += sum(sent_bytes("all_gather", args[2].nbytes, world) for args, _ in exact_gathers)
        sent += sum(
            sent_bytes("reduce_scatter", args[2].nbytes, world) for args, _ in exact_reductions
        )
        report = handle.report()
        assert report.bytes_after == sent
        padded = sum(size for comms in handle._comms for _, size in comms[0].unit.sizes(False))
        root = sum(size for _, size in handle._comms[0][0].unit.sizes(False))
        gathers = (2 * padded - root) * 4 * (world - 1)
        assert report.bytes_before == gathers + padded * 4 * (world - 1)
    input_bytes = 4 * root  # of the gather: a shard; that of the gradients is all shards
    for min_bytes, expected in ((input_bytes, "8b:g128:tread"), (input_bytes + 1, None)):
        small = quantize_fsdp(model := shard(Net()), policy(min_bytes=min_bytes))
        backward(model, batch(rank, 0))
        gather, reduction = (s for s in small.report().sites if s.source == "unit (root)")
        assert gather.format == expected
        assert gather.eligible
        assert reduction.format == "4b:g128:tread"
    assert gather.reason == f"{input_bytes} bytes < min_bytes={min_bytes}"


def check_the_way_back(rank: Rank) -> None:
    torch.manual_seed(0)
    model = shard(Net())
    exact = shard(Net())
    with torch.no_grad():
        for new, old in zip(model.parameters(), exact.parameters(), strict=True):
            new.copy_(old)
    handle = quantize_fsdp(model, policy())
    backward(model, batch(rank, 0))
    handle.remove()
    model.zero_grad()
    nothing = quantize_fsdp(exact, None)
    for net in (model, exact):
        backward(net, batch(rank, 1))
    for new, old in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(local(new.grad), local(old.grad))
    reasons = {s.reason for s in nothing.report().sites}
    assert reasons == {"the policy sends weights exact", "the policy sends gradients exact"}
    quantize_fsdp(model, policy())  # and again


@pytest.mark.parametrize(
    "check", [check_nonfinite, check_stochastic, check_bytes, check_the_way_back]
)
def test_values_that_are_not_finite_rounding_bytes_and_the_way_back(
    ranks: RunRanks, check: Callable[[Rank], None]
) -> None:
    ranks(2, check)


# ---- four ranks, two dimensions ------------------------------------------------------------------


def check_four(rank: Rank) -> None:
    check_training(rank, "four", policy("5b", "3b"))
    plain = Net()
    model = shard(copy.deepcopy(plain), reshard_after_forward=2)
    _, handle = check_training(rank, "int", policy(), model, plain)
    reasons = {s.reason for s in handle.report().skipped}
    assert reasons == {
        "reshard_after_forward=int: weights that were decoded already, among fewer ranks"
    }

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard(Net(), mesh)
    with recorded(dist, "all_gather_object") as compared:
        handle = quantize_fsdp(model, policy())
    assert len(compared) == 4  # errors, then plans, once in each dimension
    with recorded(QuantizedReduceScatter, "_reduced") as calls:
        backward(model, batch(rank, 0))
    reduced = {n: p for args, p in calls for n, p in [(args[0].unit.label, args[1])] if n}
    mine = mesh["shard"].get_group()
    for unit, x in reduced.items():
        expected = rf.reduce_scatter(x, "4b:tread", mine, op="avg")
        dist.all_reduce(expected, op=dist.ReduceOp.AVG, group=mesh["replicate"].get_group())
        if unit == "layers.1":
            got = local(model.get_parameter("layers.1.up.weight").grad).flatten()
            assert torch.equal(got, expected[: len(got)])
    for name, weight in full_weights(model).items():
        rank.assert_same(weight, name)
    [all_reduce] = [
        s for s in handle.report().sites
        if s.collective == "all_reduce" and s.source == "unit layers.1"
    ]  # fmt: skip
    assert all_reduce.format is None
    assert all_reduce.reason == "FSDP has no hook that replaces the all-reduce of HSDP"
    assert all_reduce.world_size == 2
    for odd in range(4):  # whoever it is, all ranks are told
        bits = 8 if rank.index == odd else 4
        error = error_of(lambda bits=bits: quantize_fsdp(shard(Net(), mesh), bits))
        assert isinstance(error, RankMismatchError)


@pytest.mark.slow
def test_four_ranks_and_meshes_of_two_dimensions(ranks: RunRanks) -> None:
    ranks(4, check_four)


# ---- checkpoints ---------------------------------------------------------------------------------


def make(seed: int) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = shard(Net())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def steps(rank: Rank, model: Net, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for step in numbers:
        optimizer.zero_grad()
        backward(model, batch(rank, step))
        optimizer.step()


def save(model: Net, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def load(model: Net, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def assert_equal(one: Net, other: Net) -> None:
    for (name, new), old in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(local(new), local(old)), name


def check_checkpoint(rank: Rank, folder: Path, weight_delta: bool) -> None:
    model, optimizer = make(0)
    handle = quantize_fsdp(model, policy("4b", "4b"), weight_delta=weight_delta)
    steps(rank, model, optimizer, range(3))
    save(model, optimizer, folder)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    if weight_delta:
        handle.reset()  # as loading does
    steps(rank, model, optimizer, range(3, 6))
    again, restored = make(1)
    quantize_fsdp(again, policy("4b", "4b"), weight_delta=weight_delta)
    steps(rank, again, restored, range(9, 11))  # it has sent something else before
    load(again, restored, folder)
    for name, value in again.state_dict().items():
        assert torch.equal(local(value), local(plain[name]))
    steps(rank, again, restored, range(3, 6))
    assert_equal(again, model)


@pytest.mark.parametrize("weight_delta", [False, True])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(
    ranks: RunRanks, tmp_path: Path, weight_delta: bool
) -> None:
    ranks(2, check_checkpoint, tmp_path, weight_delta)


# ---- weight differences --------------------------------------------------------------------------


def check_delta(rank: Rank) -> None:
    """By definition: every rank's copy grows by what decoding each shard's difference gives."""
    model, optimizer = make(0)
    sites = {"*.bias": None, "*norm*": None}
    handle = quantize_fsdp(model, policy("4b", None, sites=sites), weight_delta=True)
    gather = handle._comms[2][0]
    names = [name for name, _ in gather.unit.sizes(False) if name.endswith("up.weight")]
    names.append("layers.1.down.weight")
    copies: Tensor | None = None
    for step in range(6):
        shards = []
        for name, size in gather.unit.sizes(False):
            if name in names:
                values = local(model.get_parameter(name)).flatten()
                shards.append(F.pad(values, (0, size - len(values))))
        x = torch.cat(shards)
        if copies is None:
            copies = torch.stack(rank.gathered(x))
        else:
            difference = x - copies[rank.index]
            copies = copies + rf.all_gather(difference, "4b:tread").view(rank.world, -1)
        steps(rank, model, optimizer, range(step, step + 1))
        [delta] = gather._deltas.values()
        assert delta.copy is not None
        assert torch.equal(delta.copy, copies)
        rank.assert_same(delta.copy)
    assert copies is not None
    # Errors do not add up: that of the last gather is that of one step's difference.
    error = (x - copies[rank.index]).abs().max()
    assert error <= rf.QuantFormat.parse("4b:tread").max_error() * difference.abs().max()
    direct = rf.all_gather(x, "4b:tread").view(rank.world, -1)
    assert error < (x - direct[rank.index]).abs().max() / 4

    counted = recorded(differences, "all_gather_single")
    with recorded(exchanges, "start_gather") as gathered, counted as ages:
        backward(model, batch(rank, 9))
    sent = sum(sent_bytes("all_gather", args[0].nbytes, rank.world) for args, _ in gathered)
    whole = [args[1] for args, _ in ages if args[1].dtype == torch.int64]
    sent += sum(sent_bytes("all_gather", age.nbytes, rank.world) for age in whole)
    report = handle.report()
    quantized = [s for s in report.sites if s.collective == "all_gather" and s.format]
    assert sent == sum(s.bytes_after or 0 for s in quantized)
    assert {s.bytes_after for s in quantized if s.direction == "backward"} == {0}
    assert "the first gather, and the first after a reset, is exact" in report.notes[0]

    if rank.index == 1:  # one rank forgets: all begin anew, and agree
        handle.reset()
    exact = {name: p.full_tensor() for name, p in model.named_parameters()}
    for name, weight in full_weights(model).items():
        assert torch.equal(weight, exact[name]), name
    for value in (float("nan"), float("inf")):
        weight = local(model.get_parameter("layers.1.up.weight"))
        before = weight.clone()
        with torch.no_grad():
            weight[0, 0] = value if rank.index == 0 else 0
        bad = full_weights(model)["layers.1.up.weight"]
        assert not bad.isfinite().all()
        rank.assert_same(bad)
        with torch.no_grad():
            weight.copy_(before)
        good = full_weights(model)["layers.1.up.weight"]
        assert torch.equal(good, exact["layers.1.up.weight"])


def check_delta_in_low_precision(rank: Rank) -> None:
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    model = shard(Net(), mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    quantize_fsdp(model, policy("4b", "8b"), weight_delta=True)
    steps(rank, model, optimizer, range(5))
    for _ in range(3):  # weights that stand still are reached
        weights = full_weights(model)
    for name, weight in weights.items():
        rank.assert_same(weight, name)
        exact = model.get_parameter(name).full_tensor()
        torch.testing.assert_close(weight.float(), exact, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("check", [check_delta, check_delta_in_low_precision])
def test_weight_differences(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(2, check)


# ---- what cannot work ----------------------------------------------------------------------------


def wrong(rank: Rank) -> tuple[list[RFCompileError], list[RFCompileError]]:
    twice = shard(Net())
    exact, _ = units_of(twice)[0].comms

    class Own(type(exact)):  # type: ignore[misc]
        pass

    own = shard(Net())
    own.layers[2].set_custom_all_gather(Own())
    quantize_fsdp(twice, 4)
    modules = [error_of(lambda m=m: quantize_fsdp(m, 4)) for m in (3, Net(), twice, own)]  # type: ignore[misc, arg-type]

    me = rank.index
    model = shard(Net())
    comms = [unit.comms for unit in units_of(model)]
    mismatches = [
        error_of(lambda: quantize_fsdp(model, 4 + 4 * me)),
        error_of(lambda: quantize_fsdp(model, policy(sites={"*.bias": None} if me else {}))),
        error_of(lambda: quantize_fsdp(model, 4, weight_delta=bool(me))),
    ]
    assert [unit.comms for unit in units_of(model)] == comms
    quantize_fsdp(model, 4)  # nothing was registered
    backward(model, batch(rank, 0))
    return modules, mismatches


class SomeGradientsInFloat32(nn.Module):
    """torch 2.15 packs the gradients of a and b side by side, older ones in order of names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.b = (
            nn.Parameter(torch.randn(*shape, dtype=torch.bfloat16))
            for shape in ((64,), (64, 64), (64,))
        )
        self.a.grad_dtype = self.b.grad_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return ((x * self.a) @ self.w).float() * self.b


def gradients_of_some_dtypes(rank: Rank) -> None:
    """What the policy keeps exact is exact, bit for bit, and nothing else."""
    found = []
    for chosen in (None, policy(None, "3b:g32", sites={"b": None})):
        torch.manual_seed(0)
        model = fully_shard(SomeGradientsInFloat32())
        if chosen is not None:
            quantize_fsdp(model, chosen)
        torch.manual_seed(7 + rank.index)
        model(torch.randn(32, 64).bfloat16()).square().mean().backward()
        found.append({n: local(p.grad) for n, p in model.named_parameters() if p.grad is not None})
    exact, quantized = found
    same = {name: torch.equal(exact[name], quantized[name]) for name in exact}
    assert same == {"a": False, "w": False, "b": True}


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_some_dtypes_keep_their_formats(ranks: RunRanks) -> None:
    ranks(2, gradients_of_some_dtypes)


def test_modules_and_ranks_that_do_not_fit(ranks: RunRanks) -> None:
    for modules, mismatches in ranks(2, wrong):
        patterns = [
            r"^int cannot be quantized: give a module that fully_shard was applied to",
            r"^Net cannot be quantized: apply torch\.distributed\.fsdp\.fully_shard to it first",
            r"unit \(root\) has the custom communication 'QuantizedAllGather'\. .* \(remove\(\) of",
            r"unit layers\.2 has the custom communication 'Own'",
        ]
        for error, pattern in zip(modules, patterns, strict=True):
            assert isinstance(error, HookError)
            assert re.search(pattern, str(error)), str(error)
        patterns = [
            r"0: FSDP 4 units activations=4b.* 1: FSDP 4 units all=8b",
            r"sites\['\*\.bias'\]=exact",
            r"weight_delta=False .*weight_delta=True",
        ]
        for error, pattern in zip(mismatches, patterns, strict=True):
            assert isinstance(error, RankMismatchError)
            assert re.search(pattern, str(error)), str(error)


class Chunked(nn.Module):
    """The head's gradients come before those of the norm, which is in the same unit."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(32, 32), nn.RMSNorm(32)
        self.head = nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


def check_chunked(rank: Rank) -> None:
    model, alone = Chunked(), Chunked()
    alone.load_state_dict(model.state_dict())
    fully_shard([model.norm, model.head], reshard_after_forward=False)
    fully_shard(model)
    handle = quantize_fsdp(model, rf.Policy(gradients=4, min_bytes=1000))
    x = batch(rank, 0, 32)
    for _ in range(2):
        model.zero_grad()
        for net in (model, alone):
            hidden = net(x)
            if net is model:
                model.head.unshard()
            part = hidden.detach().requires_grad_()
            net.head(part).square().mean().backward()
            hidden.backward(part.grad)
    lines = [s for s in handle.report().sites if s.collective == "reduce_scatter"]
    unit = [s for s in lines if s.shape[0] in (32 * 64, 32)]
    assert [(s.shape, s.format is not None) for s in unit] == [((2048,), True), ((32,), False)]
    assert "128 bytes < min_bytes=1000" in unit[1].reason  # judged by what is sent
    assert unit[0].bytes_before == sent_bytes("reduce_scatter", 4 * 2048, rank.world)
    exact = alone.norm.weight.grad / 2  # of two steps
    dist.all_reduce(exact, op=dist.ReduceOp.AVG)
    mine = local(model.norm.weight.grad)
    start = 16 * rank.index
    torch.testing.assert_close(mine, exact[start : start + 16], rtol=1e-5, atol=1e-7)  # type: ignore[index]


def test_a_unit_that_reduces_twice_a_step_has_a_line_for_each(ranks: RunRanks) -> None:
    ranks(2, check_chunked)


def check_one_shard(rank: Rank) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    error = error_of(lambda: quantize_fsdp(shard(Net(), mesh), 4))
    assert isinstance(error, HookError)
    assert "unit (root) has 2 replicas of one shard each" in str(error)
    assert "call quantize_ddp" in str(error)
    model = shard(Net(), mesh["shard"])  # a rank by itself
    handle = quantize_fsdp(model, 4)
    backward(model, batch(rank, 0))
    assert "every unit has one rank: nothing is sent" in str(handle.report())


def test_replicas_of_one_shard_are_refused(ranks: RunRanks) -> None:
    ranks(2, check_one_shard)


# ---- ranks that die or stall ---------------------------------------------------------------------


def failing(rank: Rank, folder: Path, end: str, weight_delta: bool) -> None:
    """Rank 1 leaves in the middle of the fourth step; the others write down what they see."""
    ranks_ = list(range(rank.world))
    group = dist.new_group(ranks_, timeout=timedelta(seconds=2))
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(1)
    model = shard(Net(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    quantize_fsdp(model, policy(), weight_delta=weight_delta)
    steps(rank, model, optimizer, range(3))
    save(model, optimizer, folder / "checkpoint")
    if rank.index == 1:

        def leave(*_: Any) -> None:
            if end == "dies":
                os._exit(7)
            wait_for(folder / "seen0", 60)
            raise InterruptedError

        model.layers[1].register_full_backward_pre_hook(leave)
        with contextlib.suppress(InterruptedError):
            backward(model, batch(rank, 3))
        return
    start = time.monotonic()
    error = error_of(lambda: backward(model, batch(rank, 3)))
    seconds = time.monotonic() - start
    assert isinstance(error, TransportError)
    assert error.__cause__ is not None
    (folder / f"seen{rank.index}").write_text(f"{seconds}\n{error}")


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def seen(folder: Path, rank: int) -> tuple[float, str]:
    seconds, _, text = (folder / f"seen{rank}").read_text().partition("\n")
    return float(seconds), text


def resume(rank: Rank, folder: Path) -> None:
    model, optimizer = make(0)
    load(model, optimizer, folder / "checkpoint")
    quantize_fsdp(model, policy())
    steps(rank, model, optimizer, range(3, 5))
    for name, weight in full_weights(model).items():
        assert weight.isfinite().all()
        rank.assert_same(weight, name)


def test_a_rank_that_dies_is_an_error_of_the_others_and_the_checkpoint_loads(
    ranks: RunRanks, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="rank 1: died with exit code 7") as caught:
        ranks(3, failing, tmp_path, "dies", False, timeout=90, grace=30)
    assert set(caught.value.failures) == {1}  # type: ignore[attr-defined]
    for rank in (0, 2):
        seconds, text = seen(tmp_path, rank)
        assert seconds < 30
        assert re.match(r"FSDP (all-gather|reduce-scatter) of \S+ failed in process group", text)
        assert "start again from a checkpoint with new process groups." in text
    ranks(2, resume, tmp_path)


def test_a_rank_that_stalls_is_an_error_within_the_groups_timeout(
    ranks: RunRanks, tmp_path: Path
) -> None:
    ranks(2, failing, tmp_path, "stalls", True, timeout=90)
    seconds, text = seen(tmp_path, 0)
    assert 1.5 < seconds < 30  # 2 s, not the 120 s of the default group
    assert re.match(r"FSDP (all-gather|reduce-scatter) of .*: RuntimeError: .*[Tt]imed out", text)
