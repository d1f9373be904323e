"""Pipelines on real ranks: losses, gradients and bytes are those of a model in one process.

The reference runs all stages in one process, micro-batch by micro-batch, and puts
``rf.dequantize(rf.quantize(x))`` at each cut, in both directions: bit for bit the same.
"""

from __future__ import annotations

import contextlib
import copy
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
from torch.distributed.pipelining.stage import _PipelineStageBase

import rfcompile as rf
from rfcompile.codec.formats import DTYPES
from rfcompile.distributed import (
    QuantizedPipelineStage,
    quantize_pipeline_stage,
    split_at_boundaries,
)
from rfcompile.errors import (
    FormatError,
    HookError,
    NonFiniteError,
    RankMismatchError,
    RFCompileError,
    ShapeError,
)
from rfcompile.report.step import merge_reports
from rfcompile.wire import process_groups
from tests.ranks import any_error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

CPU = torch.device("cpu")
WIDTH, ROWS, CHUNKS = 40, 12, 4
MODERN = hasattr(torch.distributed.pipelining.stage, "_StageMeta")
"""From torch 2.13 on: tensors without gradient, and None gradients, between stages."""


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
        return x.t().contiguous().t(), second, ids, mask, empty


# ---- the reference -------------------------------------------------------------------------------


def round_trip(x: Tensor, fmt: Any) -> Tensor:
    """With the strides of ``x``, as torch's buffers have: matrix products depend on them."""
    if fmt is None:
        return x.clone()
    return torch.empty_like(x).copy_(rf.dequantize(rf.quantize(x, fmt), fmt, x.shape, x.dtype))


class Cut(torch.autograd.Function):
    """A tensor from stage ``s`` to the next one, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Any, backward: Any) -> Tensor:
        ctx.backward_format = backward
        return round_trip(x, forward)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return round_trip(gradient, ctx.backward_format), None, None


cut: Callable[[Tensor, Any, Any], Tensor] = Cut.apply
Formats = Callable[[str, int, Tensor], Any]
"""Direction, sending stage, tensor: format."""


def formats_of(wanted: rf.Policy, same_rank: tuple[int, ...] = ()) -> Formats:
    """What the policy says; stage s and s + 1 of ``same_rank`` share a rank."""

    def fmt(direction: str, stage: int, x: Tensor) -> Any:
        cut = stage if direction == "forward" else stage - 1
        if cut in same_rank or x.dtype not in DTYPES or not x.numel():
            return None
        kind = "activations" if direction == "forward" else "gradients"
        return wanted.decide(kind, f"stages.{stage}", x.numel() * x.element_size()).format

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
                    cut(v, fmt("forward", s, v), fmt("backward", s + 1, v))
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

    schedules._batch_p2p = batch  # type: ignore[assignment]
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
    options: Callable[[int], dict[str, Any]] = lambda i: {},
) -> Any:
    """Two steps: losses, gradients and bytes; the reports of this rank's stages."""
    wanted = wanted or policy()
    what = (name, wanted.describe(), dtype)
    ranks_stages = placement or SCHEDULES[name][1]
    mine = ranks_stages[rank.index]
    num = sum(map(len, ranks_stages))
    rank_of = {s: r for r, stages in enumerate(ranks_stages) for s in stages}
    same_rank = tuple(s for s in range(num - 1) if rank_of[s] == rank_of[s + 1])
    parts, local = parts_of(kind, num, dtype), parts_of(kind, num, dtype)
    stages = [
        QuantizedPipelineStage(parts[i], i, num, CPU, policy=wanted, **options(i)) for i in mine
    ]
    schedule = make_schedule(name, stages)
    for step in range(2):
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
            for (n, p), q in zip(parts[i].named_parameters(), local[i].parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), (what, step, i, n)
                assert p.grad is None or torch.equal(p.grad, q.grad), (what, step, i, n)
        report = merge_reports(stage.report() for stage in stages)
        sent = sum(x.nbytes for x in schedule.sent)
        if step:  # before the first one, torch sends some numbers of its own
            assert report.bytes_after == sent, (what, step, report.text(), sent)
        for site in report.sites:
            assert (site.format is None) == bool(site.reason)
    return report


