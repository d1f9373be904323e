"""The public function measure_link: bandwidth, latency and coding of each carrier in a group."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from rfcompile.codec import operators
from rfcompile.errors import OptionError, ProcessGroupError
from rfcompile.planning.link import Carrier, Link, positive
from rfcompile.report.table import TableReport, table
from rfcompile.torch_versions import all_gather_single, reduce_scatter_single
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.process_groups import resolve

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
"""Bytes of a rank's tensor, in the order in which they are measured."""
WARM_UP = 2
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
    group = resolve(group)
    if group.size() < 2:
        raise ProcessGroupError("a link needs two ranks or more, and this process group has one.")
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
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
    found = _repeated(group, _sender(group, carrier, x), share, device)
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

    return x.nbytes / statistics.median(_repeated(group, code, share, device))


def _repeated(
    group: Any, task: Callable[[], object], share: float, device: torch.device
) -> list[float]:
    """Seconds of the slowest rank, for about ``share`` seconds; the same on all ranks."""

    def once() -> float:
        dist.barrier(group)
        begin = time.perf_counter()
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    def slowest(seconds: list[float]) -> list[float]:
        times = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
        found: list[float] = times.tolist()
        return found

    for _ in range(WARM_UP):
        slowest([once()])
    runs = max(3, min(100, int(share / max(slowest([once()])[0], 1e-6))))
    return slowest([once() for _ in range(runs)])


def _sender(group: Any, carrier: Carrier, x: Tensor) -> Callable[[], object]:
    """A function that lets the carrier send ``x`` once."""
    world, rank = group.size(), group.rank()
    gathered = x.new_empty(world * x.numel()) if carrier == "all_gather" else x
    part = x.new_empty(x.numel() // world)

    def send() -> None:
        if rank == 0:
            dist.send(x, group=group, group_dst=1)
        elif rank == 1:
            dist.recv(x, group=group, group_src=0)

    carry: dict[str, Callable[[], object]] = {
        "send": send,
        "all_reduce": lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
        "all_gather": lambda: all_gather_single(gathered, x, group=group),
        "reduce_scatter": lambda: reduce_scatter_single(part, x, group=group),
    }
    return carry[carrier]
