"""Quantized optimizer states on two ranks: broadcast, sharded by FSDP2, consolidated by ZeRO."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import rfcompile as rf
from rfcompile.distributed import broadcast_states
from rfcompile.errors import (
    FormatError,
    HookError,
    NonFiniteError,
    OptionError,
    PeerError,
    RankMismatchError,
    RFCompileError,
    StateError,
)
from rfcompile.states.composite import Optimizers
from rfcompile.states.packing import is_packed, pack, unpack
from rfcompile.training import quantize_states
from tests.ranks import Rank, RunRanks, error_of

WORLD = 2
POLICY = rf.Policy(optimizer_state=8, min_bytes=0)


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state_dict()["state"]
    return [v for s in states.values() for v in s.values() if isinstance(v, Tensor)]


def check_broadcast(rank: Rank) -> None:
    model = made()
    optimizer = AdamW(model.parameters(), lr=1e-2 * (1 + rank.index))
    for seed in range(1 + rank.index):  # the ranks differ
        step(model, optimizer, seed)
    exact = optimizer.state_dict()["state"]
    broadcast_states(optimizer, POLICY, src=1)
    for x in tensors(optimizer):
        rank.assert_same(x, "a state")
    if rank.index == 1:  # the source has what the others have
        first = optimizer.state_dict()["state"][0]["exp_avg"]
        assert torch.equal(first, unpack(pack(exact[0]["exp_avg"], rf.QuantFormat(8))))
    assert optimizer.param_groups[0]["lr"] == 2e-2
    assert optimizer.state_dict()["state"][0]["step"] == 2
    with pytest.raises(RankMismatchError):
        broadcast_states(optimizer, 8 if rank.index else 4)


def check_sharded(rank: Rank) -> None:
    """The states of FSDP2 are DTensors: each rank packs its own part, and gets DTensors back."""
    model, reference = made(), made()
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (model, reference):
        fully_shard(module, mesh=mesh)
    optimizer, plain = (AdamW(m.parameters(), lr=1e-2) for m in (model, reference))
    quantize_states(optimizer, POLICY)
    for seed in range(3):
        step(model, optimizer, seed)
        step(reference, plain, seed)
        for state in plain.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                value = state[key]
                state[key] = unpack(pack(value, rf.QuantFormat(8)), value)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert torch.equal(p.full_tensor(), q.full_tensor())
    kept = optimizer.state[next(model.parameters())]["exp_avg"]
    assert is_packed(kept)
    assert kept["shape"] == [24, 32]
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    assert isinstance(saved, DTensor)
    assert saved.shape == (48, 32)
    optimizer.load_state_dict(optimizer.state_dict())
    step(model, optimizer, 3)


def check_zero(rank: Rank) -> None:
    """Consolidating sends what is at rest: payloads."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # torch warns on this import

    model = made()
    zero = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=1e-2)
    quantize_states(zero.optim, POLICY, packed_state_dict=True)
    step(model, zero, 0)
    for p in model.parameters():
        rank.assert_same(p.detach(), "a parameter")
    zero.consolidate_state_dict(to=0)
    if rank.index == 0:
        whole: dict[str, Any] = zero.state_dict()
        moments = [s[k] for s in whole["state"].values() for k in ("exp_avg", "exp_avg_sq")]
        assert len(moments) == 8
        assert all(map(is_packed, moments))
        numel = sum(p.numel() for p in model.parameters())
        assert len(pickle.dumps(whole)) < 2 * 4 * numel / 2  # exact ones take 8 bytes a parameter


