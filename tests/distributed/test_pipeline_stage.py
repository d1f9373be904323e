"""Pipelines on real ranks: losses, gradients and bytes are those of a model in one process.

The reference runs all stages in one process, micro-batch by micro-batch, and puts
``rf.dequantize(rf.quantize(x))`` at each cut, in both directions: bit for bit the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    SplitPoint,
    pipeline,
    schedules,
)

import rfcompile as rf
from rfcompile import process_groups
from rfcompile.distributed import QuantizedPipelineStage, quantize_pipeline_stage
from rfcompile.errors import (
    FormatError,
    HookError,
    NonFiniteError,
    RankMismatchError,
    RFCompileError,
    ShapeError,
)
from rfcompile.report import merge_reports

if TYPE_CHECKING:
    from tests.distributed.conftest import Rank, RunRanks

CPU = torch.device("cpu")
WIDTH, ROWS, CHUNKS = 40, 12, 4
MODERN = hasattr(PipelineStage, "_warmup_forward_vote")
"""Of torch 2.13: tensors without gradient, and None gradients, between stages."""


def policy(fmt: Any = "4b", gradients: Any = "8b:g64", **options: Any) -> rf.Policy:
    return rf.Policy(activations=fmt, gradients=gradients, **({"min_bytes": 0} | options))


class Plain(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) + x


class Several(Plain):
    """A strided float, a float with a gradient on some paths only, integers, a bool, no elements.

    The third stage uses only a part of what it gets: the others' gradients are None.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        if not others:
            ids = torch.arange(len(x)) * 2**40 + 1
            others = (x.flip(-1), ids, ids > 5, x.new_zeros(len(x), 0))
        second, ids, mask, empty = others
        x = super().forward(x) + (ids % 7)[:, None] * 0.01 + mask[:, None]
        if self.index < 2:
            second = second * x
        elif self.index == 2:
            second = second.detach() * 2
        if self.index == 3:
            return x + second
        return x.t().contiguous().t() if MODERN else x, second, ids, mask, empty


# ---- the reference -------------------------------------------------------------------------------


def round_trip(x: Tensor, fmt: Any) -> Tensor:
    return x.clone() if fmt is None else rf.dequantize(rf.quantize(x, fmt), fmt, x.shape, x.dtype)


