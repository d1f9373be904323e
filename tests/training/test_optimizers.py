"""Who steps which parameter, and that several optimizers behave as one."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Muon

import rfcompile as rf
from rfcompile.errors import ResidualError, StateError
from rfcompile.policy import Policy
from rfcompile.training import optimizers, pack_state_dict, unpack_state_dict
from rfcompile.training.composite import Optimizers

IDS = torch.arange(6).view(2, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(ids)))


MATRICES = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("residual", ["keep", "free", "mix"])
def test_linears_of_blocks_get_muon_and_the_rest_adamw(residual: str, start: bool) -> None:
    model: nn.Module = Model()
    matrices = set(MATRICES)
    if residual != "keep":
        how = rf.ResidualFree(residual, initialization="auto" if start else None)  # type: ignore[arg-type]
        model = rf.transform(model, residual=how, example_inputs=(IDS,))
    if residual == "mix":
        matrices |= {f"blocks.{i}.residual_0.weight" for i in range(2)}
    knows = residual != "keep" and start  # what was initialized are the blocks' linears
    both = optimizers(model, example_inputs=None if knows else (IDS,))
    muon, adamw = both.optimizers
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    assert names_of(model, muon) == matrices
    every = {name for name, _ in model.named_parameters()}
    assert names_of(model, adamw) == every - matrices
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0]


@pytest.mark.parametrize("how", ["low_rank", "adapters"])
def test_factors_get_adamw(how: str) -> None:
    model = rf.transform(Model(), **{how: 2}, modules=["up"])  # type: ignore[arg-type]
    both = optimizers(model, example_inputs=(IDS,))
    downs = {f"blocks.{i}.down.weight" for i in range(2)} if how == "low_rank" else set()
    muon = {n for o in both.optimizers if isinstance(o, Muon) for n in names_of(model, o)}
    assert muon == downs
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names_of(model, both) == trained
    factors = {id(p) for name, p in model.named_parameters() if "up." in name}
    for group in both.param_groups:
        assert not group["weight_decay"] or not factors & {id(p) for p in group["params"]}
    step(model, both)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IDS).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("matrices", ["muon", "soap", "adamw"])
def test_every_parameter_moves_and_a_checkpoint_resumes(matrices: Any) -> None:
    if matrices == "soap":
        pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    model = Model()
    both = optimizers(model, matrices=matrices, example_inputs=(IDS,))
    schedule = torch.optim.lr_scheduler.LambdaLR(both, lambda n: 0.5**n)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):  # SOAP only prepares in its first step
        step(model, both)
        schedule.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [o.param_groups[0]["lr"] for o in both.optimizers] == [
        o.param_groups[0]["initial_lr"] / 8 for o in both.optimizers
    ]
    other = Model()
    other.load_state_dict(model.state_dict())
    resumed = optimizers(other, matrices=matrices, example_inputs=(IDS,))
    resumed.load_state_dict(copy.deepcopy(both.state_dict()))  # torch would share it
    step(model, both)
    step(other, resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_group_that_is_added_later_is_stepped() -> None:
    optimizer = optimizers(Model(), example_inputs=(IDS,))
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(3)
    optimizer.step()
    assert (late < 1).all()
    assert optimizer.param_groups[-1]["params"] == [late]
    assert optimizer.state_dict()["param_groups"][-1]["lr"] == 0.5


def test_a_closure_gives_the_loss() -> None:
    model = Model()
    both = optimizers(model, example_inputs=(IDS,))

    def closure() -> Tensor:
        both.zero_grad()
        loss = model(IDS).square().mean()
        loss.backward()
        return loss

    assert both.step(closure) > both.step(closure)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResidualError, match="matrices='lion' is not supported: choose 'muon'"):
        optimizers(Model(), matrices="lion", example_inputs=(IDS,))  # type: ignore[arg-type]
    with pytest.raises(ResidualError, match="Linear has no linear in a branch of a residual add"):
        optimizers(nn.Linear(3, 3), example_inputs=(torch.ones(2, 3),))
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ResidualError, match=r"needs the package pytorch-optimizer: pip install"):
        optimizers(Model(), matrices="soap", example_inputs=(IDS,))


# ---- one optimizer to the outside ----------------------------------------------------------------


def pair() -> tuple[nn.Linear, Optimizers]:
    model = nn.Linear(6, 5)
    return model, Optimizers(Muon([model.weight]), torch.optim.AdamW([model.bias]))


def trained(steps: int = 2) -> tuple[nn.Linear, Optimizers]:
    model, both = pair()
    for _ in range(steps):
        model(torch.ones(3, 6)).square().sum().backward()
        both.step()
    return model, both


def test_its_state_is_that_of_all() -> None:
    model, both = trained()
    assert list(both.state) == [model.weight, model.bias]
    assert len(both.state) == 2
    assert model.bias in both.state
    assert both.state.get(torch.ones(1)) is None
    assert both.state[model.bias]["step"] == 2
    both.state[model.bias] = {"step": torch.tensor(7.0)}
    assert both.optimizers[1].state[model.bias]["step"] == 7
    del both.state[model.bias]
    assert not both.optimizers[1].state


def test_its_state_dict_is_that_of_one_optimizer() -> None:
    _, both = trained()
    state_dict = both.state_dict()
    assert state_dict.keys() == {"state", "param_groups"}
    assert [group["params"] for group in state_dict["param_groups"]] == [[0], [1]]
    assert [sorted(s) for s in state_dict["state"].values()] == [
        ["momentum_buffer"],
        ["exp_avg", "exp_avg_sq", "step"],
    ]
    packed = pack_state_dict(state_dict, Policy(optimizer_state=8, min_bytes=0))
    _, other = pair()
    other.load_state_dict(unpack_state_dict(packed))
    old = {"optimizers": [o.state_dict() for o in both.optimizers]}  # of earlier versions
    other.load_state_dict(old)
    assert torch.equal(other.state_dict()["state"][1]["exp_avg"], state_dict["state"][1]["exp_avg"])


def test_checkpoints_of_torch_take_it() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, both = trained()
    state_dict = copy.deepcopy(get_optimizer_state_dict(model, both))
    assert sorted(map(str, state_dict["state"])) == ["bias", "weight"]
    new, other = pair()
    set_optimizer_state_dict(new, other, state_dict)
    assert torch.equal(other.state[new.bias]["exp_avg"], both.state[model.bias]["exp_avg"])


def test_a_load_that_fails_changes_nothing() -> None:
    model, both = trained()
    before = copy.deepcopy(both.state_dict())
    damaged = copy.deepcopy(before)
    damaged["state"][0]["momentum_buffer"].zero_()
    damaged["param_groups"][1]["params"] = [1, 2]
    with pytest.raises(ValueError, match="size of optimizer's group"):
        both.load_state_dict(damaged)
    with pytest.raises(ValueError, match="1 parameter groups, the optimizers have 2"):
        both.load_state_dict({"state": {}, "param_groups": before["param_groups"][:1]})
    with pytest.raises(StateError, match="a state of other optimizers"):
        both.load_state_dict({"optimizers": []})
    after = both.state_dict()["state"]
    assert torch.equal(after[0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
    model(torch.ones(3, 6)).sum().backward()
    both.step()
    assert both.param_groups[0] is both.optimizers[0].param_groups[0]


def test_a_copy_steps_alone() -> None:
    model, both = trained()
    twin_model, twin = copy.deepcopy((model, both))
    twin_model(torch.ones(3, 6)).sum().backward()
    twin.step()
    assert not torch.equal(model.weight, twin_model.weight)
    assert twin.state[twin_model.bias]["step"] == 3
    assert both.state[model.bias]["step"] == 2
