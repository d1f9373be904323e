"""What hooks send does not depend on who codes on a CPU: the C++ library, or torch's operators."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rfcompile as rf
from rfcompile.codec import arithmetic, cpu_codec
from rfcompile.distributed import (
    QuantizedPipelineStage,
    quantize_ddp,
    quantize_fsdp,
    quantize_pipeline_stage,
)
from rfcompile.training import quantize_states

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

WIDTH = 18
POLICY = rf.Policy(
    weights=8, gradients="4b:stoch", activations="3b:h32", optimizer_state="8b:stoch", min_bytes=0
)
Train = Callable[[int], list[Tensor]]
"""Installs hooks and trains some steps on a rank of two; the tensors that came of it."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + i, WIDTH + i + 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def made() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(model: nn.Module, rank: int) -> list[Tensor]:
    """The gradients of some steps of SGD."""
    found = []
    for step in range(3):
        model(batch(step, rank)).square().mean().backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            gradient = parameter.grad
            found.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
            with torch.no_grad():
                parameter.sub_(gradient)
            parameter.grad = None
    return found


def ddp(rank: int) -> list[Tensor]:
    module = DistributedDataParallel(made())
    with quantize_ddp(module, POLICY, error_feedback=True) as handle:
        return [*trained(module, rank), *handle.state_dict().values()]


def fsdp(rank: int, weight_delta: bool = False) -> list[Tensor]:
    model = made()
    layers: list[Any] = list(model.layers)
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    for layer, following in itertools.pairwise(layers):
        assert isinstance(layer, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    with quantize_fsdp(model, POLICY, weight_delta=weight_delta):
        return trained(model, rank)


def fsdp_delta(rank: int) -> list[Tensor]:
    return fsdp(rank, weight_delta=True)


def pipeline(rank: int, is_changed: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(WIDTH, WIDTH)
    place = (module, rank, 2, torch.device("cpu"))
    if is_changed:
        stage: Any = quantize_pipeline_stage(PipelineStage(*place), POLICY)
    else:
        stage = QuantizedPipelineStage(*place, policy=POLICY)
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=F.mse_loss)
    for step in range(2):
        schedule.step(batch(step, 0)) if rank == 0 else schedule.step(target=batch(step, 1))
    assert module.weight.grad is not None
    return [module.weight.grad]


def changed_pipeline(rank: int) -> list[Tensor]:
    return pipeline(rank, is_changed=True)


def states(rank: int) -> list[Tensor]:
    module = made()
    optimizer = torch.optim.AdamW(module.parameters())
    quantize_states(optimizer, POLICY, packed_state_dict=True)
    for step in range(3):
        optimizer.zero_grad()
        module(batch(step, rank)).square().mean().backward()
        optimizer.step()
    kept = optimizer.state_dict()["state"].values()
    return [state["exp_avg"]["payload"] for state in kept] + list(module.parameters())


@contextlib.contextmanager
def coding(by_library: bool) -> Iterator[list[Any]]:
    """Where the library is not loaded yet, or cannot be; with calls of the formula."""
    calls, original = [], arithmetic.quantize

    def quantize(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return original(*args, **kwargs)

    failure = "" if by_library else "switched off"
    with (
        mock.patch.multiple(cpu_codec, _library=None, _failure=failure),
        mock.patch.object(arithmetic, "quantize", quantize),
    ):
        yield calls


def check_same(train: Train, rank: int) -> None:
    with coding(by_library=True) as calls:
        expected = copy.deepcopy(train(rank))
        assert cpu_codec._library is not None
        assert not calls
    with coding(by_library=False) as calls:
        found = train(rank)
        assert calls
    assert len(expected) == len(found) > 0
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(one, other), (train.__name__, i)


def check_hooks(rank: Rank) -> None:
    for train in (ddp, fsdp, fsdp_delta, pipeline, changed_pipeline):
        check_same(train, rank.index)


def test_hooks_load_the_library_and_send_the_same_without_it(ranks: RunRanks) -> None:
    ranks(2, check_hooks)


def test_states_are_the_same_too() -> None:
    check_same(states, 0)


@pytest.mark.parametrize("hooked", [True, False])
def test_a_copied_optimizer_has_the_library_loaded_where_it_wakes_up(hooked: bool) -> None:
    optimizer = torch.optim.AdamW(made().parameters())
    if hooked:
        quantize_states(optimizer, POLICY)
    with coding(by_library=True):
        copy.deepcopy(optimizer)
        assert (cpu_codec._library is not None) == hooked
