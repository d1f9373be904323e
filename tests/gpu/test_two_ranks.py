"""Two processes: collectives, hooks, the backend. Both may use one GPU.

Over gloo they share the GPU. NCCL refuses that: its tests need two GPUs, a GPU a rank. The dry run
is two processes of a CPU. Ranks are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import rfcompile as rf
from rfcompile.distributed import QuantizedPipelineStage, quantize_ddp, quantize_fsdp
from tests.gpu.on_gpu import Kernels

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.slow

WORLD, WIDTH = 2, 64
FORMATS = ["4b:g128", "3b:g32:tread:stoch", "8b:g128:h32", "6b:tensor"]
POLICY = rf.Policy(weights=8, gradients="4b:stoch", activations="3b:h32", min_bytes=0)


@pytest.fixture(
    params=[
        pytest.param(("cuda", "gloo"), marks=pytest.mark.gpu, id="one_gpu"),
        pytest.param(("cuda", "nccl"), marks=pytest.mark.gpu, id="nccl"),
        pytest.param(("cpu", "gloo"), id="dry_run"),
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The type of the device and the backend."""
    kind, backend = request.param
    if backend == "nccl" and torch.cuda.device_count() < WORLD:
        pytest.skip(
            f"NOT TESTED HERE: NCCL needs a GPU for each of {WORLD} ranks, "
            f"and there are {torch.cuda.device_count()}"
        )
    return kind, backend


