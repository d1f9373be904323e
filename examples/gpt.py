"""A small byte-level GPT and its tensor-parallel plan; open it to see what the demo trains.

Plain PyTorch: nothing here knows about quantization, and nobody writes a collective. The plan names
the linears to shard and DTensor puts the all-reduces in, two forward and two backward a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

BYTES = 256
"""Size of the vocabulary: a token is a byte."""


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`; ``width`` is a multiple of ``2 * heads``."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    The rows of ``qkv`` are ordered head by head (query, key, value of head 0, then of head 1, ...),
    so that a shard of its rows is a set of whole heads. The number of heads is read from the
    activations: under tensor parallelism each rank sees its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.head_width))  # [B, S, H, 3, D]
        query, key, value = qkv.transpose(1, 2).unbind(3)  # each [B, H, S, D]
        query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears with a GELU between them, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention, then MLP, each behind a norm and beside a skip connection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out: ``[B, S]`` int64 to ``[B, S, 256]``."""

    rotation: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, BYTES, bias=False)
        rotation = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("rotation", rotation, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw matrices at variance 1 / fan-in; branches end at zero, so blocks start as skips."""
        nn.init.normal_(self.embedding.weight)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_a_branch = name.endswith((".out", ".down"))
                nn.init.normal_(
                    module.weight, std=0.0 if ends_a_branch else module.in_features**-0.5
                )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        rotation = self.rotation[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


def rotary_angles(context: int, head_width: int) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021), ``[2, context, head_width / 2]``."""
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2) / head_width)
    angle = torch.outer(torch.arange(context), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair ``(x[d], x[d + D/2])`` of ``[B, H, S, D]`` by the angle of its position."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def parallelize(model: GPT, mesh: DeviceMesh) -> GPT:
    """Shard the linears of every block over ``mesh``, in place: the usual plan, in four lines.

    Everything else (embedding, norms, head) stays replicated. Compile the result with
    ``dynamic=False``: a sharded linear on a 3-D activation with a dynamic size sends the tracer of
    torch 2.11 to 2.13 into endless recursion.

    Raises:
        ValueError: the heads do not divide over the ranks.
    """
    heads, ranks = model.config.heads, mesh.size()
    if heads % ranks:
        raise ValueError(f"{heads} heads do not divide over {ranks} ranks; choose a divisor.")
    for block in model.blocks:
        plan = {
            "attention.qkv": ColwiseParallel(),
            "attention.out": RowwiseParallel(),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    return model


def tiny() -> tuple[GPT, tuple[Tensor, ...]]:
    """A model and its inputs, for ``rfcompile explain examples/gpt.py:tiny``."""
    config = GPTConfig(width=64, layers=2, context=64)
    return GPT(config), (torch.randint(BYTES, (4, config.context)),)


def tiny_to_plan() -> tuple[GPT, list[tuple[Tensor, Tensor]], object]:
    """A model, batches and a loss, for ``rfcompile plan examples/gpt.py:tiny_to_plan``.

    The loss is how far the logits are from those of the exact model.
    """
    model, _ = tiny()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # branches that end at zero would send only zeros
    batches = [(x, model(x).detach()) for x in torch.randint(BYTES, (2, 4, 64))]

    def loss(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    return model, batches, loss


def tiny_tensor_parallel() -> tuple[GPT, tuple[Tensor, ...]]:
    """The same over all ranks, for ``rfcompile explain ... --world-size 2``."""
    model, inputs = tiny()
    return parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),))), inputs
