"""Stable and numerical rank, and the bound on what an error can do to the former."""

from __future__ import annotations

import math

import pytest
import torch

from rfcompile.low_rank import effective_ranks, stable_rank_bounds
from rfcompile.rewrites.adapters.codebooks import codebook_of
from rfcompile.rewrites.low_rank.ranks import stable_rank
from rfcompile.rewrites.low_rank.svd import leading_svd


def test_ranks_of_known_matrices() -> None:
    stable, numerical = effective_ranks(torch.eye(5, 7))
    assert math.isclose(stable, 5, rel_tol=1e-6)
    assert numerical == 5
    stable, numerical = effective_ranks(torch.diag(torch.tensor([2.0, 1.0, 1.9e-3, 2.1e-3])))
    assert math.isclose(stable, 1.25, rel_tol=1e-4)
    assert numerical == 3  # above 2e-3
    assert effective_ranks(torch.zeros(3, 4)) == (0.0, 0)
    assert effective_ranks(torch.zeros(0, 4)) == (0.0, 0)
    stable, numerical = effective_ranks(torch.full((2, 2), math.nan))
    assert math.isnan(stable)
    assert numerical == 0


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_ranks_have_no_unit(scale: float) -> None:
    matrix = torch.diag(torch.tensor([2.0, 1.0, 1.9e-3], dtype=torch.float64)) * scale
    assert effective_ranks(matrix) == effective_ranks(matrix / scale)
    assert stable_rank(matrix) == pytest.approx(1.25, rel=1e-4)


@pytest.mark.parametrize("shape", [(1030, 1100), (1100, 1030)])
def test_ranks_of_a_large_matrix_need_no_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = torch.logspace(0, -5, 1030)  # 3/5 of them above 1e-3
    frames = [torch.linalg.qr(torch.randn(n, 1030, generator=seeded(n)))[0] for n in shape]
    matrix = (frames[0] * sizes) @ frames[1].t()
    monkeypatch.setattr(torch.linalg, "svdvals", lambda _: pytest.fail("decomposed"))
    stable, numerical = effective_ranks(matrix)
    assert stable == stable_rank(matrix)
    assert stable == pytest.approx(float(sizes.square().sum()), rel=1e-4)
    # float32 of the matrix moves a singular value by some 1e-7 of the largest: neighbours of the
    # bound are 1.1 % of it, 1.1e-5, apart
    assert numerical == int((sizes > 1e-3).sum())


def test_leading_values_of_a_flat_spectrum() -> None:
    matrix = torch.randn(1100, 1030, generator=seeded(0))
    u, values, v = leading_svd(matrix, 4)
    exact = torch.linalg.svdvals(matrix)[:4]
    assert torch.all(values <= exact * (1 + 1e-5))  # float32
    torch.testing.assert_close(values, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(u.t() @ matrix @ v.t(), values.diag(), rtol=1e-4, atol=1e-3)
    for again, first in zip(leading_svd(matrix, 4), (u, values, v), strict=True):
        assert torch.equal(again, first)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["kmeans", "uniform"])
def test_the_stable_rank_of_quantized_factors_keeps_its_bound(bits: int, kind: str) -> None:
    for seed in range(4):
        factor = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))
        matrix = factor @ factor.t()
        codes, levels = codebook_of(matrix, bits, kind)  # type: ignore[arg-type]
        quantized = levels[codes.long()]
        low, high = stable_rank_bounds(matrix, quantized - matrix)
        stable, _ = effective_ranks(quantized)
        # a relative 1e-5 for the float32 of the decomposition
        assert low * (1 - 1e-5) <= stable <= high * (1 + 1e-5)
        assert low <= effective_ranks(matrix)[0] * (1 + 1e-5)


def test_the_bound_closes_on_no_error_and_opens_on_a_large_one() -> None:
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    low, high = stable_rank_bounds(matrix, torch.zeros(6, 6))
    assert low == high
    assert stable_rank_bounds(matrix, 2 * matrix)[1] == math.inf
    assert stable_rank_bounds(torch.zeros(2, 2), torch.zeros(2, 2)) == (0.0, math.inf)
