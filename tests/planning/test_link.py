"""measure_link on real ranks."""

from __future__ import annotations

from typing import Any

import pytest

import rfcompile as rf
from rfcompile.errors import OptionError, ProcessGroupError
from rfcompile.planning.measured_link import CarrierTime, MeasuredLinks
from rfcompile.wire.process_groups import simulated
from tests.ranks import Rank, RunRanks, error_of

CARRIERS = ["send", "all_reduce", "all_gather", "reduce_scatter"]


def measured(rank: Rank) -> dict[str, Any]:
    found = rf.measure_link(seconds=0.2)
    assert list(dict.fromkeys(row.carrier for row in found.times)) == CARRIERS
    for row in found.times:
        assert row.seconds > 0
        assert row.spread >= 0
        assert row.runs >= 3
    assert list(found.coding) == CARRIERS
    assert all(rate > 0 for rate in found.coding.values())
    link = found.link("all_reduce")
    assert (link.carrier, link.world) == ("all_reduce", rank.world)
    assert "all_reduce" in str(found)
    return found.to_dict()


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_measure_the_same(world: int, ranks: RunRanks) -> None:
    first, *others = ranks(world, measured)
    assert first["world"] == world
    assert all(other == first for other in others)


def test_the_line_through_the_times() -> None:
    sizes = (1000, 101_000)
    rows = [CarrierTime("send", sent, 0.002 + sent / 1e6, 0.0, 3) for sent in sizes]
    link = MeasuredLinks(2, tuple(rows), {"send": 5e8}).link("send")
    assert link.bandwidth == pytest.approx(1e6)
    assert link.latency == pytest.approx(0.002)
    assert link.seconds(500, 2, None) == pytest.approx(0.003)
    coded = rf.QuantFormat(4).payload_bytes(500)
    assert link.seconds(500, 2, rf.QuantFormat(4)) == pytest.approx(0.002 + coded / 1e6 + 2e-6)
    with pytest.raises(OptionError, match=r"carrier=.all_reduce. .* measured were send"):
        MeasuredLinks(2, tuple(rows), {}).link("all_reduce")


@pytest.mark.parametrize("carrier", ["all_reduce", "all_gather", "reduce_scatter"])
def test_bytes_are_those_of_the_collectives_it_is_made_of(carrier: Any) -> None:
    fmt, n, world = rf.QuantFormat(4, group_size=32), 4096, 4
    row = fmt.row_bytes(n // world)  # of the part of one rank
    parts = {"all_reduce": 2 * row, "all_gather": fmt.row_bytes(n), "reduce_scatter": row}
    link = rf.Link(bandwidth=1e9, carrier=carrier, world=world)
    assert link.sent(n, 4, fmt) == (world - 1) * parts[carrier]


def test_a_link_needs_a_group_of_two() -> None:
    with pytest.raises(ProcessGroupError, match="there is no process group"):
        rf.measure_link()
    with simulated(1):
        assert "has one" in str(error_of(rf.measure_link))
        with pytest.raises(OptionError, match="seconds=0"):
            rf.measure_link(seconds=0)
