"""The multiple-choice knapsack: one option a site, the least loss within a budget of cost, exactly.

Why the result is exact. States are pairs (cost, loss) of choices for the first sites. A state that
another one beats in both is dropped: whatever completes it completes the other one at least as well
(Nemhauser and Ullmann 1969). A state is also dropped if its loss plus a lower bound of what the
other sites add is above the loss of a plan that is known. The bound is the linear relaxation, where
sites may mix their options: the lower convex hulls of the options, their segments in the order of
their slopes (Sinha and Zoltners 1979). Nothing else is dropped, so an optimal plan survives. Costs
are not rounded to a grid. Sums are float64; the bound allows for their rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Options = Sequence[Sequence[float]]
"""For each site, a number for each of its options."""

_ROUNDING = 1e-12
"""More than the relative rounding error of a float64 sum over 1,000 sites, 1,000 * 2**-53."""


def choose(costs: Options, losses: Options, budget: float) -> list[int] | None:
    """The option of each site with the least sum of losses whose costs sum to at most ``budget``.

    Among plans of equal loss one of the least cost. None: every plan costs more.

    Args:
        costs, losses: of the same layout; any finite numbers, also negative ones.
    """
    sites = [_Site.of(c, x) for c, x in zip(costs, losses, strict=True)]
    least = [float(site.cost[0]) for site in sites]
    slack = _ROUNDING * sum(float(np.abs(site.cost).max()) for site in sites)
    limit = budget + (slack if math.isfinite(budget) else 0.0)
    if sum(least) > limit:
        return None
    known = _rounded_down(sites, budget)
    known += _ROUNDING * sum(float(np.abs(site.loss).max()) for site in sites)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for i, site in enumerate(sites):
        grown, added = (cost[:, None] + site.cost).ravel(), (loss[:, None] + site.loss).ravel()
        others = _Relaxed.of(sites[i + 1 :])
        within = grown + others.least <= limit
        bound = added + others.loss(limit - grown)
        kept = np.flatnonzero(within & (bound <= known))
        kept = kept[np.lexsort((added[kept], grown[kept]))]
        before = np.concatenate(([np.inf], np.minimum.accumulate(added[kept])[:-1]))
        kept = kept[added[kept] < before]
        cost, loss = grown[kept], added[kept]
        steps.append(np.divmod(kept, len(site.cost)))
    state, chosen = len(loss) - 1, []
    for site, (parents, options) in zip(reversed(sites), reversed(steps), strict=True):
        chosen.append(int(site.option[options[state]]))
        state = int(parents[state])
    return chosen[::-1]


@dataclass(frozen=True)
class _Site:
    """The options that no other beats, by growing cost and falling loss."""

    cost: Numbers
    loss: Numbers
    option: npt.NDArray[np.intp]

    @classmethod
    def of(cls, cost: Sequence[float], loss: Sequence[float]) -> _Site:
        c, x = np.asarray(cost, np.float64), np.asarray(loss, np.float64)
        order = np.lexsort((x, c))
        before = np.concatenate(([np.inf], np.minimum.accumulate(x[order])[:-1]))
        order = order[x[order] < before]
        return cls(c[order], x[order], order)

    def hull(self) -> list[tuple[float, float, float]]:
        """The segments of the lower convex hull: (slope, width in cost, height in loss)."""
        corners: list[int] = []
        for i in range(len(self.cost)):
            while len(corners) > 1 and self._slope(corners[-2], corners[-1]) >= self._slope(
                corners[-1], i
            ):
                corners.pop()
            corners.append(i)
        return [
            (self._slope(i, j), self.cost[j] - self.cost[i], self.loss[j] - self.loss[i])
            for i, j in itertools.pairwise(corners)
        ]

    def _slope(self, i: int, j: int) -> float:
        return float((self.loss[j] - self.loss[i]) / (self.cost[j] - self.cost[i]))


@dataclass(frozen=True)
class _Relaxed:
    """The least loss of some sites that may mix their options, as a function of the budget."""

    at: Numbers
    value: Numbers

    @classmethod
    def of(cls, sites: Sequence[_Site]) -> _Relaxed:
        segments = sorted(segment for site in sites for segment in site.hull())
        start = [sum(float(s.cost[0]) for s in sites)], [sum(float(s.loss[0]) for s in sites)]
        widths = np.array([width for _, width, _ in segments])
        heights = np.array([height for _, _, height in segments])
        at = np.concatenate((start[0], start[0][0] + np.cumsum(widths)))
        return cls(at, np.concatenate((start[1], start[1][0] + np.cumsum(heights))))

    @property
    def least(self) -> float:
        return float(self.at[0])

    def loss(self, budgets: Numbers) -> Numbers:
        found: Numbers = np.interp(budgets, self.at, self.value)
        return found


def _rounded_down(sites: Sequence[_Site], budget: float) -> float:
    """The loss of the relaxed plan without the segment that does not fit whole: a real plan."""
    relaxed = _Relaxed.of(sites)
    return float(relaxed.value[max(0, int(np.searchsorted(relaxed.at, budget, "right")) - 1)])
