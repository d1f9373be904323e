"""The frontier: the least predicted loss increase for each budget, from the smallest to exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rfcompile.errors import OptionError
from rfcompile.planning.link import Link
from rfcompile.planning.plan import COSTS, Plan, options_of, plan
from rfcompile.planning.scores import Scores
from rfcompile.report.table import TableReport, table


@dataclass(frozen=True)
class Frontier(TableReport):
    """What :func:`frontier` found: ``print`` it, plot :meth:`points`, take a plan from it.

    Args:
        budget: "bytes" or "seconds".
        plans: by growing cost and falling increase of the loss; no plan beats another in both.
    """

    budget: Literal["bytes", "seconds"]
    plans: tuple[Plan, ...]

    def points(self) -> list[tuple[float, float]]:
        """(bytes or seconds of one batch, predicted increase of the mean loss) of each plan."""
        return [
            (sum(map(COSTS[self.budget], found.choices)), found.increase) for found in self.plans
        ]

    def lines(self) -> Iterator[str]:
        yield f"least predicted loss increase by {self.budget} of one batch"
        exact = sum(choice.exact_bytes for choice in self.plans[0].choices)
        rows = [["bytes", "of exact", "ms", "loss increase", "exact sites"]]
        for found in self.plans:
            share = f"{100 * found.bytes / exact:.1f} %" if exact else ""
            ms = "" if found.seconds is None else f"{1e3 * found.seconds:.3f}"
            left = sum(not choice.format for choice in found.choices)
            rows.append([f"{found.bytes:,.0f}", share, ms, f"{found.increase:.3g}", str(left)])
        yield from table(rows)


def frontier(scores: Scores, *, link: Link | None = None, points: int = 16) -> Frontier:
    """The plans of least predicted loss increase over a range of budgets.

    The budgets are bytes, with a link seconds: from the smallest that a plan can keep to the
    largest that a plan can use, evenly spaced on a logarithmic scale. Each plan is exact
    (:func:`~rfcompile.plan`), so the increase never grows with the budget.

    Args:
        scores: from :func:`~rfcompile.score`.
        link: what carries the traffic.
        points: how many budgets, 2 or more; equal plans are listed once.

    Raises:
        OptionError: ``points`` or ``link``.
    """
    if type(points) is not int or points < 2:
        raise OptionError("points", points, "give a number of budgets, 2 or more.")
    budget: Literal["bytes", "seconds"] = "bytes" if link is None else "seconds"

    cost = COSTS[budget]
    sites = options_of(scores, link)
    least = sum(min(map(cost, options)) for options in sites)
    best = [min(options, key=lambda option: (option.increase, cost(option))) for options in sites]
    most = sum(map(cost, best))
    between = np.geomspace(least, most, points)[1:-1].tolist() if least > 0 else []
    found: list[Plan] = []
    for limit in [least, *between, most]:
        budgets = {budget: limit}
        planned = plan(scores, **budgets, link=link)
        if not found or planned.increase < found[-1].increase:
            found.append(planned)
    return Frontier(budget, tuple(found))
