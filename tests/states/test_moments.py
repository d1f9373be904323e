"""Which states are quantized: moments; weights, step sizes and unknown states stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from rfcompile.states.packing import is_packed
from rfcompile.training import pack_state_dict, packing_report, quantize_states
from rfcompile.wire.policy import Policy

EVERYTHING = Policy(optimizer_state=8, min_bytes=0)

TORCH: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "Adadelta": ({}, {"square_avg", "acc_delta"}, {"step"}),
    "Adafactor": ({}, {"row_var", "col_var"}, {"step"}),
    "Adagrad": ({}, {"sum"}, {"step"}),
    "Adam": ({"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"step"}),
    "AdamW": ({}, {"exp_avg", "exp_avg_sq"}, {"step"}),
    "Adamax": ({}, {"exp_avg", "exp_inf"}, {"step"}),
    "ASGD": ({}, set(), {"step", "eta", "mu", "ax"}),
    "Muon": ({}, {"momentum_buffer"}, set()),
    "NAdam": ({}, {"exp_avg", "exp_avg_sq"}, {"step", "mu_product"}),
    "RAdam": ({}, {"exp_avg", "exp_avg_sq"}, {"step"}),
    "RMSprop": ({"momentum": 0.9}, {"square_avg", "momentum_buffer"}, {"step"}),
    "RMSprop, centered": (
        {"centered": True, "momentum": 0.9},
        {"momentum_buffer"},
        {"square_avg", "grad_avg", "step"},
    ),
    "Rprop": ({}, set(), {"step", "prev", "step_size"}),
    "SGD": ({"momentum": 0.9}, {"momentum_buffer"}, set()),
}


def stepped(made: optim.Optimizer, steps: int = 2) -> optim.Optimizer:
    for step in range(steps):
        for group in made.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        made.step()
    return made


def keys_of(made: optim.Optimizer) -> tuple[set[str], set[str]]:
    """Keys of packed states, and of the others."""
    items = [
        item for state in made.state.values() if isinstance(state, dict) for item in state.items()
    ]
    packed = {key for key, value in items if is_packed(value)}
    return packed, {key for key, _ in items} - packed


@pytest.mark.parametrize("name", TORCH)
def test_of_torch_optimizers_the_moments_are_quantized(name: str) -> None:
    options, packed, exact = TORCH[name]
    made = getattr(optim, name.split(",")[0])([nn.Parameter(torch.randn(20, 30))], **options)
    handle = quantize_states(made, EVERYTHING)
    assert keys_of(stepped(made)) == (packed, exact)
    for site in handle.report().skipped:
        assert site.reason == "counts steps" or "name it in sites" in site.reason


def test_averaged_weights_are_those_of_an_exact_optimizer() -> None:
    weights = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    quantized, plain = (optim.ASGD([w], t0=0) for w in weights)
    quantize_states(quantized, EVERYTHING)
    stepped(quantized, 5)
    stepped(plain, 5)
    assert torch.equal(quantized.state[weights[0]]["ax"], plain.state[weights[1]]["ax"])


PACKAGED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "ScheduleFreeAdamW": ({}, {"exp_avg_sq"}),
    "ScheduleFreeSGD": ({}, set()),
    "SOAP": ({}, {"exp_avg", "exp_avg_sq"}),
    "Shampoo": ({"momentum": 0.9}, {"momentum_buffer"}),
    "Lion": ({}, {"exp_avg"}),
    "AdaFactor": ({}, {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col"}),
    "AdEMAMix": ({}, {"exp_avg", "exp_avg_sq", "exp_avg_slow"}),
    "AdaBelief": ({}, {"exp_avg", "exp_avg_var"}),
    "MADGRAD": ({"momentum": 0.9}, set()),
    "Ranger": ({}, {"exp_avg", "exp_avg_sq"}),
    "AggMo": ({}, set()),
    "AccSGD": ({}, set()),  # its momentum_buffer holds weights
}


@pytest.mark.parametrize("name", PACKAGED)
def test_of_packaged_optimizers_only_moments_are_quantized(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    options, packed = PACKAGED[name]
    made = getattr(package, name)([nn.Parameter(torch.randn(20, 30))], **options)
    handle = quantize_states(made, EVERYTHING)
    assert keys_of(stepped(made, 3))[0] == packed
    assert all(site.reason for site in handle.report().skipped)


def test_schedule_free_weights_are_read_between_steps() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    weights = [nn.Parameter(torch.full((40, 30), 2.0)) for _ in range(2)]
    quantized, plain = (package.ScheduleFreeSGD([w], lr=0.1) for w in weights)
    quantize_states(quantized, Policy(optimizer_state=2, min_bytes=0))
    for made in (quantized, plain):
        stepped(made, 3)
        made.eval()
        made.train()
        stepped(made, 1)
    assert torch.equal(*weights)


def test_a_gradient_that_looks_like_its_parameter_once_is_a_moment() -> None:
    p = nn.Parameter(torch.randn(500))
    made = optim.SGD([p], momentum=0.9, lr=1e-3)
    quantize_states(made, EVERYTHING)
    for scale, packed in ((1.0, set()), (5.0, {"momentum_buffer"}), (-5.0, {"momentum_buffer"})):
        p.grad = scale * p.detach()
        made.step()
        assert keys_of(made)[0] == packed


def test_a_moment_that_holds_weights_is_seen() -> None:
    class Keeps(optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("exp_avg", p.detach().clone())

    made = Keeps([nn.Parameter(torch.randn(500))], {})
    handle = quantize_states(made, EVERYTHING)
    for _ in range(4):
        made.step()
        assert keys_of(made) == (set(), {"exp_avg"})
    assert "holds the parameter's values" in handle.report().sites[0].reason
    parameters = made.param_groups[0]["params"]
    packed = pack_state_dict(made.state_dict(), EVERYTHING, parameters)
    assert isinstance(packed["state"][0]["exp_avg"], Tensor)


def named(policy: Policy) -> dict[str, str | None]:
    parameters = [(n, nn.Parameter(torch.randn(20, 30))) for n in ("embedding.weight", "up.weight")]
    made = optim.ASGD(parameters) if "ax" in str(policy.sites) else optim.AdamW(parameters)
    handle = quantize_states(made, policy)
    stepped(made)
    report = handle.report()
    return {f"{s.module}.{s.collective}": s.format for s in report.sites}


def test_sites_name_states_by_key() -> None:
    sites: dict[str, Any] = {"*.exp_avg_sq": 8, "embedding.weight.*": None, "up.weight": 6}
    found = named(Policy(optimizer_state=None, sites=sites))
    bits = {key: fmt and fmt[:2] for key, fmt in found.items()}
    assert bits == {
        "embedding.weight.exp_avg": None, "embedding.weight.exp_avg_sq": "8b",
        "up.weight.exp_avg": "6b", "up.weight.exp_avg_sq": "8b",
        "embedding.weight.step": None, "up.weight.step": None,
    }  # fmt: skip


def test_a_state_that_is_named_is_quantized_whatever_it_is() -> None:
    found = named(Policy(optimizer_state=8, min_bytes=0, sites={"up.weight.ax": 8}))
    assert found["up.weight.ax"]
    assert found["embedding.weight.ax"] is None


def test_a_pattern_for_a_parameter_is_for_its_moments() -> None:
    found = named(Policy(optimizer_state=8, min_bytes=0, sites={"*.weight": 8, "up.weight.ax": 8}))
    assert found["up.weight.ax"] is None  # the first pattern that matches is the parameter's
    assert found["embedding.weight.ax"] is None


def test_what_cannot_be_coded_is_not_whoever_names_it() -> None:
    made = optim.AdamW([nn.Parameter(torch.randn(10).double()), nn.Parameter(torch.randn(10))])
    handle = quantize_states(made, Policy(sites={"*.step": 8, "exp_avg": 4, "parameter 1.*q": 8}))
    for p in made.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    made.step()
    sites = {(s.module, s.collective): (s.format, s.reason) for s in handle.report().sites}
    assert sites["parameter 0", "exp_avg"] == (None, "float64 data is not quantized")
    assert sites["parameter 1", "step"] == (None, "counts steps")
    assert str(sites["parameter 1", "exp_avg"][0]).startswith("4b")
    assert str(sites["parameter 1", "exp_avg_sq"][0]).startswith("8b")


def test_a_packed_state_dict_has_a_report() -> None:
    made = stepped(optim.ASGD([nn.Parameter(torch.randn(20, 30))]))
    report = packing_report(made.state_dict(), EVERYTHING)
    assert report.num_quantized == 0
    assert any("maybe weights" in site.reason for site in report.skipped)
    adam = stepped(optim.AdamW([nn.Parameter(torch.randn(20, 30))]))
    report = packing_report(adam.state_dict(), EVERYTHING)
    assert "2 of 3 sites quantized" in report.summary()
