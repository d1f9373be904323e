"""The fixture ``ranks`` itself: it runs on real ranks, and it notices every way to fail."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks


def place(rank: Rank, offset: int) -> tuple[int, int, str, float]:
    total = torch.tensor([float(rank.index + offset)])
    dist.all_reduce(total)
    return rank.index, dist.get_world_size(), dist.get_backend(), total.item()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_answers(ranks: RunRanks, world: int) -> None:
    total = world * (world - 1) / 2 + 10 * world
    assert ranks(world, place, 10) == [(r, world, "gloo", total) for r in range(world)]


def differ(rank: Rank) -> None:
    x = torch.tensor([1.0, float("nan"), 0.0])
    rank.assert_same(x, "NaN has bytes too")
    x[2] = -0.0 if rank.index == 1 else 0.0
    rank.assert_same(x, "the signs of zero")


def fail(rank: Rank) -> None:
    if rank.index == 1:
        raise LookupError("only here")
    dist.barrier()


def sleep(rank: Rank) -> None:
    time.sleep(60 * rank.index)


def die(rank: Rank) -> None:
    if rank.index == 1:
        print("last words")
        os._exit(3)


@pytest.mark.parametrize(
    ("f", "failed", "text"),
    [
        (differ, {0, 1}, r"the signs of zero: ranks \[1\] differ from rank 0"),
        (fail, {0, 1}, r"(?s)rank 1: Traceback.*in fail\n.*LookupError: only here"),
        (sleep, {1}, r"rank 1: no answer\nCurrent thread.*\n.* in sleep\n"),
        (die, {1}, "rank 1: died with exit code 3\nlast words"),
    ],
)
def test_a_failure_of_a_rank_is_raised_here(
    ranks: RunRanks, f: object, failed: set[int], text: str
) -> None:
    assert callable(f)
    with pytest.raises(Exception, match=text) as caught:
        ranks(2, f, timeout=2, grace=0.5)
    assert set(caught.value.failures) == failed  # type: ignore[attr-defined]
    assert ranks(2, place, 0) == [(0, 2, "gloo", 1.0), (1, 2, "gloo", 1.0)]  # works again
