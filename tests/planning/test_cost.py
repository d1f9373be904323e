"""Cost: the formulas against the planner, and against the bytes that collectives are handed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import rfcompile as rf
from rfcompile.errors import OptionError
from rfcompile.planning.plan import Choice, Plan
from rfcompile.wire import exchanges
from rfcompile.wire.process_groups import simulated

CARRIERS = ["send", "all_reduce", "all_gather", "reduce_scatter"]
FORMATS = ["", "2b:g32:rise", "3b:g128:rise:h128", "5b:tensor:tread", "8b:g1024:tread:raise"]


def planned(
    calls: Mapping[tuple[int, ...], int], fmt: str, link: rf.Link | None, batches: int = 1
) -> Plan:
    """A plan of one site."""
    how = link or rf.Link(math.inf)
    of = rf.QuantFormat.parse(fmt) if fmt else None
    sizes = [(math.prod(shape), times) for shape, times in calls.items()]
    sent = sum(how.sent(n, 4, of) * times for n, times in sizes) / batches
    seconds = sum(how.seconds(n, 4, of) * times for n, times in sizes) / batches
    choice = Choice("site", fmt, 0, sent, seconds if link else None, 0, calls, 4)
    return Plan("", "bytes", 1, (choice,), link, batches)


class Handed(TorchDispatchMode):
    """Bytes that one rank hands to collectives for others, by the definition of each."""

    def __init__(self, world: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.world, self.bytes = world, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        parts = {"all_to_all_single": 1, "all_gather_into_tensor_out": self.world}
        if func.namespace == "_c10d_functional" and (part := parts.get(func._opname)):
            self.bytes += args[0].nbytes * part * (self.world - 1) // self.world
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fmt", FORMATS[1:])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_bytes_are_those_that_are_sent(carrier: str, world: int, fmt: str) -> None:
    """Scales, padding, segments and the byte of nonfinite="raise" included."""
    link = rf.Link(1e6, carrier=carrier, world=world)
    for shape in [(4, 8, 8), (world, 3, 7), (16, 512, 384)]:
        if carrier == "send":
            counted = rf.quantize(torch.zeros(shape), fmt).numel()
        else:
            wire = getattr(exchanges, f"{carrier}_wire")
            op = () if carrier == "all_gather" else ("sum",)
            with simulated(world), Handed(world) as handed:
                wire(torch.zeros(shape), fmt, *op, world, dist.group.WORLD.group_name)
            counted = handed.bytes
        found = planned({shape: 1}, fmt, link)
        assert found.cost.at()["bytes"] == found.bytes == counted


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_other_sizes_and_ranks_are_those_of_another_plan(carrier: str, fmt: str) -> None:
    cost = planned({(4, 8, 8): 1}, fmt, rf.Link(1e6, 1e-3, carrier=carrier, coding=1e9)).cost
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        batch, sequence, width, world = (torch.randint(1, 300, (4,), generator=draw) + 1).tolist()
        sizes = {"batch": batch, "sequence": sequence, "width": width}
        if carrier != "send":
            sizes["world"] = world
        link = rf.Link(2e6, 1e-4, carrier=carrier, world=world, coding=3e9)
        other = planned({(batch, sequence, width): 1}, fmt, link)
        found = cost.at(**sizes, bandwidth=2e6, latency=1e-4, **({"coding": 3e9} if fmt else {}))
        assert found["bytes"] == other.bytes
        assert found["seconds"] == pytest.approx(other.seconds, rel=1e-12)


def test_segments_of_a_large_all_reduce() -> None:
    cost = planned({(1, 1, 1): 1}, "4b:g128:rise", rf.Link(1, carrier="all_reduce", world=3)).cost
    written = cost.bytes.rewrite(sympy.Piecewise)
    assert "segments" in str(cost)
    assert "segments" not in str(written)
    for width in [1, 2**20, 2**21 + 1, 2**22 + 129, 2**24 - 5]:
        sent = rf.Link(1, carrier="all_reduce", world=3).sent(width, 4, rf.QuantFormat(4))
        assert cost.at(width=width)["bytes"] == sent
        sizes = {"batch": 1, "sequence": 1, "width": width, "world": 3}
        symbols = {symbol: sizes[symbol.name] for symbol in written.free_symbols}
        assert written.subs(symbols) == sent
    on_gpu = rf.Link(1, carrier="all_reduce", world=3, device="cuda")
    assert "segments" not in str(planned({(1, 1, 1): 1}, "4b:g128:rise", on_gpu).cost)


def test_symbols_of_shapes() -> None:
    calls = {(8, 16, 32): 2, (5, 16, 32): 1, (8, 128): 3, (): 3}
    found = planned(calls, "8b:g128:tread", None, 3).cost
    assert found.values == {
        "batch": 8, "batch_5": 5, "sequence": 16, "width": 32, "width_128": 128
    }  # fmt: skip
    assert found.at() == {
        "bytes": pytest.approx(planned(calls, "8b:g128:tread", None, 3).bytes), "seconds": None
    }  # fmt: skip
    assert "2/3    8b:g128:tread  130*ceiling(batch*sequence*width/128)" in str(found)
    picture = planned({(2, 3, 4, 5): 1}, "", None).cost
    assert str(picture.bytes) == "4*batch*dim1*dim2*width"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, "depth=3 is not supported: the symbols are width, latency, bandwidth"),
        ({"width": 2.5}, "width=2.5 is not supported: give a whole number above 0"),
        ({"width": 0}, "width=0"),
        ({"latency": -1}, "latency=-1 is not supported: give a number, 0 or more"),
    ],
)
def test_values_that_no_symbol_has(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        planned({(7,): 1}, "", rf.Link(1.0)).cost.at(**values)
