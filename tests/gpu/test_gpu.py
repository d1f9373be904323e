"""The GPU speaks the CPU's bytes, and the backend compiles and trains there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn

import rfcompile as rf
import rfcompile.inductor.lowering  # registers the lowerings
from rfcompile.codec import arithmetic, operators
from rfcompile.codec.formats import QuantFormat

pytestmark = [
    pytest.mark.gpu,
    # Inductor's advice for a float32 model, which is an error elsewhere.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

FORMATS = [
    f"{bits}b:{group}:{grid}{rotate}{rounding}"
    for bits in (2, 3, 4, 5, 6, 8)
    for group, grid, rotate, rounding in (
        ("g128", "rise", "", ""),
        ("g128", "tread", "", ""),
        ("g16", "tread", "", ":stoch"),
        ("g128", "rise", ":h8", ""),
        ("g128", "tread", ":h128", ":stoch"),
        ("tensor", "rise", "", ""),
    )
] + ["4b:saturate"]


def wide_values() -> Tensor:
    """Rows over 16 decades, with tails, NaN, Inf and a row of zeros."""
    x = torch.randn(4, 1000) * torch.logspace(-8, 8, 1000)
    x[1, 5], x[2, 700], x[3] = torch.nan, torch.inf, 0
    return x


@pytest.mark.parametrize("fmt", FORMATS)
def test_eager_bytes_equal_the_cpus(fmt: str) -> None:
    x = wide_values()
    payload = operators.quantize(x, fmt)
    on_gpu = operators.quantize(x.cuda(), fmt)
    assert torch.equal(on_gpu.cpu(), payload)
    decoded = operators.dequantize(on_gpu, fmt, torch.float32).cpu()
    torch.testing.assert_close(
        decoded, operators.dequantize(payload, fmt, torch.float32), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(operators.requantize(on_gpu, fmt).cpu(), operators.requantize(payload, fmt))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_formulas_bytes_equal_the_cpus(fmt: str) -> None:
    """They run where Triton is missing."""
    x, parsed = wide_values(), QuantFormat.parse(fmt)
    payload = arithmetic.quantize(x, parsed)
    assert torch.equal(arithmetic.quantize(x.cuda(), parsed).cpu(), payload)
    total = arithmetic.requantize(payload.cuda(), parsed)
    assert torch.equal(total.cpu(), arithmetic.requantize(payload, parsed))


@pytest.mark.parametrize("fmt", FORMATS[::3])
def test_compiled_bytes_equal_the_cpus(fmt: str) -> None:
    x = wide_values()
    payload = operators.quantize(x, fmt)
    run = torch.compile(lambda t: operators.quantize(t, fmt), fullgraph=True)
    assert torch.equal(run(x.cuda()).cpu(), payload)
    run = torch.compile(lambda p: operators.requantize(p, fmt), fullgraph=True)
    assert torch.equal(run(payload.cuda()).cpu(), operators.requantize(payload, fmt))


@pytest.fixture
def nccl() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29631", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl")
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + funcol.all_reduce(self.down(self.up(x).relu()), "sum", dist.group.WORLD)


def test_the_backend_compiles_and_trains_a_model_with_collectives(nccl: None) -> None:
    model = nn.Sequential(Block(), Block()).cuda()
    run = torch.compile(model, backend="rfquant", options={"bits": 4, "min_bytes": 0})
    losses = _train(run, model)
    assert losses[-1] < losses[0]
    reasons = {site.reason for site in rf.reports(clear=True)[-1].sites}
    assert reasons == {"one rank: nothing is sent"}


def test_a_compiled_training_step_with_a_fake_wire() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3))).cuda()
    wired = rf.transform(model, bits=4)
    losses = _train(torch.compile(wired, backend="rfquant", fullgraph=True), wired)
    assert losses[-1] < losses[0]


def _train(run: object, model: nn.Module) -> list[float]:
    assert callable(run)
    x = torch.randn(256, 64, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (run(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
