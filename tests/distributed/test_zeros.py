"""Zero is a level of gradients and weights on the wire: what must not move does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import rfcompile as rf
from rfcompile.codec.formats import BITS
from rfcompile.distributed import quantize_ddp, quantize_fsdp
from rfcompile.training import quantize_states

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

SHAPE = (23, 37)
HELD = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5
"""What never has a gradient, on any rank: single elements, beside others that have one."""


class Net(nn.Module):
    """Its gradient is the input, but zero at what is held."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight)
        self.other = nn.Parameter(torch.ones(11))  # so that groups cross parameters

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.masked_fill(HELD, 0.0)).sum() + (self.other * x[0, :11]).sum()


def batch(rank: Rank, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank.index)
    return torch.randn(SHAPE, generator=generator)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """It makes a step of the learning rate out of the smallest gradient."""
    return torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)


def assert_held(weight: Tensor, start: Tensor, what: object) -> None:
    assert torch.equal(weight[HELD], start[HELD]), what
    moved = (weight[~HELD] != start[~HELD]).float().mean()
    assert moved > 0.5, what  # at 2 bits small gradients are zeros, too


def check_ddp(rank: Rank, bits: int) -> None:
    for fmt, feedback in ((f"{bits}b", False), (f"{bits}b", True), (f"{bits}b:tensor:stoch", True)):
        net = Net()
        start = net.weight.detach().clone()
        ddp = DDP(net)
        policy = rf.Policy(gradients=fmt, min_bytes=0)
        handle = quantize_ddp(ddp, policy, error_feedback=feedback)
        optimizer = adam(ddp)
        for step in range(4):
            optimizer.zero_grad()
            with ddp.no_sync():
                ddp(batch(rank, step)).backward()
            ddp(batch(rank, step + 50)).backward()
            optimizer.step()
        assert handle.report().num_quantized == 1
        assert_held(net.weight.detach(), start, (fmt, feedback))
        if feedback:
            assert handle.state_dict()["weight"][HELD].count_nonzero() == 0


def check_fsdp(rank: Rank, bits: int) -> None:
    for delta in (False, True):
        model = fully_shard(Net())
        start = Net().weight.detach()
        quantize_fsdp(model, rf.Policy(weights=8, gradients=bits, min_bytes=0), weight_delta=delta)
        optimizer = adam(model)
        quantize_states(optimizer, rf.Policy(optimizer_state=bits, min_bytes=0))
        for step in range(4):
            optimizer.zero_grad()
            model(batch(rank, step)).backward()
            optimizer.step()
        weight = model.weight.full_tensor()  # type: ignore[attr-defined]
        assert torch.equal(weight[HELD], start[HELD]), (bits, delta)


class Pruned(nn.Module):
    """Weights that are zero, and must be so in each forward pass; they have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(Net().weight.detach().masked_fill(HELD, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.weight.detach().clone()
        return (self.weight * x.masked_fill(HELD, 0.0)).square().sum()


def check_pruned(rank: Rank, bits: int) -> None:
    for delta in (False, True):
        model = fully_shard(Pruned())
        policy = rf.Policy(weights=bits, gradients=bits, min_bytes=0)
        handle = quantize_fsdp(model, policy, weight_delta=delta)
        optimizer = adam(model)
        for step in range(4):
            optimizer.zero_grad()
            model(batch(rank, step)).backward()
            optimizer.step()
            assert model.seen[HELD].count_nonzero() == 0, (bits, delta, step)
            rank.assert_same(model.seen, f"{bits} {delta} {step}")
        formats = {site.format for site in handle.report().sites}
        assert formats == {f"{bits}b:g128:tread"}


def check_bare_collectives(rank: Rank, bits: int) -> None:
    """``x`` goes as an activation, the gradient that comes back keeps its zeros."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(rank.index), requires_grad=True)
    weights = batch(rank, 0)[:8, :32].repeat(1, 2).masked_fill(HELD[:8, :32].repeat(1, 2), 0.0)
    (rf.all_reduce(x, bits) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad[weights == 0].count_nonzero() == 0
    zeros = torch.zeros(256)
    zeros[::2] = 1.0
    assert rf.all_reduce(zeros, f"{bits}b:tread")[1::2].count_nonzero() == 0
    if bits <= 4:
        assert rf.all_reduce(zeros, bits)[1::2].count_nonzero() == 128


@pytest.mark.parametrize("bits", BITS)
def test_ddp_holds_what_has_no_gradient(ranks: RunRanks, bits: int) -> None:
    ranks(2, check_ddp, bits)


@pytest.mark.parametrize("bits", BITS)
def test_fsdp_holds_what_has_no_gradient(ranks: RunRanks, bits: int) -> None:
    ranks(2, check_fsdp, bits)


@pytest.mark.parametrize("bits", BITS)
def test_pruned_weights_arrive_as_zeros(ranks: RunRanks, bits: int) -> None:
    ranks(2, check_pruned, bits)


@pytest.mark.parametrize("bits", BITS)
def test_gradients_of_bare_collectives_keep_zeros(ranks: RunRanks, bits: int) -> None:
    ranks(2, check_bare_collectives, bits)
