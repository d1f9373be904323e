"""Stable and numerical rank, and the bound on what an error can do to the former."""

from __future__ import annotations

import math

import pytest
import torch

from rfcompile.companions import effective_ranks, stable_rank_bounds
from rfcompile.companions.adapter_codebooks import codebook_of


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
