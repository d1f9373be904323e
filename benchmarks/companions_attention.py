"""Polynomial attention and Token Graying against what they replace: loss, accuracy, conditioning,
time. A study of ``companions.py``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import alternate
from companions_plots import plot, table
from residual_study import rate
from study_measures import validation_loss
from study_tasks import TASKS, Digits, GPTConfig, Task
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.nn.attention_operators import polynomial_attention
from rfcompile.training import Initialization, optimizers

__all__ = ["plot", "rows", "table"]


poly, gray = rf.experimental.PolynomialAttention, rf.experimental.TokenGraying
FREE = rf.ResidualFree()

ARMS: dict[str, dict[str, list[Any]]] = {
    "language": {
        "softmax": [],
        "s^3, row": [poly(3, "row")],
        "s^3, learned": [poly(3, "learned")],
        "s^2, row": [poly(2, "row")],
    },
    "digits": {
        "softmax": [],
        "s^3, row": [poly(3, "row")],
        "s^3, learned": [poly(3, "learned")],
        "s^2, row": [poly(2, "row")],
        "dct 0.95": [gray("dct", 0.95)],
        "svd 0.7": [gray("svd", 0.7)],
        "free": [FREE],
        "free, dct 0.95": [FREE, gray("dct", 0.95)],
        "free, svd 0.7": [FREE, gray("svd", 0.7)],
        "free, s^3, learned": [FREE, poly(3, "learned")],
    },
}
SIZES = {
    "language": (GPTConfig(width=64, layers=3, heads=4, context=64), 16, 400),
    "digits": (GPTConfig(width=64, layers=4, heads=4, context=17), 32, 250),
}
PAIRS = ((3, "quadratic"), (2, "quadratic"), (2, "linear"), (1, "linear"))
TINY = (GPTConfig(width=32, layers=2, heads=2, context=16), 4, 3)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    parts = options.only or ["time", "length", "language", "digits"]
    if "time" in parts:
        yield from _step_times(options)
    if "length" in parts:
        yield from _lengths(options)
    for seed in range(options.seeds):
        for task in ("language", "digits"):
            for arm in ARMS[task] if task in parts else ():
                key = f"{task} {arm} {seed}"
                if key not in options.done:
                    yield {"key": key, "part": task, "arm": arm, "seed": seed} | _train(
                        task, arm, seed, options
                    )


# ---- training ----------------------------------------------------------------------------------


def _train(name: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    config, batch, steps = TINY if options.tiny else SIZES[name]
    torch.manual_seed(seed)
    task: Task = TASKS[name](config, batch, seed)
    example = (next(iter(task.validation(4)))[0],)
    seeded = rf.ResidualFree(initialization=Initialization(seed=seed))
    asked = [seeded if change is FREE else change for change in ARMS[name][arm]]
    model = task.model()
    if asked:
        model = rf.transform(model, *asked, example_inputs=example)
    is_free = seeded in asked
    optimizer = optimizers(
        model, lr=2e-3, matrix_lr=0.01 if is_free else 0.02, example_inputs=example
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, steps))
    losses, begin = [], time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    model.eval()
    facts = rf.analyze(model, example_inputs=(*example,))
    return {
        "task": vars(config) | {"batch": batch, "steps": steps},
        "validation_loss": validation_loss(task, model, 4),
        "accuracy": _accuracy(task, model) if isinstance(task, Digits) else None,
        "condition_in": [_log(b.condition_in) for b in facts.blocks],
        "condition_out": [_log(b.condition_out) for b in facts.blocks],
        "frobenius": [a.frobenius for a in facts.attentions],
        "bound": facts.attentions[0].bound,
        "seconds": seconds, "losses": losses,
    }  # fmt: skip


def _log(condition: float) -> float | None:
    """None where a token matrix is singular: a byte that is there twice, before any position."""
    return math.log(condition) if math.isfinite(condition) else None


@torch.no_grad()
def _accuracy(task: Digits, model: nn.Module) -> float:
    images, labels = task.held_out
    outputs: Any = model(images)
    return float((outputs.logits.argmax(-1) == labels).float().mean())


# ---- what a step costs ---------------------------------------------------------------------------


def _step_times(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A training step of two ViTs in turn: as it is, grayed, polynomial."""
    from transformers import ViTConfig, ViTForImageClassification

    shapes = {"digits": (8, 2, 1, 64, 6, 64), "tokens 197": (224, 16, 3, 192, 6, 4)}
    for name, (image, patch, channels, width, layers, batch) in shapes.items():
        if f"time {name}" in options.done or (options.tiny and name != "digits"):
            continue
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=image, patch_size=patch, num_channels=channels, num_labels=10,
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
            num_attention_heads=width // 16 if width < 128 else 3,
        )  # fmt: skip
        x = torch.randn(batch, channels, image, image)
        plain = ViTForImageClassification(config)
        models = {"none": plain} | {
            arm: rf.transform(plain, change, example_inputs=(x,))
            for arm, change in {
                "dct": gray("dct", 0.95), "svd": gray("svd", 0.7), "s^3": poly(3, "row"),
                "s^2": poly(2, "row"),
            }.items()
        }  # fmt: skip

        def step(model: nn.Module, x: Tensor = x) -> None:
            outputs: Any = model(x)
            outputs.logits.square().mean().backward()
            model.zero_grad()

        tasks = {arm: (lambda m=model: step(m)) for arm, model in models.items()}
        times = alternate(tasks, 2 if options.tiny else 15)
        ratios = {a: t["median_ms"] / times["none"]["median_ms"] for a, t in times.items()}
        yield {"key": f"time {name}", "part": "time", "times": times, "ratios": ratios}


# ---- time against sequence length --------------------------------------------------------------


def _lengths(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Forward and backward of one causal attention of 4 heads."""
    lengths = (64, 128) if options.tiny else (256, 512, 1024, 2048, 4096, 8192)
    for width in (16, 64):
        for length in lengths:
            key = f"length {width} {length}"
            if key in options.done:
                continue
            torch.manual_seed(0)
            q, k, v = (torch.randn(1, 4, length, width, requires_grad=True) for _ in range(3))

            def both(function: Any, *, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
                torch.autograd.grad(function(q, k, v, is_causal=True).square().mean(), (q, k, v))

            arms = {"softmax (SDPA)": F.scaled_dot_product_attention} | {
                f"s^{power}, {form}": partial(polynomial_attention, power=power, form=form)
                for power, form in PAIRS
            }
            tasks = {name: partial(both, function) for name, function in arms.items()}
            runs = 2 if options.tiny else 15 if length < 2000 else 3
            times = alternate(tasks, runs, warm_up=1)
            yield {"key": key, "part": "length", "width": width, "length": length, "times": times}