def start(rank: Rank, kind: str, backend: str) -> tuple[torch.device, dist.ProcessGroup]:
    """The rank's device, made current, and the group that sends."""
    if kind == "cpu":
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank.index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    group = dist.new_group(backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return device, group


class Net(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def steps(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = F.mse_loss(run(x), x.flip(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(rank: Rank, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(rank.index)
    return torch.randn(24, 96, generator=generator).to(dtype)


# ---- collectives ---------------------------------------------------------------------------------


def collectives(rank: Rank, kind: str, backend: str, fmt: str) -> None:
    device, group = start(rank, kind, backend)
    calls: dict[str, Callable[[Tensor, Any], Tensor]] = {
        "all_reduce": lambda x, g: rf.all_reduce(x, fmt, g, segments=2),
        "average": lambda x, g: rf.all_reduce(x, fmt, g, op="avg", segments=1),
        "reduce_scatter": lambda x, g: rf.reduce_scatter(x, fmt, g),
        "all_gather": lambda x, g: rf.all_gather(x, fmt, g),
        "all_to_all": lambda x, g: rf.all_to_all(x, fmt, g),
        "broadcast": lambda x, g: rf.broadcast(x, fmt, g, src=1),
    }
    for name, call in calls.items():
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            x = values(rank, dtype)
            got = call(x.to(device), group)
            assert got.device.type == kind
            assert torch.equal(got.cpu(), call(x, None)), (name, dtype)
            if name in ("all_reduce", "average", "all_gather", "broadcast"):
                rank.assert_same(got.cpu(), name)


@pytest.mark.parametrize("fmt", FORMATS)
def test_collectives_give_what_cpus_give(ranks: RunRanks, place: tuple[str, str], fmt: str) -> None:
    ranks(WORLD, collectives, *place, fmt)


def gradient(rank: Rank, kind: str, backend: str) -> None:
    device, group = start(rank, kind, backend)
    found = []
    for there, its_group in ((device, group), (torch.device("cpu"), None)):
        x = values(rank).to(there).requires_grad_()
        (rf.all_reduce(x, 4, its_group) * values(rank).to(there)).sum().backward()
        assert x.grad is not None
        found.append(x.grad.cpu())
    assert torch.equal(*found)


def test_the_gradient_of_a_collective(ranks: RunRanks, place: tuple[str, str]) -> None:
    ranks(WORLD, gradient, *place)


# ---- hooks ---------------------------------------------------------------------------------------


def ddp(rank: Rank, kind: str, backend: str) -> None:
    device, group = start(rank, kind, backend)
    torch.manual_seed(0)
    model = Net().to(device)
    ids = [device.index] if kind == "cuda" else None
    module = DistributedDataParallel(model, device_ids=ids, process_group=group)
    with quantize_ddp(module, POLICY, error_feedback=True) as handle, Kernels(device) as kernels:
        losses = steps(module, model, torch.randn(32, WIDTH, device=device))
        assert handle.report().num_quantized > 0
    assert kernels.count > 0, "formulas coded"
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        rank.assert_same(parameter.cpu(), name)


def test_ddp(ranks: RunRanks, place: tuple[str, str]) -> None:
    ranks(WORLD, ddp, *place)


def fsdp(rank: Rank, kind: str, backend: str, weight_delta: bool) -> None:
    device, group = start(rank, kind, backend)
    torch.manual_seed(0)
    model = Net().to(device)
    mesh = DeviceMesh.from_group(group, kind)
    for layer in [*model.layers, model]:
        fully_shard(layer, mesh=mesh)
    x = torch.randn(32, WIDTH, device=device)
    with (
        quantize_fsdp(model, POLICY, weight_delta=weight_delta) as handle,
        Kernels(device) as kernels,
    ):
        losses = steps(model, model, x)
        assert handle.report().num_quantized > 0
        rank.assert_same(model(x).detach().cpu(), "what ranks compute of the same input")
    assert kernels.count > 0, "formulas coded"
    assert losses[-1] < losses[0]
    assert all(isinstance(p, DTensor) for p in model.parameters())


@pytest.mark.parametrize("weight_delta", [False, True], ids=["weights", "differences"])
def test_fsdp(ranks: RunRanks, place: tuple[str, str], weight_delta: bool) -> None:
    ranks(WORLD, fsdp, *place, weight_delta)


def pipeline(rank: Rank, kind: str, backend: str) -> float:
    device, group = start(rank, kind, backend)
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WIDTH).to(device)
    stage = QuantizedPipelineStage(module, rank.index, WORLD, device, policy=POLICY, group=group)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
    x = torch.randn(8, WIDTH, device=device)
    with Kernels(device) as kernels:
        schedule.step(x) if rank.index == 0 else schedule.step(target=x)
    assert kernels.count > 0, "formulas coded"
    assert module.weight.grad is not None
    return float(module.weight.grad.abs().sum())


def test_a_pipeline(ranks: RunRanks, place: tuple[str, str]) -> None:
    if place == ("cuda", "gloo"):
        pytest.skip("NOT TESTED HERE: gloo sends no tensors of a GPU from rank to rank")
    assert all(size > 0 for size in ranks(WORLD, pipeline, *place))


# ---- compiled ------------------------------------------------------------------------------------


class Parallel(nn.Module):
    """Two gated blocks, tensor parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.silu(up(x)))
        return x


def compiled(rank: Rank, kind: str, backend: str, fmt: str) -> None:
    device, group = start(rank, kind, backend)
    torch.manual_seed(0)
    mesh = (
        DeviceMesh.from_group(group, kind) if kind == "cuda" else init_device_mesh(kind, (WORLD,))
    )
    plan = {"up.*": ColwiseParallel(), "down.*": RowwiseParallel()}
    model = parallelize_module(Parallel().to(device), mesh, plan)
    options = {"bits": fmt, "min_bytes": 0}
    run = torch.compile(model, backend="rfquant", options=options, dynamic=False)
    losses = steps(run, model, torch.randn(64, WIDTH, device=device))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        rank.assert_same(run(torch.randn(64, WIDTH, device=device)).cpu(), "the output")
    assert rf.merge_reports(rf.reports(clear=True)).num_quantized > 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_tensor_parallel_model(ranks: RunRanks, place: tuple[str, str], fmt: str) -> None:
    ranks(WORLD, compiled, *place, fmt)


def dynamic(rank: Rank, kind: str, backend: str, fmt: str) -> None:
    device, group = start(rank, kind, backend)
    run = torch.compile(
        lambda x: funcol.all_reduce(2 * x, "sum", group),
        backend="rfquant", options={"bits": fmt, "min_bytes": 0}, dynamic=True, fullgraph=True,
    )  # fmt: skip
    for numel in (1000, 3000, 128):
        x = values(rank, torch.float32).flatten().repeat(2)[:numel]
        got = run(x.to(device)).cpu()
        rank.assert_same(got, numel)
        assert torch.equal(got, rf.all_reduce(2 * x, fmt)), numel


@pytest.mark.parametrize("fmt", FORMATS)
def test_one_graph_for_all_sizes(ranks: RunRanks, place: tuple[str, str], fmt: str) -> None:
    ranks(WORLD, dynamic, *place, fmt)
