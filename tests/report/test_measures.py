"""Measures: kurtosis of known distributions, SQNR in cases that can be computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rfcompile.report.measures import excess_kurtosis, sqnr_db

N = 2**20


def laplace() -> Tensor:
    return torch.distributions.Laplace(0.0, 1.0).sample((N,))


def coin() -> Tensor:
    return torch.randint(0, 2, (N,)).float()


# Excess kurtosis m4 - 3, m6 and m8, where mk is the k-th moment of the standardized distribution.
# The sample kurtosis of n values of a symmetric distribution has the variance
# (m8 - 4 m4 m6 - m4^2 + 4 m4^3) / n (Cramer 1946, section 27.4, to first order).
KNOWN: dict[str, tuple[Callable[[], Tensor], float, float, float]] = {
    "gaussian": (lambda: torch.randn(N), 0.0, 15.0, 105.0),
    "uniform": (lambda: torch.rand(N), -1.2, 27 / 7, 9.0),
    "laplace": (laplace, 3.0, 90.0, 2520.0),
    "coin": (coin, -2.0, 1.0, 1.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_kurtosis_of_known_distributions(name: str) -> None:
    sample, expected, m6, m8 = KNOWN[name]
    m4 = expected + 3
    deviation = math.sqrt(max(m8 - 4 * m4 * m6 - m4**2 + 4 * m4**3, 0) / N)
    x = sample()
    assert abs(excess_kurtosis(x) - expected) <= 5 * deviation + 1e-4
    # Place, scale and shape do not matter.
    moved = (x.double() * -3e4 + 7).reshape(2, -1, 4).transpose(0, 2)
    assert math.isclose(excess_kurtosis(moved), excess_kurtosis(x), rel_tol=1e-6, abs_tol=1e-6)


def test_kurtosis_by_hand() -> None:
    # values -1, 0, 0, 1: m2 = 1/2, m4 = 1/2, so 2 - 3
    assert excess_kurtosis(torch.tensor([-1.0, 0, 0, 1])) == -1.0
    assert excess_kurtosis(torch.tensor([5, 5, 6, 6])) == -2.0
    # one outlier among n: near n - 3
    outlier = torch.zeros(1000)
    outlier[3] = 1e-20
    n = 1000
    exact = (1 - 3 / n + 3 / n**2) * n**2 / (n - 1) - 3
    assert math.isclose(excess_kurtosis(outlier), exact, rel_tol=0.01)


@pytest.mark.parametrize(
    "x",
    [
        *(torch.full((n,), v, dtype=torch.float64) for n in (1, 3, 7, 1000) for v in (0.1, 1e30)),
        torch.zeros(10),
        torch.full((100,), -2.7).bfloat16(),
        torch.zeros(0),
        torch.tensor([1.0, torch.nan, 2.0]),
        torch.tensor([torch.inf, 1.0, 2.0]),
    ],
    ids=str,
)
def test_kurtosis_is_nan_where_there_is_none(x: Tensor) -> None:
    assert math.isnan(excess_kurtosis(x))


def test_measures_take_what_has_a_gradient_and_low_precision() -> None:
    x = torch.randn(100, requires_grad=True)
    assert excess_kurtosis(x) == excess_kurtosis(x.detach())
    assert isinstance(sqnr_db(x, x.bfloat16()), float)
    large = torch.tensor([60000.0, -60000.0, 0, 1]).half()
    assert math.isfinite(excess_kurtosis(large))
    assert math.isfinite(sqnr_db(large, large * 0.5))


@pytest.mark.parametrize(
    ("x", "decoded", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0 + 0.5], 20.0),  # 25 / 0.25
        ([1.0, 0.0], [0.0, 0.0], 0.0),  # all of it lost
        ([1.0, 1.0], [-1.0, 3.0], -10 * math.log10(4)),
        ([0.0, 0.0], [0.0, 1.0], -math.inf),
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([], [], math.nan),
        ([1.0, math.nan], [1.0, math.nan], math.nan),
        ([1.0, math.inf], [1.0, math.nan], math.nan),
    ],
)
def test_sqnr_by_hand(x: list[float], decoded: list[float], expected: float) -> None:
    found = sqnr_db(torch.tensor(x), torch.tensor(decoded))
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_sqnr_of_a_uniform_quantizer() -> None:
    """Rounding U(-1, 1) to steps of 2 / 2^b costs step^2 / 12: 6.02 b dB."""
    x = torch.rand(N, dtype=torch.float64) * 2 - 1
    for bits in (4, 8, 12):
        step = 2 / 2**bits
        decoded = (torch.floor(x / step) + 0.5) * step
        assert abs(sqnr_db(x, decoded) - 20 * bits * math.log10(2)) < 0.02
