"""Reducing a sum once: what merges, and the many sums that must not.

That the numbers agree is shown on real ranks, in distributed/test_backend.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx

import rfcompile as rf
from rfcompile.find.collectives import find_collectives
from rfcompile.graph.pipeline import run
from rfcompile.graph.text import graph_text
from rfcompile.passes import wire_pipeline
from rfcompile.passes.merge_collectives import MergeCollectives
from rfcompile.passes.quantize_collectives import QuantizeCollectives
from rfcompile.report.report import Site
from rfcompile.wire.policy import Policy
from rfcompile.wire.process_groups import simulated

if TYPE_CHECKING:
    from tests.traces import Trace

c10d = torch.ops._c10d_functional
A, B = torch.randn(6, 50), torch.randn(6, 50)


def reduce(x: Tensor, op: str = "sum", group: str = "0") -> Tensor:
    out: Tensor = c10d.wait_tensor(c10d.all_reduce(x, op, group))
    return out


def scatter(x: Tensor) -> Tensor:
    out: Tensor = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, "0"))
    return out


def merged(gm: fx.GraphModule) -> str:
    """The text after the pass; a second run must change nothing."""
    record = run(gm, [MergeCollectives("backward")])
    assert record.steps[0].changes == len(record.facts)
    again = run(record.gm, [MergeCollectives("backward")])
    assert again.steps[0].changes == 0
    return graph_text(record.gm)


def test_a_sum_of_two(trace: Trace) -> None:
    gm = trace(lambda a, b: reduce(a) + reduce(b), A, B)
    assert merged(gm) == dedent("""\
        a_1: f32[6, 50]
        b_1: f32[6, 50]
        add: f32[6, 50] = aten.add.Tensor(a_1, b_1)
        all_reduce: f32[6, 50] = _c10d_functional.all_reduce.default(add, 'sum', '0')
        wait_tensor: f32[6, 50] = _c10d_functional.wait_tensor.default(all_reduce)
        return wait_tensor""")


def test_a_sum_of_three_in_any_order_of_additions(trace: Trace) -> None:
    def left(a: Tensor, b: Tensor) -> Tensor:
        return (reduce(a) + reduce(b)) + reduce(a * b)

    def right(a: Tensor, b: Tensor) -> Tensor:
        return reduce(a) + (reduce(b) + reduce(a * b))

    add = "add: f32[6, 50] = aten.add.Tensor(a_1, b_1)"
    mul = "mul: f32[6, 50] = aten.mul.Tensor(a_1, b_1)"
    for f, (one, two), terms in (
        (left, (add, mul), "add, mul"),
        (right, (mul, add), "mul, add"),
    ):
        assert merged(trace(f, A, B)) == dedent(f"""\
            a_1: f32[6, 50]
            b_1: f32[6, 50]
            {one}
            {two}
            add_1: f32[6, 50] = aten.add.Tensor({terms})
            all_reduce: f32[6, 50] = _c10d_functional.all_reduce.default(add_1, 'sum', '0')
            wait_tensor: f32[6, 50] = _c10d_functional.wait_tensor.default(all_reduce)
            return wait_tensor""")


def test_through_equal_views(trace: Trace) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return reduce(a).view(12, 25).permute(1, 0) + reduce(b).view(12, 25).permute(1, 0)

    assert merged(trace(f, A, B)) == dedent("""\
        a_1: f32[6, 50]
        b_1: f32[6, 50]
        add: f32[6, 50] = aten.add.Tensor(a_1, b_1)
        all_reduce: f32[6, 50] = _c10d_functional.all_reduce.default(add, 'sum', '0')
        wait_tensor: f32[6, 50] = _c10d_functional.wait_tensor.default(all_reduce)
        view: f32[12, 25] = aten.view.default(wait_tensor, [12, 25])
        permute: f32[25, 12] = aten.permute.default(view, [1, 0])
        return permute""")


def test_what_is_added_beside_them_stays(trace: Trace) -> None:
    """``t + a + b``, as a residual stream's gradient: both places of ``t``."""

    def first(a: Tensor, b: Tensor) -> Tensor:
        return (a.relu() + reduce(a)) + reduce(b)

    def between(a: Tensor, b: Tensor) -> Tensor:
        return (reduce(a) + a.relu()) + reduce(b)

    for f in (first, between):
        assert merged(trace(f, A, B)) == dedent("""\
            a_1: f32[6, 50]
            b_1: f32[6, 50]
            relu: f32[6, 50] = aten.relu.default(a_1)
            add: f32[6, 50] = aten.add.Tensor(a_1, b_1)
            all_reduce: f32[6, 50] = _c10d_functional.all_reduce.default(add, 'sum', '0')
            wait_tensor: f32[6, 50] = _c10d_functional.wait_tensor.default(all_reduce)
            add_1: f32[6, 50] = aten.add.Tensor(relu, wait_tensor)
            return add_1""")


