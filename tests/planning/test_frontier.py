"""frontier: monotone, exact, from the smallest budget to exact."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import rfcompile as rf
from rfcompile.errors import OptionError
from rfcompile.planning.scores import FormatScore, SiteScore

FORMATS = {2: 1.0, 3: 0.2, 4: 0.05, 8: 1e-4}
POWERS = (1.0, 0.0, 1.0, 0.0, 3.0)


def scores_of(sensitivities: list[float]) -> rf.Scores:
    """Two batches; the increase of each site is its sensitivity times that of the format."""
    sites = []
    for i, s in enumerate(sensitivities):
        costs = {f"{bits}b:g32:tread": s * x for bits, x in FORMATS.items()}
        formats = [FormatScore(fmt, 0, 0, 2, 1, 1, cost, 0) for fmt, cost in costs.items()]
        site = SiteScore(f"s{i}", "float32", 4, {(4, 8, 32): 2}, POWERS, 3.0, tuple(formats))
        sites.append(site)
    return rf.Scores("digest", "activations", 2, 4.0, tuple(sites))


@pytest.mark.parametrize("link", [None, rf.Link(1e6, 1e-3, carrier="all_reduce", world=4)])
def test_more_cost_never_loses_more(link: Any) -> None:
    scores = scores_of([3.0, 1.0, 0.1, 1e-3, 7.0])
    found = rf.frontier(scores, link=link, points=30)
    points = found.points()
    assert len(points) > 10
    for (cost, increase), (more, less) in pairwise(points):
        assert cost < more
        assert increase > less
    first, last = found.plans[0], found.plans[-1]
    assert {choice.format for choice in first.choices} == {"2b:g32:tread"}
    assert last.policy.is_exact
    for plan, (cost, increase) in zip(found.plans, points, strict=True):
        again = rf.plan(scores, **{found.budget: cost}, link=link)
        assert again.increase == pytest.approx(increase, rel=1e-12)
        assert (plan.seconds is None) == (link is None)
    assert "loss increase" in str(found)
    assert found.budget == ("bytes" if link is None else "seconds")


def test_a_link_on_which_nothing_helps_has_one_plan() -> None:
    link = rf.Link(1e9, 1e-3, coding=1e6)
    found = rf.frontier(scores_of([1.0, 2.0]), link=link)
    assert [plan.policy.is_exact for plan in found.plans] == [True]


@pytest.mark.parametrize("points", [1, 2.5, True])
def test_a_number_of_points_that_is_none(points: Any) -> None:
    with pytest.raises(OptionError, match="give a number of budgets, 2 or more"):
        rf.frontier(scores_of([1.0]), points=points)
    with pytest.raises(OptionError, match=r"give an rf\.Link"):
        rf.frontier(scores_of([1.0]), link=3)
