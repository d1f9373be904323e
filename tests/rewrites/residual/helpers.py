"""Plain functions that add, for models of other files to call."""

from __future__ import annotations

from torch import Tensor


def plus(x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
    return x + scale * y


def nested(branch: Tensor, skip: Tensor) -> Tensor:
    doubled = branch * 2
    return plus(skip, doubled)
