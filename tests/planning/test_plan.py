"""plan: budgets of bytes, seconds and loss, exact choices, TOML, and the check of a plan."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import BudgetError, OptionError, RFCompileWarning, ScoreError
from rfcompile.planning.plan import Choice, Plan
from rfcompile.planning.site_policy import site_policy
from rfcompile.wire.policy import matches
from tests.zoo import VOCABULARY, NanoGPT

FORMATS = [2, 3, 4, 8]
LINK = rf.Link(bandwidth=1e6, latency=1e-3)


def distance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def scored() -> tuple[nn.Module, list[Any], rf.Scores]:
    torch.manual_seed(0)
    model = NanoGPT(layers=3).eval()
    batches = [(x, model(x).detach()) for x in torch.randint(0, VOCABULARY, (4, 8, 32))]
    return model, batches, rf.score(model, batches, loss=distance, formats=FORMATS)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, list[Any], rf.Scores]:
    return scored()


def every_plan(scores: rf.Scores) -> list[tuple[float, float]]:
    """Bytes and predicted increase of all choices."""
    numel = 8 * 32 * 32
    sites = [
        [(numel * 4, 0.0)]
        + [
            (rf.QuantFormat.parse(f.format).payload_bytes(numel), scores.increase(site, f))
            for f in site.formats
        ]
        for site in scores.sites
    ]
    return [
        (sum(size for size, _ in picked), sum(loss for _, loss in picked))
        for picked in itertools.product(*sites)
    ]


@pytest.mark.parametrize("bits", [2.2, 3, 4, 6.7, 20, 32])
def test_bytes_against_every_choice(bits: float, case: Any) -> None:
    _, _, scores = case
    budget = 3 * 8 * 32 * 32 * bits / 8
    found = rf.plan(scores, bytes=budget)
    best = min(loss for size, loss in every_plan(scores) if size <= budget)
    assert found.bytes <= budget
    assert found.increase == pytest.approx(best, rel=1e-9)
    assert found.seconds is None


def test_loss_against_every_choice(case: Any) -> None:
    _, _, scores = case
    budget = sum(scores.increase(site, site.formats[1]) for site in scores.sites)
    found = rf.plan(scores, loss=budget)
    assert found.increase <= budget * (1 + 1e-12)
    assert found.bytes == min(s for s, loss in every_plan(scores) if loss <= budget * (1 + 1e-12))
    assert rf.plan(scores, loss=0).bytes == 3 * 8 * 32 * 32 * 4


def test_more_budget_never_loses_more(case: Any) -> None:
    _, _, scores = case
    losses = [rf.plan(scores, bytes=b).increase for b in range(8000, 100_000, 4000)]
    assert losses == sorted(losses, reverse=True)


def test_seconds_are_those_of_the_link(case: Any) -> None:
    _, _, scores = case
    slow = rf.plan(scores, seconds=0.020, link=LINK)
    assert slow.seconds is not None
    assert slow.seconds <= 0.020
    assert slow.seconds == pytest.approx(3 * 1e-3 + slow.bytes / 1e6)
    assert slow.bytes == rf.plan(scores, bytes=17_000).bytes
    fewest = rf.plan(scores, loss=1e9, link=LINK)
    assert {choice.format for choice in fewest.choices} == {"2b:g128:rise"}


def test_exact_where_sending_is_not_what_takes_time(case: Any) -> None:
    _, _, scores = case
    # 32,768 bytes: 0.26 ms at 125 MB/s, 0.33 ms of coding at 100 MB/s.
    quick = rf.Link(bandwidth=125e6, latency=1e-3, coding=100e6)
    for budget in ({"loss": 1.0}, {"seconds": 1.0}, {"bytes": 1e6}):
        found = rf.plan(scores, link=quick, **budget)
        assert all(choice.format == "" for choice in found.choices)
        assert found.increase == 0
        assert found.policy.is_exact
    with pytest.raises(BudgetError, match="minimum that can be reached, 98304"):
        rf.plan(scores, bytes=50_000, link=quick)


def test_a_collective_sends_what_its_reports_say(case: Any) -> None:
    n, fmt = 8 * 32 * 32, rf.QuantFormat(4)
    assert rf.Link(1.0, carrier="all_reduce", world=4).sent(n, 4, None) == n * 4 * 6 // 4
    assert rf.Link(1.0, carrier="all_gather", world=4).sent(n, 4, None) == n * 4 * 3
    assert rf.Link(1.0, carrier="all_gather", world=4).sent(n, 4, fmt) == 3 * fmt.payload_bytes(n)
    assert rf.Link(1.0, carrier="reduce_scatter", world=4).sent(n, 4, fmt) == (
        3 * fmt.payload_bytes(n // 4)
    )
    assert rf.Link(1.0).sent(100, 4, fmt) == 66  # one padded group of 128, and its scale


# ---- the policy --------------------------------------------------------------------------------


def test_the_policy_selects_the_sites(case: Any, tmp_path: Path) -> None:
    model, batches, scores = case
    found = rf.plan(scores, bytes=8_000)
    assert {choice.format for choice in found.choices} > {"2b:g128:rise"}
    report = rf.explain(model, rf.Wire(found.policy), example_inputs=(batches[0][0],))
    forward = [site for site in report.sites if site.direction == "forward"]
    assert [(s.module, str(s.format)) for s in forward] == [
        (c.site, c.format) for c in found.choices
    ]
    assert sum(site.bytes_after for site in forward) == found.bytes
    found.save(tmp_path / "plan.toml")
    assert rf.Policy.from_file(tmp_path / "plan.toml") == found.policy
    assert "blocks.2" in str(found)


def test_a_site_is_no_pattern_of_another() -> None:
    policy = site_policy({"b": "2b", "a.b": "", "x.a.b": "4b", "c[0]": "8b"})
    formats = {path: policy.decide("activations", path, None).format for path in ("b", "a.b")}
    assert formats["a.b"] is None
    assert formats["b"] == rf.QuantFormat(2, grid="mid-rise")
    assert matches("c[0]", policy.override_for("c[0]") or "")
    assert policy.override_for("c0") is None


def test_odd_names_survive_toml(tmp_path: Path) -> None:
    names = ['a"b', "c\\d", "line\nbreak", "ü.*", "tag\U000e0001"]
    found = Plan("", "bytes", 1, tuple(Choice(n, "4b:g128", 1, 1, None, 0.1) for n in names))
    found.save(tmp_path / "plan.toml")
    assert rf.Policy.from_file(tmp_path / "plan.toml") == found.policy


# ---- the check ---------------------------------------------------------------------------------


def test_a_plan_keeps_its_promise(case: Any) -> None:
    model, batches, scores = case
    found = rf.plan(scores, bytes=12_000).check(model, batches, loss=distance, largest=2)
    assert found.is_additive
    assert found.loss == 0
    assert found.predicted == rf.plan(scores, bytes=12_000).increase
    policy = rf.plan(scores, bytes=12_000).policy
    wired = rf.transform(model, rf.Wire(policy)).eval()
    with torch.no_grad():
        losses = [distance(wired, batch).item() for batch in batches]
    assert found.measured == pytest.approx(sum(losses) / len(losses))
    assert len(found.largest) == 2
    assert found.interaction == found.together - sum(s.measured for s in found.largest)
    assert "interaction" in str(found)


def test_a_broken_promise_is_a_warning(case: Any) -> None:
    model, batches, scores = case
    found = rf.plan(scores, bytes=12_000)
    others = [(x, torch.zeros_like(y)) for x, y in batches]
    with pytest.warns(RFCompileWarning, match=r"ratio .* is outside \[0.7, 1.4\]"):
        checked = found.check(model, others, loss=distance)
    assert not checked.is_additive


def test_an_exact_plan_adds_nothing(case: Any) -> None:
    model, batches, scores = case
    found = rf.plan(scores, bytes=1e6).check(model, batches, loss=distance)
    assert (found.measured, found.predicted, found.ratio, found.largest) == (0, 0, 1, ())


# ---- errors ------------------------------------------------------------------------------------


def test_a_budget_below_the_minimum_names_it(case: Any) -> None:
    _, _, scores = case
    least = 3 * rf.QuantFormat(2).payload_bytes(8 * 32 * 32)
    with pytest.raises(BudgetError, match=f"bytes=100 is below the minimum .* {least}") as caught:
        rf.plan(scores, bytes=100)
    assert caught.value.minimum == least
    rf.plan(scores, bytes=caught.value.minimum)
    with pytest.raises(BudgetError, match=r"seconds=0\.001") as caught:
        rf.plan(scores, seconds=0.001, link=LINK)
    rf.plan(scores, seconds=caught.value.minimum, link=LINK)
    with pytest.raises(BudgetError, match="loss=-1"):
        rf.plan(scores, loss=-1)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one of"),
        ({"bytes": 1, "loss": 1}, "give exactly one of"),
        ({"bytes": math.nan}, "bytes=nan is not supported: give a finite number"),
        ({"loss": True}, "loss=True"),
        ({"bytes": "4"}, "bytes='4'"),
        ({"seconds": 1.0}, "seconds need a link"),
        ({"bytes": 1, "link": 3}, "give an rf.Link"),
    ],
)
def test_budgets_that_are_none(budget: Any, message: str, case: Any) -> None:
    with pytest.raises(OptionError, match=message):
        rf.plan(case[2], **budget)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bandwidth": 0}, "bandwidth=0 is not supported: give bytes a second, above 0"),
        ({"bandwidth": math.nan}, "bandwidth=nan"),
        ({"bandwidth": 1, "latency": -1}, "latency=-1 is not supported: give seconds, 0 or more"),
        ({"bandwidth": 1, "coding": 0}, "coding=0"),
        ({"bandwidth": 1, "world": 1}, "world=1 is not supported: give the number of ranks"),
        ({"bandwidth": 1, "device": "tpu"}, "device='tpu' is not supported: choose 'cpu' or"),
        ({"bandwidth": 1, "carrier": "pigeon"}, "carrier='pigeon' is not supported: choose one"),
    ],
)
def test_links_that_are_none(fields: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rf.Link(**fields)


def test_a_check_of_another_model_or_of_nothing(case: Any) -> None:
    model, batches, scores = case
    found = rf.plan(scores, bytes=12_000)
    with pytest.raises(ScoreError, match="the plan is for another model"):
        found.check(NanoGPT(layers=2), batches, loss=distance)
    with pytest.raises(OptionError, match="give one batch or more"):
        found.check(model, [], loss=distance)
    with pytest.raises(OptionError, match="largest=-1"):
        found.check(model, batches, loss=distance, largest=-1)
