"""Quantized optimizer states on two ranks: broadcast, sharded by FSDP2, consolidated by ZeRO."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

import rfcompile as rf
from rfcompile.distributed import broadcast_states
from rfcompile.errors import RankMismatchError
from rfcompile.training import quantize_states
from rfcompile.training.packing import is_packed, pack, unpack
from tests.distributed.conftest import Rank, RunRanks

pytestmark = pytest.mark.slow
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


def check_states(rank: Rank) -> None:
    check_broadcast(rank)
    check_sharded(rank)
    check_zero(rank)


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


def test_states_on_two_ranks(ranks: RunRanks) -> None:
    ranks(WORLD, check_states)
