"""Models without residual connections on two ranks: tensor parallel and fully sharded."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import rfcompile as rf
from tests.ranks import Rank, RunRanks
from tests.zoo import VOCABULARY, ZOO

os.environ.setdefault("HF_HUB_OFFLINE", "1")

pytestmark = pytest.mark.slow
WORLD = 2


def setting(mode: str) -> tuple[nn.Module, Tensor]:
    """A rewritten Llama, equal on every rank, and tokens."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (2, 12))
    model = rf.transform(
        ZOO["llama"].build(), residual=mode, example_inputs=((), {"input_ids": ids})
    )
    for name, parameter in model.named_parameters():
        if "gain" in name:
            nn.init.constant_(parameter, 0.5)
    return model, ids


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(got: Tensor, expected: Tensor, what: object) -> None:
    """Sums of at most 64 terms, split in two, through two layers and back."""
    torch.testing.assert_close(
        got, expected, rtol=1e-4, atol=1e-6, msg=lambda text: f"{what}: {text}"
    )


def check_step(rank: Rank, model: nn.Module, ids: Tensor, expected: dict[str, Any]) -> None:
    """Loss, and gradients by name, are those of one process, and the same on all ranks."""
    loss = full(loss_of(model, ids))
    rank.assert_same(loss.detach(), "loss")
    close(loss.detach(), expected["loss"], "loss")
    loss.backward()
    seen = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad = full(parameter.grad)
        rank.assert_same(grad, name)
        close(grad, expected["grads"][name], name)
        seen += 1
    assert seen == len(expected["grads"])


def one_process(mode: str) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    model, ids = setting(mode)
    loss = loss_of(model, ids)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return model, ids, {"loss": loss.detach(), "grads": grads}


def tensor_parallel(rank: Rank, mode: str) -> list[str]:
    model, ids, expected = one_process(mode)
    plan = {
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.get_submodule("model.layers").children():
        parallelize_module(layer, mesh, plan)
    check_step(rank, model, ids, expected)
    return [n for n, p in model.named_parameters() if isinstance(p, DTensor) and "proj.w" in n]


def fully_sharded(rank: Rank, mode: str) -> set[torch.Size]:
    model, ids, expected = one_process(mode)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    check_step(rank, model, ids, expected)
    new = [p for n, p in model.named_parameters() if "gain" in n or "temperature" in n]
    assert all(isinstance(parameter, DTensor) for parameter in new)
    return {parameter.shape for parameter in new}


@pytest.mark.parametrize("mode", ["free", "anneal"])
def test_tensor_parallel(ranks: RunRanks, mode: str) -> None:
    pytest.importorskip("transformers")
    assert [len(names) for names in ranks(WORLD, tensor_parallel, mode)] == [14, 14]


@pytest.mark.parametrize("mode", ["free", "anneal"])
def test_fully_sharded(ranks: RunRanks, mode: str) -> None:
    pytest.importorskip("transformers")
    assert ranks(WORLD, fully_sharded, mode) == [{torch.Size([1])}] * WORLD
