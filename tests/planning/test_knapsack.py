"""The knapsack against every choice there is."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from rfcompile.planning.knapsack import choose


def brute_force(costs: list[list[float]], losses: list[list[float]], budget: float) -> float | None:
    options = [range(len(site)) for site in costs]
    kept = [
        sum(losses[i][j] for i, j in enumerate(picked))
        for picked in itertools.product(*options)
        if sum(costs[i][j] for i, j in enumerate(picked)) <= budget
    ]
    return min(kept, default=None)


def random_problem(seed: int) -> tuple[list[list[float]], list[list[float]]]:
    """Costs that are whole or not, repeated or not; losses of both signs, some equal."""
    draw = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(draw.integers(1, 6)):
        k = draw.integers(1, 6)
        cost = draw.integers(0, 20, k).astype(float) if seed % 2 else draw.random(k) * 20
        loss = draw.integers(-3, 12, k).astype(float) if seed % 3 else draw.normal(size=k)
        costs.append(cost.tolist())
        losses.append(loss.tolist())
    return costs, losses


@pytest.mark.parametrize("seed", range(60))
def test_equal_to_brute_force(seed: int) -> None:
    costs, losses = random_problem(seed)
    lowest, highest = sum(map(min, costs)), sum(map(max, costs))
    for budget in (lowest, (lowest + highest) / 2, 0.8 * lowest + 0.2 * highest, highest):
        chosen = choose(costs, losses, budget)
        assert chosen is not None
        cost = sum(costs[i][j] for i, j in enumerate(chosen))
        assert cost <= budget * (1 + 1e-12)
        best = brute_force(costs, losses, budget * (1 + 1e-12))
        assert sum(losses[i][j] for i, j in enumerate(chosen)) == pytest.approx(best, abs=1e-9)
    assert choose(costs, losses, lowest - 0.01) is None


def test_an_infinite_budget_takes_the_least_loss() -> None:
    assert choose([[3, 2, 1], [0, 5]], [[0, 1, 2], [7, 1]], float("inf")) == [0, 1]
    assert choose([], [], 3) == []


def test_of_equal_losses_the_cheaper() -> None:
    assert choose([[5, 3, 9]], [[1, 1, 1]], 10) == [1]


def test_two_hundred_sites_take_seconds() -> None:
    draw = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8, 32])
    sizes = draw.integers(1, 64, 200) * 128
    costs = [(size * bits / 8 + size // 64).tolist() for size in sizes]
    losses = [(draw.random() * 4.0**-bits).tolist() for _ in sizes]
    begin = time.process_time()
    chosen = choose(costs, losses, 4 * float(sizes.sum()) / 8)
    assert time.process_time() - begin < 10
    assert chosen is not None
    assert len(chosen) == 200
