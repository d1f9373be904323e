"""The cost of collectives: each formula, its rounding, symbolic sizes, and the sum over a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore

from rfcompile.graph.text import graph_text
from rfcompile.graph.wire_bytes import wire_bytes
from rfcompile.wire.cost import sent_bytes

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
    size: Any = 4 * symbol
    cost: Any = sent_bytes("all_reduce", size, 4)
    assert isinstance(cost, torch.SymInt)
    (free,) = cost.node.expr.free_symbols
    assert cost.node.expr.subs(free, 5) == sent_bytes("all_reduce", 20, 4) == 30


def test_an_unknown_collective_is_refused() -> None:
    with pytest.raises(KeyError, match="gather_all"):
        sent_bytes("gather_all", 8, 2)


# ---- a whole graph -------------------------------------------------------------------------

W = 4
c10d: Any = torch.ops._c10d_functional


@pytest.fixture
def group() -> Iterator[str]:
    """The name of a process group of 4 ranks that moves no data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=W)
    yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    dist.destroy_process_group()


def text_of(f: Callable[..., Any], *args: Tensor, symbolic: bool = False) -> str:
    mode: Any = "symbolic" if symbolic else "fake"
    return graph_text(make_fx(f, tracing_mode=mode)(*args))


CALLS: dict[str, tuple[str, Callable[[Tensor, str], Tensor]]] = {
    "all_reduce": ("all_reduce", lambda x, g: c10d.all_reduce(x, "sum", g)),
    "all_reduce_": ("all_reduce", lambda x, g: c10d.all_reduce_(x.clone(), "sum", g)),
    "all_gather": ("all_gather", lambda x, g: c10d.all_gather_into_tensor(x, W, g)),
    "reduce_scatter": (
        "reduce_scatter", lambda x, g: c10d.reduce_scatter_tensor(x, "avg", W, g)
    ),
    "all_to_all": (
        "all_to_all", lambda x, g: c10d.all_to_all_single(x, [2] * W, [2] * W, g)
    ),
    "broadcast": ("broadcast", lambda x, g: c10d.broadcast(x, 0, g)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool], ids=str)
def test_wire_bytes_of_one_collective(group: str, name: str, dtype: torch.dtype) -> None:
    collective, call = CALLS[name]
    x = torch.zeros(8, 3, dtype=dtype)
    text = text_of(lambda x: c10d.wait_tensor(call(x, group)), x)
    assert wire_bytes(text) == sent_bytes(collective, x.nbytes, W) > 0


def test_wire_bytes_add_up_and_nothing_else_counts(group: str) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        total = c10d.wait_tensor(c10d.all_reduce(x, "sum", group))
        gathered = c10d.all_gather_into_tensor_coalesced([x, y.to(torch.float16)], W, group)
        return total * 2, *map(c10d.wait_tensor, gathered)

    x, y = torch.zeros(8), torch.zeros(16)
    gathered = [sent_bytes("all_gather", n, W) for n in (8 * 4, 16 * 2)]
    expected = sent_bytes("all_reduce", 8 * 4, W) + sum(gathered)
    assert wire_bytes(text_of(f, x, y)) == expected == 48 + 96 + 96


def test_a_graph_without_collectives_sends_nothing() -> None:
    assert wire_bytes(text_of(lambda x: x + 1, torch.zeros(8))) == 0
    assert wire_bytes("") == 0


def test_wire_bytes_are_unknown_for_symbolic_sizes(group: str) -> None:
    def f(x: Tensor) -> Tensor:
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", group))  # type: ignore[no-any-return]

    assert wire_bytes(text_of(f, torch.zeros(8, 4), symbolic=True)) is None
    assert wire_bytes(text_of(f, torch.zeros(8, 4))) == 192


@pytest.mark.parametrize(
    ("call", "sent"),
    [
        ("all_reduce.default(x, 'sum', '0')", None),
        ("all_gather_into_tensor.default(x, 4, '0')", 96),
        ("reduce_scatter_tensor.default(x, 'sum', 4, '0')", 24),
        ("wait_tensor.default(x)", 0),
        ("_wrap_tensor_autograd.default(x)", 0),
    ],
)
def test_without_the_group_bytes_are_known_where_the_call_gives_its_size(
    call: str, sent: int | None
) -> None:
    assert not dist.is_initialized()
    assert wire_bytes(f"x: f32[8]\ny: f32[8] = _c10d_functional.{call}") == sent


def test_wire_bytes_are_unknown_for_other_collectives(group: str) -> None:
    text = f"x: f32[8]\nsend: f32[8] = _c10d_functional.isend.default(x, 1, 0, '{group}')"
    assert wire_bytes(text) is None
