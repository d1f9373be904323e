"""The C++ library of the codec: when it is loaded, what it codes, what is where it cannot be."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

from rfcompile.codec import arithmetic, cpu_codec, operators
from rfcompile.codec.formats import BITS, DTYPES

UNLOADED: dict[str, Any] = {"_library": None, "_failure": ""}
SPECS = [
    *(f"{bits}b:{rest}" for bits in BITS for rest in ("g128", "g32:rise:stoch")),
    *("4b:tensor:tread", "8b:g64:h64:saturate", "3b:g256:h8:full", "2b:g128:h32:stoch:s3"),
]


def coded(x: Tensor, spec: str, seed: int) -> list[Tensor]:
    """What each operator gives, as bytes."""
    payload = operators.quantize(x, spec, seed)
    found = [
        payload,
        operators.dequantize(payload, spec, x.dtype),
        operators.dequantize_sum(payload, spec, x.dtype, True),
        operators.requantize(payload, spec, True, seed),
    ]
    return [tensor.view(torch.uint8) for tensor in found]


@pytest.mark.parametrize("spec", SPECS)
def test_with_the_library_an_operator_gives_the_bytes_of_the_formula(spec: str) -> None:
    with mock.patch.multiple(cpu_codec, **UNLOADED):
        assert cpu_codec.load_kernels() == ""
        for dtype in DTYPES:
            for shape in ((2, 1000), (3, 129), (1, 1)):
                x = (torch.randn(shape) * 10).to(dtype)
                with mock.patch.object(arithmetic, "quantize", side_effect=AssertionError):
                    fast = coded(x, spec, 7)
                with mock.patch.object(cpu_codec, "_library", None):
                    slow = coded(x, spec, 7)
                for one, other in zip(fast, slow, strict=True):
                    assert torch.equal(one, other), (dtype, shape)


def test_an_empty_tensor_takes_the_formula() -> None:
    """The library would read the first row of a payload."""
    with mock.patch.multiple(cpu_codec, **UNLOADED):
        cpu_codec.load_kernels()
        assert not any(tensor.numel() for tensor in coded(torch.randn(2, 0), "4b", 7))
        with pytest.raises(IndexError):
            operators.dequantize_sum(torch.zeros(0, 66, dtype=torch.uint8), "4b", torch.float32)


def test_only_what_is_coded_on_a_cpu_has_the_library_loaded() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    with mock.patch.multiple(cpu_codec, **UNLOADED):
        cpu_codec.load_kernels_for([gpu, gpu])
        assert cpu_codec._library is None
        cpu_codec.load_kernels_for([gpu, cpu])
        assert cpu_codec._library is not None


def test_without_a_compiler_a_warning_comes_once_and_the_formula_codes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.randn(2, 300)
    with (
        mock.patch.multiple(cpu_codec, **UNLOADED),
        mock.patch.object(CppCodeCache, "load", side_effect=RuntimeError("no g++")) as load,
        caplog.at_level(logging.WARNING),
    ):
        for _ in range(2):
            assert cpu_codec.load_kernels() == "RuntimeError: no g++"
        assert operators.quantize(x, "4b").shape == (2, 198)
    assert load.call_count == 1
    [record] = caplog.records
    assert "several times slower on this CPU: RuntimeError: no g++" in record.getMessage()
