"""The public function measure_link: bandwidth, latency and coding of each carrier in a group."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from rfcompile.codec import operators
from rfcompile.errors import OptionError
from rfcompile.planning.link import Carrier, Link, positive
from rfcompile.planning.timing import exact_carrier, group_to_time, seconds_in_turn
from rfcompile.report.table import TableReport, table
from rfcompile.wire.cost import sent_bytes

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
"""Bytes of a rank's tensor, in the order in which they are measured."""
RUNS = (3, 100)
"""At least and at most."""
CODED = "4b:g128:rise"
"""The format that is timed; others take about as long."""


@dataclass(frozen=True)
class CarrierTime:
    """One carrier at one size: bytes that a rank sends, median and interquartile range of seconds
    on the slowest rank.
    """

    carrier: str
    sent: int
    seconds: float
    spread: float
    runs: int


@dataclass(frozen=True)
class MeasuredLinks(TableReport):
    """What :func:`measure_link` found: ``print`` it, or take :meth:`link` of a carrier.

    Args:
        times: of exact tensors, by carrier and size.
        coding: by carrier, bytes of exact data a second that one rank codes and decodes for it.
        device: "cpu" or "cuda".
    """

    world: int
    times: tuple[CarrierTime, ...]
    coding: Mapping[str, float]
    device: str = "cpu"

    def link(self, carrier: Carrier) -> Link:
        """The link of one carrier: latency and bandwidth of the line through its times, and coding.

        The line goes through the smallest and the largest size. Where the largest size took no
        longer, only the latency is known and the bandwidth is infinite.
        """
        found = [row for row in self.times if row.carrier == carrier]
        if not found:
            rule = f"measured were {', '.join(dict.fromkeys(row.carrier for row in self.times))}."
            raise OptionError("carrier", carrier, rule)
        small, large = found[0], found[-1]
        longer = large.seconds - small.seconds
        bandwidth = (large.sent - small.sent) / longer if longer > 0 else math.inf
        latency = max(0.0, small.seconds - small.sent / bandwidth)
        return Link(bandwidth, latency, carrier, self.world, self.coding[carrier], self.device)

    def lines(self) -> Iterator[str]:
        yield f"{self.world} ranks; median and interquartile range on the slowest rank"
        rows = [["carrier", "sent bytes", "ms", "spread ms", "latency ms", "MB/s", "coding MB/s"]]
        for carrier in dict.fromkeys(row.carrier for row in self.times):
            link = self.link(carrier)  # type: ignore[arg-type]
            rates = [f"{rate / 1e6:.1f}" for rate in (link.bandwidth, link.coding)]
            facts = [f"{1e3 * link.latency:.3f}", *rates]
            for row in (row for row in self.times if row.carrier == carrier):
                numbers = [f"{1e3 * row.seconds:.3f}", f"{1e3 * row.spread:.3f}"]
                rows.append([carrier, f"{row.sent:,}", *numbers, *facts])
                facts = ["", "", ""]
        yield from table(rows)


def measure_link(group: Any = None, *, seconds: float = 4.0) -> MeasuredLinks:
    """Measure latency and bandwidth of each carrier in a process group; every rank must call.

    Each carrier sends float32 tensors of 1 kB to 4 MB on the device of the group, several times in
    turn; the slowest rank counts. What the codec takes for it is timed beside, in 4 bits, without
    sending. All ranks return the same numbers.

    Args:
        group: a process group, its name, or None for the default group.
        seconds: about how long to measure in all.

    Raises:
        OptionError: ``seconds``. ProcessGroupError: there is no group, or it has one rank.
    """
    positive("seconds", seconds, "seconds above 0.")
    group, device = group_to_time(group)
    share = seconds / (len(SIZES) + 1) / len(get_args(Carrier))
    times = [
        _timed(group, carrier, size, device, share)
        for carrier in get_args(Carrier)
        for size in SIZES
    ]
    coding = {carrier: _coding(group, carrier, device, share) for carrier in get_args(Carrier)}
    return MeasuredLinks(group.size(), tuple(times), coding, device.type)


def _timed(
    group: Any, carrier: Carrier, size: int, device: torch.device, share: float
) -> CarrierTime:
    world = group.size()
    unit = 4 * world
    size = -(-size // unit) * unit
    x = torch.ones(size // 4, device=device)
    (found,) = seconds_in_turn(group, [exact_carrier(group, carrier, x)], share, device, RUNS)
    quarters = statistics.quantiles(found, n=4)
    sent = size if carrier == "send" else sent_bytes(carrier, size, world)
    return CarrierTime(
        carrier, sent, statistics.median(found), quarters[2] - quarters[0], len(found)
    )


def _coding(group: Any, carrier: Carrier, device: torch.device, share: float) -> float:
    """Bytes of a rank's tensor over the seconds in which the codec does its part of the carrier."""
    world = group.size()
    x = torch.randn(world, SIZES[-1] // 4 // world, device=device)
    x = x if carrier in ("all_reduce", "reduce_scatter") else x.reshape(1, -1)

    def code() -> None:
        payload = operators.quantize(x, CODED)
        if carrier == "all_reduce":
            payload = operators.requantize(payload, CODED).expand(world, -1).contiguous()
        elif carrier == "all_gather":
            payload = payload.expand(world, -1).contiguous()
        if carrier == "reduce_scatter":
            operators.dequantize_sum(payload, CODED, x.dtype)
        else:
            operators.dequantize(payload, CODED, x.dtype)

    (found,) = seconds_in_turn(group, [code], share, device, RUNS)
    return x.nbytes / statistics.median(found)
