"""What ``traffic.py`` trains: models and batches, by kind of traffic and task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from study_tasks import GPT, GPTConfig, Language
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of the model, and of the batch of a rank (of a pipeline: of all)."""

    width: int
    layers: int
    heads: int
    context: int
    batch: int
    inner: int = 0
    """Of :class:`Narrow`; 0: it is a GPT."""

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.width, self.layers, self.heads, self.context)


LOSS = Size(width=64, layers=4, heads=2, context=64, batch=8)
FEW_TOKENS = Size(width=256, layers=4, heads=4, context=32, batch=1)


def size_of(kind: str, task: str, world: int) -> Size:
    """In a timed step the traffic is much and the arithmetic little, as it is on fast processors.

    Gradients and weights are of the size of the model, whatever the batch. A pipeline sends
    activations. For each byte of them a block of a GPT of width 64 has 576 operations, which take a
    processor's core about as long as the byte takes a link of 200 Mbit; a block of ``Narrow`` with
    32 inside has 48.
    """
    if task == "loss":
        return LOSS
    if kind == "pipeline":
        return Size(width=64, layers=world, heads=1, context=64, batch=128)
    if kind == "pipeline narrow":
        return Size(width=256, layers=world, heads=0, context=64, batch=128, inner=32)
    return FEW_TOKENS


class NarrowBlock(nn.Sequential):
    """A residual branch of two linears, narrow inside."""

    def __init__(self, width: int, inner: int) -> None:
        ends = nn.Linear(width, inner), nn.Linear(inner, width)
        super().__init__(nn.RMSNorm(width), ends[0], nn.GELU(), ends[1])

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Narrow(nn.Sequential):
    """The least arithmetic for what stages send; rows of normal numbers in, zeros to come out."""

    def __init__(self, size: Size) -> None:
        super().__init__(*(NarrowBlock(size.width, size.inner) for _ in range(size.layers)))
        self.size = size

    def batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.size.batch, self.size.context, self.size.width)
        return x, torch.zeros_like(x)


@dataclass(frozen=True)
class Setting:
    """What a job trains, the same on every rank but for the windows of the text."""

    kind: str
    task: str
    seed: int
    size: Size
    steps: int

    def start(self, rank: int) -> tuple[Any, Any]:
        """The model, and the task that gives its batches."""
        torch.manual_seed(self.seed)
        if self.size.inner:
            model = Narrow(self.size)
            return model, model
        return GPT(self.size.config), Language(
            self.size.config, self.size.batch, 1000 * self.seed + rank
        )
