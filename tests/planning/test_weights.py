"""Scores and plans of weights: predicted against measured, and the policy in FSDP2's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.errors import BoundaryError, DtypeError, OptionError, ScoreError
from rfcompile.wire.fake import round_trip
from tests.zoo import NanoGPT


class Product(nn.Module):
    """The loss of its output is quadratic in each weight, and each element stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(512))
        self.bias = nn.Parameter(torch.randn(512))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain + self.bias


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean() / 2


def test_a_quadratic_loss_is_predicted_exactly() -> None:
    model, batches = Product(), [torch.randn(8, 512) for _ in range(2)]
    scores = rf.score(model, batches, loss=quadratic, kind="weights", formats=[3], modules="gain")
    [site] = scores.sites
    assert (site.site, site.calls, scores.kind) == ("gain", {(512,): 2}, "weights")
    [found] = site.formats
    assert found.format == "3b:g128:tread"
    exact = model.gain.detach().clone()
    before = sum(quadratic(model, batch).item() for batch in batches) / 2
    with torch.no_grad():
        model.gain.copy_(round_trip(exact, found.format))
    after = sum(quadratic(model, batch).item() for batch in batches) / 2
    with torch.no_grad():
        model.gain.copy_(exact)
    # as in test_score.py: finite differences of float32 gradients, and float32 sums of the loss
    predicted = scores.first(found) + scores.second(scores.sites[0], found)
    assert predicted == pytest.approx(after - before, rel=2e-4, abs=2e-6 * before)


def test_a_plan_of_weights() -> None:
    torch.manual_seed(0)
    model = NanoGPT(layers=2)
    tokens = torch.randint(0, 60, (2, 4, 32))
    target = model.eval()(tokens[0]).detach()

    def distance(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - target).square().mean()

    batches = [tokens[0], tokens[0]]
    before = {name: p.clone() for name, p in model.named_parameters()}
    scores = rf.score(
        model, batches, loss=distance, kind="weights", formats=[3, 4, 8], modules="blocks.*"
    )
    assert "not scored: activations, gradients, optimizer_state" in str(scores)
    numel = sum(p.numel() for name, p in before.items() if name.startswith("blocks."))
    link = rf.Link(1e6, carrier="all_gather", world=4)
    plan = rf.plan(scores, bytes=3 * numel // 4 * 5 / 8, link=link)
    assert plan.kind == "weights"
    exact = sum(choice.exact_bytes for choice in plan.choices)
    shards = [-(-p.numel() // 4) for name, p in before.items() if name.startswith("blocks.")]
    assert exact == 3 * 4 * sum(shards)
    assert plan.cost.at()["bytes"] == plan.bytes
    checked = plan.check(model, batches, loss=distance, largest=1)
    assert checked.is_additive
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    name = plan.choices[0].site
    assert (plan.policy.decide("weights", name, None).spec or "") == plan.choices[0].format


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modules": "depth"}, BoundaryError, "no parameter .'depth'.: its parameters are gain"),
        ({"modules": lambda path, module: True}, OptionError, "a function cannot choose here"),
        ({"kind": "states"}, OptionError, "kind='states' is not supported: choose one of"),
    ],
)
def test_weights_that_are_none(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        rf.score(Product(), [torch.ones(512)], loss=quadratic, **{"kind": "weights"} | options)


def test_weights_that_have_no_part_or_cannot_be_coded() -> None:
    model = nn.ModuleDict({"used": Product(), "idle": Product()})

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return quadratic(model.get_submodule("used"), batch)

    with pytest.raises(
        ScoreError, match=r"parameters that had no part: \['idle.gain', 'idle.bias'"
    ):
        rf.score(model, [torch.ones(512)], loss=loss, kind="weights")
    found = rf.score(model, [torch.ones(512)], loss=loss, kind="weights", modules=["used"])
    assert [site.site for site in found.sites] == ["used.gain", "used.bias"]
    with pytest.raises(DtypeError, match=r"parameter 'gain'"):
        rf.score(Product().double(), [torch.ones(512)], loss=quadratic, kind="weights")
