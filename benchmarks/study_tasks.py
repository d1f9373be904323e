"""What the residual study trains: a GPT on Shakespeare's bytes and a ViT on handwritten digits.

Both are plain models. A task gives batches, the loss, and the modules whose outputs would cross the
wire: ``stream``, what leaves each block; ``cut``, the same without the last block, all that stages
of a pipeline send; and ``branch``, what a tensor-parallel all-reduce sums.
"""

from __future__ import annotations

import gzip
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from gpt import BYTES, GPT, GPTConfig  # noqa: E402

Batch = tuple[Tensor, Tensor]
"""Inputs and what the model should answer."""


class Task(Protocol):
    streams: ClassVar[str]
    branches: ClassVar[str]

    def model(self, *, rotary: bool = True) -> nn.Module: ...

    def batch(self) -> Batch: ...

    def validation(self, batches: int) -> Iterator[Batch]: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...


def boundaries_of(task: Task, model: nn.Module) -> dict[str, list[str]]:
    """Modules by kind of boundary, in order of depth."""
    names = [name for name, _ in model.named_modules()]
    streams = [n for n in names if re.fullmatch(task.streams, n)]
    branches = [n for n in names if re.fullmatch(task.branches, n)]
    return {"stream": streams, "cut": streams[:-1], "branch": branches}


class LearnedPositions(nn.Embedding):
    """Adds a learned position to each token, in place of rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(BYTES, config.width)
        self.position = nn.Parameter(torch.randn(config.context, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.position[: tokens.shape[1]]


class Language:
    """Next byte of Shakespeare; the last tenth of the text is for validation."""

    streams = r"blocks\.\d+"
    branches = r"blocks\.\d+\.(attention|mlp)"

    def __init__(self, config: GPTConfig, batch: int, seed: int) -> None:
        text = gzip.decompress((ROOT / "examples/data/shakespeare.txt.gz").read_bytes())
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.cut = len(self.text) * 9 // 10
        self.config, self.batch_size = config, batch
        self.generator = torch.Generator().manual_seed(seed)

    def model(self, *, rotary: bool = True) -> nn.Module:
        model: Any = GPT(self.config)
        if not rotary:
            model.embedding = LearnedPositions(self.config)
            cosine, sine = model.rotation
            model.rotation = torch.stack([torch.ones_like(cosine), torch.zeros_like(sine)])
        return model

    def batch(self) -> Batch:
        high = self.cut - self.config.context - 1
        return self._at(torch.randint(high, (self.batch_size,), generator=self.generator))

    def validation(self, batches: int) -> Iterator[Batch]:
        """The same windows on every call, for every arm and seed."""
        last = len(self.text) - self.config.context - 1
        starts = torch.linspace(self.cut, last, batches * self.batch_size).long()
        return map(self._at, starts.split(self.batch_size))

    def _at(self, starts: Tensor) -> Batch:
        window = self.text[starts[:, None] + torch.arange(self.config.context + 1)].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


class Digits:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels in patches of 2 x 2; a fifth is for validation.

    The model is the ViT of the transformers package, as it is, with learned positions.
    """

    streams = r"vit\.layers\.\d+"
    branches = r"vit\.layers\.\d+\.(attention\.o_proj|mlp)"

    def __init__(self, config: GPTConfig, batch: int, seed: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held = len(labels) // 5
        self.held_out = images[order[:held]], labels[order[:held]]
        self.images, self.labels = images[order[held:]], labels[order[held:]]
        self.config, self.batch_size = config, batch
        self.generator = torch.Generator().manual_seed(seed)

    def model(self, *, rotary: bool = True) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        width = self.config.width
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10,
            hidden_size=width, intermediate_size=4 * width, hidden_dropout_prob=0.0,
            num_hidden_layers=self.config.layers, num_attention_heads=self.config.heads,
        )  # fmt: skip
        return ViTForImageClassification(config)

    def batch(self) -> Batch:
        chosen = torch.randint(len(self.labels), (self.batch_size,), generator=self.generator)
        return self.images[chosen], self.labels[chosen]

    def validation(self, batches: int) -> Iterator[Batch]:
        """All that was held out, in this many parts."""
        parts = (tensor.tensor_split(batches) for tensor in self.held_out)
        return zip(*parts, strict=True)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images).logits, labels)


TASKS: dict[str, type[Language] | type[Digits]] = {"language": Language, "digits": Digits}
