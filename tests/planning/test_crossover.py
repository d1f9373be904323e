"""measure_crossover on real ranks, and ``min_bytes="auto"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rfcompile as rf
from rfcompile.errors import OptionError, PolicyError, ProcessGroupError
from rfcompile.planning.crossover import SIZES, Crossover, CrossoverTime
from rfcompile.wire import crossover
from rfcompile.wire.crossover import NEVER
from rfcompile.wire.process_groups import simulated
from tests.ranks import Rank, RunRanks, error_of


def measured(rank: Rank) -> dict[str, Any]:
    auto: dict[str, Any] = {"bits": 4, "min_bytes": "auto"}
    crossover._measured = None  # by a test before this one
    error = error_of(lambda: rf.Policy.of(**auto))
    assert isinstance(error, PolicyError)
    assert "measure_crossover" in str(error)
    found = rf.measure_crossover(4, only=("all_reduce", "reduce_scatter"), seconds=0.2)
    assert [(row.collective, row.size) for row in found.times] == [
        (collective, -(-size // 12) * 12 if rank.world == 3 else size)
        for collective in ("all_reduce", "reduce_scatter")
        for size in SIZES
    ]
    assert all(row.exact > 0 and row.quantized > 0 and row.runs >= 5 for row in found.times)
    policy = rf.Policy.of(**auto)
    assert policy.min_bytes == policy.smallest == found.min_bytes
    assert f"min_bytes={found.min_bytes}" in policy.describe()
    return found.to_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_the_same_number(world: int, ranks: RunRanks) -> None:
    first, *others = ranks(world, measured)
    assert first["world"] == world
    assert all(other == first for other in others)


def rows(collective: str, *speedups: float) -> tuple[CrossoverTime, ...]:
    pairs = zip(SIZES, speedups, strict=False)
    return tuple(CrossoverTime(collective, size, up, 1.0, 0.0, 5) for size, up in pairs)


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ((2.0, 2.0, 2.0), SIZES[0]),
        ((0.5, 0.9, 1.1, 1.5), SIZES[2]),
        ((1.2, 0.9, 1.1), SIZES[2]),  # a small size that won by chance does not count
        ((0.5, 1.0), NEVER),
        ((1.5, 0.9), NEVER),
    ],
)
def test_it_is_the_size_from_which_on_all_are_faster(
    speedups: tuple[float, ...], expected: int
) -> None:
    found = Crossover("4b:g128", "f32", 2, rows("all_reduce", *speedups))
    assert found.min_bytes == found.min_bytes_of("all_reduce") == expected


def test_a_policy_takes_the_largest_of_the_collectives() -> None:
    times = rows("all_reduce", 0.5, 2.0) + rows("all_gather", 0.5, 0.5, 2.0)
    found = Crossover("4b:g128", "f32", 2, times)
    assert (found.min_bytes_of("all_reduce"), found.min_bytes) == (SIZES[1], SIZES[2])
    assert f"all_gather: quantized is faster from {SIZES[2]:,} bytes on" in str(found)
    with pytest.raises(OptionError, match="measured were all_reduce, all_gather"):
        found.min_bytes_of("broadcast")


def test_where_quantizing_never_pays_everything_is_exact() -> None:
    never = Crossover("4b:g128", "f32", 2, rows("all_reduce", 0.5))
    assert "at no size measured" in str(never)
    policy = rf.Policy.of(bits=4, min_bytes=never.min_bytes)
    assert policy.decide("activations", "layer", 2**40).why == "min_bytes"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "exact"}, "a format to compare with exact"),
        ({"dtype": torch.float64}, "use one of"),
        ({"only": ()}, "name some of all_reduce"),
        ({"only": ("broadcast",)}, "name some of all_reduce"),
        ({"seconds": 0}, "seconds above 0"),
        ({"seconds": True}, "seconds above 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], match: str) -> None:
    with simulated(2), pytest.raises(OptionError, match=match):
        rf.measure_crossover(**({"format": 4} | arguments))


def test_it_needs_a_group_of_two() -> None:
    with pytest.raises(ProcessGroupError, match="there is no process group"):
        rf.measure_crossover(4)
    with simulated(1):
        assert "has one" in str(error_of(lambda: rf.measure_crossover(4)))
