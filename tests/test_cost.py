"""The cost of collectives: each formula, its rounding, and symbolic sizes."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rfcompile.cost import sent_bytes

SHARES = {  # of the input, as the docstring states it
    "all_reduce": lambda W: Fraction(2 * (W - 1), W),
    "all_gather": lambda W: Fraction(W - 1),
    "reduce_scatter": lambda W: Fraction(W - 1, W),
    "all_to_all": lambda W: Fraction(W - 1, W),
    "broadcast": lambda W: Fraction(1 if W > 1 else 0),
}


@pytest.mark.parametrize("collective", SHARES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 7])
def test_sent_bytes_is_the_stated_share_rounded_up(collective: str, world_size: int) -> None:
    for size in (0, 1, 2, 5, 4096, 4097, 10**15 + 1):
        expected = ceil(SHARES[collective](world_size) * size)
        assert sent_bytes(collective, size, world_size) == expected


def test_a_ring_all_reduce_is_a_reduce_scatter_and_an_all_gather_of_the_shards() -> None:
    n, W = 4096, 8
    two_steps = sent_bytes("reduce_scatter", n, W) + sent_bytes("all_gather", n // W, W)
    assert sent_bytes("all_reduce", n, W) == two_steps == 7168


@pytest.mark.parametrize("collective", SHARES)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_sympy_sizes_stay_symbolic(collective: str, world_size: int) -> None:
    n = sympy.Symbol("n", integer=True, nonnegative=True)
    cost = sympy.sympify(sent_bytes(collective, n, world_size))
    for size in (0, 1, 5, 4096):
        assert cost.subs(n, size) == sent_bytes(collective, size, world_size)


def test_symint_sizes_stay_symbolic_and_add_no_guard() -> None:
    shape_env = ShapeEnv()
    symbol = shape_env.create_unbacked_symint()  # any guard on it raises
    cost = sent_bytes("all_reduce", 4 * symbol, 4)
    assert isinstance(cost, torch.SymInt)
    (free,) = cost.node.expr.free_symbols
    assert cost.node.expr.subs(free, 5) == sent_bytes("all_reduce", 20, 4) == 30


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(KeyError, match="gather_all"):
        sent_bytes("gather_all", 8, 2)