class Cut(torch.autograd.Function):
    """A tensor from stage ``s`` to the next one, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.backward_format = backward
        return round_trip(x, forward)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return round_trip(gradient, ctx.backward_format), None, None


Formats = Callable[[str, int, Tensor], Any]
"""Direction, sending stage, tensor: format."""


def formats_of(wanted: rf.Policy, same_rank: tuple[int, ...] = ()) -> Formats:
    """What the policy says; stage s and s + 1 of ``same_rank`` share a rank."""

    def fmt(direction: str, stage: int, x: Tensor) -> Any:
        cut = stage if direction == "forward" else stage - 1
        if cut in same_rank or not x.is_floating_point() or not x.numel():
            return None
        kind = "activations" if direction == "forward" else "gradients"
        return wanted.format_for(kind, f"stages.{stage}", x.numel() * x.element_size())[0]

    return fmt


def loss_of(y: Tensor, target: Tensor) -> Tensor:
    return (y.float() - target).square().mean()


def reference(
    parts: list[nn.Module], x: Tensor, target: Tensor, fmt: Formats, order: int = 1
) -> list[Tensor]:
    """The losses of the micro-batches; gradients are added up in ``parts``, last ones first if
    ``order`` is -1."""
    losses = []
    pieces = list(zip(x.chunk(CHUNKS), target.chunk(CHUNKS), strict=True))
    for piece, wanted in pieces[::order]:
        values: Any = (piece,)
        for s, part in enumerate(parts):
            values = part(*values)
            if s + 1 < len(parts):
                values = values if isinstance(values, tuple) else (values,)
                values = tuple(
                    Cut.apply(v, fmt("forward", s, v), fmt("backward", s + 1, v))
                    if v.is_floating_point() else v
                    for v in values
                )  # fmt: skip
        loss = loss_of(values, wanted)
        loss.backward()
        losses.append(loss.detach())
    for parameter in (p for part in parts for p in part.parameters()):
        if parameter.grad is not None:
            parameter.grad.div_(CHUNKS)  # as a schedule does
    return losses[::order]


@contextlib.contextmanager
def recorded_sends() -> Iterator[list[Tensor]]:
    """Every tensor that the schedules send."""
    sent: list[Tensor] = []
    original = schedules._batch_p2p

    def batch(ops: list[Any], desc: Any = None) -> Any:
        sent.extend(op.tensor for op in ops if op.op is dist.isend)
        return original(ops, desc)

    schedules._batch_p2p = batch
    try:
        yield sent
    finally:
        schedules._batch_p2p = original


# ---- every schedule ------------------------------------------------------------------------------

SCHEDULES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "gpipe": (ScheduleGPipe, ((0,), (1,))),
    "1f1b": (Schedule1F1B, ((0,), (1,))),
    "interleaved": (ScheduleInterleaved1F1B, ((0, 2), (1, 3))),
    "looped": (ScheduleLoopedBFS, ((0, 2), (1, 3))),
    "interleaved zb": (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3))),
    "zbv": (ScheduleZBVZeroBubble, ((0, 3), (1, 2))),
}


def parts_of(kind: Callable[[int], nn.Module], num: int, dtype: torch.dtype) -> list[nn.Module]:
    torch.manual_seed(5)
    return [kind(i).to(dtype) for i in range(num)]


def make_schedule(
    name: str, stages: list[Any], loss: Any = loss_of, chunks: int = CHUNKS, **options: Any
) -> Any:
    kind, _ = SCHEDULES[name]
    single = issubclass(kind, schedules.PipelineScheduleSingle)
    return kind(stages[0] if single else stages, chunks, loss_fn=loss, **options)


def run_step(
    rank: Rank, schedule: Any, mine: tuple[int, ...], last: int, x: Tensor, y: Tensor
) -> list[Tensor]:
    losses: list[Tensor] = []
    with recorded_sends() as sent:
        has_target = {"target": y, "losses": losses} if last in mine else {}
        schedule.step(*((x,) if 0 in mine else ()), **has_target)
    schedule.sent = sent
    return losses


def check_schedule(
    rank: Rank,
    name: str,
    kind: Callable[[int], nn.Module] = lambda i: Plain(),
    wanted: rf.Policy | None = None,
    dtype: torch.dtype = torch.float32,
    placement: tuple[tuple[int, ...], ...] | None = None,
    **options: Any,
) -> Any:
    """Three steps: losses, gradients and bytes; the reports of this rank's stages."""
    wanted = wanted or policy()
    what = (name, wanted.describe(), dtype)
    ranks_stages = placement or SCHEDULES[name][1]
    mine = ranks_stages[rank.index]
    num = sum(map(len, ranks_stages))
    rank_of = {s: r for r, stages in enumerate(ranks_stages) for s in stages}
    same_rank = tuple(s for s in range(num - 1) if rank_of[s] == rank_of[s + 1])
    parts, local = parts_of(kind, num, dtype), parts_of(kind, num, dtype)
    stages = [QuantizedPipelineStage(parts[i], i, num, CPU, policy=wanted, **options) for i in mine]
    schedule = make_schedule(name, stages)
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS, WIDTH)
        for part in (*parts, *local):
            part.zero_grad()
        losses = run_step(rank, schedule, mine, num - 1, x, y)
        order = -1 if name == "looped" else 1  # of the backward passes
        expected = reference(local, x, y, formats_of(wanted, same_rank), order)
        for i in mine:
            if i == num - 1:
                assert len(losses) == CHUNKS
                for loss, other in zip(losses, expected, strict=True):
                    assert torch.equal(loss.detach(), other), (what, step)
            for (n, p), q in zip(
                parts[i].named_parameters(), local[i].parameters(), strict=True
            ):
                assert (p.grad is None) == (q.grad is None), (what, step, i, n)
                assert p.grad is None or torch.equal(p.grad, q.grad), (what, step, i, n)
        report = merge_reports(stage.report() for stage in stages)
        # The first step of torch 2.11 and the warm-up of later ones send small floats too.
        sent = sum(x.nbytes for x in schedule.sent)
        if step:
            assert report.bytes_after == sent, (what, step, report.text(), sent)
        for site in report.sites:
            assert (site.format is None) == bool(site.reason)
    return report


def check_schedules(rank: Rank) -> None:
    for name in SCHEDULES:
        report = check_schedule(rank, name)
        ways = 2 * len(SCHEDULES[name][1][0]) - 1
        if name == "zbv" and rank.index == 1:  # stages 1 and 2, one after the other
            local = [site for site in report.sites if "same rank" in site.reason]
            assert [(s.direction, s.module) for s in local] == [
                ("forward", "stages.1"), ("backward", "stages.2")
            ]  # fmt: skip
            assert all(s.bytes_before == s.bytes_after == 0 for s in local)
            assert not any(s.eligible for s in local)
            assert report.num_quantized == 2
        elif name in ("gpipe", "1f1b"):
            assert report.num_quantized == report.num_sites == 1
            [site] = report.sites
            assert site.direction == ("backward" if rank.index else "forward")
            assert site.source == "tensor 0 of 4 micro-batches"
        elif name != "zbv":
            assert report.num_quantized == report.num_sites == ways


def test_schedules_compute_what_one_process_computes(ranks: RunRanks) -> None:
    ranks(2, check_schedules)
