"""The Triton kernels of the codec: the bytes of the formulas, no spills, wide loads and stores.

No GPU is needed: ``triton_process.py`` says how. On one they are tested by tests/gpu.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch

from rfcompile.codec import triton_codec
from rfcompile.codec.formats import BITS, DTYPES
from rfcompile.emission.machine_code import MachineCode
from tests.codec.triton_process import Case, differing, run

pytestmark = pytest.mark.kernels

INTERPRETED = [
    Case(f"{bits}b:{rest}", dtype, rows, average=rows == 2)
    for (bits, rest), dtype, rows in zip(
        (
            (bits, rest)
            for bits in BITS
            for rest in (
                *("g128:rise", "g32:tread", "g128:rise:stoch", "g16:tread:stoch:saturate"),
                *("g128:h32", "g64:tread:h64:stoch:s3", "g16:h2:saturate", "g256:h8:full"),
            )
        ),
        cycle(DTYPES),
        cycle((1, 2, 3, 4)),
        strict=False,
    )
] + [
    Case("4b:g1024:h1024:s9", torch.float32),
    Case("2b:g128:h128", torch.float16),
    *(Case("3b:g128:h32:stoch", torch.bfloat16, 2, numel) for numel in (0, 1, 16, 127, 129, 4096)),
    Case("4b:g128", torch.float32, 3, 1000, is_transposed=True),
    *(
        Case(f"{fmt[0]}b:tensor:{fmt[1:]}", dtype, rows, 9000, rows == 2)
        for fmt, dtype, rows in zip(
            [
                *(f"{bits}{rest}" for bits in BITS for rest in ("rise", "tread:h128:stoch")),
                *("4tread:stoch:saturate", "3h32:saturate", "5saturate", "8h32:saturate"),
            ],
            cycle(DTYPES),
            cycle((1, 2, 3, 4)),
            strict=False,
        )
    ),
    *(Case("3b:tensor:h8", torch.bfloat16, 2, numel) for numel in (0, 1, 7, 9, 8192, 8200)),
    Case("5b:tensor:h1024", torch.float16, 2, 9000, is_transposed=True),
]
"""Sizes and dtypes in turn, so that each format meets only some of them."""

COMPILED = [
    Case(fmt, torch.bfloat16, 8, 2**20)
    for fmt in ("3b:g128", "8b:g128", "2b:g128:h32", "4b:g128:h32", "4b:g32:stoch")
]
OTHERS = [
    Case(fmt, torch.bfloat16, 8, 2**20)
    for fmt in (
        *("2b:g128", "4b:g128", "5b:g128", "6b:g128", "4b:g128:h128"),
        *("3b:g128:h32", "5b:g128:h32", "6b:g128:h32", "8b:g128:h32"),
    )
]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, str]:
    folder = tmp_path_factory.mktemp("interpreted")
    return dict(zip(INTERPRETED, run("interpret", INTERPRETED, folder), strict=True))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, MachineCode]]:
    folder = tmp_path_factory.mktemp("compiled")
    return dict(zip(COMPILED, run("sm_90", COMPILED, folder), strict=True))


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_the_bytes_are_those_of_the_formulas(case: Case, differences: dict[Case, str]) -> None:
    assert differences[case] == ""


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.format)
def test_kernels_do_not_spill_and_move_wide_words(
    case: Case, compiled: dict[Case, dict[str, MachineCode]]
) -> None:
    """All but the scales, which are two bytes a group."""
    _check(compiled[case])
    for code in compiled[case].values():
        assert "fma" not in code.ir


@pytest.mark.slow
def test_nor_do_those_of_other_widths(tmp_path: Path) -> None:
    for kernels in run("sm_90", OTHERS, tmp_path):
        _check(kernels)


@pytest.mark.slow
def test_on_an_amd_gpu_too(tmp_path: Path) -> None:
    (kernels,) = run("gfx942", [Case("4b:g128:h32", torch.bfloat16, 8, 2**20)], tmp_path)
    _check(kernels)


def _check(kernels: dict[str, MachineCode]) -> None:
    assert list(kernels) == ["quantize", "dequantize", "dequantize_sum", "requantize"]
    for name, code in kernels.items():
        assert code.spilled == 0, name
        floats, payloads = (
            (code.loads, code.stores) if name == "quantize" else (code.stores, code.loads)
        )
        if name == "requantize":
            floats, payloads = {128: 1}, code.loads | code.stores
        assert set(floats) == {128}, name
        assert set(payloads) <= {8, 64, 128}, name
        assert payloads.get(8, 0) <= 4, name


TENSORS = ("2b:tensor:stoch", "4b:tensor:h32")


@pytest.fixture(scope="module")
def of_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, MachineCode]]:
    cases = [Case(fmt, torch.bfloat16, 8, 2**20) for fmt in TENSORS]
    return dict(zip(TENSORS, run("sm_90", cases, tmp_path_factory.mktemp("tensors")), strict=True))


@pytest.mark.parametrize("fmt", TENSORS)
def test_a_tensor_with_one_scale_is_coded_in_two_launches(
    fmt: str, of_tensors: dict[str, dict[str, MachineCode]]
) -> None:
    """A row of a payload begins two bytes after a word: its codes move by two bytes at most."""
    kernels = of_tensors[fmt]
    assert list(kernels) == [
        *("quantize_peaks", "quantize", "dequantize", "dequantize_sum"),
        *("requantize_peaks", "requantize"),
    ]
    for name, code in kernels.items():
        assert code.spilled == 0, name
        assert "fma" not in code.ir, name
    assert kernels["quantize_peaks"].loads.keys() == kernels["quantize"].loads.keys() == {128}
    for name in ("dequantize", "dequantize_sum"):
        assert kernels[name].stores.keys() == {128}


@pytest.mark.slow
def test_on_an_amd_gpu_it_does_not_spill(tmp_path: Path) -> None:
    for kernels in run("gfx942", [Case("3b:tensor:stoch", torch.bfloat16, 8, 2**20)], tmp_path):
        assert [name for name, code in kernels.items() if code.spilled] == []


def test_a_cpu_has_no_kernel() -> None:
    assert triton_codec.runs_on(torch.device("cuda"))
    assert not triton_codec.runs_on(torch.device("cpu"))


def test_the_comparison_sees_another_sign_of_zero() -> None:
    zero = torch.zeros(3)
    assert differing(zero, zero) == ""
    assert differing(-zero, zero) == "3 of 3 elements differ"
    assert differing(zero.half(), zero).startswith("torch.float16")
