"""Finding collectives: every kind, its wait, its group; the graph stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rfcompile.find.collectives import find_collectives
from rfcompile.graph.text import graph_text

if TYPE_CHECKING:
    from tests.traces import Trace

c10d = torch.ops._c10d_functional


def test_every_kind_with_its_facts_and_the_graph_untouched(trace: Trace) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        started = (
            c10d.all_reduce(x, "avg", "0"),
            c10d.reduce_scatter_tensor(x, "sum", 4, "0"),
            c10d.all_gather_into_tensor(x, 4, "0"),
            c10d.all_to_all_single(x, [2] * 4, [2] * 4, "0"),
            c10d.broadcast(x, 1, "0"),
        )
        return tuple(c10d.wait_tensor(y) for y in started)

    gm = trace(f, torch.randn(8, 3))
    before = graph_text(gm)
    found = find_collectives(gm)
    assert graph_text(gm) == before
    assert [(c.kind, c.op) for c in found] == [
        ("all_reduce", "avg"),
        ("reduce_scatter", "sum"),
        ("all_gather", ""),
        ("all_to_all", ""),
        ("broadcast", ""),
    ]
    for c in found:
        assert (c.group, c.world, tuple(c.input.shape)) == ("0", 4, (8, 3))
        assert c.wait is not None
        assert c.wait.args == (c.node,)


def test_unknown_collectives_are_found_under_their_own_name(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        (total,) = c10d.all_reduce_coalesced([x], "sum", "0")
        (gathered,) = c10d.all_gather_into_tensor_coalesced([x], 4, "0")
        return c10d.wait_tensor(total).sum() + c10d.wait_tensor(gathered).sum()

    found = find_collectives(trace(f, torch.randn(8)))
    names = ["all_reduce_coalesced", "all_gather_into_tensor_coalesced"]
    assert [c.kind for c in found] == names
    assert [tuple(c.input.shape) for c in found] == [(8,), (8,)]


def test_a_collective_that_two_read_or_nobody_waits_for_has_no_wait(trace: Trace) -> None:
    def f(x: Tensor) -> Tensor:
        y = c10d.all_reduce(x, "sum", "0")
        c10d.all_reduce(x * 2, "sum", "0")
        return c10d.wait_tensor(y) + c10d.wait_tensor(y)

    gm = trace(f, torch.randn(8))
    assert [c.wait for c in find_collectives(gm)] == [None] * len(find_collectives(gm))
    assert find_collectives(gm)


def test_groups_have_their_own_size_and_a_lost_one_has_none(trace: Trace) -> None:
    pair = dist.new_group([0, 2])
    gone = dist.new_group([0, 3])
    names = (pair.group_name, gone.group_name)

    def f(x: Tensor) -> Tensor:
        for name in names:
            x = c10d.wait_tensor(c10d.all_reduce(x, "sum", name))
        return x

    gm = trace(f, torch.randn(8))
    dist.destroy_process_group(gone)
    assert [(c.group, c.world) for c in find_collectives(gm)] == [(names[0], 2), (names[1], 0)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_without_collectives(trace: Trace, dynamic: bool) -> None:
    assert find_collectives(trace(lambda x: x.relu(), torch.randn(8), dynamic=dynamic)) == ()