def test_reduce_scatters_and_averages_merge_too(trace: Trace) -> None:
    text = merged(trace(lambda a, b: scatter(a) + scatter(b), A, B))
    assert text.count("reduce_scatter_tensor.default(add,") == 1
    text = merged(trace(lambda a, b: reduce(a, "avg") + reduce(b, "avg"), A, B))
    assert text.count("all_reduce.default(add, 'avg', '0')") == 1


def shared(a: Tensor, b: Tensor) -> Tensor:
    """One of the terms is read elsewhere too."""
    x = reduce(a)
    return (x + reduce(b)) * x.relu()


def shared_sum(a: Tensor, b: Tensor) -> Tensor:
    """A part of the sum is read elsewhere too."""
    part = reduce(a) + a
    return (part + reduce(b)) * part.relu()


def twice(a: Tensor, b: Tensor) -> Tensor:
    """One term, added to itself."""
    x = reduce(a)
    return x + x


NEAR_MISSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another operation": lambda a, b: reduce(a) * reduce(b),
    "a difference": lambda a, b: reduce(a) - reduce(b),
    "a weighted sum": lambda a, b: torch.add(reduce(a), reduce(b), alpha=2),
    "max": lambda a, b: reduce(a, "max") + reduce(b, "max"),
    "two reductions": lambda a, b: reduce(a) + reduce(b, "avg"),
    "two collectives": lambda a, b: scatter(a) + reduce(b)[:3],
    "two dtypes": lambda a, b: reduce(a) + reduce(b.bfloat16()),
    "two shapes": lambda a, b: reduce(a) + reduce(b[:1]),
    "different views": lambda a, b: reduce(a).view(50, 6) + reduce(b).t(),
    "a function between": lambda a, b: reduce(a).relu() + reduce(b),
    "a constant": lambda a, b: reduce(a) + 1,
    "read elsewhere": shared,
    "a part read elsewhere": shared_sum,
    "added to itself": twice,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(trace: Trace, name: str) -> None:
    gm = trace(NEAR_MISSES[name], A, B)
    before = graph_text(gm)
    assert merged(gm) == before


def test_groups_do_not_mix(trace: Trace) -> None:
    pair = dist.new_group([0, 2]).group_name
    gm = trace(lambda a, b: reduce(a) + reduce(b, group=pair), A, B)
    before = graph_text(gm)
    assert merged(gm) == before
    gm = trace(lambda a, b: (reduce(a) + reduce(b, group=pair)) + reduce(a * b), A, B)
    text = merged(gm)
    assert text.count("all_reduce.default") == 2
    assert f"all_reduce.default(b_1, 'sum', '{pair}')" in text


