"""DDP gradients on real ranks: what rf.all_reduce gives, on every rank, whatever DDP does.

The reference is the gradient that each rank's copy of the model computes alone: the quantized
parts must be bit for bit ``rf.all_reduce`` of them, the exact ones what DDP itself computes.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import rfcompile as rf
from rfcompile.codec import operators
from rfcompile.distributed import DDPHandle, quantize_ddp
from rfcompile.errors import (
    FormatError,
    HookError,
    NonFiniteError,
    RankMismatchError,
    RFCompileError,
    StateError,
    TransportError,
)
from rfcompile.wire import exchanges, process_groups
from rfcompile.wire.cost import sent_bytes
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

SMALL = 0.015
"""A bucket_cap_mb of a few linears of :class:`Net`."""


class Net(nn.Module):
    """Linears whose gradients fill several buckets; ``skip`` leaves one of them unused."""

    def __init__(self, width: int = 48, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.skip: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != self.skip:
                x = torch.tanh(layer(x.to(layer.weight.dtype)))
        result: Tensor = self.norm(x.to(self.norm.weight.dtype))
        return result


def policy(fmt: Any = "4b", **options: Any) -> rf.Policy:
    return rf.Policy(gradients=fmt, **({"min_bytes": 0} | options))


def batch(rank: Rank, step: int, width: int = 48) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(100 * step + rank.index))


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def backward(model: nn.Module, x: Tensor) -> None:
    loss: Tensor = model(x).float().square().mean()
    loss.backward()


def reduced(rank: Rank, handle: DDPHandle, local: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What the ranks' own gradients become, by the functions that graphs call."""
    result = {}
    for bucket in handle._buckets.values():
        for part in bucket.parts:
            pieces = []
            for span in part.spans:
                gradient = local[span.name]
                pieces.append(torch.zeros(span.size) if gradient is None else gradient.flatten())
            x = torch.cat([piece.to(bucket.dtype) for piece in pieces])
            if part.format:
                x = rf.all_reduce(x, part.format, op="avg")
            else:
                dist.all_reduce(x.mul_(1 / rank.world))
            for span, piece in zip(part.spans, part.pieces(x), strict=True):
                result[span.name] = piece
    return result


def check_steps(
    rank: Rank, module: nn.Module, handle: DDPHandle, ddp: DDP, what: object, width: int = 48
) -> None:
    """Three steps: DDP rebuilds its buckets after the first one."""
    for step in range(3):
        local = copy.deepcopy(module)
        local.zero_grad()
        ddp.zero_grad()
        x = batch(rank, step, width)
        backward(local, x)
        backward(ddp, x)
        for name, expected in reduced(rank, handle, gradients(local)).items():
            got = module.get_parameter(name).grad
            if got is None:
                assert not expected.any(), (what, name)
                continue
            assert torch.equal(got.flatten(), expected), f"{what}: {name}, step {step}"
            rank.assert_same(got, (what, name))


# ---- every way of DDP ----------------------------------------------------------------------------


def check_ways(rank: Rank) -> None:
    default: dict[str, Any] = {"bucket_cap_mb": SMALL}
    for what, changes in {
        "plain": {},
        "one bucket": {"bucket_cap_mb": 25},
        "views": {"gradient_as_bucket_view": True},
        "static": {"static_graph": True},
        "find unused": {"find_unused_parameters": True},
        "static views": {"static_graph": True, "gradient_as_bucket_view": True},
    }.items():
        module = Net()
        ddp = DDP(module, **default | changes)
        handle = quantize_ddp(ddp, policy())
        check_steps(rank, module, handle, ddp, what)
        assert (len(handle._buckets) > 1) == (what != "one bucket"), what
        assert handle.report().num_quantized == len(handle._buckets)


def check_dtypes(rank: Rank) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        module = Net().to(dtype)
        ddp = DDP(module, bucket_cap_mb=SMALL)
        check_steps(rank, module, quantize_ddp(ddp, policy("8b")), ddp, dtype)
    module = Net()  # two dtypes: DDP gives each its own buckets
    module.layers[1:4].bfloat16()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    handle = quantize_ddp(ddp, policy("8b"))
    check_steps(rank, module, handle, ddp, "mixed")
    assert {site.dtype for site in handle.report().sites} == {"f32", "bf16"}


