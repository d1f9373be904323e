"""Activation checkpointing: what is computed again in the backward pass must come out the same."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rfcompile as rf
from rfcompile.wire.process_groups import simulated


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def reduced(self, x: Tensor) -> Tensor:
        y = funcol.all_reduce(torch.relu(self.linear(x)), "sum", dist.group.WORLD)
        return torch.relu(y) @ self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.reduced, x, use_reentrant=False)
        return x + out


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_a_recomputed_collective_uses_the_format_of_the_forward() -> None:
    with simulated(2):
        model = torch.compile(
            Block(),
            backend="rfquant",
            options={"activations": 8, "gradients": 4, "min_bytes": 0},
        )
        rf.reports(clear=True)
        model(torch.randn(8, 64)).sum().backward()

    (report,) = rf.reports(clear=True)
    found = [(site.direction, site.kind, site.format) for site in report.sites]
    assert found == [
        ("forward", "activations", "8b:g128:tread"),
        ("backward", "activations", "8b:g128:tread"),
        ("backward", "gradients", "4b:g128:tread"),
    ]
