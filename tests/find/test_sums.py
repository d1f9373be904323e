"""Reading sums and copies: every spelling gives the same terms; the graph is not touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile.find.dataflow import Dataflow, Value
from rfcompile.find.sums import carried, summands
from rfcompile.graph.text import graph_text

A, B = torch.randn(2, 4), torch.randn(2, 4)
C = torch.randn(4, 4)
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def last_value(f: Function) -> Value:
    """The value a function of ``a_1, b_1, c_1`` returns."""

    def named(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return f(a, b, c)

    flow = Dataflow(make_fx(named)(A, B, C))
    return flow.values[-1]


SUMS: dict[str, tuple[Function, list[str]]] = {
    "a + b": (lambda a, b, c: a + b, ["0: a_1", "1: b_1"]),
    "in place": (lambda a, b, c: a.clone().add_(b), ["0: clone", "1: b_1"]),
    "alpha": (lambda a, b, c: torch.add(a, b, alpha=2), ["0: a_1", "1: b_1"]),
    "negative alpha": (lambda a, b, c: torch.add(a, b, alpha=-2), ["0: a_1", "1: -b_1"]),
    "a - b": (lambda a, b, c: a - b, ["0: a_1", "1: -b_1"]),
    "twice negative": (lambda a, b, c: torch.sub(a, b, alpha=-1), ["0: a_1", "1: b_1"]),
    "rsub": (lambda a, b, c: torch.ops.aten.rsub.Tensor(a, b), ["0: -a_1", "1: b_1"]),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, b + 1), ["0: a_1", "1: b_1 add"]),
    "addmm": (lambda a, b, c: torch.addmm(a, b, c), ["0: a_1", "1: b_1 @ c_1"]),
    "addmm of itself": (lambda a, b, c: torch.addmm(c, c, c), ["0: c_1", "1: c_1 @ c_1"]),
    "addmv": (lambda a, b, c: torch.addmv(a[0], c, b[0]), ["0: select", "1: c_1 @ select_1"]),
    "lerp": (lambda a, b, c: torch.lerp(a, b, 0.3), ["0: a_1", "1: b_1"]),
    "lerp with a gate": (lambda a, b, c: torch.lerp(a, b, a @ c), []),
    "lerp by hand": (lambda a, b, c: a + c[0] * (b - a), ["0: a_1", "1: b_1"]),
    "lerp by hand, reversed": (lambda a, b, c: 0.5 * (b - a) + a, ["1: a_1", "0: b_1"]),
    "gate by hand": (lambda a, b, c: a + (a @ c) * (b - a), []),
    "straight through": (lambda a, b, c: a + (b - a).detach(), []),
    "index_add": (
        lambda a, b, c: torch.index_add(a, 0, torch.tensor([1, 0]), b),
        ["0: a_1", "3: b_1"],
    ),
    "stack and sum": (lambda a, b, c: torch.stack([a, b], 1).sum(1), ["0: a_1", "1: b_1"]),
    "stack and sum over another": (lambda a, b, c: torch.stack([a, b], 1).sum(0), []),
    "a number": (lambda a, b, c: a + 1, []),
    "a product": (lambda a, b, c: a * b, []),
}


@pytest.mark.parametrize("case", SUMS)
def test_terms(case: str) -> None:
    f, expected = SUMS[case]
    found = []
    for term in summands(last_value(f)):
        sign, times = "-" * term.is_negative, " @ " if term.is_contraction else " "
        names = times.join(factor.name for factor in term.factors)
        found.append(f"{term.operand}: {sign}{names}")
    assert found == expected


COPIES: dict[str, tuple[Function, bool]] = {
    "cast": (lambda a, b, c: a.double(), True),
    "reshaped": (lambda a, b, c: a.reshape(8), True),
    "cut": (lambda a, b, c: a[:1], True),
    "dropped out": (lambda a, b, c: torch.dropout(a, 0.5, True), True),
    "times a number": (lambda a, b, c: 2 * a, True),
    "divided": (lambda a, b, c: a / 3, True),
    "plus a number": (lambda a, b, c: a + 0, True),
    "times a gain": (lambda a, b, c: a * c[0], True),
    "times a random mask": (lambda a, b, c: a * torch.empty_like(a).bernoulli_(0.5), True),
    "times another": (lambda a, b, c: a * b, False),
    "times its own norm": (lambda a, b, c: a * a.norm(dim=1, keepdim=True), False),
    "times a gate": (lambda a, b, c: a * (b @ c)[:1], False),
    "activated": (lambda a, b, c: a.relu(), False),
    "negated": (lambda a, b, c: -a, True),
    "multiplied": (lambda a, b, c: a @ c, False),
}


@pytest.mark.parametrize("case", COPIES)
def test_copies(case: str) -> None:
    f, is_copy = COPIES[case]
    value: Value | None = last_value(f)
    while value is not None and value.name != "a_1":
        value = carried(value)
    assert (value is not None) is is_copy


def test_reading_leaves_the_graph_alone() -> None:
    gm: fx.GraphModule = make_fx(lambda a, b: torch.lerp(a, b, 0.3) - b)(A, B)
    before = graph_text(gm)
    for value in Dataflow(gm).values:
        summands(value), carried(value)
    assert graph_text(gm) == before