@pytest.mark.parametrize("check", [check_broadcast, check_sharded, check_zero])
def test_states_on_two_ranks(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(WORLD, check)


# ---- errors that one rank meets ------------------------------------------------------------------


def check_errors(rank: Rank) -> None:
    me = rank.index
    model = made()
    optimizer = AdamW(model.parameters(), lr=1e-2 * (1 + me))
    step(model, optimizer, 0)
    before = [x.clone() for x in tensors(optimizer)]

    # One rank only: all raise the same, and it says where it was.
    cases: list[tuple[type[RFCompileError], str, Callable[[], object]]] = [
        (OptionError, "rank 1: src=2", lambda: broadcast_states(optimizer, 8, src=me and 2)),
        (FormatError, "rank 1: bits=7", lambda: broadcast_states(optimizer, 7 if me else 8)),
        (
            HookError,
            "rank 1: Sequential cannot be quantized",
            lambda: broadcast_states(model if me else optimizer),  # type: ignore[arg-type]
        ),
    ]
    for kind, text, call in cases:
        error = error_of(call)
        assert type(error) is kind
        assert str(error).startswith(text)
    optimizer.param_groups[0]["params"], kept = (
        optimizer.param_groups[0]["params"][: 3 + me], optimizer.param_groups[0]["params"]
    )  # fmt: skip
    assert isinstance(error_of(lambda: broadcast_states(optimizer)), RankMismatchError)
    optimizer.param_groups[0]["params"] = kept

    if me == 1:  # the source has what cannot be sent
        optimizer.state[kept[0]]["exp_avg"][0, 0] = float("nan")
    raising = rf.Policy.of(bits=8, nonfinite="raise", min_bytes=0)
    error = error_of(lambda: broadcast_states(optimizer, raising, src=1))
    assert isinstance(error, NonFiniteError)
    assert "rank 1: NaN or Inf in the input of state 'exp_avg' of parameter 0" in str(error)
    if me == 1:
        optimizer.state[kept[0]]["exp_avg"].copy_(before[1])

    def fails(*_: object) -> None:
        raise MemoryError("no more")

    if me == 0:
        optimizer.load_state_dict = fails  # type: ignore[method-assign, assignment]
    call = lambda: broadcast_states(optimizer, 8)  # noqa: E731
    if me == 0:
        with pytest.raises(MemoryError):
            call()
        del optimizer.load_state_dict  # type: ignore[method-assign]
    else:
        error = error_of(call)
        assert isinstance(error, PeerError)
        assert (error.rank, error.reason) == (0, "MemoryError: no more")

    sharded = made()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (WORLD,)))
    error = error_of(lambda: broadcast_states(AdamW(sharded.parameters()), POLICY))
    assert isinstance(error, StateError)
    assert "torch.distributed.checkpoint" in str(error)


def test_errors_reach_all_ranks(ranks: RunRanks) -> None:
    ranks(WORLD, check_errors, timeout=60)


def check_source_of_a_group(rank: Rank) -> None:
    group = dist.new_group([1, 2])
    if rank.index == 0:
        return
    model = made()
    both = Optimizers(
        torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=rank.index),
        AdamW([p for p in model.parameters() if p.dim() == 1], lr=rank.index),
    )
    step(model, both, rank.index)
    report = broadcast_states(both, POLICY, group, src=1)
    assert both.param_groups[0]["lr"] == 2  # rank 1 of the group
    for x in tensors(both):
        rank.assert_same(x, "a state", group)
    assert report.num_quantized == 6  # 2 momentum buffers, 2 x 2 moments
    assert {site.reason for site in report.skipped} == {"counts steps"}
    assert {site.direction for site in report.sites} == {"broadcast"}
    assert report.bytes_after < report.bytes_before / 3
    quantize_states(both, POLICY, packed_state_dict=True)
    kept = [v["payload"] for s in both.state.values() for v in s.values() if is_packed(v)]
    broadcast_states(both, POLICY, group)  # payloads travel as they are
    new = [v["payload"] for s in both.state.values() for v in s.values() if is_packed(v)]
    assert all(map(torch.equal, kept, new))


def test_the_source_is_a_rank_of_the_group(ranks: RunRanks) -> None:
    ranks(3, check_source_of_a_group)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------

SHAPES = (33, 50)
"""33 rows on 2 ranks: shards of 17 and 16."""