def check_schedules(rank: Rank) -> None:
    for name in SCHEDULES:
        if name == "zbv" and not MODERN:
            continue  # torch 2.11 sends a message to its own rank first, which gloo cannot
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


# ---- tensors, dtypes, formats --------------------------------------------------------------------


def examples(dtype: torch.dtype) -> Callable[[int], dict[str, Any]]:
    def tensor(requires_grad: bool) -> Tensor:
        return torch.empty(ROWS // CHUNKS, WIDTH, dtype=dtype, requires_grad=requires_grad)

    return lambda i: {"input_args": tensor(i > 0), "output_args": tensor(True)}


def check_kinds(rank: Rank) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        report = check_schedule(rank, "1f1b", dtype=dtype)
        assert {site.dtype for site in report.sites} == {str(dtype)[6:].replace("loat", "")}
    check_schedule(rank, "gpipe", options=examples(torch.float32))
    check_schedule(rank, "1f1b", wanted=policy("3b:h16", None))
    check_schedule(rank, "interleaved", wanted=policy("8b:tensor", "2b"))
    report = check_schedule(rank, "1f1b", dtype=torch.float64)
    assert [site.reason for site in report.sites] == ["f64 data is not quantized"]
    assert not report.sites[0].eligible

    bytes_each = ROWS // CHUNKS * WIDTH * 4
    report = check_schedule(rank, "1f1b", wanted=policy(min_bytes=bytes_each + 1))
    assert report.bytes_before == report.bytes_after == CHUNKS * bytes_each
    assert report.sites[0].reason == f"{bytes_each} bytes < min_bytes={bytes_each + 1}"
    assert report.sites[0].eligible

    sites = {"stages.1": None, "stages.[02]": "2b"}
    report = check_schedule(rank, "interleaved", wanted=policy("4b", "8b", sites=sites))
    found = {(s.direction, s.module): s.format or s.reason for s in report.sites}
    exact = "sites['stages.1'] says exact"
    expected = {
        ("forward", "stages.0"): "2b:g128:rise", ("forward", "stages.1"): exact,
        ("forward", "stages.2"): "2b:g128:rise", ("backward", "stages.1"): exact,
        ("backward", "stages.2"): "2b:g128:tread", ("backward", "stages.3"): "8b:g128:tread",
    }  # fmt: skip
    assert found == {k: v for k, v in expected.items() if int(k[1][-1]) % 2 == rank.index}


def check_several(rank: Rank) -> None:
    for name in ("gpipe", "1f1b", "interleaved"):
        stages = SCHEDULES[name][1]
        kind = (lambda i: Several(i)) if len(stages[0]) > 1 else (lambda i: Several(3 * i))
        report = check_schedule(rank, name, kind)
        reasons = {(s.direction, s.dtype): s.reason for s in report.sites if s.format is None}
        assert rank.index or reasons["forward", "i64"] == "i64 data is not quantized"
        assert rank.index or reasons["forward", "b8"] == "b8 data is not quantized"
        assert rank.index or reasons["forward", "f32"] == "empty tensor"


def check_traced(rank: Rank) -> None:
    """Stages that torch cut itself, and a subclass."""
    for wanted in (policy(), policy(None, None)):
        local = nn.Sequential(*parts_of(lambda i: Plain(), 2, torch.float32))
        traced = nn.Sequential(*parts_of(lambda i: Plain(), 2, torch.float32))
        example = torch.randn(ROWS // CHUNKS, WIDTH)
        pipe = pipeline(traced, (example,), split_spec={"1": SplitPoint.BEGINNING})
        made = pipe.build_stage(rank.index, CPU)
        stage = quantize_pipeline_stage(made, wanted)
        assert stage is made
        schedule = Schedule1F1B(stage, CHUNKS, loss_fn=loss_of)
        x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
        losses = run_step(rank, schedule, (rank.index,), 1, x, y)
        expected = reference(list(local), x, y, formats_of(wanted))
        assert all(map(torch.equal, losses, expected if losses else ()))
        for name, p in stage.submod.named_parameters():
            q = local.get_parameter(name)
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad), name
        assert stage.report().num_quantized == (1 if wanted.activations else 0)

    class Mine(PipelineStage):
        pass

    stage = quantize_pipeline_stage(Mine(Plain(), rank.index, 2, CPU), 4)
    assert isinstance(stage, Mine)
    assert type(stage).__name__ == "QuantizedMine"


def check_transform(rank: Rank) -> None:
    """The fake wire of transform, on one machine, is the wire: bit for bit."""
    model = nn.Sequential(*parts_of(lambda i: Plain(), 4, torch.float32))
    fake = rf.transform(model, rf.Wire(policy(), modules=["1"]))
    other = copy.deepcopy(model)
    marked = rf.transform(other, rf.Wire(4, modules=["1"]))
    stages = split_at_boundaries(marked, 2, torch.randn(ROWS // CHUNKS, WIDTH))
    stage = QuantizedPipelineStage(stages[rank.index], rank.index, 2, CPU, policy=policy())
    schedule = Schedule1F1B(stage, CHUNKS, loss_fn=loss_of)
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    losses = run_step(rank, schedule, (rank.index,), 1, x, y)
    expected = reference([fake], x, y, formats_of(policy()))
    assert all(map(torch.equal, losses, expected if losses else ()))
    assert len(list(stage.submod.parameters())) == 4
    for name, parameter in stage.submod.named_parameters():
        assert parameter is other.get_parameter(name)
        gradient, wanted = parameter.grad, model.get_parameter(name).grad
        assert gradient is not None
        assert wanted is not None
        assert torch.equal(gradient, wanted), name


def check_eval(rank: Rank) -> None:
    parts, local = (parts_of(lambda i: Plain(), 4, torch.float32) for _ in range(2))
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    for name in ("gpipe", "1f1b", "interleaved"):
        mine = SCHEDULES[name][1][rank.index]
        num = 2 * len(mine)
        expected = []
        for piece in x.chunk(CHUNKS):
            for s in range(num):
                piece = local[s](piece)
                piece = round_trip(piece, "4b") if s + 1 < num else piece
            expected.append(piece.detach())
        for loss in (None, loss_of):
            fresh = [QuantizedPipelineStage(parts[i], i, num, CPU, policy=policy()) for i in mine]
            schedule = make_schedule(name, fresh, loss)
            target = {"target": y} if loss and num - 1 in mine else {}
            if loss:  # after a step of training
                run_step(rank, schedule, mine, num - 1, x, y)
            call = schedule.eval if loss else schedule.step
            with torch.no_grad():
                out = call(*((x,) if 0 in mine else ()), **target)
            if num - 1 in mine:
                assert torch.equal(out, torch.cat(expected)), name
            report = merge_reports(stage.report() for stage in fresh)
            assert {site.direction for site in report.sites} <= {"forward"}
            assert report.num_quantized == sum(i + 1 < num for i in mine)


def check_payloads(rank: Rank) -> None:
    """What travels is what rf.quantize gives; stochastic rounding never repeats itself."""
    x, y = torch.randn(1, 8, WIDTH).expand(CHUNKS, 8, WIDTH).flatten(0, 1), torch.zeros(32, WIDTH)
    for fmt in ("4b", "4b:stoch"):
        [part] = parts_of(lambda i: Plain(), 1, torch.float32)
        stage = QuantizedPipelineStage(part, rank.index, 2, CPU, policy=policy(fmt, fmt))
        schedule = ScheduleGPipe(stage, CHUNKS, loss_fn=loss_of)
        payloads: list[Tensor] = []
        for _ in range(2):
            run_step(rank, schedule, (rank.index,), 1, x, y)
            payloads += [sent for sent in schedule.sent if sent.dtype == torch.uint8]
        assert len(payloads) == 2 * CHUNKS
        same = [torch.equal(payloads[0], other) for other in payloads[1:]]
        assert all(same) if fmt == "4b" else not any(same)
        if fmt == "4b" and rank.index == 0:
            assert torch.equal(payloads[0], rf.quantize(part(x[:8]).detach(), fmt))


@pytest.mark.parametrize(
    "check",
    [
        check_kinds,
        *([check_several] if MODERN else []),
        check_traced,
        check_transform,
        check_eval,
        check_payloads,
    ],
)
def test_tensors_dtypes_and_formats(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(2, check)


def check_four(rank: Rank) -> None:
    placement: tuple[tuple[int, ...], ...] = tuple((i,) for i in range(4))
    kind = (lambda i: Several(i)) if MODERN else lambda i: Plain()
    check_schedule(rank, "1f1b", kind, placement=placement)
    placement = ((0, 4), (1, 5), (2, 6), (3, 7))
    check_schedule(rank, "interleaved", placement=placement)
    refused = refusal(rank, "1f1b", "forward", seconds=2)
    if rank.index < 2:
        assert isinstance(refused, NonFiniteError)
        assert refused.ranks == (0,)
    else:  # nobody tells them more than that their neighbour is silent
        assert isinstance(refused, RuntimeError)


@pytest.mark.slow
def test_four_ranks(ranks: RunRanks) -> None:
    ranks(4, check_four)


# ---- values that are not finite, sizes that differ -----------------------------------------------


def refusal(rank: Rank, name: str, direction: str, seconds: float) -> Exception:
    """The error of a step in which NaN leaves the first stage, or Inf the last one."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    stages = SCHEDULES[name][1] if rank.world == 2 else tuple((i,) for i in range(rank.world))
    mine, num = stages[rank.index], sum(map(len, stages))
    parts = parts_of(lambda i: Plain(), num, torch.float32)
    wanted = policy("4b:raise", "8b:raise")
    made = [QuantizedPipelineStage(parts[i], i, num, CPU, group=group, policy=wanted) for i in mine]
    schedule = make_schedule(name, made)
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    run_step(rank, schedule, mine, num - 1, x, y)
    (x if direction == "forward" else y)[4, 7] = float("nan" if direction == "forward" else "inf")
    return any_error_of(lambda: run_step(rank, schedule, mine, num - 1, x, y))


def check_raise(rank: Rank) -> None:
    for name in ("gpipe", "1f1b", "interleaved"):
        for direction in ("forward", "backward"):
            start = time.monotonic()
            error = refusal(rank, name, direction, seconds=60)
            assert time.monotonic() - start < 30, (name, direction)
            assert isinstance(error, NonFiniteError), (name, direction, error)
            last = 3 if name == "interleaved" else 1
            sender = 0 if direction == "forward" else last
            assert error.ranks == (sender % 2,), (name, direction)
            assert error.site == f"stages.{sender}, {direction} send"


def check_propagate(rank: Rank) -> None:
    """The group of NaN arrives as NaN, and nothing else changes."""
    [part] = parts_of(lambda i: Plain(), 1, torch.float32)
    stage = QuantizedPipelineStage(part, rank.index, 2, CPU, policy=policy("4b:g16"))
    schedule = ScheduleGPipe(stage, CHUNKS, loss_fn=loss_of)
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    x[4, 7] = float("nan")
    losses = run_step(rank, schedule, (rank.index,), 1, x, y)
    assert [loss.isnan().item() for loss in losses] == ([False, True, False, False] * rank.index)


def check_sizes(rank: Rank) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    [part] = parts_of(lambda i: Plain(), 1, torch.float32)
    stage = QuantizedPipelineStage(part, rank.index, 2, CPU, group=group, policy=policy())
    schedule = ScheduleGPipe(stage, CHUNKS, loss_fn=loss_of)
    x, y = torch.randn(ROWS - 2, WIDTH), torch.randn(ROWS - 2, WIDTH)  # 3, 3, 2, 2 rows
    error = any_error_of(lambda: run_step(rank, schedule, (rank.index,), 1, x, y))
    assert isinstance(error, RuntimeError) or rank.index == 0
    if rank.index == 0 and MODERN:
        assert isinstance(error, ShapeError)
        assert re.match(
            r"output 0 \(torch.float32\) of pipeline stage 0 has shape \(2, 40\): .*\(3, 40\)",
            str(error),
        )


@pytest.mark.parametrize("check", [check_propagate, check_raise, check_sizes])
def test_nan_and_sizes_that_differ(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(2, check)


# ---- ranks that disagree, die or stall -----------------------------------------------------------


def wrong_calls(rank: Rank) -> list[Exception]:
    def stage(**options: Any) -> Any:
        return QuantizedPipelineStage(Plain(), rank.index, 2, CPU, **options)

    plain = PipelineStage(Plain(), rank.index, 2, CPU)
    twice = stage(policy=4)
    me = rank.index
    errors = [
        any_error_of(lambda: quantize_pipeline_stage(Plain(), 4)),
        any_error_of(lambda: quantize_pipeline_stage(twice, 4)),
        any_error_of(lambda: stage(policy=7)),
        any_error_of(lambda: stage(policy=4 + 4 * me)),
        any_error_of(lambda: stage(policy=policy(sites={"stages.0": None} if me else {}))),
        any_error_of(lambda: quantize_pipeline_stage(plain, 5 + me)),
    ]
    assert type(plain) is PipelineStage
    original = process_groups.source_digest
    process_groups.source_digest = lambda: f"{me:016x}"  # type: ignore[assignment]
    try:
        errors.append(any_error_of(lambda: stage(policy=4)))
    finally:
        process_groups.source_digest = original
    # Torches that keep an attribute elsewhere, or no longer call a method.
    other = PipelineStage(Plain(), rank.index, 2, CPU)
    del other.group_rank
    errors.append(any_error_of(lambda: quantize_pipeline_stage(other, 4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(_PipelineStageBase, "_retrieve_recv_grads")
        errors.append(any_error_of(lambda: stage(policy=4)))
    misspelt = policy(sites={"stages.1": 8, "stage.0": None})
    report = quantize_pipeline_stage(plain, misspelt).report()
    assert "no step has run yet" in str(report)
    assert "sites['stage.0'] applies to nothing here" in str(report)
    assert report.patterns == {"stages.1": True, "stage.0": False}
    return errors


def test_wrong_calls_and_ranks_that_disagree(ranks: RunRanks) -> None:
    expected: list[tuple[type[RFCompileError], str]] = [
        (HookError, r"Plain cannot be quantized: pass a PipelineStage, or what"),
        (HookError, r"QuantizedPipelineStage cannot be quantized: it is quantized already"),
        (FormatError, r"bits=7 is not supported"),
        (RankMismatchError, r"0: pipeline .* activations=4b.*1: pipeline of 2 stages all=8b"),
        (RankMismatchError, r"sites\['stages.0'\]=exact"),
        (RankMismatchError, r"all=5b.*all=6b"),
        (RankMismatchError, r"sources 0{16}\]; .* sources 0{15}1\]"),
        (HookError, r"in torch 2\..* it has no group_rank\. rfcompile was tried with torch 2\.11"),
        (HookError, r"torch's pipeline stage .* it has no _retrieve_recv_grads\."),
    ]
    for errors in ranks(2, wrong_calls):
        for error, (kind, pattern) in zip(errors, expected, strict=True):
            assert isinstance(error, kind)
            assert re.search(pattern, str(error)), (pattern, str(error))


class Leaves(Plain):
    """Ends its process, or waits for a file, in the third micro-batch of the second step."""

    end, calls, enough = "", 0, 0
    awaited: Path

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.enough and self.calls == self.enough:
            if self.end == "dies":
                os._exit(7)
            wait_for(self.awaited, 60)
        return super().forward(x)


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def failing(rank: Rank, folder: Path, end: str, name: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=2))
    part = Leaves()
    stage = QuantizedPipelineStage(part, rank.index, rank.world, CPU, group=group, policy=policy())
    schedule = make_schedule(name, [stage])
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    mine, last = (rank.index,), rank.world - 1
    run_step(rank, schedule, mine, last, x, y)
    if rank.index == 1:
        part.end, part.enough = end, part.calls + 3
        part.awaited = folder / "seen0"
    start = time.monotonic()
    error = any_error_of(lambda: run_step(rank, schedule, mine, last, x, y))
    seconds = time.monotonic() - start
    assert isinstance(error, RuntimeError)
    (folder / f"seen{rank.index}").write_text(f"{seconds}\n{error}")


def test_a_rank_that_stalls_is_an_error_within_the_timeout(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, failing, tmp_path, "stalls", "gpipe", timeout=90)
    assert 1.5 < float((tmp_path / "seen0").read_text().split("\n")[0]) < 20


def test_a_rank_that_dies_is_an_error_of_the_others(ranks: RunRanks, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank 1: died with exit code 7") as caught:
        ranks(3, failing, tmp_path, "dies", "1f1b", timeout=60)
    assert 1 in caught.value.failures  # type: ignore[attr-defined]
    deadline = time.monotonic() + 20
    for rank in (0, 2):
        while not (tmp_path / f"seen{rank}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert float((tmp_path / f"seen{rank}").read_text().split("\n")[0]) < 20
