"""Ranks that call a collective with something else: typed errors everywhere, no other tensors."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import rfcompile as rf
from rfcompile.errors import OptionError, PolicyError, ProcessGroupError, RankMismatchError

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

X = torch.linspace(-1, 1, 240)

CALLS: dict[str, Callable[[torch.Tensor, Any, Any], torch.Tensor]] = {
    "all_reduce": rf.all_reduce,
    "reduce_scatter": rf.reduce_scatter,
    "all_gather": rf.all_gather,
    "all_to_all": rf.all_to_all,
    "broadcast": rf.broadcast,
}
OTHERS = {
    "shape": (X.reshape(2, 120), "4b:tread"),
    "size": (X[:216], "4b:tread"),  # as many bytes as all of X
    "dtype": (X.bfloat16(), "4b:tread"),
    "format": (X, "8b:tread"),
}


def first_calls_differ(rank: Rank) -> list[str]:
    wrong = []
    for name, call in CALLS.items():
        for what, other in OTHERS.items():
            group = dist.new_group(timeout=timedelta(seconds=60))
            try:
                call(*(other if rank.index == rank.world - 1 else (X, "4b:tread")), group)
                wrong.append(f"{name}, {what}: no error")
            except RankMismatchError as error:
                if set(error.plans) != set(range(rank.world)):
                    wrong.append(f"{name}, {what}: {error}")
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_a_first_call_that_differs_is_an_error_on_every_rank(ranks: RunRanks, world: int) -> None:
    if world == 3:
        assert ranks(world, three_ranks_differ) == [[]] * 3
    else:
        assert ranks(world, first_calls_differ) == [[]] * world


def three_ranks_differ(rank: Rank) -> list[str]:
    x = X[: 180 + 30 * (rank.index == 1)]
    try:
        rf.all_reduce(x, 4)
    except RankMismatchError:
        return []
    return ["no error"]


def later_calls_differ(rank: Rank) -> dict[tuple[str, str], str]:
    """Both are in their second call: rank 1 alone meets something new, the other sends.

    All pairs of ranks wait for their timeouts at the same time, in groups of their own.
    """
    cases = [(name, what) for name in CALLS for what in OTHERS]
    groups = [dist.new_group(timeout=timedelta(seconds=2)) for _ in cases]
    for (name, _), group in zip(cases, groups, strict=True):
        CALLS[name](X, "4b:tread", group)

    def second_call(case: tuple[str, str], group: Any) -> str:
        name, what = case
        try:
            CALLS[name](*(OTHERS[what] if rank.index == 1 else (X, "4b:tread")), group)
        except Exception as error:
            return type(error).__name__
        return "no error"

    with ThreadPoolExecutor(len(cases)) as threads:
        return dict(zip(cases, threads.map(second_call, cases, groups), strict=True))


@pytest.fixture(scope="module")
def later_calls(ranks: RunRanks) -> list[dict[tuple[str, str], str]]:
    return ranks(2, later_calls_differ)


@pytest.mark.parametrize("what", list(OTHERS))
@pytest.mark.parametrize("name", list(CALLS))
def test_a_later_call_that_differs_is_an_error_within_the_timeout(
    later_calls: list[dict[tuple[str, str], str]], name: str, what: str
) -> None:
    assert [found[name, what] for found in later_calls] == ["TransportError"] * 2


def count_agreements(rank: Rank) -> list[int]:
    counts: list[int] = []
    gather = dist.all_gather_object

    def counted(*args: Any, **kwargs: Any) -> None:
        counts[-1] += 1
        gather(*args, **kwargs)

    dist.all_gather_object = counted
    try:
        for x in (X, X, X, X[:120], X, X[:120]):
            counts.append(0)
            for call in CALLS.values():
                call(x, 4, None)
    finally:
        dist.all_gather_object = gather
    return counts


def test_what_is_known_costs_no_message(ranks: RunRanks) -> None:
    each = len(CALLS)
    assert ranks(2, count_agreements) == [[each, 0, 0, each, 0, 0]] * 2


def uneven_splits_of_any_size(rank: Rank) -> bool:
    for step in range(4):
        sent = [step, 3] if rank.index == 0 else [2, 1 + step]
        got = [step, 2] if rank.index == 0 else [3, 1 + step]
        x = torch.full((sum(sent), 5), float(rank.index + 1))
        y = rf.all_to_all(x, 8, output_splits=got, input_splits=sent)
        origins = torch.tensor([1.0] * got[0] + [2.0] * got[1])
        # One value a tensor: 8 bits keep it to a relative 2**-7 of the scale's rounding.
        torch.testing.assert_close(y, origins[:, None].expand(-1, 5), rtol=2**-7, atol=0)
    return True


def test_splits_may_differ_by_rank_and_step(ranks: RunRanks) -> None:
    assert ranks(2, uneven_splits_of_any_size) == [True, True]


# ---- src, group and op ---------------------------------------------------------------------------


def broadcasts_in_a_group(rank: Rank) -> float | None:
    group = dist.new_group([1, 2])
    if rank.index == 0:
        return None
    return rf.broadcast(torch.full((64,), float(rank.index)), 8, group, src=1)[0].item()


def test_src_is_a_rank_of_the_group(ranks: RunRanks) -> None:
    nothing, one, two = ranks(3, broadcasts_in_a_group)
    assert nothing is None
    assert one == two == pytest.approx(2.0, rel=2**-7)


def wrong_arguments(rank: Rank) -> list[str]:
    group, x = dist.group.WORLD, torch.ones(64)
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ProcessGroupError, lambda: rf.broadcast(x, 8, 1)),
        (ProcessGroupError, lambda: rf.all_reduce(x, 8, 1)),
        *(
            (OptionError, lambda src=src: rf.broadcast(x, 8, src=src))  # type: ignore[misc]
            for src in (group, 2, -1, True, 0.0, None)
        ),
        *(
            (OptionError, lambda op=op: rf.all_reduce(x, 8, op=op))  # type: ignore[misc]
            for op in ("max", dist.ReduceOp.MAX, None, 3)
        ),
        (PolicyError, lambda: rf.all_reduce(x, 8, segments=0)),
        (OptionError, lambda: rf.all_reduce(x, None)),  # type: ignore[arg-type]
    ]
    wrong = []
    for i, (expected, call) in enumerate(calls):
        try:
            call()
            wrong.append(f"{i}: no error")
        except expected:
            pass
    return wrong


def test_wrong_arguments_are_typed_errors(ranks: RunRanks) -> None:
    assert ranks(2, wrong_arguments) == [[], []]


def sums_by_object(rank: Rank) -> bool:
    x = torch.randn(300)
    pairs = ((dist.ReduceOp.SUM, "sum"), (dist.ReduceOp.AVG, "avg"))
    return all(
        torch.equal(rf.all_reduce(x, 4, op=op), rf.all_reduce(x, 4, op=name)) for op, name in pairs
    )


def test_reduce_ops_of_torch_are_taken(ranks: RunRanks) -> None:
    assert ranks(2, sums_by_object) == [True, True]
