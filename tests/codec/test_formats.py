"""QuantFormat: validation, text, the grid's numbers, bytes. Its arithmetic: test_arithmetic.py."""

from __future__ import annotations

import dataclasses
import math
from itertools import product
from typing import Any

import pytest
import torch

from rfcompile.codec.formats import (
    BITS,
    FORMAT_FIELDS,
    PLANES,
    QuantFormat,
    as_format,
    expected_peak,
)
from rfcompile.errors import FormatError, RFCompileError
from rfcompile.report.measures import sqnr_db
from rfcompile.wire.fake import round_trip
from rfcompile.wire.policy import KINDS

GROUPS = (16, 32, 64, 128, 256, 512, 1024, None)


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("bits", 7, "choose one of (2, 3, 4, 5, 6, 8)"),
        ("bits", 1, "choose one of"),
        ("bits", 4.0, "choose one of"),
        ("bits", True, "choose one of"),
        ("bits", "4", "choose one of"),
        ("group_size", 100, "power of two from 16 to 1024"),
        ("group_size", 8, "power of two from 16 to 1024"),
        ("group_size", 2048, "None for one scale a tensor"),
        ("group_size", 0, "power of two"),
        ("group_size", -128, "power of two"),
        ("rotate", 3, "power of two from 2 to 128"),
        ("rotate", 1, "power of two from 2 to 128"),
        ("rotate", 256, "must divide the group"),
        ("grid", "middle", "'auto', 'mid-rise', 'mid-tread'"),
        ("scale", "fp32", "'bf16'"),
        ("rounding", "down", "'nearest', 'stochastic'"),
        ("nonfinite", "ignore", "'propagate', 'raise', 'saturate'"),
        ("range", "half", "'fitted', 'full'"),
        ("seed", -1, "from 0 to 2**31 - 1"),
        ("seed", 2**31, "from 0 to 2**31 - 1"),
        ("seed", 1.5, "from 0 to 2**31 - 1"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_rule(field: str, value: Any, hint: str) -> None:
    with pytest.raises(FormatError) as caught:
        QuantFormat(**{"bits": 4, field: value})
    error = caught.value
    assert isinstance(error, RFCompileError)
    assert isinstance(error, ValueError)
    assert str(error).startswith(f"{field}={value!r} is not supported: ")
    assert hint in str(error)
    assert (error.field, error.value) == (field, value)
    assert error.rule in str(error)


def test_a_format_is_frozen_and_hashable() -> None:
    fmt = QuantFormat(4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 8  # type: ignore[misc]
    assert {fmt: 1}[QuantFormat(4, 128)] == 1
    first = ("bits", "group_size", "grid", "scale", "rotate", "rounding", "nonfinite", "seed")
    assert (*first, "range") == FORMAT_FIELDS


def test_spec_and_parse_are_inverse_for_every_format() -> None:
    specs = set()
    for bits, group, grid, rotate, rounding, nonfinite, seed, end in product(
        BITS, GROUPS, ("auto", "mid-rise", "mid-tread"), (None, 2, 16), ("nearest", "stochastic"),
        ("propagate", "raise", "saturate"), (0, 7), ("fitted", "full"),
    ):  # fmt: skip
        fmt = QuantFormat(
            bits, group, grid=grid, rotate=rotate,  # type: ignore[arg-type]
            rounding=rounding, nonfinite=nonfinite, seed=seed, range=end,  # type: ignore[arg-type]
        )  # fmt: skip
        assert QuantFormat.parse(fmt.spec) == fmt
        specs.add(fmt.spec)
    assert len(specs) == 6 * 8 * 3 * 3 * 2 * 3 * 2 * 2


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("4b", QuantFormat(4)),
        ("8b:tensor", QuantFormat(8, None)),
        ("3b:g1024:h1024", QuantFormat(3, 1024, rotate=1024)),
        (
            "4b:g64:tread:h32:stoch:s7:raise",
            QuantFormat(
                4, 64, "mid-tread", rotate=32, rounding="stochastic", seed=7, nonfinite="raise"
            ),
        ),
    ],
)
def test_parse_reads_what_its_docstring_shows(text: str, fmt: QuantFormat) -> None:
    assert QuantFormat.parse(text) == fmt
    assert as_format(text) == fmt


def test_a_bare_format_is_mid_rise_to_4_bits_and_names_no_grid() -> None:
    assert [QuantFormat(bits).is_mid_rise for bits in BITS] == [True] * 3 + [False] * 3
    assert (QuantFormat(4).spec, str(QuantFormat(8))) == ("4b:g128", "8b:g128")


@pytest.mark.parametrize("bits", BITS)
def test_auto_keeps_zeros_in_every_kind_but_activations(bits: int) -> None:
    fmt = QuantFormat(bits, 64, rotate=16, seed=3)
    grids = {kind: fmt.for_kind(kind).grid for kind in KINDS}
    assert grids.pop("activations") == ("mid-rise" if bits <= 4 else "mid-tread")
    assert set(grids.values()) == {"mid-tread"}
    resolved = fmt.for_kind("gradients")
    assert resolved == dataclasses.replace(fmt, grid="mid-tread")
    assert resolved.for_kind("activations") is resolved, "a grid that is named stays"


