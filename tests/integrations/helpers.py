"""What the tests of all clients share: a rank as torchrun starts it, a small model, its bytes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rfcompile as rf

if TYPE_CHECKING:
    from tests.ranks import Rank

WIDTH, LABELS, ROWS = 32, 4, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.b(self.a(x).relu())
        return out


class Net(nn.Module):
    """Two blocks and a head; 17,092 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def dataset() -> torch.utils.data.TensorDataset:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())


@contextmanager
def as_torchrun(rank: Rank) -> Iterator[None]:
    """The environment of torchrun around the process group that is there, which stays."""
    place = {"RANK": rank.index, "LOCAL_RANK": rank.index, "GROUP_RANK": 0, "MASTER_PORT": 29400}
    sizes = {"WORLD_SIZE": rank.world, "LOCAL_WORLD_SIZE": rank.world}
    names = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    environment = {key: str(value) for key, value in (place | sizes | names).items()}
    with (
        patch.dict(os.environ, environment),
        patch.object(dist, "destroy_process_group", _keep(dist.destroy_process_group)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _keep(destroy: Any) -> Any:
    """Groups end, the default one stays."""
    return lambda group=None: None if group is None else destroy(group)


def values(model: nn.Module) -> Tensor:
    """All parameters, whole, in one vector."""
    whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
    return torch.cat([x.detach().flatten() for x in whole])


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Residuals of error feedback, bit for bit, and there are some."""
    assert one.keys() == other.keys() == {"ddp 0"}
    assert one["ddp 0"].keys() == other["ddp 0"].keys()
    assert all(torch.equal(one["ddp 0"][name], other["ddp 0"][name]) for name in one["ddp 0"])
    assert any(residual.abs().max() > 0 for residual in one["ddp 0"].values())


def wire_bytes(model: nn.Module, bits: int, world: int) -> int:
    """What a rank sends of all gradients in one bucket: a chunk to each other rank, twice."""
    elements = sum(p.numel() for p in model.parameters())
    chunk = -(-elements // world)
    return 2 * (world - 1) * rf.quantize(torch.zeros(chunk), bits).numel()