def check_formats_by_name(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    sites = {"*.bias": None, "layers.3": "8b", "layers.1.weight": "2b:g64"}
    handle = quantize_ddp(ddp, policy("4b:h16", sites=sites))
    check_steps(rank, module, handle, ddp, "sites")
    formats = {
        name: part.format and part.format.bits
        for bucket in handle._buckets.values() for part in bucket.parts for name in part.names
    }  # fmt: skip
    expected = {n: None if n.endswith("bias") else 4 for n, _ in module.named_parameters()}
    assert formats == expected | {"layers.3.weight": 8, "layers.1.weight": 2}
    assert "6 of 12 parameters quantized" in handle.report().notes


def check_odd_parameters(rank: Rank) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
            self.table = nn.Embedding(10, 4, sparse=True)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.table(torch.arange(3) + 2 * rank.index)
            image = x.view(2, 3, 8, 8)
            return self.conv(image) * self.frozen + rows.sum() + self.empty.sum()

    module = Odd()
    ddp = DDP(module)
    handle = quantize_ddp(ddp, policy())
    for step in range(3):
        local = copy.deepcopy(module)
        local.zero_grad()
        ddp.zero_grad()
        x = torch.randn(2, 192)
        backward(local, x)
        backward(ddp, x)
        table, kernel = module.table.weight.grad, module.conv.weight.grad
        assert table is not None
        assert table.is_sparse
        own = local.table.weight.grad
        assert own is not None
        exact = own.to_dense() / rank.world
        dist.all_reduce(exact)
        torch.testing.assert_close(table.to_dense(), exact)
        assert kernel is not None
        rank.assert_same(kernel, step)
        assert module.empty.grad is None or module.empty.grad.shape == (0, 3)
    assert {site.reason for site in handle.report().skipped} == {
        "sparse gradients are not quantized"
    }


def check_nothing_but_empty(rank: Rank) -> None:
    module = nn.Module()
    module.empty = nn.Parameter(torch.zeros(0))
    module.forward = lambda x: module.empty.sum() + x.sum()  # type: ignore[method-assign]
    ddp = DDP(module)
    handle = quantize_ddp(ddp, 4)
    for _ in range(2):
        ddp(torch.ones(1)).backward()
    assert handle.report().sites == ()


def check_accumulation(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    handle = quantize_ddp(ddp, policy())
    local = copy.deepcopy(module)
    for step in range(3):
        local.zero_grad()
        ddp.zero_grad()
        for piece in range(3):
            x = batch(rank, 10 * step + piece)
            backward(local, x)
            with ddp.no_sync() if piece < 2 else contextlib.nullcontext():
                backward(ddp, x)
        for name, expected in reduced(rank, handle, gradients(local)).items():
            got = module.get_parameter(name).grad
            assert got is not None
            assert torch.equal(got.flatten(), expected)
    assert handle._num_sent == 1 + 2 * 3  # one bucket in the first step, then three


def check_unused(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL, find_unused_parameters=True)
    handle = quantize_ddp(ddp, policy())
    unused = module.layers[2].weight
    assert isinstance(unused, nn.Parameter)
    module.skip = 2 if rank.index == 0 else None  # on one rank
    check_steps(rank, module, handle, ddp, "unused here")
    assert unused.grad is not None
    module.skip = 2  # everywhere
    ddp.zero_grad()
    backward(ddp, batch(rank, 0))
    assert unused.grad is None


def check_everything_exact(rank: Rank) -> None:
    results = []
    for hook in (False, True):
        torch.manual_seed(0)
        module = Net()
        ddp = DDP(module, bucket_cap_mb=SMALL)
        if hook:
            handle = quantize_ddp(ddp, rf.Policy())
        for step in range(3):
            ddp.zero_grad()
            backward(ddp, batch(rank, step))
        results.append(gradients(module))
    for name, expected in results[0].items():
        got = results[1][name]
        assert got is not None
        assert expected is not None
        assert torch.equal(got, expected), name
    assert {s.reason for s in handle.report().sites} == {"the policy sends gradients exact"}


def check_a_late_start_and_the_way_back(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    backward(ddp, batch(rank, 0))  # exact, and the buckets are rebuilt
    backward(ddp, batch(rank, 1))
    handle = quantize_ddp(ddp, policy(), error_feedback=False)
    check_steps(rank, module, handle, ddp, "late")
    assert handle.report().num_quantized == 3
    handle.remove()
    check_steps(rank, module, handle, ddp, "removed")
    assert handle.report().num_quantized == 0


def check_the_thread(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    handle = quantize_ddp(ddp, policy())
    order: list[tuple[str, int]] = []
    original = DDPHandle._average

    def average(self: DDPHandle, site: str, *args: Any) -> Tensor:
        order.append((threading.current_thread().name, int(site[-1])))
        return original(self, site, *args)

    DDPHandle._average = average  # type: ignore[method-assign,assignment]
    try:
        backward(ddp, batch(rank, 0))
        backward(ddp, batch(rank, 1))
    finally:
        DDPHandle._average = original  # type: ignore[method-assign]
    assert order == [("rfcompile", index) for index in (0, 0, 1, 2)]

    count = threading.active_count()
    alive = weakref.ref(handle)
    del ddp, module, handle
    gc.collect()
    assert alive() is None  # and with it the thread ends
    deadline = time.monotonic() + 30
    while threading.active_count() >= count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() < count


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check_ways, marks=pytest.mark.slow),
        pytest.param(check_dtypes, marks=pytest.mark.slow),
        check_formats_by_name,
        check_odd_parameters,
        check_nothing_but_empty,
        check_accumulation,
        check_unused,
        check_everything_exact,
        check_a_late_start_and_the_way_back,
        check_the_thread,
    ],
)
def test_gradients_are_those_of_all_reduce(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(2, check)


class ComplexNet(nn.Module):
    """A complex parameter that does not lie in the order of its indices, a double one, a real."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(48, 24, dtype=torch.complex64).t())
        self.phase = nn.Parameter(torch.randn(48, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.randn(48))

    def forward(self, x: Tensor) -> Tensor:
        mixed = (x.to(torch.complex64) @ self.mixing) * self.phase.to(torch.complex64)
        return mixed.abs() * self.scale


def complex_gradients(rank: Rank, step: int, module: ComplexNet) -> dict[str, Tensor]:
    """Of this rank alone, flat real numbers in the order of the memory."""
    local = copy.deepcopy(module)
    local.zero_grad()
    backward(local, batch(rank, step, 24))
    found = {}
    for name, parameter in local.named_parameters():
        assert parameter.grad is not None
        dense = parameter.grad.t() if name == "mixing" else parameter.grad
        flat = torch.view_as_real(dense.contiguous()) if dense.is_complex() else dense
        found[name] = flat.reshape(-1).clone()
    return found


def check_complex(rank: Rank, fmt: Any, error_feedback: bool) -> None:
    module = ComplexNet()
    ddp = DDP(module, bucket_cap_mb=0.001)
    handle = quantize_ddp(ddp, policy(fmt), error_feedback=error_feedback)
    residuals: dict[str, Tensor] = {}
    for step in range(3):
        mine = complex_gradients(rank, step, module)
        ddp.zero_grad()
        backward(ddp, batch(rank, step, 24))
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            grad = parameter.grad.t() if name == "mixing" else parameter.grad
            got = torch.view_as_real(grad) if grad.is_complex() else grad
            rank.assert_same(got.contiguous(), (name, step))
            sent = mine[name]
            if fmt is None or sent.dtype == torch.float64:
                dist.all_reduce(sent.mul_(1 / rank.world))
            else:
                used = rf.QuantFormat.parse(fmt).for_kind("gradients")
                if error_feedback:
                    sent = sent + residuals.get(name, torch.zeros_like(sent))
                    residuals[name] = sent - round_trip(sent, used, rank.world)
                sent = rf.all_reduce(sent, used, op="avg")
            assert torch.equal(got.reshape(-1), sent), (name, step)
    sizes = {s.module: s.shape for s in handle.report().sites}
    assert sizes == {"mixing": (2 * 48 * 24,), "phase": (96,), "scale": (48,)}
    if error_feedback:
        state = handle.state_dict()
        assert state["mixing"].dtype == torch.complex64
        assert state["mixing"].shape == module.mixing.shape
        mean = residuals["mixing"] / rank.world
        dist.all_reduce(mean)
        flat = torch.view_as_real(state["mixing"].t().contiguous()).reshape(-1)
        assert torch.equal(flat, mean)
        handle.load_state_dict(state)
        assert torch.equal(handle.state_dict()["mixing"], state["mixing"])
        real = error_of(lambda: handle.load_state_dict({"mixing": state["mixing"].real}))
        assert isinstance(real, StateError)


@pytest.mark.parametrize(("fmt", "feedback"), [("4b", False), ("4b", True), (None, False)])
def test_complex_parameters_are_averaged_as_a_whole(
    ranks: RunRanks, fmt: Any, feedback: bool
) -> None:
    ranks(2, check_complex, fmt, feedback)


def opened() -> tuple[int, int, int]:
    """File descriptors, threads of the system and process groups of this process."""
    gc.collect()
    groups = len(dist.distributed_c10d._world.pg_map)
    fds, tasks = (len(list(Path("/proc/self", what).iterdir())) for what in ("fd", "task"))
    return fds, tasks, groups


def check_given_back(rank: Rank, how: str) -> None:
    def cycle() -> None:
        module = nn.Linear(48, 48)
        ddp = DDP(module)
        handle = quantize_ddp(ddp, policy("4b:raise" if how == "error" else "4b"))
        if how == "error":  # which knows the frames that it came through
            with pytest.raises(NonFiniteError):
                backward(ddp, batch(rank, 0) * torch.nan)
            return
        backward(ddp, batch(rank, 0))
        if how == "remove":
            handle.remove()
            handle.remove()
            backward(ddp, batch(rank, 1))
            assert module.weight.grad is not None
            rank.assert_same(module.weight.grad)
        elif rank.index:  # ranks need not collect it at one time
            del ddp, module
            gc.collect()

    def opened_once(is_enough: Callable[[tuple[int, int, int]], bool]) -> tuple[int, int, int]:
        deadline = time.monotonic() + 60
        while not is_enough(opened()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return opened()

    cycle()
    before = opened_once(lambda now: now[2] == 1)
    for _ in range(4):
        cycle()
    dist.barrier()
    after = opened_once(lambda now: all(x <= y for x, y in zip(now, before, strict=True)))
    assert all(x <= y for x, y in zip(after, before, strict=True)), (before, after)


@pytest.mark.skipif(sys.platform != "linux", reason="counts files and threads in /proc")
@pytest.mark.parametrize("how", ["remove", "collect", "error"])
def test_group_and_thread_are_given_back(ranks: RunRanks, how: str) -> None:
    ranks(2, check_given_back, how)


def check_all_have_connected(rank: Rank) -> None:
    """A rank that gave its half back at once would cut off one that still connects."""
    ddp = DDP(nn.Linear(48, 48))
    c10d: Any = dist.distributed_c10d
    make, connected = c10d._new_process_group_helper, 0.0

    def slowly(*args: Any, **kwargs: Any) -> Any:
        nonlocal connected
        time.sleep(0.2 * rank.index)
        made = make(*args, **kwargs)
        connected = time.monotonic()
        return made

    c10d._new_process_group_helper = slowly
    try:
        handle = quantize_ddp(ddp, policy())
    finally:
        c10d._new_process_group_helper = make
    returned = time.monotonic()  # one clock for all processes of a machine
    handle.remove()
    times: list[Any] = [None] * rank.world
    dist.all_gather_object(times, (connected, returned))
    assert max(connected for connected, _ in times) <= min(returned for _, returned in times)


def test_no_rank_goes_on_before_all_have_connected(ranks: RunRanks) -> None:
    ranks(3, check_all_have_connected)


def check_other_groups(rank: Rank) -> None:
    pair = dist.new_group([0, 1])
    for one in range(2):  # rank 0 knows a group more than rank 1
        dist.new_group([0, 2] if one else [0, 1, 2])
    if rank.index < 2:
        module = nn.Linear(48, 48)
        ddp = DDP(module, process_group=pair)
        quantize_ddp(ddp, policy())
        backward(ddp, batch(rank, 0))
        assert module.weight.grad is not None
        rank.assert_same(module.weight.grad, group=pair)


def test_ranks_may_know_different_groups(ranks: RunRanks) -> None:
    ranks(3, check_other_groups, timeout=60)


def check_subgroup(rank: Rank) -> None:
    """Two DDP groups of two ranks each: neither waits for the other."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = pairs[rank.index % 2]
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL, process_group=mine)
    quantize_ddp(ddp, policy())
    for step in range(2 + rank.index % 2):  # one pair takes more steps than the other
        ddp.zero_grad()
        backward(ddp, batch(rank, step))
        for parameter in module.parameters():
            assert parameter.grad is not None
            rank.assert_same(parameter.grad, group=mine)


def check_four(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    check_steps(rank, module, quantize_ddp(ddp, policy("3b")), ddp, "four")


def check_four_with_feedback(rank: Rank) -> None:
    check_formats_with_feedback(rank, ("3b",))


@pytest.mark.parametrize("check", [check_four, check_four_with_feedback, check_subgroup])
def test_four_ranks(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(4, check)


# ---- values that are not finite, rounding, bytes -------------------------------------------------


@contextlib.contextmanager
def gradient_of(parameter: Tensor, value: float) -> Iterator[None]:
    """One element of the parameter's gradient is ``value``."""

    def change(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[5] = value
        return gradient

    handle = parameter.register_hook(change)
    yield
    handle.remove()


def check_nonfinite(rank: Rank) -> None:
    for feedback in (False, True):
        for value in (float("nan"), float("inf")):
            module = Net()
            ddp = DDP(module, bucket_cap_mb=SMALL)
            handle = quantize_ddp(ddp, policy(), error_feedback=feedback)
            weight = module.layers[0].weight
            assert isinstance(weight, nn.Parameter)
            backward(ddp, batch(rank, 0))
            before = handle.state_dict()
            ddp.zero_grad()
            with gradient_of(weight, value) if rank.index == 1 else contextlib.nullcontext():
                backward(ddp, batch(rank, 1))
            bad = weight.grad
            assert bad is not None
            assert not bad.view(-1)[5].isfinite()
            rank.assert_same(bad)
            if feedback:  # it lives on, and the residuals of the bad gradient are as they were
                after = handle.state_dict()
                assert all(residual.isfinite().all() for residual in after.values())
                if rank.world == 1:
                    assert torch.equal(after["layers.0.weight"], before["layers.0.weight"])
            ddp.zero_grad()
            backward(ddp, batch(rank, 2))
            good = weight.grad
            assert good is not None
            assert good.isfinite().all()


def check_raise(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    quantize_ddp(ddp, policy("4b:raise"))
    backward(ddp, batch(rank, 0))
    backward(ddp, batch(rank, 1))
    weight = module.layers[4].weight  # in the first bucket, and the last one raises
    assert isinstance(weight, nn.Parameter)
    with gradient_of(weight, float("inf")) if rank.index == 1 else contextlib.nullcontext():
        error = error_of(lambda: backward(ddp, batch(rank, 2)))
    assert isinstance(error, NonFiniteError)
    assert error.ranks == (1,)
    assert re.search(r"DDP gradient bucket 0 \(norm\.\w+, .*\.\.\.\) on rank 1", str(error))


@contextlib.contextmanager
def recorded(module: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Arguments and results of the calls of ``module.name``."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(module, name, call)
    try:
        yield calls
    finally:
        setattr(module, name, original)


def check_stochastic(rank: Rank) -> None:
    payloads = {}
    for fmt in ("4b", "4b:stoch"):
        torch.manual_seed(0)
        module = Net()
        ddp = DDP(module, bucket_cap_mb=SMALL)
        quantize_ddp(ddp, policy(fmt))
        x = torch.randn(8, 48)  # the same on every rank and in every step
        with recorded(operators, "quantize") as calls:
            for _ in range(3):
                ddp.zero_grad()
                backward(ddp, x)
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            rank.assert_same(parameter.grad, name)
        payloads[fmt] = [payload for _, payload in calls]
    for fmt, (_, second, *_others) in payloads.items():
        mine, other = rank.gathered(second)
        assert torch.equal(mine, other) == (fmt == "4b")
        again = payloads[fmt][4]  # the same bucket in the third step
        assert torch.equal(second, again) == (fmt == "4b")


def check_bytes(rank: Rank, segments: int | None = None) -> None:
    for fmt in ("4b", "3b:raise", "8b:tensor"):
        module = Net(depth=3)
        ddp = DDP(module, bucket_cap_mb=SMALL)
        sites = {"*.bias": None}
        handle = quantize_ddp(ddp, policy(fmt, sites=sites, segments=segments))
        for step in range(2):
            backward(ddp, batch(rank, step))
        with (
            recorded(exchanges, "_all_to_all") as exchanged,
            recorded(exchanges, "start_gather") as gathered,
            recorded(dist, "all_reduce") as exact,
        ):
            backward(ddp, batch(rank, 2))
        sent = sum(sent_bytes("all_to_all", args[0].nbytes, rank.world) for args, _ in exchanged)
        sent += sum(sent_bytes("all_gather", args[0].nbytes, rank.world) for args, _ in gathered)
        sent += sum(sent_bytes("all_reduce", args[0].nbytes, rank.world) for args, _ in exact)
        report = handle.report()
        assert report.bytes_after == sent
        assert report.num_quantized < report.num_sites
        total = sum(p.numel() * 4 for p in module.parameters())
        assert report.bytes_before == sent_bytes("all_reduce", total, rank.world)
        [note] = report.notes
        assert note == "4 of 8 parameters quantized"  # the weights
        assert len(exchanged) > report.num_quantized or fmt == "8b:tensor"


def check_bytes_of_segments(rank: Rank) -> None:
    with several_segments():
        check_bytes(rank)
    check_bytes(rank, segments=3)


@pytest.mark.parametrize(
    "check", [check_nonfinite, check_raise, check_stochastic, check_bytes_of_segments]
)
def test_values_that_are_not_finite_rounding_and_bytes(
    ranks: RunRanks, check: Callable[[Rank], None]
) -> None:
    ranks(2, check)


# ---- error feedback ------------------------------------------------------------------------------


@contextlib.contextmanager
def several_segments() -> Iterator[None]:
    """Small all-reduces are cut into segments as large ones are."""
    usual, exchanges.SEGMENT_BYTES = exchanges.SEGMENT_BYTES, 2**8
    try:
        yield
    finally:
        exchanges.SEGMENT_BYTES = usual


class Reference:
    """Error feedback by its definition, beside a DDP model; every step must agree bit for bit."""

    def __init__(self, handle: DDPHandle, ddp: DDP, residuals: dict[str, Tensor]) -> None:
        self.handle, self.ddp = handle, ddp
        self.residuals = {name: residual.flatten() for name, residual in residuals.items()}

    def step(self, rank: Rank, x: Tensor) -> None:
        module = self.ddp.module
        local = copy.deepcopy(module)
        for model in (local, self.ddp):
            model.zero_grad()
            backward(model, x)
        for bucket in self.handle._buckets.values():
            for part in bucket.parts:
                used = {name: local.get_parameter(name).grad is not None for name in part.names}
                pieces = []
                for name, size in zip(part.names, (span.size for span in part.spans), strict=True):
                    gradient = local.get_parameter(name).grad
                    piece = torch.zeros(size) if gradient is None else gradient.flatten().float()
                    residual = self.residuals.get(name)
                    pieces.append(
                        piece + residual if used[name] and residual is not None else piece
                    )
                sent = torch.cat(pieces)
                left: list[Any] = [None] * len(part.names)
                if part.format:
                    mean = rf.all_reduce(sent, part.format, op="avg")
                    left = part.pieces(sent - round_trip(sent, part.format, rank.world))
                else:
                    mean = sent.to(bucket.dtype) * (1 / rank.world)
                    dist.all_reduce(mean)
                for name, got, new in zip(part.names, part.pieces(mean), left, strict=True):
                    gradient = module.get_parameter(name).grad
                    assert gradient is None or torch.equal(gradient.flatten(), got.to(bucket.dtype))
                    if used[name] and new is not None:
                        self.residuals[name] = new
                    elif used[name]:
                        self.residuals.pop(name, None)

    def check(self, rank: Rank, what: object) -> dict[str, Tensor]:
        """The state_dict is the mean residual; it is returned."""
        state = self.handle.state_dict()
        assert set(state) >= set(self.residuals), what
        for name, residual in state.items():  # some rank has one
            mean = self.residuals.get(name, torch.zeros(residual.numel())) / rank.world
            dist.all_reduce(mean)
            assert torch.equal(state[name].flatten(), mean), (what, name)
            assert state[name].shape == self.ddp.module.get_parameter(name).shape
            rank.assert_same(state[name], (what, name))
        return state


def round_trip(x: Tensor, fmt: rf.QuantFormat, world: int) -> Tensor:
    unit = world * fmt.group_elements(8)
    padded = nn.functional.pad(x, (0, -len(x) % unit)).view(world, -1)
    return operators.dequantize(operators.quantize(padded, fmt.spec), fmt.spec, x.dtype).view(-1)[
        : len(x)
    ]


def check_formats_with_feedback(rank: Rank, formats: tuple[str, ...]) -> None:
    for fmt in formats:
        module = Net(depth=3)
        ddp = DDP(module, bucket_cap_mb=SMALL)
        sites = {"layers.0.bias": None}
        handle = quantize_ddp(ddp, policy(fmt, sites=sites), error_feedback=True)
        reference = Reference(handle, ddp, {})
        for step in range(4):  # the buckets change after the first one
            reference.step(rank, batch(rank, step))
        state = reference.check(rank, fmt)
        assert "layers.0.bias" not in state
        assert all(residual.any() for residual in state.values())
        handle.remove()  # what is left over goes with the next exact gradients
        reference.step(rank, batch(rank, 9))
        assert reference.check(rank, (fmt, "removed")) == {}


def check_the_debt_is_paid(rank: Rank) -> None:
    """The gradients sent and the residuals are together all gradients, also when rounded randomly.

    The ranks have one gradient g, the same in each step: after T steps the applied ones add up to
    T g but for the last residual and the rounding of each mean.
    """
    fmt = rf.QuantFormat(4, rounding="stochastic")
    module = nn.Linear(64, 64, bias=False)
    ddp = DDP(module)
    handle = quantize_ddp(ddp, policy(fmt), error_feedback=True)
    x, applied, steps = torch.randn(8, 64), torch.zeros(64, 64), 8
    roundings = torch.zeros(64, 64)
    for _ in range(steps):
        ddp.zero_grad()
        with recorded(operators, "requantize") as coded:
            backward(ddp, x)
        assert module.weight.grad is not None
        applied += module.weight.grad
        [((received, *_), total)] = coded
        spec = fmt.for_kind("gradients").spec
        shard = operators.dequantize_sum(received, spec, torch.float32, True)
        rounding = shard - operators.dequantize(total, spec, torch.float32).view(-1)
        both = torch.zeros(2, 2048)
        both[rank.index] = rounding
        dist.all_reduce(both)
        roundings += both.view(64, 64)
    local = copy.deepcopy(module)
    local.zero_grad()
    backward(local, x)
    assert local.weight.grad is not None
    exact = steps * local.weight.grad
    residual = handle.state_dict()["weight"]
    assert residual.any()
    tolerance = 2.0**-24 * 16 * exact.abs().max().item()  # float32 sums
    torch.testing.assert_close(applied + roundings + residual, exact, rtol=0, atol=tolerance)


def check_low_precision(rank: Rank) -> None:
    """With bfloat16 gradients the residual is float32 and misses only the cast of the result."""
    module = Net(depth=2).bfloat16()
    ddp = DDP(module)
    handle = quantize_ddp(ddp, policy(), error_feedback=True)
    for step in range(2):
        backward(ddp, batch(rank, step))
    for name, residual in handle.state_dict().items():
        assert residual.dtype == torch.float32
        rank.assert_same(residual, name)
        rank.assert_same(module.get_parameter(name).grad)


def check_unused_residual(rank: Rank) -> None:
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL, find_unused_parameters=True)
    handle = quantize_ddp(ddp, policy("3b"), error_feedback=True)
    reference = Reference(handle, ddp, {})
    for step in range(2):
        reference.step(rank, batch(rank, step))
    before = handle.state_dict()["layers.2.weight"]
    assert before.any()
    module.skip = 2  # on every rank: DDP throws away what is reduced for it
    reference.step(rank, batch(rank, 2))
    assert torch.equal(handle.state_dict()["layers.2.weight"], before)
    module.skip = None if rank.index else 2  # on one rank
    reference.step(rank, batch(rank, 3))
    reference.check(rank, "unused for a step")
    handle.remove()
    reference.step(rank, batch(rank, 4))  # still unused on rank 0, which keeps its residual
    assert list(reference.check(rank, "released on one rank")) == [
        "layers.2.bias",
        "layers.2.weight",
    ]
    module.skip = None
    reference.step(rank, batch(rank, 5))
    assert reference.check(rank, "released") == {}


def check_loading(rank: Rank) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 5))
    module[0].to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (4, 3, 5, 5)
    ddp = DDP(module)
    handle = quantize_ddp(ddp, policy(), error_feedback=True)
    for _ in range(2):
        backward(ddp, torch.randn(shape))
    state = handle.state_dict()
    assert state["0.weight"].shape == (4, 3, 3, 3)
    assert state["0.weight"].is_contiguous()
    handle.load_state_dict(state)
    again = handle.state_dict()
    assert list(again) == sorted(n for n, _ in module.named_parameters())
    for name, residual in again.items():  # the mean of equal tensors is the tensor
        assert torch.equal(residual, state[name])

    lost = error_of(lambda: handle.load_state_dict({"1.weight": torch.ones(3), **state}))
    assert isinstance(lost, StateError)
    assert lost.names == ("1.weight",)
    assert "residuals of parameters that the model lacks: '1.weight'. Load it" in str(lost)
    wrong = error_of(lambda: handle.load_state_dict({"0.bias": torch.ones(5)}))
    assert isinstance(wrong, StateError)
    assert "of another shape than the parameters: '0.bias'." in str(wrong)
    nan = {"0.bias": torch.full_like(state["0.bias"], torch.nan)}
    never = error_of(lambda: handle.load_state_dict(nan))
    assert isinstance(never, StateError)
    assert "that are NaN or Inf and would never go away: '0.bias'." in str(never)
    here = error_of(lambda: handle.load_state_dict(nan if rank.index else state))
    assert isinstance(here, StateError)  # on all ranks
    assert str(here).startswith("rank 1: ")
    off = quantize_ddp(DDP(Net()), 4)
    assert off.state_dict() == {}
    off.load_state_dict({})
    error = error_of(lambda: off.load_state_dict(state))
    assert isinstance(error, StateError)
    assert re.search(r"error feedback is off: '0.bias', .* Pass error_feedback=True", str(error))


def check_feedback(rank: Rank) -> None:
    check_formats_with_feedback(rank, ("2b", "4b:h16", "8b:tensor"))
    with several_segments():
        check_formats_with_feedback(rank, ("4b:g16",))


@pytest.mark.parametrize(
    "check",
    [
        check_feedback,
        check_the_debt_is_paid,
        check_low_precision,
        check_unused_residual,
        check_loading,
    ],
)
def test_error_feedback_loses_nothing(ranks: RunRanks, check: Callable[[Rank], None]) -> None:
    ranks(2, check)


def save(rank: Rank, folder: Path) -> None:
    torch.manual_seed(1)
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL)
    handle = quantize_ddp(ddp, policy("3b"), error_feedback=True)
    for step in range(3):
        backward(ddp, batch(rank, step))
    state = handle.state_dict()  # on every rank
    if rank.index == 0:
        torch.save({"model": module.state_dict(), "feedback": state}, folder / "checkpoint.pt")


def resume(rank: Rank, folder: Path, cap: float) -> None:
    checkpoint = torch.load(folder / "checkpoint.pt")
    module = Net()
    module.load_state_dict(checkpoint["model"])
    ddp = DDP(module, bucket_cap_mb=cap)
    handle = quantize_ddp(ddp, policy("3b"), error_feedback=True)
    handle.load_state_dict(checkpoint["feedback"])
    loaded = handle.state_dict()
    assert set(loaded) == {name for name, _ in module.named_parameters()}
    reference = Reference(handle, ddp, checkpoint["feedback"])
    for name, residual in checkpoint["feedback"].items():
        torch.testing.assert_close(loaded[name], residual, rtol=2.0**-22, atol=0)
    for step in range(3):
        reference.step(rank, batch(rank, 20 + step))
    left = reference.check(rank, (rank.world, cap))
    assert bool(left) == (rank.world > 1)  # one rank sends nothing: the first step takes them all


@pytest.mark.parametrize(("world", "cap"), [(1, SMALL), (2, 25), (4, 0.01)])
def test_a_checkpoint_goes_on_with_other_ranks_and_buckets(
    ranks: RunRanks, tmp_path: Path, world: int, cap: float
) -> None:
    ranks(2, save, tmp_path)
    ranks(world, resume, tmp_path, cap)


# ---- training ------------------------------------------------------------------------------------


def train(rank: Rank, bits: int | None, feedback: bool) -> float:
    torch.manual_seed(0)
    teacher, module = (
        nn.Linear(48, 8),
        nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 8)),
    )
    ddp = DDP(module, bucket_cap_mb=0.004)
    quantize_ddp(ddp, policy(bits), error_feedback=feedback)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(80):
        x = batch(rank, step)
        optimizer.zero_grad()
        loss = (ddp(x) - torch.tanh(teacher(x)).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    for parameter in module.parameters():
        rank.assert_same(parameter)
    mean = torch.stack(losses[-20:]).mean()
    dist.all_reduce(mean)
    return mean.item() / rank.world


def trained(rank: Rank) -> dict[str, float]:
    return {
        "exact": train(rank, None, False),
        "8 bits": train(rank, 8, False),
        "4 bits": train(rank, 4, False),
        "feedback": train(rank, 4, True),
    }


@pytest.fixture(scope="module")
def losses(ranks: RunRanks) -> dict[str, float]:
    return ranks(2, trained)[0]


@pytest.mark.parametrize(
    ("how", "limit"), [("8 bits", 0.005), ("4 bits", 0.02), ("feedback", 0.02)]
)
def test_training_gives_the_loss_of_exact_gradients(
    losses: dict[str, float], how: str, limit: float
) -> None:
    assert abs(losses[how] / losses["exact"] - 1) < limit


# ---- what cannot work ----------------------------------------------------------------------------


def wrong_modules(rank: Rank) -> list[RFCompileError]:
    twice = DDP(Net())
    quantize_ddp(twice, 4)
    ran = DDP(Net())
    ran.register_comm_hook(None, allreduce_hook)
    backward(ran, batch(rank, 0))
    built_in = DDP(Net())
    built_in._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    python = DDP(Net())
    python._use_python_reducer = True
    return [
        error_of(lambda: quantize_ddp(Net(), 4)),
        error_of(lambda: quantize_ddp(torch.compile(DDP(Net())), 4)),
        *(error_of(lambda d=d: quantize_ddp(d, 4)) for d in (twice, ran, built_in, python)),
        error_of(lambda: quantize_ddp(DDP(Net()), 7)),
    ]


def test_modules_that_cannot_take_the_hook(ranks: RunRanks) -> None:
    once = r"DistributedDataParallel .* the communication hook '{}', .* Wrap the module in a new"
    patterns = [
        r"Net cannot be quantized: pass the torch\.nn\.parallel\.DistributedDataParallel itself",
        r"OptimizedModule cannot be quantized: pass .* before torch\.compile",
        once.format("quantized_hook"),
        once.format("allreduce_hook"),
        once.format(r"BuiltinCommHookType\.FP16_COMPRESS"),
        r"with optimize_ddp='python_reducer' .* backend='rfquant' instead",
        r"bits=7 is not supported",
    ]
    for errors in ranks(2, wrong_modules):
        for error, pattern in zip(errors, patterns, strict=True):
            assert isinstance(error, FormatError if "bits" in pattern else HookError)
            assert re.search(pattern, str(error)), (pattern, str(error))
        assert errors[0].module == "Net"


def disagree(rank: Rank) -> list[RFCompileError]:
    me = rank.index
    ddp = DDP(Net())
    errors = [
        error_of(lambda: quantize_ddp(ddp, 4 + 4 * me)),
        error_of(lambda: quantize_ddp(ddp, policy(sites={"*.bias": None} if me else {}))),
        error_of(lambda: quantize_ddp(ddp, 4, error_feedback=bool(me))),
    ]
    original = process_groups.source_digest
    process_groups.source_digest = lambda: f"{me:016x}"  # type: ignore[assignment]
    try:
        errors.append(error_of(lambda: quantize_ddp(ddp, 4)))
    finally:
        process_groups.source_digest = original
    quantize_ddp(ddp, 4)  # nothing was registered
    quantize_ddp(DDP(Net()), 5)
    # Each rank has agreed to both before, and still they are compared.
    errors.append(error_of(lambda: quantize_ddp(DDP(Net()), 4 + me)))
    backward(ddp, batch(rank, 0))
    return errors


def test_ranks_that_disagree_are_told_before_training(ranks: RunRanks) -> None:
    for errors in ranks(2, disagree):
        assert all(isinstance(error, RankMismatchError) for error in errors)
        bits, sites, feedback, sources, late = errors
        assert re.search(r"0: DDP gradients .* gradients=4b.*1: DDP gradients all=8b", str(bits))
        assert re.search(r"min_bytes=0 error.*sites\['\*\.bias'\]=exact error", str(sites))
        assert re.search(r"error_feedback=False .* error_feedback=True ", str(feedback))
        assert re.search(r"sources 0{16}\]; .* sources 0{15}1\]", str(sources))
        assert re.search(r" gradients=4b.* all=5b", str(late))


# ---- ranks that die or stall ---------------------------------------------------------------------


def failing(rank: Rank, folder: Path, end: str) -> None:
    """Rank 1 leaves in the middle of the fourth step; the others write down what they see."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    torch.manual_seed(1)
    module = Net()
    ddp = DDP(module, bucket_cap_mb=SMALL, process_group=group)
    handle = quantize_ddp(ddp, policy("3b"), error_feedback=True)
    for step in range(3):
        backward(ddp, batch(rank, step))
    state = handle.state_dict()
    if rank.index == 0:
        torch.save({"model": module.state_dict(), "feedback": state}, folder / "checkpoint.pt")
    if rank.index == 1:

        def leave(gradient: Tensor) -> None:
            if end == "dies":
                os._exit(7)
            wait_for(folder / "seen0", 60)
            raise InterruptedError

        module.layers[2].weight.register_hook(leave)  # after the first bucket
        with contextlib.suppress(InterruptedError):
            backward(ddp, batch(rank, 3))
        return
    start = time.monotonic()
    error = error_of(lambda: backward(ddp, batch(rank, 3)))
    seconds = time.monotonic() - start
    assert isinstance(error, TransportError)
    assert error.__cause__ is not None
    (folder / f"seen{rank.index}").write_text(f"{seconds}\n{error}")
    if end == "stalls":  # and the worker stays shut
        first = str(error)
        assert (
            str(
                error_of(lambda: handle._worker.submit("x", torch.device("cpu"), gc.collect).wait())
            )
            == first
        )


def wait_for(path: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def seen(folder: Path, rank: int) -> tuple[float, str]:
    seconds, _, text = (folder / f"seen{rank}").read_text().partition("\n")
    return float(seconds), text


def test_a_rank_that_dies_is_an_error_of_the_others_and_the_checkpoint_loads(
    ranks: RunRanks, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match="rank 1: died with exit code 7") as caught:
        ranks(3, failing, tmp_path, "dies", timeout=90, grace=30)
    assert set(caught.value.failures) == {1}  # type: ignore[attr-defined]
    for rank in (0, 2):
        seconds, text = seen(tmp_path, rank)
        assert seconds < 30
        assert re.match(
            r"DDP gradient bucket [012] failed in process group '\w+': \w+Error: ", text
        )
        assert "start again from a checkpoint with new process groups." in text
    ranks(2, resume, tmp_path, SMALL)


def test_a_rank_that_stalls_is_an_error_within_the_groups_timeout(
    ranks: RunRanks, tmp_path: Path
) -> None:
    ranks(2, failing, tmp_path, "stalls", timeout=90)
    seconds, text = seen(tmp_path, 0)
    assert 1.5 < seconds < 30  # 2 s, not the 120 s of the default group
    assert re.match(r"DDP gradient bucket [012] failed .*: RuntimeError: .*[Tt]imed out", text)


# ---- going on from a checkpoint ------------------------------------------------------------------


def warmed(seed: int) -> tuple[nn.Module, DDP]:
    """The recipe of docs/guide/ddp.md: one pass before the hook, which settles DDP's buckets."""
    torch.manual_seed(seed)
    module = nn.Sequential(*[nn.Linear(40, 40) for _ in range(3)])
    ddp = DDP(module)
    ddp(torch.zeros(2, 40)).sum().backward()
    module.zero_grad()
    quantize_ddp(ddp, policy(4))
    return module, ddp


def check_resume(rank: Rank) -> None:
    def train(module: nn.Module, ddp: DDP, steps: range) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for step in steps:
            seed = torch.Generator().manual_seed(2 * step + rank.index)
            optimizer.zero_grad()
            ddp(torch.randn(8, 40, generator=seed)).square().mean().backward()
            optimizer.step()

    module, ddp = warmed(0)
    train(module, ddp, range(3))
    saved = {key: value.clone() for key, value in module.state_dict().items()}
    train(module, ddp, range(3, 6))
    other, resumed = warmed(1)
    other.load_state_dict(saved)
    train(other, resumed, range(3, 6))
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resumed_training_is_bit_for_bit(ranks: RunRanks) -> None:
    ranks(2, check_resume)