@pytest.mark.parametrize("text", ["", "b", "4", "xb", "4b:", "4b:h", "4b:g", "4b:lunch", "4b:g-1"])
def test_parse_refuses_what_it_does_not_understand(text: str) -> None:
    with pytest.raises(FormatError, match="is not supported") as caught:
        QuantFormat.parse(text)
    assert (caught.value.field, caught.value.value) == ("format", text)


@pytest.mark.parametrize(("text", "field"), [("7b", "bits"), ("4b:g100", "group_size")])
def test_parse_checks_the_fields_as_the_constructor_does(text: str, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        QuantFormat.parse(text)
    assert caught.value.field == field


def test_as_format_takes_what_users_write() -> None:
    fmt = QuantFormat(4, 64)
    assert as_format(None) is None
    assert as_format(fmt) is fmt
    assert as_format(4) == as_format("4b") == QuantFormat(4)
    assert as_format(fmt, seed=3) == QuantFormat(4, 64, seed=3)
    assert as_format("4b", group_size=32) == as_format(4, group_size=32) == QuantFormat(4, 32)
    with pytest.raises(FormatError, match=r"format=4\.5 is not supported"):
        as_format(4.5)


@pytest.mark.parametrize(("bits", "rise", "tread"), [(2, 1.5, 1), (3, 3.5, 3), (8, 127.5, 127)])
def test_grid_numbers_are_those_of_the_table(bits: int, rise: float, tread: float) -> None:
    mid_rise, mid_tread = (QuantFormat(bits, grid=g) for g in ("mid-rise", "mid-tread"))
    assert (mid_rise.half_range, mid_rise.zero_offset) == (rise, rise)
    assert (mid_tread.half_range, mid_tread.zero_offset) == (tread, 2 ** (bits - 1))


def test_expected_peak_agrees_with_a_simulation() -> None:
    assert expected_peak(1) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-6)
    samples = 20_000
    for n in (16, 128):
        peaks = torch.randn(samples, n).abs().amax(1)
        assert abs(peaks.mean() - expected_peak(n)) < 6 * peaks.std() / math.sqrt(samples)


def test_clip_follows_its_formula_and_is_1_where_it_would_hurt() -> None:
    # Max 1960, Table II: best uniform steps of N(0, 1).
    steps = {"mid-rise": (0.9957, 0.5860, 0.3352), "mid-tread": (1.2240, 0.6508, 0.3534)}
    for grid, by_bits in steps.items():
        for bits, step in zip((2, 3, 4), by_bits, strict=True):
            for group in GROUPS:
                fmt = QuantFormat(bits, group, grid=grid)  # type: ignore[arg-type]
                expected = step * fmt.half_range / expected_peak(group or 1024)
                assert fmt.clip == pytest.approx(min(1, expected))
                assert fmt.clip > 0.35
                assert dataclasses.replace(fmt, range="full").clip == 1
                assert dataclasses.replace(fmt, rounding="stochastic").clip == 1
        assert QuantFormat(5, grid=grid).clip == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", ["mid-rise", "mid-tread"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_step_is_the_one_with_the_smallest_error_on_a_gaussian(bits: int, grid: Any) -> None:
    fmt = QuantFormat(bits, grid=grid)
    step = fmt.clip * expected_peak(128) / fmt.half_range
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)

    def error(s: float) -> float:
        shift = 0.5 if fmt.is_mid_rise else 0.0
        level = torch.round(z / s + shift) - shift
        level = level.clamp(-fmt.half_range, fmt.half_range)
        return float(((z - level * s).square() * density).sum())

    assert error(step) < min(error(step * 0.99), error(step * 1.01))


@pytest.mark.parametrize(
    ("text", "decibels"),
    [("4b:rise", 19.8), ("3b:rise", 14.3), ("2b:rise", 9.1), ("4b:tread", 19.3),
     ("3b:tread", 13.3), ("2b:tread", 7.1), ("4b:tread:full", 18.6), ("3b:tread:full", 11.3),
     ("2b:tread:full", 2.3)],
)  # fmt: skip
def test_signal_to_noise_of_a_gaussian_in_groups_of_128(text: str, decibels: float) -> None:
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(x, round_trip(x, text)) == pytest.approx(decibels, abs=0.15)


def test_planes_hold_the_bits_and_divide_a_byte() -> None:
    assert tuple(PLANES) == BITS
    for bits, planes in PLANES.items():
        assert sum(planes) == bits
        assert all(8 % width == 0 for width in planes)
        assert list(planes) == sorted(planes, reverse=True)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_payload_bytes_are_within_the_documented_bound(bits: int, group: int | None) -> None:
    for numel, rotate in product((0, 1, 5, 127, 128, 129, 1025, 100003, 2**31), (None, 8, 16)):
        fmt = QuantFormat(bits, group, rotate=rotate)
        size = group or max(1, -(-numel // (rotate or 1)) * (rotate or 1))
        bound = math.ceil(numel / size) * (size * bits / 8 + 2) + 16
        assert numel * bits / 8 <= fmt.payload_bytes(numel) <= bound
        for chunks in (2, 4, 7):
            row = fmt.row_bytes(math.ceil(numel / chunks))
            assert fmt.payload_bytes(numel, chunks) == chunks * row


def test_a_large_tensor_costs_bits_plus_an_eighth() -> None:
    # 16 bits of scale for 128 elements.
    assert QuantFormat(4).payload_bytes(2**20) * 8 / 2**20 == 4 + 16 / 128
