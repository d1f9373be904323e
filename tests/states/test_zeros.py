"""Zero is a level of optimizer states: what never has a gradient never moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import rfcompile as rf
from rfcompile.codec.formats import BITS, QuantFormat
from rfcompile.states.packing import pack, pack_state_dict, unpack, unpack_state_dict
from rfcompile.training import quantize_states

MakeOptimizer = Callable[[list[nn.Parameter]], optim.Optimizer]

# Without L-BFGS: its state is lists of flat vectors, none of them a tensor of its own.
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "Adam": lambda p: optim.Adam(p, 1e-2),
    "Adam amsgrad": lambda p: optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.0),
    "NAdam": lambda p: optim.NAdam(p, 1e-2),
    "RAdam": lambda p: optim.RAdam(p, 1e-2),
    "Adamax": lambda p: optim.Adamax(p, 1e-2),
    "SGD": lambda p: optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
    "RMSprop": lambda p: optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 1e-2),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0),
    "Adafactor": lambda p: optim.Adafactor(p, 1e-2, weight_decay=0.0),
    "Rprop": lambda p: optim.Rprop(p, 1e-2),
    "ASGD": lambda p: optim.ASGD(p, 1e-2, lambd=0.0),
    # It orthogonalizes the whole matrix: what keeps still is a row or a column without gradients.
    "Muon": lambda p: optim.Muon(p, 1e-2, weight_decay=0.0),
}
SHAPE = (24, 40)
HELD = torch.zeros(SHAPE, dtype=torch.bool)
HELD[:, 25:] = True
HELD[5:9] = True


def gradient(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SHAPE, generator=generator).masked_fill(HELD, 0.0)


def trained(optimizer: optim.Optimizer, p: nn.Parameter, steps: range) -> Tensor:
    for step in steps:
        p.grad = gradient(step)
        optimizer.step()
    return p.detach()


def quantized(bits: int, **fields: Any) -> rf.Policy:
    return rf.Policy(optimizer_state=QuantFormat(bits, **fields), min_bytes=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_at_rest(name: str, bits: int) -> None:
    p = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    start = p.detach().clone()
    optimizer = OPTIMIZERS[name]([p])
    handle = quantize_states(optimizer, quantized(bits))
    end = trained(optimizer, p, range(8))
    assert torch.equal(end[HELD], start[HELD])
    assert end.isfinite().all()
    assert not torch.equal(end, start)
    handle.remove()


FIELDS: tuple[dict[str, Any], ...] = (
    {"rounding": "stochastic"},
    {"rotate": 16},
    {"group_size": None},
    {"grid": "mid-rise"},
    {"nonfinite": "saturate"},
)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_states_at_rest_in_any_format(fields: dict[str, Any]) -> None:
    """Also where the format asks for what would make numbers of zeros."""
    p = nn.Parameter(torch.ones(SHAPE))
    optimizer = optim.Adam([p], 1e-2)
    quantize_states(optimizer, quantized(4, **fields))
    assert torch.equal(trained(optimizer, p, range(20))[HELD], torch.ones(SHAPE)[HELD])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_that_were_packed_and_loaded(name: str, bits: int) -> None:
    p = nn.Parameter(torch.ones(SHAPE))
    optimizer = OPTIMIZERS[name]([p])
    trained(optimizer, p, range(3))
    packed = pack_state_dict(optimizer.state_dict(), quantized(bits))
    optimizer.load_state_dict(unpack_state_dict(packed))
    assert torch.equal(trained(optimizer, p, range(3, 6))[HELD], torch.ones(SHAPE)[HELD])


def moments(dtype: torch.dtype) -> Tensor:
    """All magnitudes of a dtype, its smallest and largest numbers, and zeros among them."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(3001, generator=generator, dtype=torch.float64)
    low, high = torch.tensor([smallest, limits.max], dtype=torch.float64).log2()
    x = (2 ** (low + (high - low) * exponents)).clamp(max=limits.max).to(dtype)
    x[500:700], x[1000:1300], x[0] = smallest, 0.0, limits.max
    return x.masked_fill(torch.rand(3001, generator=generator) < 0.3, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("group_size", [16, 128, 1024, None])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_second_moments_are_the_same_before_and_after(
    bits: int, group_size: int | None, rounding: Any, dtype: torch.dtype
) -> None:
    x = moments(dtype)
    fmt = QuantFormat(bits, group_size, rounding=rounding)
    for seed in (0, 1):
        decoded = unpack(pack(x, fmt, seed))
        assert torch.equal(decoded == 0, x == 0)
        assert decoded.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_second_moment_of_a_group_is_not_clipped(bits: int) -> None:
    x = torch.rand(40, 128, generator=torch.Generator().manual_seed(0)).square()
    decoded = unpack(pack(x, QuantFormat(bits)))
    half_a_step = 0.5 / QuantFormat(bits, grid="mid-tread").half_range
    assert (decoded.amax(1) ** 0.25 >= x.amax(1) ** 0.25 * (1 - half_a_step - 2**-10)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", BITS)
def test_zeros_of_either_sign_stay_on_a_mid_tread_grid(
    bits: int, rounding: Any, dtype: torch.dtype
) -> None:
    x = torch.randn(7, 301, generator=torch.Generator().manual_seed(bits)).to(dtype)
    x[:, ::3], x[:, 1::3], x[3] = 0.0, -0.0, 0.0
    fmt = QuantFormat(bits, grid="mid-tread", rounding=rounding)
    for seed in range(4):
        decoded = rf.dequantize(rf.quantize(x, fmt, seed=seed), fmt, x.shape, dtype)
        assert decoded[x == 0].count_nonzero() == 0


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bits", BITS)
def test_a_sum_of_zeros_coded_again_is_zero(bits: int, rounding: Any) -> None:
    fmt = QuantFormat(bits, grid="mid-tread", rounding=rounding)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(bits))
    x[:, ::5] = 0.0
    payload = torch.ops.rfcompile.requantize(torch.ops.rfcompile.quantize(x, fmt.spec), fmt.spec)
    total = torch.ops.rfcompile.dequantize(payload, fmt.spec, torch.float32)
    assert total[:, ::5].count_nonzero() == 0
    assert total.count_nonzero() > 0
