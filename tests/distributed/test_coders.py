"""Compiled coding of DDP, FSDP2 and pipelines: the bytes of eager coding, and few compilations.

Inductor generates each operator once. On ranks, where only matters what is compiled and how often,
the graphs of the kernels run as they are.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rfcompile as rf
from rfcompile.codec import arithmetic
from rfcompile.codec.operators import OPERATORS
from rfcompile.distributed import (
    QuantizedPipelineStage,
    quantize_ddp,
    quantize_fsdp,
    quantize_pipeline_stage,
)
from rfcompile.distributed.coders import CoderName, _kernel, coder_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

EAGER, COMPILED = coder_of("eager"), coder_of("compiled")
FORMAT = rf.QuantFormat(4).spec
WIDTH = 18


class Running(threading.local):
    """Whether a kernel runs in this thread."""

    is_kernel = False


running = Running()


@contextlib.contextmanager
def kernels_run_as_they_are() -> Iterator[None]:
    """Whatever torch.compile gets in here, Dynamo traces, and nobody generates code for it."""

    def take(gm: fx.GraphModule, example_inputs: object) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            running.is_kernel = True
            try:
                return gm.forward(*args)
            finally:
                running.is_kernel = False

        return run

    _kernel.cache_clear()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=take)):
        yield
    _kernel.cache_clear()


def num_compiled() -> int:
    return counters["stats"]["unique_graphs"]


def check_operators(rows: int, size: int, *others: tuple[str, tuple[Any, ...]]) -> None:
    x = torch.randn(rows, size)
    payload = COMPILED.quantize(x, FORMAT)
    assert torch.equal(payload, EAGER.quantize(x, FORMAT))
    for name, arguments in others:
        compiled, eager = (getattr(c, name)(payload, FORMAT, *arguments) for c in (COMPILED, EAGER))
        assert torch.equal(compiled, eager), (name, rows, size)


@pytest.mark.slow
def test_a_kernel_serves_every_size() -> None:
    assert EAGER is OPERATORS
    others: list[tuple[str, tuple[Any, ...]]] = [
        ("dequantize", (torch.bfloat16,)),
        ("dequantize_sum", (torch.float32, True)),
        ("requantize", (True,)),
    ]
    start = num_compiled()
    check_operators(2, 1000, *others)
    assert num_compiled() - start == 4
    for size in (1001, 1024, 77_777, 129):
        check_operators(2, size, *others)
    assert num_compiled() - start == 4
    for size in (500, 1):  # one row, one element: kernels of their own
        check_operators(1, size)
    assert num_compiled() - start <= 4 + 2


def test_few_kernels_serve_every_shape() -> None:
    """One row, one element, and less than a group are cases of their own: with all of them a kernel
    stays below 8, where torch would give up and run it eagerly.
    """
    start = num_compiled()
    with kernels_run_as_they_are():
        for rows, size in ((2, 1000), (1, 500), (1, 1), (2, 1), (1, 5), (4, 5), (4, 1000)):
            check_operators(rows, size)
    assert num_compiled() - start < 1 + 7


def test_each_format_counts_by_itself() -> None:
    """Else more than 8 formats, or dtypes, would be too many."""
    x = torch.randn(1, 1000)
    once = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with kernels_run_as_they_are(), once:
        for fmt in ("4b:g64:rise", "4b:g32:rise"):
            for values in (x, x.bfloat16()):
                assert torch.equal(COMPILED.quantize(values, fmt), EAGER.quantize(values, fmt))


def test_stochastic_rounding_stays_eager_and_takes_its_seed() -> None:
    fmt = rf.QuantFormat(4, rounding="stochastic").spec
    x = torch.randn(2, 300)
    start = num_compiled()
    for seed in (1, 2):
        payload = COMPILED.quantize(x, fmt, seed)
        assert torch.equal(payload, EAGER.quantize(x, fmt, seed))
        total = COMPILED.requantize(payload, fmt, True, seed)
        assert torch.equal(total, EAGER.requantize(payload, fmt, True, seed))
    assert num_compiled() == start
    assert not torch.equal(COMPILED.quantize(x, fmt, 1), COMPILED.quantize(x, fmt, 2))


# ---- on ranks ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + i, WIDTH + i + 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(rank: Rank, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank.index)
    return torch.randn(6, WIDTH, generator=generator)


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a backward pass, after which SGD takes a step."""
    found = {}
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        found[name] = (gradient.to_local() if isinstance(gradient, DTensor) else gradient).clone()
        with torch.no_grad():
            parameter.sub_(gradient)
        parameter.grad = None
    return found


