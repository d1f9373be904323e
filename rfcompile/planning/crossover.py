"""The public function measure_crossover: from which size on is a quantized collective faster?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rfcompile.codec.formats import DTYPES, QuantFormat, as_format, dtype_text
from rfcompile.errors import OptionError
from rfcompile.planning.link import positive
from rfcompile.planning.timing import exact_carrier, group_to_time, seconds_in_turn
from rfcompile.report.report import format_bytes
from rfcompile.report.table import TableReport, table
from rfcompile.wire import collectives, crossover
from rfcompile.wire.policy import Formatish

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
SIZES = tuple(4**power for power in range(6, 13))
"""Bytes of a rank's tensor: 4 KiB to 16 MiB."""
RUNS = (5, 200)
"""At least and at most."""


@dataclass(frozen=True)
class CrossoverTime:
    """A collective at one size, exact and quantized in turn, on the slowest rank.

    Args:
        size: bytes of a rank's tensor.
        exact, quantized: median seconds.
        spread: the interquartile range of exact / quantized.
    """

    collective: str
    size: int
    exact: float
    quantized: float
    spread: float
    runs: int

    @property
    def speedup(self) -> float:
        return self.exact / self.quantized


@dataclass(frozen=True)
class Crossover(TableReport):
    """What :func:`measure_crossover` found: ``print`` it, or take :attr:`min_bytes`."""

    format: str
    dtype: str
    world: int
    times: tuple[CrossoverTime, ...]

    @property
    def collectives(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.collective for row in self.times))

    @property
    def min_bytes(self) -> int:
        """The size, for a policy, from which quantizing pays in every collective measured.

        A collective that does not pay at the largest size measured does not pay beyond it either:
        then the number is one that no tensor reaches.
        """
        return max(map(self.min_bytes_of, self.collectives))

    def min_bytes_of(self, collective: str) -> int:
        """The smallest size measured from which on, at all larger ones too, quantized is faster.

        Raises:
            OptionError: the collective was not measured.
        """
        rows = [row for row in self.times if row.collective == collective]
        if not rows:
            rule = f"measured were {', '.join(self.collectives)}."
            raise OptionError("collective", collective, rule)
        found = crossover.NEVER
        for row in sorted(rows, key=lambda row: -row.size):
            if row.speedup <= 1:
                break
            found = row.size
        return found

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.format}, {self.dtype}, {self.world} ranks; medians on the slowest rank; "
            "speedup is exact / quantized, +- its interquartile range"
        )
        rows = [["collective", "size", "exact ms", "quantized ms", "speedup", "+-"]]
        for row in self.times:
            seconds = [f"{1e3 * row.exact:.3f}", f"{1e3 * row.quantized:.3f}"]
            ratios = [f"{row.speedup:.2f}", f"{row.spread:.2f}"]
            rows.append([row.collective, format_bytes(row.size), *seconds, *ratios])
        yield from table(rows)
        for collective in self.collectives:
            yield f"{collective}: quantized is faster {_from(self.min_bytes_of(collective))}"
        exact = self.min_bytes == crossover.NEVER
        yield "min_bytes: " + ("everything stays exact" if exact else f"{self.min_bytes:,}")


def _from(size: int) -> str:
    return "at no size measured" if size == crossover.NEVER else f"from {size:,} bytes on"


def measure_crossover(
    format: Formatish,
    group: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    only: tuple[Collective, ...] = get_args(Collective),
    seconds: float = 6.0,
) -> Crossover:
    """Measure from which size on a quantized collective is faster; every rank must call.

    Each collective runs at 4 KiB to 16 MiB a rank on the device of the group, exact and quantized
    in turn, outside compiled graphs. All ranks return the same numbers. Policies of this process
    with ``min_bytes="auto"`` take the result from then on.

    Args:
        format: of the quantized collectives.
        group: a process group, its name, or None for the default group.
        dtype: of the tensors: float32, bfloat16 or float16.
        only: which collectives; a policy's number is the largest of theirs.
        seconds: about how long to measure in all.

    Raises:
        FormatError: ``format`` is none, or exact. OptionError: ``dtype``, ``only`` or ``seconds``.
        ProcessGroupError: there is no group, or it has one rank.
    """
    fmt = as_format(format)
    if fmt is None:
        raise OptionError("format", format, "give a format to compare with exact, such as 4.")
    if dtype not in DTYPES:
        rule = f"use one of {', '.join(map(dtype_text, DTYPES))}."
        raise OptionError("dtype", dtype, rule)
    if not only or {*only} - {*get_args(Collective)}:
        raise OptionError("only", only, f"name some of {', '.join(get_args(Collective))}.")
    positive("seconds", seconds, "seconds above 0.")
    group, device = group_to_time(group)
    share = seconds / len(SIZES) / len(only)
    world = group.size()
    numels = [-(-size // (dtype.itemsize * world)) * world for size in SIZES]
    given = [torch.ones(numel, dtype=dtype, device=device) for numel in numels]
    times = [_timed(group, collective, fmt, x, share) for collective in only for x in given]
    found = Crossover(fmt.spec, dtype_text(dtype), world, tuple(times))
    crossover.keep(found.min_bytes)
    return found


def _timed(group: Any, collective: str, fmt: QuantFormat, x: Tensor, share: float) -> CrossoverTime:
    def quantized() -> None:
        getattr(collectives, collective)(x, fmt, group)

    tasks = [exact_carrier(group, collective, x), quantized]
    times = seconds_in_turn(group, tasks, share, x.device, RUNS)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    exact, coded = map(statistics.median, times)
    spread = quarters[2] - quarters[0]
    return CrossoverTime(collective, x.nbytes, exact, coded, spread, len(ratios))
