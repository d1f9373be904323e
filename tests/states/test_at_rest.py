"""Optimizer states as payloads: what they decode to, at rest and in checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import HookError, PayloadError, StateError
from rfcompile.states.composite import Optimizers
from rfcompile.states.packing import is_packed, pack, unpack
from rfcompile.training import pack_state_dict, quantize_states, unpack_state_dict
from rfcompile.wire.policy import Policy

FORMATS = [QuantFormat(8), QuantFormat(4, 64), QuantFormat(8, None), QuantFormat(4, rotate=32)]


def peaks(x: Tensor, fmt: QuantFormat) -> Tensor:
    """For each element, the largest magnitude of its group."""
    size = fmt.group_size or x.numel()
    groups = nn.functional.pad(x.flatten().abs(), (0, -x.numel() % size)).view(-1, size)
    return groups.amax(1, keepdim=True).expand_as(groups).flatten()[: x.numel()].view_as(x)


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
@pytest.mark.parametrize("shape", [(33, 50), (700,), ()])
def test_signed_tensors_are_within_the_bound_of_the_format(
    fmt: QuantFormat, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape) - 10.0 * (not shape)
    decoded = unpack(pack(x, fmt))
    assert decoded.shape == x.shape
    error = fmt.for_kind("optimizer_state").max_error()
    assert ((decoded - x).abs() <= error * peaks(x, fmt)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_second_moments_are_within_the_bound_as_fourth_roots(fmt: QuantFormat) -> None:
    x = torch.randn(33, 50).square() * 10 ** torch.linspace(-12, 0, 33)[:, None]
    decoded = unpack(pack(x, fmt))
    used = QuantFormat(fmt.bits, fmt.group_size, grid="mid-tread", range="full")
    roots, peak = x**0.25, peaks(x**0.25, fmt)
    step = peak / used.half_range * (1 + 2**-7)
    limit = (used.max_error() + 2**-20) * peak
    limit = torch.where(roots < step, torch.maximum(limit, step), limit)  # lifted to one step
    assert ((decoded**0.25 - roots).abs() <= limit).all()
    assert (decoded > 0).all(), "an update would divide by zero"


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(fmt: QuantFormat) -> None:
    assert unpack(pack(torch.zeros(300), fmt)).count_nonzero() == 0
    for bad in (float("nan"), float("inf")):
        x = torch.ones(300)
        x[7] = bad
        assert unpack(pack(x, fmt))[7].isnan()
        assert unpack(pack(-x, fmt))[7].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_dtype_returns(dtype: torch.dtype, sign: int) -> None:
    x = (sign * torch.rand(200)).to(dtype)
    assert unpack(pack(x, QuantFormat(8))).dtype == dtype


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.tanh(self.up(x)))
        return down


def train(net: Net, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


def made(net: Net, kind: str = "adamw") -> Optimizer:
    if kind == "adamw":
        return AdamW(net.named_parameters(), lr=1e-2)
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return Optimizers(torch.optim.Muon(matrices, lr=1e-2), AdamW(rest, lr=1e-2))


def tensors(state: Any) -> list[Tensor]:
    return [v for entries in state.values() for v in entries.values() if isinstance(v, Tensor)]


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return optimizer.optimizers if isinstance(optimizer, Optimizers) else (optimizer,)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_is_that_of_the_decoded_states(kind: str, offload: bool) -> None:
    fmt = QuantFormat(4, 64)
    net = Net()
    twin = copy.deepcopy(net)
    optimizer, plain = made(net, kind), made(twin, kind)
    quantize_states(optimizer, Policy(optimizer_state=fmt, min_bytes=0), offload=offload)
    for step in range(5):
        train(net, optimizer, range(step, step + 1))
        train(twin, plain, range(step, step + 1))
        for part in parts_of(plain):  # the rule, written out
            for state in part.state.values():
                for key in state.keys() - {"step"}:
                    state[key] = unpack(pack(state[key], fmt))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    for part in parts_of(optimizer):
        assert all(is_packed(v) for s in part.state.values() for k, v in s.items() if k != "step")


def test_eight_bits_take_a_quarter() -> None:
    net = Net()
    optimizer = made(net)
    handle = quantize_states(optimizer, Policy(optimizer_state=8, min_bytes=1024))
    train(net, optimizer, range(2))
    report = handle.report()
    weights = [site for site in report.sites if site.module.endswith("weight")]
    assert {s.collective for s in weights} == {"exp_avg", "exp_avg_sq", "step"}
    moments = [s for s in weights if s.collective != "step"]
    assert [s.bytes_before for s in moments] == [4 * 2048] * 4
    assert [s.bytes_after for s in moments] == [2048 + 2 * 2048 // 128] * 4
    states = [value for entries in optimizer.state.values() for value in entries.values()]
    stored = [value["payload"].nbytes for value in states if is_packed(value)]
    assert stored == [s.bytes_after for s in report.sites if s.format]
    reasons = {s.reason for s in report.skipped}
    assert reasons == {"counts steps", "256 bytes < min_bytes=1024", "128 bytes < min_bytes=1024"}
    assert "at rest exp_avg" in str(report)


def test_sites_are_names_of_parameters() -> None:
    net = Net()
    optimizer = made(net)
    policy = Policy(optimizer_state=8, min_bytes=0, sites={"down.*": None, "up.weight": 4})
    handle = quantize_states(optimizer, policy)
    train(net, optimizer, range(1))
    formats = {s.module: s.format for s in handle.report().sites if s.collective == "exp_avg"}
    assert formats == {
        "up.weight": "4b:g128:tread", "up.bias": "8b:g128:tread",
        "down.weight": None, "down.bias": None,
    }  # fmt: skip
    assert handle.report().notes == ()


def test_sites_that_reach_no_parameter_are_noted() -> None:
    net = Net()
    nameless = torch.optim.AdamW(net.parameters())
    sites: dict[str, Any] = {"up.*": 4}
    notes = quantize_states(nameless, Policy(sites=sites)).report().notes
    assert [note.split(":")[0] for note in notes] == [
        "sites reach no parameter without a name",
        "sites['up.*'] applies to nothing here",
    ]


def saved(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_goes_on_bit_for_bit_from_a_packed_checkpoint(kind: str, bits: int) -> None:
    net = Net()
    optimizer = made(net, kind)
    policy = Policy(optimizer_state=bits, min_bytes=0)
    quantize_states(optimizer, policy, packed_state_dict=True)
    train(net, optimizer, range(3))
    resumed = copy.deepcopy(net)
    checkpoint = saved(optimizer.state_dict())
    train(net, optimizer, range(3, 6))

    other = made(resumed, kind)
    quantize_states(other, policy, packed_state_dict=True)
    other.load_state_dict(checkpoint)
    train(resumed, other, range(3, 6))
    for p, q in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_plain_checkpoint_loads_everywhere() -> None:
    net = Net()
    optimizer = made(net)
    handle = quantize_states(optimizer, Policy(optimizer_state=8, min_bytes=0))
    train(net, optimizer, range(3))
    checkpoint = saved(optimizer.state_dict())
    plain = made(copy.deepcopy(net))
    plain.load_state_dict(checkpoint)
    handle.remove()
    assert len(tensors(plain.state)) == len(tensors(optimizer.state)) == 12
    for a, b in zip(tensors(plain.state), tensors(optimizer.state), strict=True):
        assert torch.equal(a, b)
    handle.remove()
    quantize_states(optimizer, 4)  # after remove it may be quantized anew


def test_a_state_dict_is_packed_and_unpacked() -> None:
    net = Net()
    optimizer = made(net)
    train(net, optimizer, range(2))
    packed = saved(pack_state_dict(optimizer.state_dict(), Policy(optimizer_state=8, min_bytes=0)))
    assert sum(is_packed(v) for s in packed["state"].values() for v in s.values()) == 8
    unpacked = unpack_state_dict(packed)
    other = made(copy.deepcopy(net))
    other.load_state_dict(unpacked)
    for a, b in zip(tensors(unpacked["state"]), tensors(other.state), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        unpacked["state"][0]["exp_avg"],
        unpack(pack(optimizer.state_dict()["state"][0]["exp_avg"], QuantFormat(8))),
    )


def test_what_has_no_large_tensor_state_is_left_alone() -> None:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1)
    handle = quantize_states(optimizer, 8)
    train(net, optimizer, range(2))
    assert handle.report().sites == ()


def test_a_single_number_stays_exact() -> None:
    net, plain_net = Net(), Net()
    plain_net.load_state_dict(net.state_dict())
    optimizer, plain = (torch.optim.NAdam(n.parameters()) for n in (net, plain_net))
    handle = quantize_states(optimizer, Policy(optimizer_state=4, min_bytes=0))
    train(net, optimizer, range(3))
    train(plain_net, plain, range(3))
    for a, b in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert torch.equal(a["mu_product"], b["mu_product"])
    reasons = {s.collective: s.reason for s in handle.report().skipped}
    assert set(reasons) == {"step", "mu_product"}
    assert reasons["mu_product"].startswith("a single number")


def test_errors() -> None:
    optimizer = made(Net())
    quantize_states(optimizer, 8)
    with pytest.raises(StateError, match=r"quantized already: 'AdamW'. Call remove\(\)"):
        quantize_states(optimizer, 4)
    with pytest.raises(StateError, match="no state_dict of an optimizer: 'a'"):
        unpack_state_dict({"a": 1})
    with pytest.raises(StateError, match="no state_dict of an optimizer: 'a'"):
        pack_state_dict({"a": 1})
    with pytest.raises(HookError, match=r"Net cannot be quantized: pass a torch\.optim\.Optimizer"):
        quantize_states(Net(), 8)  # type: ignore[arg-type]
    packed = pack(torch.ones(100), QuantFormat(8))
    packed["payload"] = packed["payload"][:-1]
    with pytest.raises(PayloadError):
        unpack(packed)


# ---- optimizers that read their states in other ways ---------------------------------------------


@pytest.mark.parametrize("fmt", ["2b", "4b", "8b", "8b:stoch"])
def test_a_centered_rmsprop_stays_finite(fmt: str) -> None:
    """Its root is of a small difference of two states, which stay exact both."""
    parameter = nn.Parameter(torch.zeros(4, 256))
    optimizer = torch.optim.RMSprop([parameter], lr=1e-3, centered=True)
    handle = quantize_states(optimizer, {"bits": fmt, "min_bytes": 0})
    for _ in range(120):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.isfinite().all()
    state = optimizer.state[parameter]
    assert not is_packed(state["square_avg"])
    assert not is_packed(state["grad_avg"])
    packed = pack_state_dict(optimizer.state_dict(), {"bits": fmt, "min_bytes": 0})
    assert not is_packed(packed["state"][0]["square_avg"])
    assert any("centered" in site.reason for site in handle.report().sites)

    plain = torch.optim.RMSprop([nn.Parameter(torch.zeros(4, 256))], lr=1e-3)
    quantize_states(plain, {"bits": fmt, "min_bytes": 0})
    (other,) = plain.param_groups[0]["params"]
    other.grad = torch.ones_like(other)
    plain.step()
    assert is_packed(plain.state[other]["square_avg"]), "alone it is a moment like others"


class Averaging(torch.optim.AdamW):
    """Reads and writes states after the step that it inherits."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["exp_avg"].mul_(0.5)
        return loss


def test_a_step_within_a_step_packs_once_at_the_end() -> None:
    parameter, twin = nn.Parameter(torch.ones(4, 256)), nn.Parameter(torch.ones(4, 256))
    quantized, plain = Averaging([parameter], lr=1e-2), Averaging([twin], lr=1e-2)
    quantize_states(quantized, {"bits": 8, "min_bytes": 0})
    for step in range(3):
        for p, optimizer in ((parameter, quantized), (twin, plain)):
            p.grad = torch.full_like(p, 1.0 + step)
            optimizer.step()
        assert is_packed(quantized.state[parameter]["exp_avg"])
    # A group of equal values is coded within half a step of 1/127 of its peak, once a step.
    difference = (parameter - twin).abs().max().item()
    assert difference < 3 * 3 * 1e-2 / 127
