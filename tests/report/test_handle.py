"""Every hook's handle: a report, a state, a way back, and all of it as a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.nn.parallel import DistributedDataParallel

from rfcompile.distributed import (
    QuantizedPipelineStage,
    quantize_ddp,
    quantize_fsdp,
    quantize_pipeline_stage,
)
from rfcompile.errors import HookError, StateError
from rfcompile.report.handle import REMOVED, Handle
from rfcompile.training import quantize_states
from tests.ranks import LOOPBACK


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in LOOPBACK.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp() -> Any:
    return quantize_ddp(DistributedDataParallel(nn.Linear(8, 8)), 4)


def fsdp() -> Any:
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return quantize_fsdp(model, 4)


def plain_stage() -> PipelineStage:
    return PipelineStage(nn.Linear(8, 8), 0, 1, torch.device("cpu"))


def states() -> Any:
    return quantize_states(torch.optim.AdamW(nn.Linear(8, 8).parameters()), 4)


HANDLES: dict[str, Callable[[], Any]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "stage": lambda: quantize_pipeline_stage(plain_stage(), 4),
    "stage class": lambda: QuantizedPipelineStage(
        nn.Linear(8, 8), 0, 1, torch.device("cpu"), policy=4
    ),
    "states": states,
}


@pytest.mark.parametrize("kind", HANDLES)
def test_a_handle_has_a_report_a_state_and_a_way_back(kind: str) -> None:
    handle = HANDLES[kind]()
    assert isinstance(handle, Handle)
    with handle as entered:
        assert entered is handle
        assert "4b" in handle.report().policy
        handle.load_state_dict(handle.state_dict())
    report = handle.report()
    assert "4b" not in report.policy
    assert kind == "states" or report.notes[0] == REMOVED


@pytest.mark.parametrize("kind", HANDLES)
def test_a_state_that_a_handle_has_no_place_for_is_an_error(kind: str) -> None:
    with HANDLES[kind]() as handle, pytest.raises(StateError):
        handle.load_state_dict({"surprise": torch.ones(1)})


def test_a_stage_is_quantized_again_after_its_way_back() -> None:
    stage = quantize_pipeline_stage(plain_stage(), 4)
    with pytest.raises(HookError, match="quantized already: call its remove"):
        quantize_pipeline_stage(stage, 8)
    stage.remove()
    assert "8b" in quantize_pipeline_stage(stage, 8).report().policy
