"""Link: bandwidth and latency of what carries the traffic, and what it then costs to send."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import OptionError
from rfcompile.wire import exchanges
from rfcompile.wire.cost import sent_bytes

Carrier = Literal["send", "all_reduce", "all_gather", "reduce_scatter"]
"""What carries a site's traffic: one transfer to the next stage, or a collective."""


Segments = Callable[[Any, QuantFormat, torch.device], Any]


def sent_elements(numel: Any, kind: str, carrier: str, world: Any) -> Any:
    """Elements that a rank gives to the carrier: of weights that are gathered, its shard."""
    return -(-numel // world) if (kind, carrier) == ("weights", "all_gather") else numel


def link_bytes(
    carrier: Carrier,
    numel: Any,
    itemsize: int,
    fmt: QuantFormat | None,
    world: Any,
    device: str,
    segments: Segments = exchanges.default_segments,
) -> Any:
    """Bytes that one rank sends for a tensor, with scales and padding; None is exact.

    ``numel`` and ``world`` may be sympy expressions; ``segments`` then says the segments of an
    all-reduce. The counts are those of reports: :func:`~rfcompile.wire.cost.sent_bytes` and the
    payload.
    """
    if fmt is None:
        size = numel * itemsize
        return size if carrier == "send" else sent_bytes(carrier, size, world)
    if carrier == "all_reduce":
        parts = segments(numel, fmt, torch.device(device))
        return exchanges.all_reduce_sent_bytes(numel, fmt, world, parts)
    if carrier == "all_gather":
        return exchanges.all_gather_sent_bytes(numel, fmt, world)
    if carrier == "reduce_scatter":
        return exchanges.reduce_scatter_sent_bytes(numel, fmt, world)
    return fmt.payload_bytes(numel)


def link_seconds(sent: Any, coded: Any, latency: Any, bandwidth: Any, coding: Any) -> Any:
    """``latency + sent / bandwidth + coded / coding``; any of them may be a sympy expression."""
    return latency + sent / bandwidth + coded / coding


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
        device: "cpu" or "cuda", where the tensors are: on a CPU an all-reduce of many bytes is cut
            into segments, which adds padding.

    Raises:
        OptionError: a field has a value outside its rule.
    """

    bandwidth: float
    latency: float = 0.0
    carrier: Carrier = "send"
    world: int = 2
    coding: float = math.inf
    device: str = "cpu"

    def __post_init__(self) -> None:
        positive("bandwidth", self.bandwidth, "bytes a second, above 0: 125e6 is 1 Gbit a second.")
        positive("coding", self.coding, "bytes a second, above 0, or math.inf.")
        if not _is_number(self.latency) or not 0 <= self.latency < math.inf:
            raise OptionError("latency", self.latency, "give seconds, 0 or more.")
        if self.carrier not in get_args(Carrier):
            rule = f"choose one of {', '.join(map(repr, get_args(Carrier)))}."
            raise OptionError("carrier", self.carrier, rule)
        if type(self.world) is not int or self.world < 2:
            raise OptionError("world", self.world, "give the number of ranks, 2 or more.")
        if self.device not in ("cpu", "cuda"):
            raise OptionError("device", self.device, "choose 'cpu' or 'cuda'.")

    def sent(self, numel: int, itemsize: int, fmt: QuantFormat | None) -> int:
        """Bytes that one rank sends for a tensor; None is exact. Scales and padding included."""
        found: int = link_bytes(self.carrier, numel, itemsize, fmt, self.world, self.device)
        return found

    def seconds(self, numel: int, itemsize: int, fmt: QuantFormat | None) -> float:
        """Seconds for a tensor: latency, bytes over bandwidth and, unless it is exact, coding."""
        coded = 0 if fmt is None else numel * itemsize
        size = self.sent(numel, itemsize, fmt)
        found: float = link_seconds(size, coded, self.latency, self.bandwidth, self.coding)
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(name: str, value: object, rule: str) -> None:
    if not _is_number(value) or not value > 0:  # type: ignore[operator]
        raise OptionError(name, value, f"give {rule}")
