"""A tensor-parallel transformer block of 8 ranks, generated for an H100: launches and collectives.

No GPU is needed. Needs Triton: ``make test-kernels``.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from rfcompile.emission.absent_gpu import install
from rfcompile.emission.capture import CapturedGraph, capture
from rfcompile.emission.child import in_children
from rfcompile.emission.emit import Emission, emit
from rfcompile.emission.gpus import gpu_of
from rfcompile.emission.report import CODEC
from rfcompile.wire.exchanges import default_segments
from rfcompile.wire.policy import Policy
from rfcompile.wire.process_groups import simulated

pytestmark = pytest.mark.kernels

RANKS, TOKENS, WIDTH = 8, 2048, 512
ALL_REDUCES = 2
"""In each direction."""


class Block(nn.Module):
    """Attention of a head a rank, then a gated MLP, each behind a norm and beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(TOKENS, WIDTH))  # so that it has a gradient
        self.first, self.second = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        head = self.qkv(self.first(x)).view(1, len(x), 3, WIDTH // RANKS)
        query, key, value = head.unsqueeze(1).unbind(3)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.reshape(len(x), WIDTH // RANKS))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.fixture(scope="module")
def graphs() -> list[CapturedGraph]:
    with simulated(RANKS):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        columns, rows = ColwiseParallel(), RowwiseParallel()
        plan = {"qkv": columns, "up": columns, "gate": columns, "out": rows, "down": rows}
        block = parallelize_module(Block().to(torch.bfloat16), mesh, plan)
        x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
        return capture(block, (x,), {}, {"bits": 4, "min_bytes": 0})


@pytest.fixture(scope="module")
def emissions(graphs: list[CapturedGraph]) -> dict[str, Emission]:
    with simulated(RANKS):
        found = in_children(partial(install, gpu_of("sm_90")), emit, graphs, 2)
        return {graphs[number].direction: emission for number, emission in found}


def test_the_block_is_one_graph_a_direction(graphs: list[CapturedGraph]) -> None:
    assert [graph.direction for graph in graphs] == ["forward", "backward"]


def test_a_cpu_would_cut_its_all_reduces(graphs: list[CapturedGraph]) -> None:
    fmt = Policy.of(bits=4).activations
    assert fmt is not None
    assert default_segments(TOKENS * WIDTH, fmt, torch.device("cpu")) == 2


def test_forward_and_backward_are_at_most_40_launches(emissions: dict[str, Emission]) -> None:
    assert sum(len(emission.launches) for emission in emissions.values()) <= 40


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_all_reduce_is_two_collectives_and_at_most_three_kernels(
    direction: str, emissions: dict[str, Emission]
) -> None:
    emission = emissions[direction]
    assert len(emission.collective_calls) == 2 * ALL_REDUCES
    coding = [launch for launch in emission.launches if {*CODEC} & {*launch.operators}]
    assert 2 * ALL_REDUCES < len(coding) <= 3 * ALL_REDUCES


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_decoded_is_fused_into_its_reader(
    direction: str, emissions: dict[str, Emission]
) -> None:
    decoding = [one for one in emissions[direction].launches if "dequantize" in one.operators]
    assert decoding
    for launch in decoding:
        assert {*launch.operators} - {*CODEC}, launch
