"""Damaged packed states, NaN under "raise" and resumed rounding: errors are typed, loads atomic."""

from __future__ import annotations

import copy
import io
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rfcompile.errors import NonFiniteError, PayloadError, RFCompileError, StateError
from rfcompile.states.packing import is_packed
from rfcompile.training import (
    StatesHandle,
    pack_state_dict,
    quantize_states,
    unpack_state_dict,
)
from rfcompile.wire.policy import Policy

POLICY = Policy(optimizer_state=8, min_bytes=0)


def made() -> tuple[nn.Parameter, Optimizer]:
    p = nn.Parameter(torch.ones(40, 50))
    return p, AdamW([("up.weight", p)], lr=0.1)


def step(p: nn.Parameter, optimizer: Optimizer, seed: int = 1) -> None:
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def trained(*, packed: bool = True) -> Optimizer:
    p, optimizer = made()
    quantize_states(optimizer, POLICY, packed_state_dict=packed)
    step(p, optimizer)
    return optimizer


DAMAGE: list[dict[str, Any]] = [
    {"dtype": "int32"}, {"dtype": "bool"}, {"dtype": "save"}, {"dtype": None}, {"dtype": "float16"},
    {"root": 7}, {"root": "4"}, {"root": 4}, {"root": 0}, {"root": True}, {"root": None},
    {"shape": [-40, -50]}, {"shape": [50, 40]}, {"shape": [2000]}, {"shape": [2**70]},
    {"shape": "40"}, {"shape": None}, {"shape": [40.0, 50.0]}, {"shape": [10**9, 10**9]},
    {"format": None}, {"format": "9b"}, {"format": "8b:g64"}, {"format": "4b:g64:tread"},
    {"format": "8b:g128:rise"}, {"payload": None}, {"payload": torch.zeros(2032)},
    {"payload": torch.zeros(3, dtype=torch.uint8)},
    {"payload": torch.zeros(1, 2032, dtype=torch.uint8)}, {"extra": 1}, {"version": 2},
    {"check": 1}, {"check": None},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_a_damaged_packed_state_is_refused_and_named(change: dict[str, Any]) -> None:
    source = trained()
    damaged = copy.deepcopy(source.state_dict())
    damaged["state"][0]["exp_avg"].update(change)
    refused(damaged)


@pytest.mark.parametrize("key", ["payload", "format", "shape", "dtype", "root"])
def test_a_missing_key_is_refused(key: str) -> None:
    damaged = copy.deepcopy(trained().state_dict())
    del damaged["state"][0]["exp_avg"][key]
    refused(damaged)


def refused(damaged: dict[str, Any]) -> None:
    """By unpack_state_dict, and by an optimizer that stays as it was."""
    with pytest.raises((PayloadError, StateError), match=r"exp_avg' of up\.weight"):
        unpack_state_dict(damaged)
    p, optimizer = made()
    quantize_states(optimizer, POLICY, packed_state_dict=True)
    step(p, optimizer, seed=2)
    before = optimizer.state_dict()
    with pytest.raises((PayloadError, StateError), match=r"exp_avg' of up\.weight"):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(before["state"][0][key]["payload"], after["state"][0][key]["payload"])
    step(p, optimizer, seed=3)


def test_random_damage_never_raises_another_error() -> None:
    source = trained().state_dict()
    rng = random.Random(0)
    values: list[Any] = [
        None,
        -1,
        2**80,
        1.5,
        float("nan"),
        "x",
        "8b",
        [],
        {},
        [[1]],
        torch.ones(3),
        b"1",
        (),
    ]
    for _ in range(400):
        damaged = copy.deepcopy(source)
        entry = damaged["state"][0]["exp_avg"]
        for _ in range(rng.randint(1, 2)):
            entry[rng.choice([*entry])] = rng.choice(values)
        with pytest.raises(RFCompileError):
            unpack_state_dict(damaged)


@pytest.mark.parametrize(
    "other", [None, [], {"state": {}}, {"state": 1, "param_groups": []},
              {"state": {}, "param_groups": 3}, {"state": {}, "param_groups": [{}]}], ids=str
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(other: Any) -> None:
    for read in (pack_state_dict, unpack_state_dict):
        with pytest.raises(StateError, match="no state_dict of an optimizer"):
            read(other)
    with pytest.raises((StateError, AttributeError)):  # torch copies it first
        trained().load_state_dict(other)


def test_packed_states_of_earlier_versions_load() -> None:
    old = copy.deepcopy(trained().state_dict())
    for value in old["state"][0].values():
        if is_packed(value):
            del value["check"]
    del old["param_groups"][0]["rfcompile_num_packed"]
    _, optimizer = made()
    quantize_states(optimizer, POLICY)
    optimizer.load_state_dict(old)
    assert torch.equal(
        optimizer.state_dict()["state"][0]["exp_avg"], unpack_state_dict(old)["state"][0]["exp_avg"]
    )


def test_a_state_dict_does_not_change_later() -> None:
    optimizer = trained()
    kept = optimizer.state_dict()
    payload = kept["state"][0]["exp_avg"]["payload"]
    copied = payload.clone()
    step(optimizer.param_groups[0]["params"][0], optimizer, seed=5)
    assert torch.equal(payload, copied)
    payload.zero_()  # nor does the optimizer change with it
    assert optimizer.state_dict()["state"][0]["exp_avg"]["payload"].any()


@pytest.mark.parametrize("spec", ["8b:stoch", "4b:stoch", "3b:g64:stoch"])
def test_stochastic_rounding_goes_on_bit_for_bit(spec: str) -> None:
    policy = Policy(optimizer_state=spec, min_bytes=0)
    p, optimizer = made()
    quantize_states(optimizer, policy, packed_state_dict=True)
    for seed in range(3):
        step(p, optimizer, seed)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q, other = made()
    quantize_states(other, policy, packed_state_dict=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    q.data.copy_(p.data)
    assert "rfcompile_num_packed" not in other.param_groups[0]
    for seed in range(3, 6):
        step(p, optimizer, seed)
        step(q, other, seed)
    assert torch.equal(p, q)


# ---- NaN and Inf ---------------------------------------------------------------------------------

RAISE = Policy.of(bits=8, nonfinite="raise", min_bytes=0)


def test_a_step_that_leaves_nan_raises_and_leaves_whole_states() -> None:
    p, optimizer = made()
    handle = quantize_states(optimizer, RAISE)
    step(p, optimizer)
    p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(NonFiniteError, match=r"state 'exp_avg' of up\.weight\. The step is done"):
        optimizer.step()
    state = optimizer.state[p]
    assert all(isinstance(value, Tensor) for value in state.values())
    assert {s.reason for s in handle.report().sites} == {"decoded after an error", "counts steps"}
    for key in ("exp_avg", "exp_avg_sq"):
        state[key].zero_()
    p.data.fill_(1.0)
    step(p, optimizer)
    assert is_packed(optimizer.state[p]["exp_avg"])


def test_nan_that_was_there_before_changes_nothing() -> None:
    p, optimizer = made()
    step(p, optimizer)
    optimizer.state[p]["exp_avg"][3, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="Nothing was changed"):
        quantize_states(optimizer, RAISE)
    with pytest.raises(StateError):
        StatesHandle.of(optimizer)
    step(p, optimizer)
    with pytest.raises(NonFiniteError, match=re.escape("state 'exp_avg' of up.weight")):
        pack_state_dict(optimizer.state_dict(), RAISE)
    q, other = made()
    quantize_states(other, RAISE)
    step(q, other)
    with pytest.raises(NonFiniteError, match="Nothing was loaded"):
        other.load_state_dict(optimizer.state_dict())
    assert is_packed(other.state[q]["exp_avg"])


def test_saturation_keeps_the_sign_of_inf() -> None:
    p, optimizer = made()
    step(p, optimizer)
    state = optimizer.state[p]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key][0, 0] = float("inf")
    policy = Policy.of(bits=8, nonfinite="saturate", min_bytes=0)
    decoded = unpack_state_dict(pack_state_dict(optimizer.state_dict(), policy))["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        group = state[key].flatten()[1:128].abs().max()
        assert decoded[key].isfinite().all()
        assert group * 0.9 <= decoded[key][0, 0] <= group * 1.1


def test_one_nan_takes_only_its_group_of_a_second_moment() -> None:
    p, optimizer = made()
    step(p, optimizer)
    optimizer.state[p]["exp_avg_sq"][0, 0] = float("nan")
    packed = pack_state_dict(optimizer.state_dict(), POLICY)
    assert packed["state"][0]["exp_avg_sq"]["root"] == 4
    decoded = unpack_state_dict(packed)["state"][0]["exp_avg_sq"].flatten()
    assert decoded[:128].isnan().all()
    assert decoded[128:].isfinite().all()
