"""One forward and backward pass of a model that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Random state and buffers are afterwards as before."""
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    local = [b.to_local() if isinstance(b, DTensor) else b for b in model.buffers()]
    buffers = [(buffer, buffer.clone()) for buffer in local]
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for buffer, old in buffers:
                buffer.data.copy_(old)  # a pending backward pass must not take it for a change


def run_backward(model: nn.Module, outputs: Any) -> None:
    """The gradients of the mean of what a model returned, for its trainable parameters, if any."""
    leaves = [leaf for leaf in _tensors(outputs) if leaf.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if leaves and parameters:
        grads = [torch.full_like(leaf, 1 / max(leaf.numel(), 1)) for leaf in leaves]
        torch.autograd.grad(leaves, parameters, grads, allow_unused=True)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf):
            yield from _tensors([getattr(leaf, field.name) for field in fields(leaf)])
