"""isend, irecv and batch_isend_irecv in compiled graphs carry payloads, in both directions.

Inductor compiles what depends on it: the order of transfers, memory that is used again or that
comes from outside, sizes that change. Other graphs run as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import rfcompile as rf
from rfcompile.errors import CaptureError, UnquantizedSiteError
from rfcompile.passes.quantize_transfers import QuantizeTransfers
from rfcompile.wire.process_groups import simulated
from tests.inductor.test_backend import graphs_run_as_they_are

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "enable_p2p_compilation"),
    reason="this torch does not capture isend and irecv",
)


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.config.enable_p2p_compilation = True  # type: ignore[attr-defined]
    rf.reports(clear=True)
    options.setdefault("min_bytes", 0)
    result: Callable[..., Any] = torch.compile(
        f, backend="rfquant", options=options, fullgraph=True, dynamic=options.pop("dynamic", False)
    )
    return result


def round_trip(x: Tensor, fmt: str) -> Tensor:
    return rf.dequantize(rf.quantize(x, fmt), fmt, x.shape, x.dtype)


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def shift(x: Tensor, by: int) -> Tensor:
    """What rank - by sent."""
    me, world = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(x)
    batch = [
        dist.P2POp(dist.isend, x, (me + by) % world),
        dist.P2POp(dist.irecv, received, (me - by) % world),
    ]
    for request in dist.batch_isend_irecv(batch):
        request.wait()
    return received


def _wait(request: dist.Work | None) -> None:
    assert request is not None
    request.wait()


class Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return shift(x, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return shift(grad.contiguous(), -1)


# ---- on the ranks ------------------------------------------------------------------------------


def ring(rank: Rank) -> rf.Report:
    """Activations and gradients of a ring, in formats of their own, are the codec's."""
    shape = (7, 33)

    def scaled(x: Tensor, w: Tensor) -> Tensor:
        shifted: Tensor = Shift.apply(2 * x)  # type: ignore[no-untyped-call]
        return shifted * w

    f = compiled(scaled, activations="4b", gradients="8b")
    x = values(rank.index, *shape).requires_grad_()
    w = values(10 + rank.index, *shape)
    with graphs_run_as_they_are():
        y = f(x, w)
        y.backward(torch.ones_like(y))
    before, after = (rank.index - 1) % rank.world, (rank.index + 1) % rank.world
    fmt = {"4b": "4b:g128:rise", "8b": "8b:g128:tread"}
    assert torch.equal(y, round_trip(2 * values(before, *shape), fmt["4b"]) * w)
    assert x.grad is not None
    assert torch.equal(x.grad, round_trip(values(10 + after, *shape), fmt["8b"]) * 2)
    return rf.merge_reports(rf.reports())


def pair(rank: Rank, dtype: torch.dtype, into_an_input: bool) -> list[rf.Report]:
    """One way, into a buffer of the graph's own or one that comes from outside; twice."""

    def send(x: Tensor) -> Tensor:
        request = dist.isend(x, 1)
        y = x * 3
        _wait(request)
        return y

    def receive(buffer: Tensor) -> Tensor:
        mine = buffer if into_an_input else torch.empty_like(buffer)
        _wait(dist.irecv(mine, 0))
        return mine * 2

    f = compiled(send if rank.index == 0 else receive, bits=4)
    for seed in (0, 1):
        x = values(seed, 5, 129, dtype=dtype)
        with contextlib.nullcontext() if into_an_input else graphs_run_as_they_are():
            if rank.index == 0:
                assert torch.equal(f(x), x * 3)
            else:
                expected = round_trip(x, "4b:g128:rise")
                buffer = torch.zeros_like(x)
                assert torch.equal(f(buffer), expected * 2)
                assert torch.equal(buffer, expected if into_an_input else torch.zeros_like(x))
    return rf.reports()


