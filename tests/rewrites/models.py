"""Small models that the companions' tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    """Two blocks, the weights of embedding and head tied on request."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def made(tied: bool = False, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(tied)


def tokens() -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))


def graph_of(model: nn.Module, how: str) -> nn.Module:
    """As torch.export captures it, or as torch.fx traces it."""
    if how == "export":
        return torch.export.export(model, (tokens(),)).module()
    return torch.fx.symbolic_trace(model)


def moved(model: nn.Module, seed: int = 0) -> nn.Module:
    """The adapters of a model, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model
