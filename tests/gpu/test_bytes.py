"""The GPU speaks the bytes of the formula on the CPU: eager, as operators of torch, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings
from rfcompile.codec import cpu_codec, operators
from rfcompile.codec.formats import DTYPES, QuantFormat
from tests.gpu.on_gpu import (
    FORMATS,
    Kernels,
    assert_same,
    by_formula,
    by_operators,
    dtype_of,
    payload_of,
    wide_values,
)

SOME = [fmt for fmt in FORMATS if fmt.startswith(("4b", "3b"))]
EACH = list(enumerate(FORMATS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_eager_operators(fmt: str, dtype: torch.dtype, device: torch.device) -> None:
    x = wide_values(dtype)
    payload, average = payload_of(x, fmt), dtype == torch.float32
    got = by_operators(x.to(device), payload.to(device), fmt, average=average)
    assert_same(got, by_formula(x, payload, fmt, average=average))


@pytest.mark.parametrize("fmt", ["4b:g128", "3b:tensor:h32"])
def test_kernels_of_the_package_code(fmt: str, device: torch.device) -> None:
    """Else the test above would say nothing about them."""
    cpu_codec.load_kernels()
    x = wide_values().to(device)
    with Kernels(device) as kernels:
        by_operators(x, payload_of(x, fmt), fmt)
    assert kernels.count >= 4


@pytest.mark.parametrize(("number", "fmt"), EACH)
def test_the_formula_itself(number: int, fmt: str, device: torch.device) -> None:
    """It codes where Triton is missing."""
    x = wide_values(dtype_of(number))
    payload = payload_of(x, fmt)
    got = by_formula(x.to(device), payload.to(device), fmt)
    assert_same(got, by_formula(x, payload, fmt))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "fmt"), EACH)
def test_compiled_operators(number: int, fmt: str, device: torch.device) -> None:
    x = wide_values(dtype_of(number))
    payload = payload_of(x, fmt)
    run = torch.compile(by_operators, fullgraph=True, dynamic=False)
    assert_same(run(x.to(device), payload.to(device), fmt), by_formula(x, payload, fmt))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SOME)
def test_one_graph_for_all_sizes(fmt: str, device: torch.device) -> None:
    run = torch.compile(by_operators, fullgraph=True, dynamic=True)
    for rows, numel in ((4, 1000), (6, 3000), (5, 130)):
        x = wide_values(torch.bfloat16, rows, numel)
        payload = payload_of(x, fmt)
        assert_same(run(x.to(device), payload.to(device), fmt), by_formula(x, payload, fmt))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", SOME)
def test_fused_with_neighbours(fmt: str, device: torch.device) -> None:
    """In float32: what is fused keeps it, where eager would round to bfloat16 in between."""
    x, y = wide_values(), torch.randn(4, 1000)
    payload = payload_of(2 * x + 1, fmt)
    size = operators.dequantize(payload, fmt, torch.float32).shape[1]

    def run(x: Tensor, y: Tensor, payload: Tensor) -> list[Tensor]:
        decoded = operators.dequantize(payload, fmt, torch.float32)
        total = operators.dequantize_sum(payload, fmt, torch.float32)
        return [operators.quantize(2 * x + 1, fmt, 5), decoded - y, total.relu()]

    y = torch.nn.functional.pad(y, (0, size - 1000))
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    assert_same(compiled(x.to(device), y.to(device), payload.to(device)), run(x, y, payload))


@pytest.mark.parametrize("fmt", ["4b:g128", "3b:g32:tread:stoch", "2b:g128:h32", "6b:tensor"])
@pytest.mark.parametrize("layout", ["transposed", "every_second", "offset", "expanded"])
def test_any_layout(fmt: str, layout: str, device: torch.device) -> None:
    x = wide_values(torch.bfloat16, 8, 1040)
    x = {
        "transposed": x.t().contiguous().t(),
        "every_second": x[:, ::2],
        "offset": x[1:, 3:],
        "expanded": x[:1].expand(4, -1),
    }[layout]
    on_device = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    on_device = on_device.copy_(x) if layout != "expanded" else x[:1].to(device).expand(4, -1)
    assert on_device.stride() == x.stride()
    assert_same([operators.quantize(on_device, fmt, 5)], [payload_of(x, fmt)])


@pytest.mark.parametrize("fmt", ["4b:g128", "3b:g128:h32:stoch", "5b:tensor", "2b:tensor:h8"])
@pytest.mark.parametrize("numel", [0, 1, 7, 127, 129, 4097])
def test_any_size(fmt: str, numel: int, device: torch.device) -> None:
    x = torch.randn(3, numel, dtype=torch.bfloat16)
    payload = payload_of(x, fmt)
    got = by_operators(x.to(device), payload.to(device), fmt)
    assert_same(got, by_formula(x, payload, fmt))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["4b:g128", "8b:g128:h32", "3b:tensor"])
def test_more_elements_than_32_bits_count(fmt: str, device: torch.device) -> None:
    """Two rows; the second one begins beyond 2**31 elements."""
    numel = 2**31 + 2**20 if device.type == "cuda" else 2**14
    ends = torch.randn(2, 4096, dtype=torch.bfloat16)
    x = torch.zeros(2, numel, dtype=torch.bfloat16, device=device)
    for place in (0, numel - 4096):
        x.narrow(1, place, 4096).copy_(ends)
    payload = operators.quantize(x, fmt)
    decoded = operators.dequantize(payload, fmt, torch.bfloat16)
    for place in (0, numel - 4096):
        got = decoded.narrow(1, place, 4096).cpu()
        if "tensor" in fmt:
            error = (got.float() - ends.float()).abs().max()
            # The value is rounded to bfloat16 once more.
            bound = QuantFormat.parse(fmt).max_error() + 2**-8
            assert float(error) <= bound * float(ends.abs().max())
        else:
            assert_same([got], [by_formula(ends, payload_of(ends, fmt), fmt)[1]])
