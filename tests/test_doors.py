"""Every door takes the same policies, and refuses the same ones with the same errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import rfcompile as rf
from rfcompile.codec.fingerprint import package_version
from rfcompile.distributed import broadcast_states, quantize_ddp, quantize_fsdp
from rfcompile.errors import (
    FormatError,
    HookError,
    OptionError,
    PolicyError,
    RFCompileWarning,
    ShapeError,
)
from rfcompile.inductor.backend import Settings
from rfcompile.training import pack_state_dict, quantize_states
from rfcompile.wire import default_policy as defaults
from rfcompile.wire.policy import DEFAULT_MIN_BYTES, Policy, as_policy
from rfcompile.wire.process_groups import simulated


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).relu()


def net() -> nn.Module:
    return nn.Sequential(Block(), Block(), Block())


def stepped() -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.randn(8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(8)
    optimizer.step()
    return optimizer


def ddp_door(policy: Any) -> None:
    with suppress(HookError):  # the module is none, and the policy is read first
        quantize_ddp(nn.Linear(2, 2), policy)  # type: ignore[arg-type]


def fsdp_door(policy: Any) -> None:
    with suppress(HookError):
        quantize_fsdp(nn.Linear(2, 2), policy)


def broadcast_door(policy: Any) -> None:
    with simulated(1):
        broadcast_states(stepped(), policy)


DOORS: dict[str, Callable[[Any], Any]] = {
    "as_policy": as_policy,
    "backend": lambda policy: Settings.of({"policy": policy}),
    "transform": lambda policy: rf.transform(net(), rf.Wire(policy)),
    "transform bits": lambda policy: rf.transform(net(), bits=policy),
    "explain": lambda policy: rf.explain(
        net(), rf.Wire(policy), example_inputs=(torch.randn(2, 32),)
    ),
    "explain bits": lambda policy: rf.explain(
        net(), bits=policy, example_inputs=(torch.randn(2, 32),)
    ),
    "quantize_ddp": ddp_door,
    "quantize_fsdp": fsdp_door,
    "quantize_states": lambda policy: quantize_states(stepped(), policy),
    "quantize_traffic": lambda policy: rf.quantize_traffic(stepped(), policy),
    "pack_state_dict": lambda policy: pack_state_dict(stepped().state_dict(), policy),
    "broadcast_states": broadcast_door,
    "set_default_policy": rf.set_default_policy,
}
SPELLINGS = [
    4,
    np.int64(4),
    "4b:g64",
    "exact",
    rf.QuantFormat(4),
    {"bits": 4},
    {"bits": 4, "group_size": 64, "min_bytes": 0},
    {"gradients": 8, "sites": {"0": None}},
    {"auto": 4},
    rf.Policy(activations=4),
]
WRONG: list[tuple[Any, type[Exception]]] = [
    (True, FormatError),
    (4.0, FormatError),
    (7, FormatError),
    ("nonsense", FormatError),
    ([], FormatError),
    (print, FormatError),
    ("4b:g64:g128", FormatError),
    ("4b:rise:tread", FormatError),
    ({"bits": 4.0}, FormatError),
    ({"bitz": 4}, PolicyError),
    ({"group_size": 64}, PolicyError),
    ({}, PolicyError),
    ({3: 4}, PolicyError),
    ({"auto": 4, "bits": 4}, PolicyError),
    ("/no/such/policy.toml", PolicyError),
    (Path("/no/such/policy.toml"), PolicyError),
]


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RFCOMPILE_POLICY", "RFCOMPILE_BITS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(defaults._Default, "policy", None)
    monkeypatch.setattr(defaults._Default, "compiled", None)


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize("policy", SPELLINGS, ids=str)
def test_every_door_takes_every_spelling(door: str, policy: Any) -> None:
    DOORS[door](policy)


@pytest.mark.parametrize("door", list(DOORS))
def test_every_door_reads_files(door: str, tmp_path: Path) -> None:
    (file := tmp_path / "policy.toml").write_text("bits = 4")
    DOORS[door](file)
    DOORS[door](str(file))


@pytest.mark.parametrize("door", list(DOORS))
@pytest.mark.parametrize(("policy", "error"), WRONG, ids=str)
def test_every_door_refuses_the_same(door: str, policy: Any, error: type[Exception]) -> None:
    with pytest.raises((FormatError, PolicyError)) as caught:
        DOORS[door](policy)
    assert type(caught.value) is error
    with pytest.raises(error) as plain:
        as_policy(policy)
    assert str(caught.value).endswith(str(plain.value))


def test_none_is_exact_where_a_policy_must_be_given() -> None:
    assert as_policy(None) == as_policy("exact") == Policy()
    assert as_policy(None).is_exact
    with pytest.raises(PolicyError, match=r"give bits .* or a policy"):
        rf.transform(net())
    with pytest.raises(OptionError, match="a Wire is given twice: give one, or bits= alone"):
        rf.transform(net(), rf.Wire(4), bits=4)
    with pytest.raises(OptionError, match="give bits or a Wire, not both"):
        rf.explain(net(), rf.Wire(4), bits=4)


# ---- min_bytes ---------------------------------------------------------------------------------


def test_one_default_of_min_bytes() -> None:
    named = (as_policy(4), Settings.of({"bits": 4}).policy, quantize_states(stepped(), 4)._policy)
    for policy in named:
        assert policy.smallest == DEFAULT_MIN_BYTES == 16384
        assert "min_bytes=16384" in policy.describe()
        assert policy.for_fake_wire().smallest == 0
    assert as_policy({"bits": 4, "min_bytes": 5}).for_fake_wire().smallest == 5


def test_a_fake_wire_has_no_smallest_size_unless_it_is_named() -> None:
    x = torch.randn(2, 32)
    assert rf.explain(net(), bits=4, example_inputs=(x,)).num_quantized == 6
    assert "min_bytes=0" in rf.explain(net(), bits=4, example_inputs=(x,)).policy
    assert (
        rf.explain(net(), rf.Wire({"bits": 4, "min_bytes": 257}), example_inputs=(x,)).num_quantized
        == 0
    )
    small = rf.transform(net(), rf.Wire({"bits": 2, "min_bytes": 257}))
    assert not torch.equal(rf.transform(small, bits=2)(x), small(x))


# ---- the default policy ------------------------------------------------------------------------


def test_a_backend_without_options_says_how_to_give_them() -> None:
    for options in (None, {}, {"strict": True}, {"mode": "max-autotune"}):
        with pytest.raises(PolicyError, match=r"options=.*set_default_policy.*RFCOMPILE_BITS"):
            Settings.of(options)


def test_options_win_over_what_is_set_and_that_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RFCOMPILE_BITS", "2b:g64")
    assert Settings.of(None).policy == as_policy("2b:g64")
    assert Settings.of({"mode": "max-autotune"}).inductor["max_autotune"]
    defaults._Default.compiled = None
    rf.set_default_policy(3)
    assert Settings.of({"strict": True}) == Settings(as_policy(3), strict=True)
    assert Settings.of({"bits": 8}).policy == as_policy(8)
    defaults._Default.compiled = None
    rf.set_default_policy(None)
    (file := tmp_path / "p.toml").write_text("gradients = 8")
    monkeypatch.setenv("RFCOMPILE_POLICY", str(file))
    with pytest.raises(PolicyError, match="RFCOMPILE_BITS='2b:g64' is set as well"):
        Settings.of(None)
    monkeypatch.delenv("RFCOMPILE_BITS")
    assert Settings.of(None).policy == Policy(gradients=8)
    monkeypatch.setenv("RFCOMPILE_POLICY", "/no/policy.toml")
    with pytest.raises(PolicyError, match=r"RFCOMPILE_POLICY='/no/policy.toml' .* cannot be read"):
        Settings.of(None)


def test_transform_and_explain_use_the_default_policy() -> None:
    rf.set_default_policy(4)
    model, x = net(), torch.randn(2, 32)
    assert torch.equal(rf.transform(model)(x), rf.transform(model, bits=4)(x))
    assert rf.explain(model, example_inputs=(x,)).num_quantized == 6


def test_a_default_that_changes_after_compiling_warns() -> None:
    rf.set_default_policy(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rf.set_default_policy(8)
    Settings.of(None)
    with pytest.warns(RFCompileWarning, match=r"keeps it .*torch\.compiler\.reset"):
        rf.set_default_policy(4)


def test_unknown_modes_are_typed_errors() -> None:
    with pytest.raises(OptionError, match=r"mode='fastest' .* 'max-autotune'"):
        Settings.of({"bits": 4, "mode": "fastest"})


# ---- exact models beside other ranks -----------------------------------------------------------


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_a_model_without_collectives_is_exact_beside_other_ranks_and_both_say_so() -> None:
    model, x = net(), torch.randn(2, 32)
    with simulated(2):
        wired = rf.transform(model, bits=2)
        with pytest.warns(RFCompileWarning, match="no collective in its graphs, so it is exact"):
            y = wired(x)
        report = rf.explain(model, bits=2, example_inputs=(x,))
        assert report.sites == ()
        assert any("so it is exact" in note for note in report.notes)
        assert not torch.equal(rf.transform(model, rf.Wire(2, modules="blocks"))(x), y)
        named = rf.explain(model, rf.Wire(2, modules="blocks"), example_inputs=(x,))
        assert named.num_quantized == 6
    torch.testing.assert_close(y, model(x))


@pytest.mark.usefixtures("rfquant_without_inductor")
def test_fake_wires_of_before_are_taken_away_beside_other_ranks() -> None:
    model, x = net(), torch.randn(2, 32)
    fake = rf.transform(model, bits=2)
    with simulated(2):
        assert "3 fake wires of an earlier transform" in str(
            rf.explain(fake, bits=8, example_inputs=(x,))
        )
        wired = rf.transform(fake, bits=8)
        with pytest.warns(RFCompileWarning, match="so it is exact"):
            y = wired(x)
    torch.testing.assert_close(y, model(x))


# ---- constants while compiling -----------------------------------------------------------------


FORMATS = (
    rf.QuantFormat(4),
    rf.QuantFormat(8),
    rf.QuantFormat(3, 64, rounding="stochastic", seed=5),
    rf.QuantFormat(3, 64, rounding="stochastic", seed=6),
    4,
    8,
    "2b:g32",
    {"bits": 6, "group_size": 32},
    {"bits": 6, "group_size": 64},
)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_formats_are_constants_while_compiling(backend: str, dynamic: bool | None) -> None:
    def round_trip(x: torch.Tensor, fmt: Any) -> torch.Tensor:
        return rf.dequantize(rf.quantize(x, fmt), fmt, x.shape, x.dtype)

    x = torch.randn(300)
    with torch._dynamo.config.patch(recompile_limit=20):
        compiled = torch.compile(round_trip, backend=backend, fullgraph=True, dynamic=dynamic)
        for fmt in FORMATS * 2:
            assert torch.equal(compiled(x, fmt), round_trip(x, fmt)), fmt


def test_formats_made_while_compiling_are_constants() -> None:
    def coded(x: torch.Tensor, bits: int) -> torch.Tensor:
        return rf.quantize(x, rf.QuantFormat(bits, group_size=16 * bits))

    compiled = torch.compile(coded, backend="eager", fullgraph=True)
    for bits in (4, 8, 2, 4):
        x = torch.randn(300)
        assert torch.equal(compiled(x, bits), coded(x, bits))


def test_collectives_take_any_format_while_compiling() -> None:
    specs: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        specs.extend(n.args[1] for n in gm.graph.nodes if "all_reduce" in str(n.target))
        return gm

    def reduced(x: torch.Tensor, fmt: Any, op: Any) -> torch.Tensor:
        return rf.all_reduce(x, fmt, op=op)

    with simulated(2):
        compiled = torch.compile(reduced, backend=backend, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=20):
            for fmt in FORMATS:
                compiled(torch.randn(300), fmt, "sum")
            compiled(torch.randn(300), 4, dist.ReduceOp.AVG)
    assert [rf.QuantFormat.parse(spec).bits for spec in specs] == [4, 8, 3, 3, 4, 8, 2, 6, 6, 4]


# ---- odd inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("rotate", ["", ":h32"])
@pytest.mark.parametrize("nonfinite", ["", ":raise", ":saturate"])
@pytest.mark.parametrize("group", ["g64", "tensor"])
def test_empty_tensors_have_a_payload_in_every_format(
    rotate: str, nonfinite: str, group: str
) -> None:
    fmt, x = f"4b:{group}{rotate}{nonfinite}", torch.empty(0, 3)
    payload = rf.quantize(x, fmt)
    assert payload.numel() == rf.QuantFormat.parse(fmt).payload_bytes(0)
    assert rf.dequantize(payload, fmt, x.shape).shape == x.shape


def test_a_shape_may_be_a_number_and_must_be_one() -> None:
    payload = rf.quantize(torch.ones(8), 8)
    assert rf.dequantize(payload, 8, 8).shape == (8,)
    for shape in (-8, (2, -4), "8", 8.0, (8.0,), True):
        with pytest.raises(ShapeError, match="whole numbers of elements"):
            rf.dequantize(payload, 8, shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        b"bits = \xff",
        b"a = " + b"[" * 20000,
        b"bits = " + b"9" * 5000,
        b"bits = 0x" + b"f" * 20000,
        b"min_bytes = 0x" + b"f" * 20000,
        b"bits = 4\ncls = 1",
        b"auto = 4\nbits = 4",
        b"auto = 4\ngroup_size = 64",
        b"auto = 'exact'",
        b"[auto]\nrotate = 32",
        b"[sites]\nlayers.0 = 4",
        b"sites = 4",
        b"bits = nan",
        b"bits = 2026-01-01",
        b"\x00",
        b"",
    ],
)
def test_damaged_files_are_typed_errors(content: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "policy.toml").write_bytes(content)
    with pytest.raises((PolicyError, FormatError)) as caught:
        Policy.from_file(file)
    assert len(str(caught.value)) < 1000


def test_auto_is_bits_a_format_or_a_table(tmp_path: Path) -> None:
    (file := tmp_path / "policy.toml").write_text("[auto]\nbits = 3\nrotate = 32")
    assert Policy.from_file(file) == Policy.auto(3, rotate=32) == Policy.of(auto=3, rotate=32)
    assert as_policy({"auto": "4b:g64"}).activations == rf.QuantFormat(4, 64, "mid-rise")


def test_the_version_is_a_name() -> None:
    assert rf.__version__ == package_version()


@pytest.mark.parametrize("path", [".", "no\0file.toml", None, 7])
def test_what_is_no_file_of_a_policy(path: Any) -> None:
    with pytest.raises(PolicyError, match="it cannot be read"):
        Policy.from_file(path)
