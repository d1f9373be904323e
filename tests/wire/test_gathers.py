"""gloo's threads must never hold the name of a gather that needs memory of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

import rfcompile as rf
from tests.ranks import Rank, RunRanks

GATHER = "_c10d_functional::all_gather_into_tensor"


def gathers_of(f: Any, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """The result, and how often each form of torch's gather was called."""
    with profile() as trace:
        y = f(x)
    counts = {event.key: event.count for event in trace.key_averages()}
    return y, {name: counts.get(name, 0) for name in (GATHER, f"{GATHER}_out")}


def reduced(x: Tensor) -> Tensor:
    return rf.all_reduce(x, 4, segments=4)


def check_form(rank: Rank, is_compiled: bool) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(rank.index))
    f = torch.compile(reduced) if is_compiled else reduced
    f(x)  # compiles
    y, gathers = gathers_of(f, x)
    assert torch.equal(y, reduced(x))
    assert gathers == {GATHER: 0, f"{GATHER}_out": 4}
    rank.assert_same(y)


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_payloads_are_gathered_under_the_short_name(ranks: RunRanks, is_compiled: bool) -> None:
    ranks(2, check_form, is_compiled)
