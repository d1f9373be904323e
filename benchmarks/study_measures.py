"""What the residual study measures of a trained model; one function a question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from study_tasks import Task, boundaries_of
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.report.measures import excess_kurtosis, sqnr_db
from rfcompile.states.composite import Optimizers

SIZES = {"tensor": None, "g128": 128}

FORMATS: dict[str, rf.QuantFormat] = {
    f"{bits}b {size} {grid}": rf.QuantFormat(bits, group_size=group, grid=f"mid-{grid}")
    for bits in (8, 4, 3, 2)
    for size, group in SIZES.items()
    for grid in ("tread", "rise")
} | {
    f"{bits}b {size} {grid} rotated": rf.QuantFormat(bits, SIZES[size], f"mid-{grid}", rotate=128)
    for bits in (4, 3, 2)
    for size, grid in (("tensor", "tread"), ("g128", "rise"))
}
"""Mid-tread (symmetric) and mid-rise grids, one scale a tensor and one for 128 elements; with the
Hadamard rotation those that the tables show."""


@torch.no_grad()
def validation_loss(task: Task, model: nn.Module, batches: int) -> float:
    losses = [task.loss(model, batch).item() for batch in task.validation(batches)]
    return sum(losses) / len(losses)


@torch.no_grad()
def kurtosis_by_site(task: Task, model: nn.Module) -> dict[str, dict[str, float]]:
    """Excess kurtosis of each boundary over all elements, and the mean over its channels."""
    found: dict[str, dict[str, float]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            channels = output.flatten(0, -2).unbind(-1)
            by_channel = sum(map(excess_kurtosis, channels)) / len(channels)
            found[name] = {"elements": excess_kurtosis(output), "channels": by_channel}

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(keep(name))
        for kind in ("stream", "branch")
        for name in boundaries_of(task, model)[kind]
    ]
    task.loss(model, next(iter(task.validation(1))))
    for hook in hooks:
        hook.remove()
    return found


def increases(
    task: Task, model: nn.Module, exact: float, batches: int
) -> dict[str, dict[str, float]]:
    """How much the validation loss grows, by kind of boundary and format."""
    result: dict[str, dict[str, float]] = {}
    for boundary, names in boundaries_of(task, model).items():
        result[boundary] = {}
        if not names:
            continue
        for name, fmt in FORMATS.items():
            policy = rf.Policy(activations=fmt, min_bytes=0)
            quantized = rf.transform(model, rf.Wire(policy, modules=names))
            result[boundary][name] = validation_loss(task, quantized, batches) - exact
    return result


def of_tensors(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Kurtosis (mean, max) and SQNR in dB of tensors, quantized to 4 bits in groups of 128."""
    kurtoses = [excess_kurtosis(x) for x in tensors.values()]
    decibels = []
    for x in tensors.values():
        decoded = rf.dequantize(rf.quantize(x, 4), 4, x.shape, x.dtype)
        decibels.append(sqnr_db(x, decoded))
    return {
        "mean kurtosis": sum(kurtoses) / len(kurtoses),
        "max kurtosis": max(kurtoses),
        "mean SQNR 4b g128": sum(decibels) / len(decibels),
    }


def traffic(task: Task, model: nn.Module, optimizer: Optimizers) -> dict[str, dict[str, float]]:
    """Gradients and optimizer states of the blocks' matrices."""
    blocks = tuple(f"{name}." for name in boundaries_of(task, model)["stream"])
    matrices = {
        name: p for name, p in model.named_parameters() if name.startswith(blocks) and p.dim() == 2
    }
    result = {"gradients": of_tensors({n: p.grad for n, p in matrices.items()})}
    states = [inner.state for inner in optimizer.optimizers]
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        held = {
            name: state[p][key]
            for name, p in matrices.items()
            for state in states
            if p in state and key in state[p]
        }
        if held:
            result[key] = of_tensors(held)
    return result
