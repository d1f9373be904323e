"""The C++ kernels of the codec: the bytes of the formulas, whatever the format, dtype and size."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import cycle, product

import pytest
import torch

from rfcompile.codec import cpu_codec, operators
from rfcompile.codec.formats import BITS, DTYPES
from tests.codec.triton_process import Case, both, differing

SIZES = [(1, 3000, False), (3, 1000, True), (4, 129, False), (2, 1, False), (1, 0, False)]
"""Rows, elements of a row, and whether the rows are the columns of another tensor."""
ROTATIONS = (None, 2, 4, 8, 16, 64, 128, 256, 1024)
WAYS = ("", "tread", "stoch:s3", "tread:saturate", "full")


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    assert cpu_codec.load_kernels() == ""


def cases(bits: int) -> Iterator[Case]:
    """Every group with every rotation and every way; dtypes and sizes in turn."""
    turns = zip(cycle(DTYPES), cycle(SIZES), cycle((False, True)))  # endless
    for group, rotate, way in product(("g16", "g128", "g1024", "tensor"), ROTATIONS, WAYS):
        if group == "tensor" or (rotate or 1) <= int(group[1:]):
            words = [f"{bits}b", group, f"h{rotate}" if rotate else "", way]
            dtype, (rows, numel, is_transposed), average = next(turns)
            yield Case(":".join(filter(None, words)), dtype, rows, numel, average, is_transposed)


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_those_of_the_formulas(bits: int) -> None:
    wrong = {
        (str(case), name): text
        for case in cases(bits)
        for name, pair in both(case, cpu_codec).items()
        if (text := differing(*pair))
    }
    assert wrong == {}


@pytest.mark.parametrize("fmt", ["3b:g128:h32", "4b:g32:tread:stoch", "8b:tensor"])
def test_threads_change_nothing(fmt: str) -> None:
    """A tensor of many threads' worth, beside what one thread makes of it."""
    x = torch.randn(3, 2**16 + 5)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            payload = operators.quantize(x, fmt)
            decoded = operators.dequantize_sum(payload, fmt, torch.bfloat16)
            found.append((payload, decoded, operators.requantize(payload, fmt)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_large_tensors_have_it_loaded_and_small_ones_do_not() -> None:
    code = """
import sys, torch
from rfcompile.codec import cpu_codec, operators
operators.quantize(torch.ones(1, 100), "4b")
assert cpu_codec._library is None and "torch._inductor" not in sys.modules
operators.quantize(torch.ones(1, 2**16), "4b")
assert cpu_codec._library is not None
operators.quantize(torch.ones(1, 100), "4b")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_a_compiler_the_formula_codes_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(1, 2**17)
    expected = operators.quantize(x, "4b:h32")
    monkeypatch.setattr(cpu_codec, "_library", None)
    monkeypatch.setattr(cpu_codec, "_failure", "")
    monkeypatch.setattr(cpu_codec, "_FLAGS", ("-no-such-flag",))
    for _ in range(2):
        assert torch.equal(operators.quantize(x, "4b:h32"), expected)
    (record,) = (r for r in caplog.records if r.name == cpu_codec.__name__)  # torch logs traces
    assert "Without a C++ compiler (g++) the codec is several times slower" in record.message
