"""accelerate, the real one, on two CPU ranks: one line after ``prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rfcompile as rf
from rfcompile.errors import HookError
from tests.integrations.helpers import (
    Net,
    as_torchrun,
    assert_same_state,
    dataset,
    values,
    wire_bytes,
)
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.clients


def prepared(as_on_gpus: bool = False, **options: Any) -> tuple[Any, Any, Any, Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)  # that of another process group
    if as_on_gpus:  # on CPU accelerate makes DDP of FSDP
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    accelerator = Accelerator(cpu=True, **options)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    data = torch.utils.data.DataLoader(dataset(), batch_size=16)
    return (accelerator, *accelerator.prepare(model, optimizer, data))


def train(accelerator: Any, model: Any, optimizer: Any, data: Any, epochs: int = 4) -> list[float]:
    losses = []
    for _ in range(epochs):
        for x, y in data:
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def check_ddp(rank: Rank, folder: str) -> None:
    with as_torchrun(rank):
        accelerator, model, optimizer, data = prepared()
        handle = rf.quantize_traffic(model, 4, error_feedback=True)
        accelerator.register_for_checkpointing(handle)
        losses = train(accelerator, model, optimizer, data)
        assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
        rank.assert_same(values(model))
        assert handle.report().bytes_after == wire_bytes(model, 4, rank.world)
        state = handle.state_dict()
        accelerator.save_state(folder)
        dist.barrier()

        accelerator, model, optimizer, data = prepared()
        handle = rf.quantize_traffic(model, 4, error_feedback=True)
        accelerator.register_for_checkpointing(handle)
        accelerator.load_state(folder)
        assert_same_state(handle.state_dict(), state)
        more = train(accelerator, model, optimizer, data, epochs=1)
        assert sum(more[:8]) < sum(losses[:8])
        rank.assert_same(values(model))


def check_fsdp2(rank: Rank) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    with as_torchrun(rank):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
        )
        accelerator, model, optimizer, data = prepared(as_on_gpus=True, fsdp_plugin=plugin)
        policy = rf.Policy(weights=8, gradients=4, min_bytes=0)
        handle = rf.quantize_traffic(model, policy, weight_delta=True)
        losses = train(accelerator, model, optimizer, data)
        assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
        rank.assert_same(values(model))
        report = handle.report()
        assert report.num_quantized == report.num_sites > 0


def check_a_hook_that_is_there(rank: Rank) -> None:
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    with as_torchrun(rank):
        hooked = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
        _, model, _, _ = prepared(kwargs_handlers=[hooked])
        error = error_of(lambda: rf.quantize_traffic(model, 4))
    assert isinstance(error, HookError)
    assert "it has the communication hook" in str(error)


def test_ddp_with_error_feedback_in_checkpoints(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_ddp, str(tmp_path))


def test_fsdp2(ranks: RunRanks) -> None:
    ranks(2, check_fsdp2)


def test_a_hook_that_is_there(ranks: RunRanks) -> None:
    ranks(2, check_a_hook_that_is_there)