def one_after_another(rank: Rank) -> None:
    """Both ways without a batch, in any order: what runs does so in the order of the program.

    Payloads of equal sizes invite Inductor to use their memory again, and to move waits.
    """
    other = 1 - rank.index

    def f(x: Tensor) -> tuple[Tensor, ...]:
        first, second = torch.empty_like(x), torch.empty_like(x)
        numbers = torch.empty(3, dtype=torch.int64)  # torch folds what it fills by itself
        receive, send = dist.irecv(first, other), dist.isend(x, other)
        _wait(receive)
        again = dist.isend(x + first, other)  # reads what the first payload was made of, too
        _wait(dist.irecv(second, other))
        _wait(send)
        _wait(again)
        if rank.index == 0:
            _wait(dist.isend(torch.arange(3), other))
            _wait(dist.irecv(numbers, other))
        else:
            _wait(dist.irecv(numbers, other))
            _wait(dist.isend(numbers + 1, other))
        return first, second, numbers

    x, theirs = values(rank.index, 300), values(other, 300)
    g = compiled(f, bits=4)
    coded = partial(round_trip, fmt="4b:g128:rise")
    for _ in range(2):
        first, second, numbers = g(x)
        assert torch.equal(first, coded(theirs))
        assert torch.equal(second, coded(theirs + coded(x)))
        assert torch.equal(numbers, torch.arange(3) + (rank.index == 0))
    # What torch remembers until it is waited for is never freed.
    assert torch._C._distributed_c10d._get_work_registry_size() == 0


