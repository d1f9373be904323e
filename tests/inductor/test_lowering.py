"""Compiled codec operators: the bytes of the eager ones; generated, in one kernel, fused, visible.

What is generated for a GPU is looked at here in C++; by default a CPU calls a library instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

from rfcompile.codec import operators
from rfcompile.inductor.lowering import generating_on_cpu

pytestmark = pytest.mark.slow

FORMATS = ["2b:g16:tread:stoch:saturate", "3b:tensor", "4b:h128", "8b:h8"]
"""Each kind of group, grid, rotation, rounding and of what is not finite; 5 and 6 bits: below."""
KERNEL = "async_compile.cpp_pybinding("
EXTERNAL_CALL = re.compile(r"(\baten\.\w+|extern_kernels)\.\w+\(")


@pytest.fixture(autouse=True, scope="module")
def generating() -> Iterator[None]:
    with generating_on_cpu():
        yield


def wide_values() -> Tensor:
    """Four rows over 16 decades, with tails, NaN, Inf and a row of zeros."""
    x = torch.randn(4, 1000) * torch.logspace(-8, 8, 1000)
    x[1, 5], x[2, 700], x[3] = torch.nan, torch.inf, 0
    return x


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        both_nan = a.isnan() & b.isnan()
        a, b = a.masked_fill(both_nan, 0.0), b.masked_fill(both_nan, 0.0)
        return torch.equal(a.view(torch.int32), b.view(torch.int32))
    return torch.equal(a, b)


def compiled(f: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """The result of compiling ``f`` into one graph, and the generated code."""
    result, code = run_and_get_code(torch.compile(f, fullgraph=True), *args)
    return result, "".join(code)


def test_same_bits_can_fail() -> None:
    x = torch.tensor([1.0, torch.nan, 0.0])
    assert same_bits(x, x.clone())
    assert not same_bits(x, torch.tensor([1.0, torch.nan, -0.0]))
    assert not same_bits(x, torch.tensor([1.0, 2.0, 0.0]))


def test_the_search_for_external_calls_can_succeed() -> None:
    code = generated(lambda t: t @ t, torch.randn(64, 64))
    assert EXTERNAL_CALL.search(code)


def generated(f: Callable[..., Any], *args: Tensor) -> str:
    """The code that Inductor generates for ``f``; the C++ in it is not compiled."""

    def uncompiled(self: object, argtypes: list[str], source: str) -> Callable[..., None]:
        return lambda *_: None

    try:
        with (
            patch.object(AsyncCompile, "cpp_pybinding", uncompiled),
            config.patch(fx_graph_cache=False),
        ):
            return compiled(f, *args)[1]
    finally:
        PyCodeCache.cache_clear()  # its modules have the kernels that do nothing
        torch._dynamo.reset()


OPERATORS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "quantize": operators.quantize,
    "dequantize": lambda p, fmt: operators.dequantize(p, fmt, torch.float32),
    "dequantize_sum": lambda p, fmt: operators.dequantize_sum(p, fmt, torch.float32),
    "requantize": lambda p, fmt: operators.requantize(p, fmt, True),
}


@pytest.fixture(scope="module", params=FORMATS)
def everything(request: pytest.FixtureRequest) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """All operators of a format: what they give compiled as one graph, eager, and the code."""
    torch.manual_seed(0)
    x = wide_values()
    payload = operators.quantize(x, request.param)

    def run(x: Tensor, payload: Tensor) -> dict[str, Tensor]:
        return {
            name: operator(x if name == "quantize" else payload, request.param)
            for name, operator in OPERATORS.items()
        }

    got, code = compiled(run, x, payload)
    return got, run(x, payload), code


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiled_bytes_are_the_eager_bytes(everything: Any, operator: str) -> None:
    got, expected, _ = everything
    assert same_bits(got[operator], expected[operator])


def test_the_operators_are_one_kernel(everything: Any) -> None:
    assert everything[2].count(KERNEL) == 1


def test_the_operators_call_nothing_outside(everything: Any) -> None:
    assert not EXTERNAL_CALL.search(everything[2])


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.bfloat16, ["4b", "8b"]),
        (torch.float16, ["4b", "8b"]),
        (torch.float32, ["5b", "6b"]),
    ],
)
def test_a_lone_operator_gives_the_eager_bytes(dtype: torch.dtype, formats: list[str]) -> None:
    """Each operator reads an input of its own: Inductor fuses none with another one."""
    xs = [torch.randn(2, 300).to(dtype) for _ in formats]
    payloads = [operators.quantize(x, fmt) for x, fmt in zip(xs, formats, strict=True)]

    def run(xs: list[Tensor], payloads: list[Tensor]) -> list[Tensor]:
        there = [operators.quantize(x, fmt) for x, fmt in zip(xs, formats, strict=True)]
        return there + [
            operators.dequantize(p, fmt, dtype) for p, fmt in zip(payloads, formats, strict=True)
        ]

    got, _ = compiled(run, xs, payloads)
    assert all(torch.equal(a, b) for a, b in zip(got, run(xs, payloads), strict=True))


def test_one_graph_serves_many_sizes() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    run = torch.compile(lambda t: operators.quantize(t, "4b"), backend=counter, dynamic=True)
    for n in (130, 1000, 4096):
        x = torch.randn(3, n)
        assert torch.equal(run(x), operators.quantize(x, "4b"))
    assert counter.frame_count == 1


def test_producers_and_consumers_fuse() -> None:
    x, y = torch.randn(4, 1024), torch.randn(4, 1024)
    quantized, code = compiled(
        lambda a, b: operators.quantize(torch.nn.functional.gelu(a + b), "4b"), x, y
    )
    assert code.count(KERNEL) == 1
    assert torch.equal(quantized, operators.quantize(torch.nn.functional.gelu(x + y), "4b"))

    payload = operators.quantize(x, "4b")
    out, code = compiled(lambda p: operators.dequantize(p, "4b", torch.float32).relu(), payload)
    assert code.count(KERNEL) == 1
    assert torch.equal(out, operators.dequantize(payload, "4b", torch.float32).relu())


class Look(CustomGraphPass):
    """Notes the operators of a graph."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen += [node.target for node in graph.nodes]

    def uuid(self) -> None:
        return None  # never served from a cache


def test_the_operator_is_one_node_at_the_end_of_the_post_grad_passes() -> None:
    look = Look()
    with config.patch(post_grad_custom_post_pass=look):
        generated(lambda t: operators.quantize(t * 2, "4b"), torch.randn(2, 256))
    assert look.seen.count(operators.quantize) == 1


def test_an_operator_that_inductor_met_before_is_lowered_all_the_same(tmp_path: Path) -> None:
    # Inductor compiles an operator that it does not know to an opaque call, and remembers that.
    code = """
import torch, rfcompile
x = torch.randn(1, 1000)
code = lambda x: torch.ops.rfcompile.quantize(x, "4b:g128:rise", 0)
torch.compile(code)(x)
import rfcompile.inductor.lowering
from torch._inductor.utils import run_and_get_code
with rfcompile.inductor.lowering.generating_on_cpu():
    y, (source,) = run_and_get_code(torch.compile(lambda x: code(x + 1)), x)
print("torch.ops.rfcompile" in source, torch.equal(y, code(x + 1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"]
