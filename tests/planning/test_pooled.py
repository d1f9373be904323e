"""pooled_costs: chance goes, differences that are none stay."""

from __future__ import annotations

import numpy as np
import pytest

from rfcompile.planning.pooled import pooled_costs

SITES, FORMATS = 16, 9


def sums_of(probes: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Each an array [sites, formats] of what a probe of squared error 3 found; NaN: none."""
    found = np.array(probes)
    count = (~np.isnan(found)).sum(0)
    return count, 3.0 * count, 3 * np.nansum(found, 0), 3 * np.nansum(found**2, 0)


def true_costs(rng: np.random.Generator, *, outliers: bool) -> np.ndarray:
    costs = rng.lognormal(0, 1, (SITES, 1)) * np.linspace(1, 1.4, FORMATS)
    if outliers:  # half of the sites and of the formats
        costs[::2, ::2] *= 20
    return costs


def log_error(costs: np.ndarray, true: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.log(costs / true) ** 2)))


@pytest.mark.parametrize("seed", range(3))
def test_chance_goes_where_the_formats_of_a_site_cost_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = true_costs(rng, outliers=False)
    sums = sums_of([true * (1 + rng.uniform(-0.5, 0.5, true.shape)) for _ in range(2)])
    # A fit of 25 numbers to 144 values has sqrt(25 / 144) = 0.42 of their error. Some of the rest
    # stays where sites look by chance as if their formats differed.
    assert log_error(pooled_costs(*sums), true) < 0.7 * log_error(sums[2] / sums[1], true)


@pytest.mark.parametrize("seed", range(3))
def test_differences_that_are_no_chance_stay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    true = true_costs(rng, outliers=True)
    sums = sums_of([true * (1 + rng.uniform(-0.1, 0.1, true.shape)) for _ in range(2)])
    assert log_error(pooled_costs(*sums), true) < 1.1 * log_error(sums[2] / sums[1], true)


def test_an_estimate_near_zero_counts_as_its_chance() -> None:
    """A plan would choose it."""
    true = np.ones((SITES, FORMATS))
    probes = [1.5 * true, 0.5 * true]
    for probe, found in zip(probes, (1.0, -0.999), strict=True):
        probe[3, 4] = found
    # v = 0.5, so that chance is 0.5 after two probes; the one pair moves v by a few hundredths
    assert pooled_costs(*sums_of(probes))[3, 4] > 0.45


def test_estimates_that_were_not_repeated_stay() -> None:
    rng = np.random.default_rng(0)
    costs = rng.lognormal(0, 1, (SITES, FORMATS))
    np.testing.assert_allclose(pooled_costs(*sums_of([costs])), costs, rtol=1e-12)


def test_a_format_without_an_estimate_has_that_of_site_and_format() -> None:
    costs = np.outer([1.0, 2.0, 4.0, 8.0], [1.0, 1.0, 1.0])
    for missing in (np.nan, -0.5):  # no probe; one that chance turned around
        holes = costs.copy()
        holes[2, 1] = missing
        found = pooled_costs(*sums_of([holes]))
        assert found[2, 1] == pytest.approx(4.0)
        np.testing.assert_allclose(found[holes > 0], costs[holes > 0])


def test_a_site_whose_sum_is_negative_is_turned_around() -> None:
    costs = np.outer([1.0, -2.0, 4.0], [1.0, 1.0])
    np.testing.assert_allclose(pooled_costs(*sums_of([costs])), abs(costs))


def test_a_site_without_a_cost_has_none() -> None:
    costs = np.array([[1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(pooled_costs(*sums_of([costs]))[1], 0)
    np.testing.assert_array_equal(pooled_costs(*sums_of([0 * costs])), 0)