def test_each_merge_is_a_site_that_sends_nothing_more(trace: Trace) -> None:
    gm = trace(lambda a, b: reduce(a) + reduce(b), A, B)
    (site,) = run(gm, [MergeCollectives("backward")]).facts
    assert isinstance(site, Site)
    assert (site.collective, site.direction, site.kind) == ("all_reduce", "backward", "gradients")
    assert (site.merged, site.eligible, site.format) == (True, False, None)
    assert site.reason == "merged: added to a later site's tensor"
    assert (site.bytes_before, site.bytes_after) == (2 * 3 * 6 * 50 * 4 // 4, 0)


def test_symbolic_sizes(trace: Trace) -> None:
    def f(a: Tensor) -> Tensor:
        return reduce(a) + reduce(a.relu())

    assert merged(trace(f, A, dynamic=True)) == dedent("""\
        a_1: f32[s0, s1]
        relu: f32[s0, s1] = aten.relu.default(a_1)
        add: f32[s0, s1] = aten.add.Tensor(a_1, relu)
        all_reduce: f32[s0, s1] = _c10d_functional.all_reduce.default(add, 'sum', '0')
        wait_tensor: f32[s0, s1] = _c10d_functional.wait_tensor.default(all_reduce)
        return wait_tensor""")


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_compiled_with_a_dynamic_batch() -> None:
    options: dict[str, Any] = {"bits": None}
    with simulated(4):
        rf.reports(clear=True)
        f = torch.compile(
            lambda a: reduce(a) + reduce(a.relu()),
            backend="rfquant",
            options=options,
            fullgraph=True,
            dynamic=True,
        )
        for batch in (6, 9):
            assert f(torch.randn(batch, 50)).shape == (batch, 50)
    (report,) = rf.reports(clear=True)
    assert (report.num_sites, report.num_merged) == (1, 1)


def test_a_policy_decides_what_may_be_merged(trace: Trace) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        return reduce(a) + reduce(b)

    for policy, merges in (
        (Policy.of(bits=4, min_bytes=0), 1),
        (Policy(), 1),
        (Policy.of(bits=4, min_bytes=10**9), 0),  # both stay exact, and as they are
    ):
        assert run(trace(f, A, B), [MergeCollectives(policy=policy)]).steps[0].changes == merges


def test_sites_with_formats_of_their_own_are_not_merged(trace: Trace) -> None:
    gm = trace(lambda a, b: reduce(a) + reduce(b), A, B)
    first, second = (c.node for c in find_collectives(gm))
    first.meta["nn_module_stack"] = {"q": ("q", torch.nn.Linear)}
    second.meta["nn_module_stack"] = {"k": ("k", torch.nn.Linear)}
    for sites in ({"q": 8, "k": 2}, {"q": None}, {"k": None}):
        policy = Policy.of(bits=4, min_bytes=0, sites=sites)
        assert run(gm, [MergeCollectives(policy=policy)]).steps[0].changes == 0
    same = Policy.of(bits=4, min_bytes=0, sites={"q": 4, "k": 4})
    assert run(gm, [MergeCollectives(policy=same)]).steps[0].changes == 1


def test_it_finds_nothing_in_a_graph_without_collectives(trace: Trace) -> None:
    gm = trace(lambda a, b: a + b, A, B)
    assert find_collectives(gm) == ()
    assert run(gm, [MergeCollectives()]).steps[0].changes == 0


def test_a_group_of_another_process_merges_and_its_bytes_are_unknown(trace: Trace) -> None:
    gm = trace(lambda a, b: reduce(a, group="lost") + reduce(b, group="lost"), A, B)
    every = Policy.of(bits=4, min_bytes=0)
    merge, left = run(gm, [MergeCollectives(), QuantizeCollectives(every)]).facts
    assert isinstance(merge, Site)
    assert isinstance(left, Site)
    assert (merge.merged, merge.bytes_before) == (True, None)
    assert left.reason == "process group 'lost' is not known in this process"


def test_recomputed_forward_collectives_have_one_kind(trace: Trace) -> None:
    gm = trace(lambda a, b: reduce(a) + reduce(b), A, B)
    for node in gm.graph.nodes:
        node.meta["partitioner_tag"] = "is_forward"
    facts = run(gm, wire_pipeline(Policy.of(bits=4, min_bytes=0), "backward")).facts
    assert [site.kind for site in facts if isinstance(site, Site)] == ["activations"] * 2


def calls_of(f: Callable[[], object]) -> int:
    """How many Python functions run."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(before)
    return count


def pairs(number: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(number):
            y = x.relu()
            x = reduce(y.sin()) + reduce(y.cos())
        return x

    return run


def one_sum(number: int) -> Callable[[Tensor], Tensor]:
    return lambda x: sum((reduce(x * i) for i in range(1, number)), reduce(x))


@pytest.mark.parametrize("make", [pairs, one_sum])
def test_the_work_is_linear(
    trace: Trace, make: Callable[[int], Callable[[Tensor], Tensor]]
) -> None:
    """Sixfold the collectives take sixfold the calls, within a tenth."""
    work = []
    for number in (10, 60):
        gm = trace(make(number), torch.randn(4, 4))
        merge = MergeCollectives("forward", Policy.of(bits=4, min_bytes=0))
        work.append(calls_of(lambda merge=merge, gm=gm: merge(gm)))  # type: ignore[misc]
        assert len(find_collectives(gm)) == (number if make is pairs else 1)
    assert work[1] <= 1.1 * 6 * work[0]
