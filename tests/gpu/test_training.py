"""Models train on the GPU: the backend, the fake wire, autocast, states of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.training import quantize_states
from tests.gpu.on_gpu import ADVICE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(ADVICE)]

WIDTH, BATCH = 64, 256
EXACT: dict[str, Any] = {"bits": None}
"""Collectives, if there were some."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + funcol.all_reduce(self.down(self.up(x).relu()), "sum", dist.group.WORLD)


def layers(device: torch.device) -> nn.Module:
    made = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(3)))
    return made.to(device)


def losses_of(
    run: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, device: torch.device
) -> list[float]:
    x = torch.randn(BATCH, WIDTH, device=device)
    losses = []
    for _ in range(20):
        loss = (run(x).float() - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


@pytest.fixture
def one_rank(device: torch.device, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone: NCCL where there is a GPU."""
    is_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        device_id=torch.device("cuda", 0) if is_gpu else None,
    )
    yield
    dist.destroy_process_group()


def test_collectives_of_one_rank_stay_exact(one_rank: None, device: torch.device) -> None:
    model = nn.Sequential(Block(), Block()).to(device)
    run = torch.compile(model, backend="rfquant", options={"bits": 4, "min_bytes": 0})
    losses = losses_of(run, sgd(model), device)
    assert losses[-1] < losses[0]
    reasons = {site.reason for site in rf.reports(clear=True)[-1].sites}
    assert reasons == {"one rank: nothing is sent"}


@pytest.mark.parametrize("fmt", [8, 4, "4b:g128:h32", "4b:stoch", "8b:tensor"])
def test_a_fake_wire(fmt: object, device: torch.device) -> None:
    wired = rf.transform(layers(device), bits=fmt)
    run = torch.compile(wired, backend="rfquant", options=EXACT, fullgraph=True)
    losses = losses_of(run, sgd(wired), device)
    assert losses[-1] < losses[0]


def test_a_fake_wire_under_autocast(device: torch.device) -> None:
    wired = rf.transform(layers(device), bits=4)
    compiled = torch.compile(wired, backend="rfquant", options=EXACT, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return compiled(x)

    losses = losses_of(run, sgd(wired), device)
    assert losses[-1] < losses[0]


def test_states_of_an_optimizer(device: torch.device) -> None:
    model = layers(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with quantize_states(optimizer, rf.Policy(optimizer_state="8b:stoch", min_bytes=0)) as handle:
        losses = losses_of(model, optimizer, device)
        assert handle.report().num_quantized > 0
    assert losses[-1] < losses[0]
