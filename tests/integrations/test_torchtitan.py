"""The functions for torchtitan on a stand-in with the fields and calls of torchtitan 0.3.

torchtitan itself asks for a GPU: ``make test-torchtitan`` runs the real one, patched for CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import rfcompile as rf
from rfcompile.errors import HookError, PolicyError
from rfcompile.integrations.torchtitan import quantized, quantized_passes
from tests.integrations.helpers import Net, dataset, values

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

POLICY = rf.Policy(weights=8, gradients=4, activations=8, min_bytes=0)


@dataclass
class ModelSpec:
    name: str
    flavor: str
    model: Any
    parallelize_fn: Callable[..., Any]
    pipelining_fn: Callable[..., Any] | None
    post_optimizer_build_fn: Callable[..., Any] | None = None
    state_dict_adapter: Any = None


def parallelize(model: Net, *, degree: int = 2, **_: Any) -> Net:
    if degree > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def pipelining(
    model: nn.Module, *, rank: Rank, parallelize_fn: Any, **kwargs: Any
) -> tuple[Any, list[nn.Module], bool, bool]:
    part = parallelize_fn(model, **kwargs)
    stage = PipelineStage(part, rank.index, rank.world, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=F.mse_loss)
    return schedule, [part], rank.index == 0, rank.index == rank.world - 1


def spec() -> ModelSpec:
    return ModelSpec("net", "debug", Net, parallelize, pipelining)


def check_fsdp(rank: Rank) -> None:
    """As the trainer does it: parallelized on the meta device, then filled."""
    handles: list[Any] = []
    new = quantized(spec(), POLICY, on_start=handles.append)
    with torch.device("meta"):
        model: Any = new.model()
    model = new.parallelize_fn(model, parallel_dims=None)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, y = dataset().tensors
    losses = []
    for step in range(24):
        rows = slice(16 * (step % 8) + 128 * rank.index, 16 * (step % 8 + 1) + 128 * rank.index)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    rank.assert_same(values(model))
    (handle,) = handles
    report = handle.report()
    assert report.num_quantized == report.num_sites > 0
    assert report.ratio > 4


def check_pipeline(rank: Rank) -> None:
    handles: list[Any] = []
    old = spec()
    new = quantized(old, POLICY, on_start=handles.append)
    assert (new.name, new.flavor, new.post_optimizer_build_fn) == ("net", "debug", None)
    assert old.parallelize_fn is parallelize
    part = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    schedule, *_ = new.pipelining_fn(part, rank=rank, parallelize_fn=new.parallelize_fn, degree=1)
    (handle,) = handles
    assert list(handle.handles) == ["stage 0"]
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    schedule.step(*([x] if rank.index == 0 else []), target=x, losses=[])
    report = handle.report()
    assert report.num_quantized == report.num_sites > 0


def test_fsdp_units_of_a_model(ranks: RunRanks) -> None:
    ranks(2, check_fsdp)


def test_stages_of_a_pipeline(ranks: RunRanks) -> None:
    ranks(2, check_pipeline)


def test_what_is_no_model_spec() -> None:
    for thing in (nn.Linear(2, 2), object()):
        with pytest.raises(HookError, match="give a ModelSpec of torchtitan"):
            quantized(thing, 4)
    with pytest.raises(PolicyError):
        quantized(spec(), {"bitz": 4})
    without = quantized(ModelSpec("net", "debug", Net, parallelize, None), 4)
    assert without.pipelining_fn is None
    with pytest.raises(HookError, match="neither in DistributedDataParallel nor sharded"):
        without.parallelize_fn(Net(), degree=1)


# ---- graph_trainer -------------------------------------------------------------------------------


def joint_transformer_block_bucketing_reordering_pass(gm: Any, _: Any) -> Any:
    return gm


def cleaned(gm: Any, _: Any) -> Any:
    return gm


def test_the_pass_comes_before_those_that_fill_buckets() -> None:
    buckets = partial(joint_transformer_block_bucketing_reordering_pass)

    def pipeline(traced: Any, config: Any, *, parallel_dims: Any = None) -> list[Any]:
        assert (config, parallel_dims) == ("config", "dims")
        return [cleaned, buckets]

    traced = SimpleNamespace(num_static_inputs=3)
    passes = quantized_passes(pipeline, 4, strict=True)(traced, "config", parallel_dims="dims")
    first, added, last = passes
    assert (first, last) == (cleaned, buckets)
    assert (added.parameters, added.strict) == ((0, 1, 2), True)
    assert added.__name__ == "quantize_collectives_pass"
    with pytest.raises(HookError, match=r"pipeline of cleaned.*put rfcompile\.joint_pass"):
        quantized_passes(lambda traced: [cleaned], 4)(traced)
    with pytest.raises(PolicyError):
        quantized_passes(pipeline, {"bitz": 4})
