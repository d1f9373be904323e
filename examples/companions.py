"""A small image classifier with polynomial attention, grayed tokens, no skips and a 4-bit wire.

    python examples/companions.py --steps 50

The reports say what ``transform`` did, ``analyze`` what the blocks do to the tokens.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf


class Classifier(nn.Module):
    """Which of four frequencies is in a noisy wave: [B, 16, 8] to [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 32)
        self.position = nn.Parameter(torch.randn(16, 32))
        layers = (nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True) for _ in range(2))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def waves(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(4, (n,))
    time = torch.linspace(0, 1, 128) * (labels[:, None] + 1) + torch.rand(n, 1)
    return ((6.28 * time).sin() + 0.3 * torch.randn(n, 128)).view(n, 16, 8), labels


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps
torch.manual_seed(0)
model = rf.transform(
    Classifier(),
    rf.ResidualFree("free"),
    rf.experimental.PolynomialAttention(power=3, scale="learned"),
    rf.experimental.TokenGraying("dct", 0.9),
    rf.Wire(4),
    example_inputs=waves(32)[:1],
)
print(*rf.rewrites_of(model), rf.analyze(model, example_inputs=(waves(32)[0],)), sep="\n")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(steps):
    x, labels = waves(64)
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f} after {steps} steps")
