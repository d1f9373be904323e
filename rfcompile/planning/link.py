"""Link: bandwidth and latency of what carries the traffic, given or measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import OptionError, ProcessGroupError
from rfcompile.report.table import TableReport, table
from rfcompile.torch_versions import all_gather_single
from rfcompile.wire import exchanges
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.process_groups import resolve

Carrier = Literal["send", "all_reduce", "all_gather", "reduce_scatter"]
"""What carries a site's traffic: one transfer to the next stage, or a collective."""


@dataclass(frozen=True)
class Link:
    """What a site's tensor costs to send: ``seconds = latency + sent / bandwidth + coding``.

    Args:
        bandwidth: bytes a second that one rank sends.
        latency: seconds of a transfer or collective that carries next to nothing.
        carrier: "send" (one tensor to the next stage), "all_reduce", "all_gather" or
            "reduce_scatter". ``sent`` are the bytes that one rank sends for it, with scales and
            padding.
        world: ranks of the collective; 2 or more.
        coding: bytes of exact data a second that are quantized and dequantized; ``coding`` seconds
            are the exact bytes over this number. Infinite: coding takes no time.

    Raises:
        OptionError: a field has a value outside its rule.
    """

    bandwidth: float
    latency: float = 0.0
    carrier: Carrier = "send"
    world: int = 2
    coding: float = math.inf

    def __post_init__(self) -> None:
        _positive("bandwidth", self.bandwidth, "bytes a second, above 0: 125e6 is 1 Gbit a second.")
        _positive("coding", self.coding, "bytes a second, above 0, or math.inf.")
        if not _is_number(self.latency) or not 0 <= self.latency < math.inf:
            raise OptionError("latency", self.latency, "give seconds, 0 or more.")
        if self.carrier not in get_args(Carrier):
            rule = f"choose one of {', '.join(map(repr, get_args(Carrier)))}."
            raise OptionError("carrier", self.carrier, rule)
        if type(self.world) is not int or self.world < 2:
            raise OptionError("world", self.world, "give the number of ranks, 2 or more.")

    def sent(self, numel: int, itemsize: int, fmt: QuantFormat | None) -> int:
        """Bytes that one rank sends for a tensor; None is exact. Scales and padding included.

        The counts are those of reports: :func:`~rfcompile.wire.cost.sent_bytes` and the payload.
        Those of an all-reduce are of CPU tensors.
        """
        if fmt is None:
            size = numel * itemsize
            return size if self.carrier == "send" else sent_bytes(self.carrier, size, self.world)
        if self.carrier == "all_reduce":
            segments = exchanges.default_segments(numel, fmt, torch.device("cpu"))
            return exchanges.all_reduce_sent_bytes(numel, fmt, self.world, segments)
        if self.carrier == "all_gather":
            return exchanges.all_gather_sent_bytes(numel, fmt, self.world)
        if self.carrier == "reduce_scatter":
            return exchanges.reduce_scatter_sent_bytes(numel, fmt, self.world)
        return fmt.payload_bytes(numel)

    def seconds(self, numel: int, itemsize: int, fmt: QuantFormat | None) -> float:
        """Seconds for a tensor: latency, bytes over bandwidth and, unless it is exact, coding."""
        coding = 0.0 if fmt is None else numel * itemsize / self.coding
        return self.latency + self.sent(numel, itemsize, fmt) / self.bandwidth + coding


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(name: str, value: object, rule: str) -> None:
    if not _is_number(value) or not value > 0:  # type: ignore[operator]
        raise OptionError(name, value, f"give {rule}")


# ---- measured ----------------------------------------------------------------------------------

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
"""Bytes of a rank's tensor, in the order in which they are measured."""
WARM_UP = 2


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
    """What :func:`measure_link` found: ``print`` it, or take :meth:`link` of a carrier."""

    world: int
    times: tuple[CarrierTime, ...]

    def link(self, carrier: Carrier) -> Link:
        """The link of one carrier: latency and bandwidth of the line through its times.

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
        return Link(bandwidth, latency, carrier, self.world)

    def lines(self) -> Iterator[str]:
        yield f"{self.world} ranks; median and interquartile range on the slowest rank"
        rows = [["carrier", "sent bytes", "ms", "spread ms", "latency ms", "MB/s"]]
        for carrier in dict.fromkeys(row.carrier for row in self.times):
            link = self.link(carrier)  # type: ignore[arg-type]
            facts = [f"{1e3 * link.latency:.3f}", f"{link.bandwidth / 1e6:.1f}"]
            for row in (row for row in self.times if row.carrier == carrier):
                numbers = [f"{1e3 * row.seconds:.3f}", f"{1e3 * row.spread:.3f}"]
                rows.append([carrier, f"{row.sent:,}", *numbers, *facts])
                facts = ["", ""]
        yield from table(rows)


def measure_link(group: Any = None, *, seconds: float = 4.0) -> MeasuredLinks:
    """Measure latency and bandwidth of each carrier in a process group; every rank must call.

    Each carrier sends float32 tensors of 1 kB to 4 MB on the device of the group, several times in
    turn; the slowest rank counts. All ranks return the same numbers.

    Args:
        group: a process group, its name, or None for the default group.
        seconds: about how long to measure in all.

    Raises:
        OptionError: ``seconds``. ProcessGroupError: there is no group, or it has one rank.
    """
    _positive("seconds", seconds, "seconds above 0.")
    group = resolve(group)
    if group.size() < 2:
        raise ProcessGroupError("a link needs two ranks or more, and this process group has one.")
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    share = seconds / len(SIZES) / len(get_args(Carrier))
    times = [
        _timed(group, carrier, size, device, share)
        for carrier in get_args(Carrier)
        for size in SIZES
    ]
    return MeasuredLinks(group.size(), tuple(times))


def _timed(
    group: Any, carrier: Carrier, size: int, device: torch.device, share: float
) -> CarrierTime:
    world = group.size()
    unit = 4 * world
    size = -(-size // unit) * unit
    run = _runner(group, carrier, torch.ones(size // 4, device=device))
    for _ in range(WARM_UP):
        _slowest(group, [run()], device)
    first = _slowest(group, [run()], device)[0]
    runs = max(3, min(100, int(share / max(first, 1e-6))))  # the same on all ranks
    found = _slowest(group, [run() for _ in range(runs)], device)
    quarters = statistics.quantiles(found, n=4)
    sent = size if carrier == "send" else sent_bytes(carrier, size, world)
    return CarrierTime(carrier, sent, statistics.median(found), quarters[2] - quarters[0], runs)


def _slowest(group: Any, seconds: list[float], device: torch.device) -> list[float]:
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    found: list[float] = times.tolist()
    return found


def _runner(group: Any, carrier: Carrier, x: Tensor) -> Callable[[], float]:
    """A function that lets the carrier send ``x`` once, and returns the seconds."""
    world, rank = group.size(), group.rank()
    gathered = x.new_empty(world * x.numel()) if carrier == "all_gather" else x
    part = x.new_empty(x.numel() // world)

    def send() -> None:
        if rank == 0:
            dist.send(x, group=group, group_dst=1)
        elif rank == 1:
            dist.recv(x, group=group, group_src=0)

    carry: dict[str, Callable[[], Any]] = {
        "send": send,
        "all_reduce": lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
        "all_gather": lambda: all_gather_single(gathered, x, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, x, group=group),
    }

    def run() -> float:
        dist.barrier(group)
        begin = time.perf_counter()
        carry[carrier]()
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - begin

    return run
