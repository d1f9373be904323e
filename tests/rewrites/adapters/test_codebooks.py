"""Codebooks of 1 to 8 bits: levels, errors, corner cases, and the bytes that codes take."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rfcompile.errors import DtypeError, NonFiniteError, OptionError
from rfcompile.rewrites.adapters.codebooks import BITS, codebook_of, pack_codes, unpack_codes


def values(seed: int = 0, n: int = 1000) -> torch.Tensor:
    return torch.randn(n // 10, 10, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("bits", BITS)
def test_the_errors_stay_in_their_bounds(bits: int) -> None:
    x = values(bits)
    squared = {}
    for kind in ("kmeans", "uniform"):
        codes, levels = codebook_of(x, bits, kind)  # type: ignore[arg-type]
        assert codes.shape == x.shape
        assert codes.dtype is torch.uint8
        assert len(levels) <= 2**bits
        assert int(codes.max()) < len(levels)
        assert torch.equal(levels, levels.sort().values)
        off = (levels[codes.long()].double() - x.double()).abs()
        nearest = (levels.double() - x.double().unsqueeze(-1)).abs().amin(-1)
        torch.testing.assert_close(off, nearest, rtol=0, atol=0)
        squared[kind] = float(off.square().sum())
        if kind == "uniform":
            step = float(x.max() - x.min()) / (2**bits - 1)
            rounding = 2**-24 * float(x.abs().max())
            assert float(off.max()) <= step / 2 + rounding
    # Levels are rounded to float32: relatively by 2**-24, so is each error, and the square twice.
    slack = 2**-22 * float(x.abs().max()) * math.sqrt(x.numel() * squared["uniform"])
    assert squared["kmeans"] <= squared["uniform"] + slack


@pytest.mark.parametrize("kind", ["kmeans", "uniform"])
def test_it_is_deterministic(kind: str) -> None:
    first, again = (codebook_of(values(), 3, kind) for _ in range(2))  # type: ignore[arg-type]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_kmeans_finds_clusters_that_are_there() -> None:
    centres = torch.tensor([-7.0, -1.0, 0.5, 9.0])
    spread = 0.01 * torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    codes, levels = codebook_of(centres[:, None] + spread, 2)
    assert torch.equal(codes, torch.arange(4, dtype=torch.uint8)[:, None].expand(4, 50))
    torch.testing.assert_close(levels, (centres[:, None] + spread).mean(1), rtol=1e-6, atol=0)


def test_lloyd_ends_where_each_level_is_the_mean_of_its_values() -> None:
    x = values(3)
    codes, levels = codebook_of(x, 4)
    for code in range(16):
        mine = x[codes == code].double()
        assert mine.numel()
        torch.testing.assert_close(levels[code].double(), mine.mean(), rtol=2**-23, atol=1e-12)


def test_few_distinct_values_lose_nothing() -> None:
    x = torch.tensor([0.1, -3.0, 0.1, 0.1, 2.0e-30, 0.1])
    for bits in (2, 3, 8):
        codes, levels = codebook_of(x, bits)
        assert len(levels) == 3
        assert torch.equal(levels[codes.long()], x)
    same = torch.full((5,), 1 / 3)
    for kind in ("kmeans", "uniform"):
        codes, levels = codebook_of(same, 1, kind)  # type: ignore[arg-type]
        assert torch.equal(levels[codes.long()], same)


def test_one_value_many_times_and_a_few_others() -> None:
    x = torch.cat([torch.zeros(1000), torch.arange(1.0, 20.0)])
    codes, levels = codebook_of(x, 3)
    even_codes, even = codebook_of(x, 3, "uniform")
    assert (levels[codes.long()] - x).norm() < (even[even_codes.long()] - x).norm()
    assert len(levels.unique()) == 8


def test_nothing_and_one() -> None:
    codes, levels = codebook_of(torch.empty(0, 4), 2)
    assert codes.shape == (0, 4)
    assert levels.numel() == 0
    codes, levels = codebook_of(torch.tensor([[2.5]]), 1)
    assert levels[codes.long()].item() == 2.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = values()
    x[3, 3] = bad
    with pytest.raises(NonFiniteError):
        codebook_of(x, 4)


def test_options_outside_their_rule() -> None:
    for bits in (0, 9, 2.0):
        with pytest.raises(OptionError, match=f"bits={bits}"):
            codebook_of(values(), bits)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="codebook='lloyd'"):
        codebook_of(values(), 2, "lloyd")  # type: ignore[arg-type]
    with pytest.raises(DtypeError):
        codebook_of(torch.arange(4), 2)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 13, 64])
def test_codes_take_their_bits_and_come_back(bits: int, numel: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (numel,), generator=generator).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == math.ceil(numel * bits / 8)
    assert torch.equal(unpack_codes(packed, bits, numel).to(torch.uint8), codes)


@pytest.mark.parametrize("kind", ["kmeans", "uniform"])
def test_values_beyond_float32_become_no_inf(kind: Any) -> None:
    with pytest.raises(NonFiniteError, match="exceed float32"):
        codebook_of(torch.tensor([1e300, 0.0], dtype=torch.float64), 2, kind)