@contextlib.contextmanager
def coded_eagerly() -> Iterator[list[str]]:
    """Formats that ``arithmetic.quantize`` is called with, but not by kernels."""
    calls, original = [], arithmetic.quantize

    def quantize(x: Tensor, fmt: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not running.is_kernel:
            calls.append(str(fmt))
        return original(x, fmt, *args, **kwargs)

    with mock.patch.object(arithmetic, "quantize", quantize):
        yield calls


def check_same(
    rank: Rank, make: Callable[[nn.Module, bool], nn.Module], what: str, steps: int = 3
) -> None:
    """Models trained with compiled and with eager coding stay bit for bit the same."""
    plain = Net()
    models = [make(copy.deepcopy(plain), coder) for coder in ("compiled", "eager")]
    warm = 0
    for step in range(steps):
        with coded_eagerly() as calls:
            compiled = gradients_of(models[0], batch(rank, step))
            # Compiling calls the formula too: weight_delta sends its first difference in step 1.
            assert step < 2 or not calls, f"{what}: coded eagerly"
        with coded_eagerly() as calls:
            eager = gradients_of(models[1], batch(rank, step))
            assert calls
        assert compiled.keys() == eager.keys()
        for name, gradient in compiled.items():
            assert torch.equal(gradient, eager[name]), (what, name, step)
        if step == 1:
            warm = num_compiled()
    assert num_compiled() == warm, f"{what}: compiled again after two steps"


def ddp(model: nn.Module, coder: CoderName) -> nn.Module:
    module = DistributedDataParallel(model)
    quantize_ddp(module, rf.Policy(gradients=4, activations=4, min_bytes=0), coder=coder)
    return module


def fsdp(
    model: nn.Module, coder: CoderName, weight_delta: bool = False, whole: bool = False
) -> nn.Module:
    assert isinstance(model, Net)
    layers: list[Any] = list(model.layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    for layer, following in itertools.pairwise(layers):
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    policy = rf.Policy(weights=4 if weight_delta else 8, gradients=4, min_bytes=0)
    quantize_fsdp(model, policy, weight_delta=weight_delta, coder=coder)
    if whole:
        model.compile()
    return model


def check_pipeline(rank: Rank) -> None:
    """Both ways to make a stage, micro-batches of two sizes of message."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(6, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)
    plain, results, warm = nn.Linear(WIDTH, WIDTH), [], 0
    policy = rf.Policy(gradients=4, activations=4, min_bytes=0)
    for coder in ("eager", "compiled"):
        for make in (0, 1):
            module = copy.deepcopy(plain)
            place = (module, rank.index, 2, torch.device("cpu"))
            if make:
                stage: Any = PipelineStage(*place)
                quantize_pipeline_stage(stage, policy, coder=coder)
            else:
                stage = QuantizedPipelineStage(*place, policy=policy, coder=coder)
            schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
            for _ in range(2):
                schedule.step(x) if rank.index == 0 else schedule.step(target=y)
            assert module.weight.grad is not None
            results.append(module.weight.grad)
            if (coder, make) == ("compiled", 0):
                warm = num_compiled()
    assert all(torch.equal(results[0], result) for result in results)
    assert warm > 0
    assert num_compiled() == warm


CLIENTS: dict[str, Callable[[Rank], None]] = {
    "ddp": lambda rank: check_same(rank, ddp, "DDP"),
    "fsdp": lambda rank: check_same(rank, fsdp, "FSDP"),
    "weight_delta": lambda rank: check_same(
        rank, lambda m, c: fsdp(m, c, weight_delta=True), "weight_delta"
    ),
    "compiled model": lambda rank: check_same(
        rank, lambda m, c: fsdp(m, c, whole=True), "compiled model"
    ),
    "pipeline": check_pipeline,
}


def check_client(rank: Rank, client: str) -> None:
    with kernels_run_as_they_are():
        CLIENTS[client](rank)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_ddp_fsdp_and_pipelines_send_the_same_bytes(ranks: RunRanks, client: str) -> None:
    ranks(2, check_client, client)
