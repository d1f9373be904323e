"""Ranks that disagree, and calls that cannot work: typed errors, on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

import rfcompile as rf
from rfcompile.errors import (
    DtypeError,
    FormatError,
    OptionError,
    ProcessGroupError,
    RankMismatchError,
    RFCompileError,
    ShapeError,
)
from rfcompile.wire import process_groups
from rfcompile.wire.process_groups import agree
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

CALLS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "all_reduce": lambda x, fmt: rf.all_reduce(x, fmt),
    "reduce_scatter": lambda x, fmt: rf.reduce_scatter(x, fmt),
    "all_gather": lambda x, fmt: rf.all_gather(x, fmt),
    "all_to_all": lambda x, fmt: rf.all_to_all(x, fmt),
    "broadcast": lambda x, fmt: rf.broadcast(x, fmt),
}


# ---- ranks that disagree -------------------------------------------------------------------------


def disagree_on_the_format(rank: Rank) -> list[RFCompileError]:
    mine = "8b:g64" if rank.index == rank.world - 1 else 4
    errors = []
    for name, call in CALLS.items():
        errors.append(error_of(lambda call=call: call(torch.ones(8), mine)))
        y = call(torch.ones(8), 5)  # the group still works
        assert (y / (rank.world if "reduce" in name else 1) - 1).abs().max() < 0.02
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_formats_that_differ_are_refused_on_every_rank(ranks: RunRanks, world: int) -> None:
    others = "rank 0" if world == 2 else "ranks 0, 1, 2"
    first, *rest = ranks(world, disagree_on_the_format)
    for name, error in zip(CALLS, first, strict=True):
        assert isinstance(error, RankMismatchError)
        assert re.fullmatch(
            rf"the ranks of process group '0' disagree on the wire: {others}: {name} 4b:g128 "
            rf".*float32\[8\] \[rfcompile \S+, sources (\w+)\]; "
            rf"rank {world - 1}: {name} 8b:g64 .*float32\[8\] \[rfcompile \S+, sources \1\]\. "
            r"Every rank must use the same formats, options and rfcompile version\.",
            str(error),
        )
        assert error.group == "0"
        assert sorted(error.plans) == list(range(world))
        assert error.plans[0].startswith(f"{name} 4b:g128 ")
    assert [[str(error) for error in errors] for errors in rest] == [list(map(str, first))] * (
        world - 1
    )


def disagree_on_the_sources(rank: Rank) -> RFCompileError:
    original = process_groups.source_digest
    if rank.index == 1:
        process_groups.source_digest = lambda: "0123456789abcdef"  # type: ignore[assignment]
    try:
        return error_of(lambda: rf.all_reduce(torch.ones(8), 4))
    finally:
        process_groups.source_digest = original


def test_package_sources_that_differ_are_refused_on_every_rank(ranks: RunRanks) -> None:
    for error in ranks(2, disagree_on_the_sources):
        assert isinstance(error, RankMismatchError)
        assert error.plans[1].endswith("sources 0123456789abcdef]")
        assert error.plans[0] != error.plans[1]
        assert all(plan in str(error) for plan in error.plans.values())


def disagree_in_the_backend(rank: Rank) -> list[RFCompileError]:
    def f(x: Tensor) -> Tensor:
        return funcol.all_reduce(x * 2, "sum", dist.group.WORLD).relu()

    errors = []
    for options in (
        {"bits": 4 + 4 * rank.index, "min_bytes": 0},
        {"bits": 4, "min_bytes": rank.index},
        {"bits": 4, "sites": {"a.*": None} if rank.index else {}},
        {"bits": 4, "merge": bool(rank.index)},
    ):
        torch._dynamo.reset()  # it would find the last failure where options stayed the same
        compiled = torch.compile(f, backend="rfquant", options=options, fullgraph=True)
        errors.append(error_of(lambda g=compiled: g(torch.ones(8))))
    return errors


def test_backend_options_that_differ_are_refused_on_every_rank(ranks: RunRanks) -> None:
    sides = [
        (" optimizer_state=4b:g128:tread min_bytes=0 ", "all=8b:g128:tread min_bytes=0 "),
        (" min_bytes=0 ", " min_bytes=1 "),
        (" min_bytes=16384 merge", " sites['a.*']=exact "),
        (" merge=False ", " merge=True "),
    ]
    for errors in ranks(2, disagree_in_the_backend):
        for error, (zero, one) in zip(errors, sides, strict=True):
            assert isinstance(error, RankMismatchError)
            assert zero in error.plans[0]
            assert one in error.plans[1]
            assert all(plan.startswith("rfquant ") for plan in error.plans.values())


def agree_often_while_compiling(rank: Rank) -> int:
    with enable_python_dispatcher():  # as in AOTAutograd: its kernels run with the GIL held
        return sum(agree("0", f"plan {number}") for number in range(2000))


@pytest.mark.slow
def test_agreeing_while_compiling_never_hangs(ranks: RunRanks) -> None:
    # It hung now and then: a gloo thread wanted the GIL to free a tensor.
    assert ranks(2, agree_often_while_compiling, timeout=60) == [2000, 2000]


def disagree_while_compiling(rank: Rank) -> str:
    f = torch.compile(lambda x: rf.all_reduce(x, 4 + 4 * rank.index), fullgraph=True)
    try:
        f(torch.ones(8))
    except Exception as error:
        return str(error)
    raise AssertionError("no error")


def test_formats_that_differ_are_refused_while_compiling(ranks: RunRanks) -> None:
    pattern = r"RankMismatchError: the ranks .* rank 0: all_reduce 4b.* rank 1: all_reduce 8b"
    for text in ranks(2, disagree_while_compiling):
        assert re.match(pattern, text)


# ---- calls that cannot work ----------------------------------------------------------------------


def wrong_calls(rank: Rank) -> list[RFCompileError]:
    integers, odd = torch.arange(8), torch.ones(rank.world + 1, 2)
    sums = [rank.world + 1, *[0] * (rank.world - 1)]
    wrong = [
        *(lambda call=call: call(integers, 4) for call in CALLS.values()),
        lambda: rf.all_reduce(torch.ones(3, dtype=torch.float64), 4),
        lambda: rf.all_reduce(torch.ones(3), 4, op="max"),
        lambda: rf.all_reduce(torch.ones(3), 7),
        lambda: rf.all_reduce(torch.ones(3), 4, "no such group"),
        lambda: rf.reduce_scatter(odd, 4),
        lambda: rf.reduce_scatter(torch.tensor(1.0), 4),
        lambda: rf.all_to_all(odd, 4),
        lambda: rf.all_to_all(torch.tensor(1.0), 4),
        lambda: rf.all_to_all(odd, 4, input_splits=[1] * rank.world, output_splits=sums),
        lambda: rf.all_to_all(odd, 4, input_splits=sums, output_splits=[1]),
    ]
    return [error_of(f) for f in wrong]


def test_calls_that_cannot_work(ranks: RunRanks) -> None:
    expected: list[tuple[type, str, dict[str, Any]]] = [
        *(
            (DtypeError, f"the input of {name} has dtype torch.int64; the codec takes", {})
            for name in CALLS
        ),
        (DtypeError, "the input of all_reduce has dtype torch.float64", {"dtype": torch.float64}),
        (OptionError, "op='max' is not supported: a quantized reduction is", {"option": "op"}),
        (FormatError, "bits=7 is not supported: choose one of", {"field": "bits", "value": 7}),
        (ProcessGroupError, "process group 'no such group' does not exist in this process", {}),
        (ShapeError, r"\(3, 2\): dim 0 must divide by the 2 ranks; pad it", {"shape": (3, 2)}),
        (ShapeError, r"reduce_scatter has shape \(\): dim 0", {"shape": ()}),
        (ShapeError, r"all_to_all has shape \(3, 2\): .* or give input_splits", {}),
        (ShapeError, r"all_to_all has shape \(\): .* or give input_splits", {}),
        (ShapeError, r"input_splits=\[1, 1\] must hold one number for each of the 2 ranks", {}),
        (ShapeError, r"output_splits=\[1\] likewise", {}),
    ]
    for errors in ranks(2, wrong_calls):
        for error, (kind, pattern, fields) in zip(errors, expected, strict=True):
            assert type(error) is kind
            assert re.search(pattern, str(error))
            assert {name: getattr(error, name) for name in fields} == fields
