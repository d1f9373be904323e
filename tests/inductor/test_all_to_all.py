"""Context and expert parallel layers: their all_to_all forward and backward, compiled and eager.

The compiled layer calls torch's collective and knows nothing of quantization; the eager one calls
``rf.all_to_all``. Values and gradients must be the same; compiled graphs run as the passes leave
them, because Inductor's own kernels may add in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

import rfcompile as rf
from tests.inductor.test_backend import graphs_run_as_they_are
from tests.ranks import Rank, RunRanks

Exchange = Callable[[Tensor, list[int], list[int]], Tensor]
"""``exchange(x, rows that arrive from each rank, rows that go to each rank)``."""

FORMAT = rf.QuantFormat(8)
OPTIONS = {"bits": 8, "min_bytes": 0, "strict": True}


def torch_exchange(x: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
    y: Tensor = funcol.all_to_all_single_autograd(x, output_splits, input_splits, dist.group.WORLD)
    return y


def our_exchange(x: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
    return rf.all_to_all(x, FORMAT, output_splits=output_splits, input_splits=input_splits)


def heads_for_sequence(x: Tensor, exchange: Exchange, world: int) -> Tensor:
    """Ulysses: a part of the sequence ``[S / W, H, D]`` to part of the heads ``[S, H / W, D]``."""
    rows, heads, width = x.shape
    by_rank = x.unflatten(1, (world, heads // world)).transpose(0, 1)  # [W, S / W, H / W, D]
    parts = exchange(by_rank.reshape(world * rows, -1), [rows] * world, [rows] * world)
    return parts.reshape(world * rows, heads // world, width)


def sequence_for_heads(x: Tensor, exchange: Exchange, world: int) -> Tensor:
    """The way back."""
    rows, heads, width = x.shape[0] // world, x.shape[1], x.shape[2]
    parts = exchange(x.reshape(world * rows, -1), [rows] * world, [rows] * world)
    return parts.reshape(world, rows, heads, width).transpose(0, 1).reshape(rows, -1, width)


def context_parallel(x: Tensor, exchange: Exchange, world: int) -> Tensor:
    """Attention over the whole sequence by ranks that hold a part of it each."""
    q, k, v = (heads_for_sequence(part, exchange, world) for part in (x, 0.5 * x, x.sin()))
    mixed = F.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    return sequence_for_heads(mixed.transpose(0, 1), exchange, world)


def experts(
    x: Tensor, weight: Tensor, exchange: Exchange, received: list[int], sent: list[int]
) -> Tensor:
    """Tokens, sorted by expert, to the ranks of their experts and back; an expert is a linear."""
    dispatched = exchange(x, received, sent)
    return exchange(torch.tanh(dispatched @ weight), sent, received)


def graded(f: Callable[..., Tensor], *tensors: Tensor, **others: Any) -> list[Tensor]:
    """The output and the gradients of the tensors."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    y = f(*leaves, **others)
    (y * torch.arange(y.numel()).view_as(y).cos()).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def check_context_parallel(rank: Rank) -> int:
    torch._dynamo.reset()
    rf.reports(clear=True)  # of tests that ran on this rank before
    x = torch.randn(12, 4, 32, generator=torch.Generator().manual_seed(rank.index))
    run = torch.compile(context_parallel, backend="rfquant", options=OPTIONS, fullgraph=True)
    with graphs_run_as_they_are():
        compiled = graded(run, x, exchange=torch_exchange, world=rank.world)
    eager = graded(context_parallel, x, exchange=our_exchange, world=rank.world)
    exact = graded(context_parallel, x, exchange=torch_exchange, world=rank.world)
    for got, expected, far in zip(compiled, eager, exact, strict=True):
        assert torch.equal(got, expected)
        assert 0 < (got - far).norm() / far.norm() < 0.05
    return sum(report.num_quantized for report in rf.reports(clear=True))


def check_experts(rank: Rank) -> int:
    torch._dynamo.reset()
    rf.reports(clear=True)  # of tests that ran on this rank before
    run = torch.compile(experts, backend="rfquant", options=OPTIONS, fullgraph=True)
    for splits in ([[5, 9], [2, 7]], [[0, 6], [8, 3]], [[4, 4], [4, 4]]):
        sent, received = splits[rank.index], [row[rank.index] for row in splits]
        generator = torch.Generator().manual_seed(rank.index)
        x = torch.randn(sum(sent), 64, generator=generator)
        weight = torch.randn(64, 64, generator=generator) / 8
        places = {"received": received, "sent": sent}
        with graphs_run_as_they_are():
            compiled = graded(run, x, weight, exchange=torch_exchange, **places)
        eager = graded(experts, x, weight, exchange=our_exchange, **places)
        for got, expected in zip(compiled, eager, strict=True):
            # The gradient's matmuls see other strides: 64 products of order 1, added in any order.
            torch.testing.assert_close(got, expected, rtol=0, atol=64 * 2**-23)
    return sum(report.num_quantized for report in rf.reports(clear=True))


@pytest.mark.slow
def test_context_parallel_layers(ranks: RunRanks) -> None:
    for num_quantized in ranks(2, check_context_parallel):
        assert num_quantized == 2 * 4, "q, k, v and the output, forward and backward"


@pytest.mark.slow
def test_expert_parallel_layers(ranks: RunRanks) -> None:
    for num_quantized in ranks(2, check_experts):
        assert num_quantized >= 2 * 2
        assert num_quantized % 4 == 0, "each compilation has two forward and two backward"
