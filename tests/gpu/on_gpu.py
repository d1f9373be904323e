"""What the tests of a GPU share: formats, values, comparisons, streams and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rfcompile.codec import arithmetic, cpu_codec, operators, triton_launch
from rfcompile.codec.formats import BITS, DTYPES, QuantFormat
from tests.codec.triton_process import differing

FORMATS = [
    f"{bits}b:{rest}"
    for bits in BITS
    for rest in (
        *("g128:rise", "g128:tread", "g32:tread:full", "g16:tread:stoch:s7", "g128:rise:stoch"),
        *("g128:rise:h8", "g128:h32", "g128:tread:h128:stoch", "g64:h64:saturate"),
        *("tensor:rise", "tensor:tread:stoch", "tensor:h32", "g128:saturate", "g128:raise"),
    )
]

ADVICE = "ignore:TensorFloat32 tensor cores"
"""Inductor's advice for a float32 model, which would be an error here."""

SEED = 5


def dtype_of(number: int) -> torch.dtype:
    """The dtypes in turn, so that each format meets one of them."""
    return DTYPES[number % len(DTYPES)]


def wide_values(dtype: torch.dtype = torch.float32, rows: int = 4, numel: int = 1000) -> Tensor:
    """Rows over 16 decades (of float16 fewer), with tails, NaN, Inf and a row of zeros."""
    decades = 3 if dtype == torch.float16 else 8
    x = torch.randn(rows, numel) * torch.logspace(-decades, decades, numel)
    x[1, 5], x[2, 7 * numel // 10], x[3] = torch.nan, torch.inf, 0
    return x.to(dtype)


def payload_of(x: Tensor, fmt: str) -> Tensor:
    """By the formula."""
    return arithmetic.quantize(x, QuantFormat.parse(fmt), SEED)


def by_formula(x: Tensor, payload: Tensor, fmt: str, *, average: bool = False) -> list[Tensor]:
    """The results of the four operators, by the formula, where the tensors are."""
    parsed = QuantFormat.parse(fmt)
    return [
        arithmetic.quantize(x, parsed, SEED),
        arithmetic.dequantize(payload, parsed, x.dtype),
        arithmetic.dequantize_sum(payload, parsed, x.dtype, average),
        arithmetic.requantize(payload, parsed, average, SEED),
    ]


def by_operators(x: Tensor, payload: Tensor, fmt: str, *, average: bool = False) -> list[Tensor]:
    """The same by the operators."""
    return [
        operators.quantize(x, fmt, SEED),
        operators.dequantize(payload, fmt, x.dtype),
        operators.dequantize_sum(payload, fmt, x.dtype, average),
        operators.requantize(payload, fmt, average, SEED),
    ]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits, whatever the devices."""
    found = [differing(g.cpu(), e.cpu()) for g, e in zip(got, expected, strict=True)]
    assert found == [""] * len(expected)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work inside goes to a stream of its own, between what came before and what comes after."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(device: torch.device, call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """``call`` as a CUDA graph: what is returned replays it and gives its results."""
    if device.type == "cpu":
        return call
    with side_stream(device):  # kernels are compiled before the capture
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


class Kernels:
    """Counts what kernels of the package, not formulas, have coded."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.count = device, 0

    def __enter__(self) -> Kernels:
        is_gpu = self.device.type == "cuda"
        owner, name = (triton_launch, "launch") if is_gpu else (cpu_codec, "_call")
        run: Callable[..., None] = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> None:
            self.count += 1
            run(*args, **options)

        self.patch = mock.patch.object(owner, name, counted)
        self.patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.stop()