def sharded(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SHAPES[1], SHAPES[0]), nn.Tanh(), nn.Linear(SHAPES[0], 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    policy = rf.Policy(optimizer_state="8b:stoch", min_bytes=0)
    quantize_states(optimizer, policy, packed_state_dict=True)
    return model, optimizer


def forward(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, SHAPES[1], generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).abs().mean().backward()  # moments of one sign on some ranks
    optimizer.step()


def payloads(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v["payload"] for s in optimizer.state.values() for v in s.values() if is_packed(v)]


def check_checkpoint(rank: Rank, folder: str, full: bool) -> None:
    model, optimizer = sharded()
    for seed in range(2):
        forward(model, optimizer, seed + rank.index)
    options = StateDictOptions(full_state_dict=full)
    weights, states = get_state_dict(model, optimizer, options=options)
    new_model, new = sharded(seed=1)
    if full:
        for p in new.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        new.step()
        loaded = copy.deepcopy((weights, states))  # torch would share the counts of steps
    else:
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
        loaded = get_state_dict(new_model, new)
        dcp.load({"model": loaded[0], "optimizer": loaded[1]}, checkpoint_id=folder)
    set_state_dict(
        new_model, new, model_state_dict=loaded[0], optim_state_dict=loaded[1], options=options
    )
    assert all(map(torch.equal, payloads(optimizer), payloads(new)))
    assert len(payloads(new)) == 8
    assert all(is_packed(v) and "check" not in v for v in new.state.values() if is_packed(v))
    for seed in range(2, 4):
        forward(model, optimizer, seed)
        forward(new_model, new, seed)
    for p, q in zip(model.parameters(), new_model.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())  # type: ignore[attr-defined]


@pytest.mark.parametrize("full", [False, True])
def test_each_rank_loads_its_own_part(ranks: RunRanks, tmp_path: Path, full: bool) -> None:
    ranks(WORLD, check_checkpoint, str(tmp_path), full)


def save_plain(rank: Rank, folder: str) -> None:
    model, optimizer = sharded()
    forward(model, optimizer, 0)
    _, states = get_state_dict(model, optimizer)
    dcp.save({"optimizer": states}, checkpoint_id=folder)
    whole = optimizer.state_dict()["state"][0]["exp_avg"]
    rows = {**whole, "payload": whole["payload"].full_tensor()}
    if rank.index == 0:
        torch.save(rows, f"{folder}.pt")


def load_elsewhere(rank: Rank, folder: str) -> None:
    model, optimizer = sharded()
    forward(model, optimizer, 0)
    before = payloads(optimizer)
    _, states = get_state_dict(model, optimizer)
    with pytest.raises(CheckpointException, match=r"Size mismatch .*payload"):
        dcp.load({"optimizer": states}, checkpoint_id=folder)
    loaded = optimizer.state_dict()
    loaded["state"][0]["exp_avg"] = torch.load(f"{folder}.pt")
    with pytest.raises(StateError, match=r"on another number of ranks.*on 2 ranks"):
        optimizer.load_state_dict(loaded)
    assert all(map(torch.equal, before, payloads(optimizer)))


def test_another_number_of_ranks_is_an_error(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, save_plain, str(tmp_path / "saved"))
    ranks(3, load_elsewhere, str(tmp_path / "saved"))


def check_replicated(rank: Rank, folder: str) -> None:
    """Without sharding the ranks have the same payloads."""
    model = made()
    optimizer = AdamW(model.parameters())
    quantize_states(optimizer, POLICY, packed_state_dict=True)
    step(model, optimizer, 0)
    _, states = get_state_dict(model, optimizer)
    dcp.save({"optimizer": states}, checkpoint_id=folder)
    twin = made()
    new = AdamW(twin.parameters())
    quantize_states(new, POLICY, packed_state_dict=True)
    weights, loaded = get_state_dict(twin, new)
    dcp.load({"optimizer": loaded}, checkpoint_id=folder)
    set_state_dict(twin, new, model_state_dict=weights, optim_state_dict=loaded)
    assert all(map(torch.equal, payloads(optimizer), payloads(new)))


def test_states_that_are_not_sharded(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(WORLD, check_replicated, str(tmp_path))