def in_a_group(rank: Rank, is_batch: bool) -> None:
    """Ranks are those of the default group, also where the group numbers its ranks otherwise."""
    group = dist.new_group([0, 2, 3])
    if rank.index in (0, 1):
        return
    other = 5 - rank.index

    def f(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if is_batch:
            batch = [
                dist.P2POp(dist.isend, x, other, group),
                dist.P2POp(dist.irecv, y, other, group),
            ]
            requests: list[Any] = dist.batch_isend_irecv(batch)
        else:
            requests = [dist.isend(x, other, group), dist.irecv(y, other, group)]
        for request in requests:
            request.wait()
        return y * 2

    with graphs_run_as_they_are():
        y = compiled(f, bits=4)(values(rank.index, 5, 129))
    assert torch.equal(y, round_trip(values(other, 5, 129), "4b:g128:rise") * 2)


def reasons(rank: Rank) -> list[str]:
    def f(small: Tensor, numbers: Tensor, large: Tensor) -> tuple[Tensor, ...]:
        return shift(small, 1), shift(numbers, 1), shift(large, 1)

    before = (rank.index - 1) % rank.world
    x = values(rank.index, 64, 64)
    x[3, 5] = math.nan
    g = compiled(f, bits=4, min_bytes=1000)
    with graphs_run_as_they_are():
        small, numbers, large = g(x[0, :4], torch.arange(600) + rank.index, x)
    expected = values(before, 64, 64)
    assert torch.equal(small, expected[0, :4])
    assert torch.equal(numbers, torch.arange(600) + before)
    expected[3, 5] = math.nan
    assert torch.equal(large, round_trip(expected, "4b:g128:rise")) is False  # NaN is not equal
    assert torch.equal(large.isnan(), round_trip(expected, "4b:g128:rise").isnan())
    assert large.isnan().any()
    (report,) = rf.reports()
    careful = compiled(lambda x: shift(x, 1), bits=4, nonfinite="raise")
    with graphs_run_as_they_are():
        assert torch.equal(careful(values(rank.index, 8)), values(before, 8))
    with pytest.raises(UnquantizedSiteError, match=r"nonfinite='raise' needs every rank"):
        compiled(lambda x: shift(x, 1), bits=4, nonfinite="raise", strict=True)(x)
    return [site.reason for site in report.sites]


def any_size(rank: Rank) -> int:
    f = compiled(lambda x: shift(x, 1), bits=4, dynamic=True)
    before = (rank.index - 1) % rank.world
    for n in (100, 57, 300):
        got = f(values(rank.index, n, 3))
        assert torch.equal(got, round_trip(values(before, n, 3), "4b:g128:rise"))
    return len(rf.reports())


def another_policy(rank: Rank) -> None:
    """Payloads of another size than expected never become numbers."""
    group = dist.new_group(timeout=timedelta(seconds=1))

    def f(x: Tensor) -> Tensor:
        if rank.index == 0:
            _wait(dist.isend(x, 1, group))
            return x
        received = torch.empty_like(x)
        _wait(dist.irecv(received, 0, group))
        return received

    # Of gloo: timed out, or the other rank has gone.
    with graphs_run_as_they_are(), pytest.raises(RuntimeError):
        compiled(f, bits=4 if rank.index == 0 else 8)(values(0, 64, 64))


# ---- tests -------------------------------------------------------------------------------------


def test_a_ring_in_both_directions(ranks: RunRanks) -> None:
    for report in ranks(2, ring):
        assert report.num_quantized == report.num_sites == 4
        names = [(site.direction, site.collective, site.kind) for site in report.sites]
        assert names == [
            ("forward", "send", "activations"),
            ("forward", "recv", "activations"),
            ("backward", "send", "gradients"),
            ("backward", "recv", "gradients"),
        ]
        sent = [(site.bytes_before, site.bytes_after) for site in report.sites]
        four, eight = (rf.QuantFormat(bits).payload_bytes(7 * 33) for bits in (4, 8))
        assert sent == [(7 * 33 * 4, four), (0, 0), (7 * 33 * 4, eight), (0, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "into_an_input"), [(torch.bfloat16, False), (torch.float32, True)]
)
def test_one_way(ranks: RunRanks, dtype: torch.dtype, into_an_input: bool) -> None:
    (sender,), (receiver,) = ranks(2, pair, dtype, into_an_input)
    assert [site.collective for site in sender.sites] == ["send"]
    assert [site.collective for site in receiver.sites] == ["recv"]
    assert sender.bytes_after == rf.QuantFormat(4).payload_bytes(5 * 129)
    assert sender.bytes_before == 5 * 129 * dtype.itemsize
    assert receiver.bytes_before == 0


@pytest.mark.slow
def test_transfers_keep_their_order_and_their_memory(ranks: RunRanks) -> None:
    ranks(2, one_after_another)


@pytest.mark.parametrize("is_batch", [False, True])
def test_in_a_group_of_some_ranks(ranks: RunRanks, is_batch: bool) -> None:
    ranks(4, in_a_group, is_batch)


def test_what_stays_exact_says_why_on_both_ends(ranks: RunRanks) -> None:
    for found in ranks(2, reasons):
        small, numbers = "16 bytes < min_bytes=1000", "i64 data is not quantized"
        assert found == [small, small, numbers, numbers, "", ""]


@pytest.mark.slow
def test_one_graph_serves_every_size(ranks: RunRanks) -> None:
    assert ranks(2, any_size) == [1, 1]


@pytest.mark.parametrize("name", ["isend", "irecv"])
def test_one_that_nobody_waits_for_is_an_error(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        start: Callable[..., Tensor] = getattr(torch.ops._c10d_functional, name)
        return start(x, 0, 0, "0")

    with simulated(2):
        gm = make_fx(f, tracing_mode="fake")(torch.zeros(8, 8))
        with pytest.raises(CaptureError, match=rf"the {name} at .* is not waited for where it is"):
            QuantizeTransfers(rf.Policy.of(bits=4, min_bytes=0))(gm)


def transfer(x: Tensor, name: str) -> Tensor:
    start: Callable[..., Tensor] = getattr(torch.ops._c10d_functional, name)
    done: Tensor = torch.ops._c10d_functional.wait_tensor(start(x, 0, 0, "0"))
    return done


def sites_of(f: Callable[[Tensor], Tensor], x: Tensor, policy: rf.Policy) -> list[tuple[str, bool]]:
    with simulated(2):
        gm = make_fx(f, tracing_mode="fake")(x)
        facts = QuantizeTransfers(policy)(gm).facts
    assert all(isinstance(fact, rf.Site) for fact in facts)
    return [(fact.reason, fact.eligible) for fact in facts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["isend", "irecv"])
@pytest.mark.parametrize(
    ("shape", "reason"),
    [((8, 1), "a statistic: one value a row"), ((1,), "a statistic: a single element")],
)
def test_both_ends_see_a_statistic_by_its_shape(
    name: str, shape: tuple[int, ...], reason: str
) -> None:
    policy = rf.Policy.of(bits=4, min_bytes=0)
    assert sites_of(lambda x: transfer(x, name), torch.zeros(shape), policy) == [(reason, False)]
    named = rf.Policy.of(bits=4, sites={"*": 4})
    assert sites_of(lambda x: transfer(x, name), torch.zeros(shape), named) == [("", True)]


def test_a_statistic_that_only_the_sender_sees_is_an_error_until_sites_name_it() -> None:
    def f(x: Tensor) -> Tensor:
        return transfer(x.logsumexp(-1), "isend")

    x = torch.zeros(8, 16, 32)
    with pytest.raises(CaptureError, match=r"a statistic: made by aten.logsumexp over features"):
        sites_of(f, x, rf.Policy.of(bits=4, min_bytes=0))
    for policy, reason in (
        (rf.Policy.of(bits=4, sites={"*": 8}), ""),
        (rf.Policy.of(bits=4, sites={"*": None}), "sites['*'] says exact"),
        (rf.Policy.of(bits=4), "512 bytes < min_bytes=16384"),
        (rf.Policy(), "the policy sends activations exact"),
    ):
        assert [found for found, _ in sites_of(f, x, policy)] == [reason]


def test_another_policy_at_the_other_end_is_an_error(ranks: RunRanks) -> None:
    ranks(2, another_policy)
