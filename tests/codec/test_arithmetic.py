"""The arithmetic of the wire: bounds, layout, non-finite values, dtypes, sizes, randomness, bytes.

The bounds are those QuantFormat documents; nothing here is tuned. Operators: test_operators.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rfcompile as rf
from rfcompile.codec import arithmetic
from rfcompile.codec.formats import BITS, DTYPES, PLANES, QuantFormat
from rfcompile.codec.rotation import axes_of

GROUPS = (16, 32, 64, 128, 256, 512, 1024, None)
ROTATIONS = (None, 2, 8, 32, 64, 128, 1024)
SIZES = (0, 1, 5, 127, 128, 129, 100003)
Matrix = Callable[[Sequence[int], int], Tensor]


def formats(
    bits: Sequence[int] = BITS,
    groups: Sequence[int | None] = GROUPS,
    rotations: Sequence[int | None] = ROTATIONS,
    grids: Sequence[Any] = ("mid-rise", "mid-tread"),
    roundings: Sequence[Any] = ("nearest", "stochastic"),
    **fixed: Any,
) -> Iterator[QuantFormat]:
    """Every valid combination of the values given."""
    for b, group, rotate, grid, rounding in product(bits, groups, rotations, grids, roundings):
        if (rotate or 1) <= (group or 1024):
            yield QuantFormat(b, group, grid, rotate=rotate, rounding=rounding, **fixed)


FAMILIES = [
    QuantFormat.parse(f"{bits}b:{rest}")
    for bits in BITS
    for rest in ("g128:rise", "g32:tread:stoch", "tensor", "g64:h16", "g128:h128:saturate")
]
CLIPPED = [
    QuantFormat.parse(f"{bits}b:{rest}")
    for bits in (2, 3, 4)
    for rest in ("g128:tread", "g128:tread:full", "g128:rise:full")
]


def round_trip(x_CM: Tensor, fmt: QuantFormat, dtype: torch.dtype | None = None) -> Tensor:
    payload = arithmetic.quantize(x_CM, fmt)
    assert payload.dtype == torch.uint8
    assert payload.shape == (x_CM.shape[0], fmt.row_bytes(x_CM.shape[1]))
    return arithmetic.dequantize(payload, fmt, dtype or x_CM.dtype).narrow(1, 0, x_CM.shape[1])


def in_groups(x_CM: Tensor, fmt: QuantFormat) -> Tensor:
    """``[C, G, E]`` in float64, padded with zeros."""
    C, M = x_CM.shape
    E = fmt.group_elements(M)
    G = -(-M // E)
    return torch.nn.functional.pad(x_CM.double(), (0, G * E - M)).reshape(C, G, E)


def wide_range_data(columns: int) -> Tensor:
    """Rows of normal, heavy-tailed, tiny, huge and mostly zero values, and outliers among them."""
    gauss = torch.randn(5, columns)
    heavy = gauss[1] * torch.exp(3 * torch.randn(columns))
    sparse = gauss[4] * (torch.rand(columns) < 0.02)
    x = torch.stack([gauss[0], heavy, gauss[2] * 1e-35, gauss[3] * 1e30, sparse])
    x[0, ::97] *= 100
    return x


# ---- error bounds --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_error_is_within_the_documented_bound(bits: int) -> None:
    x = wide_range_data(1300)
    for fmt in formats([bits], rotations=[None]):
        groups = in_groups(x, fmt)
        error = (in_groups(round_trip(x, fmt), fmt) - groups).abs()
        peak = groups.abs().amax(-1, keepdim=True)
        assert (error <= fmt.max_error() * peak + 2.0**-120).all(), fmt


def test_the_bound_is_not_vacuous() -> None:
    for fmt in formats(groups=[128], rotations=[None], roundings=["nearest"]):
        x = torch.rand(1, 128 * 4096) * 2 - 1
        share = (round_trip(x, fmt) - x).view(-1, 128) / x.view(-1, 128).abs().amax(1, True)
        assert share.abs().max() >= fmt.max_error() / 1.1, fmt


@pytest.mark.parametrize("bits", BITS)
def test_rotated_error_is_within_the_documented_bounds(
    bits: int, rotation_matrix: Matrix, rotation_blocks: Callable[[Tensor, int], Tensor]
) -> None:
    x = wide_range_data(1300)
    for fmt in formats([bits], rotations=ROTATIONS[1:], seed=3):
        n = fmt.rotate or 1
        groups = in_groups(x, fmt)
        rotated = rotation_matrix(axes_of(n), 3) @ rotation_blocks(groups, n)
        r = rotated.abs().amax((-1, -2), keepdim=True)
        error = rotation_blocks(in_groups(round_trip(x, fmt), fmt) - groups, n)
        limit = fmt.max_error() * r + 2.0**-120 * n
        assert (error.abs() <= n**0.5 * limit).all(), fmt
        assert (error.square().mean(-2, keepdim=True).sqrt() <= limit).all(), fmt


@pytest.mark.parametrize("rotate", [None, 128])
@pytest.mark.parametrize(("bits", "floor"), [(8, 43.5), (4, 19.7), (3, 14.1), (2, 9.0)])
def test_sqnr_of_gaussian_values(bits: int, floor: float, rotate: int | None) -> None:
    x = torch.randn(1, 2**20)
    error = round_trip(x, QuantFormat(bits, 128, rotate=rotate)) - x
    assert 10 * math.log10(x.square().sum() / error.square().sum()) >= floor


def test_zeros_decode_to_zeros() -> None:
    x = torch.zeros(2, 300)
    x[1].neg_()  # -0.0
    for fmt in formats():
        assert torch.equal(round_trip(x, fmt), x), fmt


def test_single_zeros_stay_exact_on_a_mid_tread_grid() -> None:
    x = torch.randn(1, 4096) * (torch.rand(1, 4096) < 0.1)
    for fmt in formats(grids=["mid-tread"], rotations=[None]):
        assert (round_trip(x, fmt)[x == 0] == 0).all(), fmt


# ---- layout, against an implementation made from the docstrings alone ----------------------------


def reference_payload(x: Sequence[float], fmt: QuantFormat) -> bytes:
    """Payload of one row (nearest, not rotated), element by element, bit by bit."""
    size = fmt.group_elements(len(x))
    padded = [*x, *[0.0] * (-len(x) % size)]
    groups = [padded[i : i + size] for i in range(0, len(padded), size)]
    share = np.float32(fmt.clip / fmt.half_range)
    codes, scales = [], []
    for group in groups:
        peak = np.float32(max(abs(v) for v in group))
        bits = int((peak * share).view(np.uint32))
        bits = (bits + 0xFFFF) & 0xFFFF0000  # to bfloat16, upwards
        scales.append(bits >> 16)
        step = float(np.uint32(bits).view(np.float32))
        exponent = math.frexp(1 / step)[1] - 15
        inverse = round((1 / step) / 2.0**exponent) * 2.0**exponent  # to 15 bits, ties to even
        t = [float(np.float32(v * inverse)) for v in group]
        if fmt.is_mid_rise:
            levels = [math.floor(v) + 2 ** (fmt.bits - 1) for v in t]
            codes.append([min(max(u, 0), 2**fmt.bits - 1) for u in levels])
        else:
            levels = [round(v) + 2 ** (fmt.bits - 1) for v in t]
            codes.append([min(max(u, 1), 2**fmt.bits - 1) for u in levels])
    out, low = bytearray(), 0
    for width in PLANES[fmt.bits]:
        stride = size * width // 8
        for group_codes in codes:
            for b in range(stride):
                byte = 0
                for i, u in enumerate(group_codes[b::stride]):
                    byte |= (u >> low & (2**width - 1)) << (i * width)
                out.append(byte)
        low += width
    out += bytes(s & 255 for s in scales) + bytes(s >> 8 for s in scales)
    return bytes(out)


@pytest.mark.parametrize("grid", ["mid-rise", "mid-tread"])
@pytest.mark.parametrize("bits", BITS)
def test_payload_is_what_the_docstrings_say(bits: int, grid: Any) -> None:
    # The long row holds values that only the snapped reciprocal puts on their side of a boundary.
    for group, numel in ((16, 37), (128, 300), (None, 75), (1024, 20_000)):
        fmt = QuantFormat(bits, group, grid)
        x = torch.randn(1, numel) * 2.0 ** torch.randint(-8, 9, (1, numel))
        payload = arithmetic.quantize(x, fmt)
        assert bytes(payload.flatten().tolist()) == reference_payload(x[0].tolist(), fmt), fmt


def test_values_are_level_times_step_by_the_docstrings() -> None:
    # One group of 16 at 4 bits by hand: element 0 in the low half of byte 0, element 8 in its high
    # half; step 0x3F80 = 1.0; mid-rise level (u - 7.5), mid-tread level (u - 8).
    row = [*[0x00] * 4, 0xF0, 0x0F, 0x71, 0x80, 0x80, 0x3F]
    codes = [0, 0, 0, 0, 0, 15, 1, 0, 0, 0, 0, 0, 15, 0, 7, 8]
    payload = torch.tensor([row], dtype=torch.uint8)
    for grid, zero in (("mid-rise", 7.5), ("mid-tread", 8)):
        decoded = arithmetic.dequantize(payload, QuantFormat(4, 16, grid), torch.float32)  # type: ignore[arg-type]
        assert decoded.tolist() == [[u - zero for u in codes]]


# ---- non-finite values ---------------------------------------------------------------------------

NAN_BITS = [0x7FC00000, -0x400000, 0x7F800001, -0x7FFFFF, 0x7FFFFFFF, -1]  # both signs, all kinds
BAD = [torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in NAN_BITS]
BAD += [torch.tensor(math.inf), torch.tensor(-math.inf)]


@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_inf_turn_their_group_and_no_other_into_nan(bits: int, nonfinite: Any) -> None:
    # "raise" codes alike: whoever sends the payload checks it (test_operators.py, require_finite).
    clean = torch.randn(2, 700).repeat(len(BAD), 1)
    x = clean.clone()
    x[1::2, 699] = torch.stack(BAD)
    for fmt in formats([bits], [16, 128, None], [None, 8, 128], nonfinite=nonfinite):
        size = fmt.group_elements(700)
        first = 699 // size * size  # the tail group of every second row
        expected, decoded = round_trip(clean, fmt), round_trip(x, fmt)
        assert decoded[1::2, first:].isnan().all(), fmt
        assert torch.equal(decoded[::2], expected[::2])
        assert torch.equal(decoded[1::2, :first], expected[1::2, :first])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_nan_and_inf_decodes_to_nan(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    bad = every[~every.isfinite()]
    x = torch.ones(1, len(bad) * 16, dtype=dtype)
    x[0, 3::16] = bad
    for fmt in (QuantFormat(4, 16), QuantFormat(8, 16), QuantFormat(3, 16, rotate=16)):
        assert round_trip(x, fmt).isnan().all()


def test_saturate_puts_inf_at_the_end_of_the_finite_range() -> None:
    for fmt in formats(rotations=[None, 16], groups=[16, 128, None], nonfinite="saturate"):
        x = torch.randn(1, 256)
        x[0, 3], x[0, 200] = math.inf, -math.inf
        clamped = x.clone()
        size = fmt.group_elements(256)
        for at in (3, 200):
            group = x[0, at // size * size :][:size]
            clamped[0, at] = group[group.isfinite()].abs().max().copysign(x[0, at])
        assert torch.equal(arithmetic.quantize(x, fmt), arithmetic.quantize(clamped, fmt)), fmt
        x[0, 100] = math.nan
        decoded = round_trip(x, fmt)
        start = 100 // size * size
        assert decoded[0, start : start + size].isnan().all()
        outside = torch.cat([decoded[0, :start], decoded[0, start + size :]])
        assert outside.isfinite().all()


def test_saturate_never_makes_zeros_of_inf() -> None:
    for others in (math.inf, 0.0):  # no finite value, or none that says where the grid ends
        x = torch.full((1, 128), others)
        x[0, 5] = -math.inf
        assert round_trip(x, QuantFormat(4, nonfinite="saturate")).isnan().all()


# ---- dtypes, sizes, strides, magnitudes ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", SIZES)
def test_every_size_and_dtype_round_trips(numel: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, numel).to(dtype)
    spacing = torch.finfo(dtype).eps / 2
    for fmt in FAMILIES if numel < 1000 else FAMILIES[::4]:
        decoded = round_trip(x, fmt)
        assert (decoded.dtype, decoded.shape) == (x.dtype, x.shape)
        exact = round_trip(x, fmt, torch.float32)
        assert torch.equal(decoded, exact.to(dtype)), fmt
        assert torch.equal(arithmetic.quantize(x, fmt), arithmetic.quantize(x.float(), fmt)), fmt
        if numel and fmt.rotate is None:
            peak = in_groups(x, fmt).abs().amax(-1, keepdim=True)
            error = (in_groups(decoded, fmt) - in_groups(x, fmt)).abs()
            limit = fmt.max_error() * (1 + spacing) + spacing
            assert (error <= limit * peak + 2.0**-120).all(), fmt


@pytest.mark.parametrize("fmt", FAMILIES, ids=str)
def test_rows_are_coded_on_their_own_and_strides_do_not_matter(fmt: QuantFormat) -> None:
    base = torch.randn(3, 400)
    views = {
        "transposed": torch.randn(400, 3).t(),
        "sliced": torch.randn(6, 900)[::2, 5:805:2],
        "expanded": torch.randn(1, 400).expand(3, 400),
        "offset": torch.randn(1201)[1:].view(3, 400),
        "flipped": base.flip(1),
    }
    for name, x in views.items():
        assert torch.equal(arithmetic.quantize(x, fmt), arithmetic.quantize(x.contiguous(), fmt)), (
            name
        )
    payload = arithmetic.quantize(base, fmt)
    if fmt.rounding == "nearest":
        for row in range(3):
            assert torch.equal(
                payload[row : row + 1], arithmetic.quantize(base[row : row + 1], fmt)
            )
    spread = torch.stack([payload, payload], 2).select(2, 0)
    assert not spread.is_contiguous()
    for f in (arithmetic.dequantize, arithmetic.dequantize_sum):
        assert torch.equal(f(spread, fmt, torch.float32), f(payload, fmt, torch.float32))
    assert torch.equal(arithmetic.requantize(spread, fmt), arithmetic.requantize(payload, fmt))


def test_the_input_is_left_alone() -> None:
    x = torch.randn(2, 256)
    x[0, 0] = math.inf
    copy = x.clone()
    for fmt in FAMILIES:
        arithmetic.quantize(x, fmt)
        assert torch.equal(x, copy)


@pytest.mark.parametrize(
    "dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[1:])], ids=str
)
def test_no_finite_value_decodes_to_inf_or_nan(dtype: torch.dtype, rotation_matrix: Matrix) -> None:
    largest = torch.finfo(dtype).max
    uniform = torch.rand(1, 2048) * 2 - 1
    rows = [torch.full((1, 2048), v) for v in (largest, -largest, 1e-40, 1e-30)]
    rows += [uniform * largest, uniform * 1e-40, uniform * 1e-30]
    single = torch.zeros(1, 2048)
    single[0, 77] = largest
    rows += [single, torch.where(uniform > 0, largest, 1e-40)]
    # The worst for a rotation: a whole block that adds up in one rotated value.
    rows.append((rotation_matrix(axes_of(128), 0)[1].sign() * largest).float().repeat(1, 16))
    x = torch.cat(rows).to(dtype)
    assert x.isfinite().all()
    top = 2.0**-7 if dtype == torch.float16 else 0.0
    for fmt in formats(groups=[128, 1024, None], rotations=[None, 32, 128, 1024]):
        decoded = round_trip(x, fmt)
        assert decoded.isfinite().all(), fmt
        again = arithmetic.requantize(arithmetic.quantize(x[:1], fmt), fmt)
        assert arithmetic.dequantize(again, fmt, torch.float32).isfinite().all(), fmt
        if fmt.rotate is None:
            groups, found = in_groups(x, fmt), in_groups(round_trip(x, fmt, torch.float32), fmt)
            peak = groups.abs().amax(-1, keepdim=True)
            limit = (fmt.max_error() + top) * peak + 2.0**-120
            assert ((found - groups).abs() <= limit).all(), fmt


# ---- stochastic rounding -------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["mid-rise", "mid-tread"])
@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased(bits: int, grid: Any) -> None:
    # The same 16 values in many groups and seeds: each decodes to one of two neighbours, so the
    # mean of n is within 6 * step / (2 sqrt n) of x, but for the known bias of finite arithmetic:
    # 2**-16 of the noise's resolution and 2**-16 * |x| of the snapped reciprocal, each twice over.
    fmt = QuantFormat(bits, 16, grid, rounding="stochastic")
    values = torch.randn(16)
    x = values.repeat(1, 1000)
    seeds = 50
    decoded = torch.stack(
        [
            arithmetic.dequantize(arithmetic.quantize(x, fmt, seed), fmt, torch.float32).reshape(
                1000, 16
            )
            for seed in range(seeds)
        ]
    ).double()
    step = float(values.abs().max()) / fmt.half_range * (1 + 2**-7)
    n = seeds * 1000
    noise = 6 * step / (2 * math.sqrt(n))
    bias = 2 * (2.0**-16 * step + 2.0**-16 * values.abs())
    assert ((decoded.mean((0, 1)) - values).abs() <= noise + bias).all()
    # Neither the seed nor the place may fix the outcome: each mean over one axis stays near too.
    for axis, m in ((0, seeds), (1, 1000)):
        spread = 7 * step / (2 * math.sqrt(m))
        assert ((decoded.mean(axis) - values).abs() <= spread + bias).all()


def test_stochastic_rounding_is_a_function_of_the_seed() -> None:
    x = torch.randn(2, 1000)
    for fmt in (QuantFormat(4, rounding="stochastic"), QuantFormat(8, 64, rounding="stochastic")):
        payload = arithmetic.quantize(x, fmt)
        assert torch.equal(payload, arithmetic.quantize(x.clone(), fmt))
        assert not torch.equal(payload, arithmetic.quantize(x, fmt, seed=1))
        shifted = QuantFormat(fmt.bits, fmt.group_size, rounding="stochastic", seed=5)
        assert torch.equal(arithmetic.quantize(x, fmt, seed=5), arithmetic.quantize(x, shifted))
        same_rows = arithmetic.quantize(x[:1].expand(2, 1000), fmt)
        assert not torch.equal(same_rows[0], same_rows[1])
    nearest = QuantFormat(4)
    assert torch.equal(arithmetic.quantize(x, nearest), arithmetic.quantize(x, nearest, seed=9))


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_dequantize_sum_adds_the_rows_in_order(rows: int, average: bool) -> None:
    # Of such different sizes that another order of additions rounds to another sum.
    x = torch.randn(rows, 1000) * torch.tensor([[1.0], [3e6], [5e2], [7e4]])[:rows]
    for fmt in formats(groups=[32, 128, None], rotations=[None]):
        payload = arithmetic.quantize(x, fmt)
        decoded = arithmetic.dequantize(payload, fmt, torch.float32)
        total = decoded[0]
        for row in decoded[1:]:
            total = total + row
        total = total * (1.0 / rows) if average else total
        for dtype in DTYPES:
            assert torch.equal(
                arithmetic.dequantize_sum(payload, fmt, dtype, average), total.to(dtype)
            )
        again = arithmetic.requantize(payload, fmt, average)
        assert torch.equal(again, arithmetic.quantize(total[None], fmt, seed=1))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rotated_sums_agree_within_float32_rounding(rows: int, average: bool) -> None:
    x = torch.randn(rows, 1000)
    for bits, rotate in product(BITS, (8, 32, 128)):
        fmt = QuantFormat(bits, rotate=rotate)
        payload = arithmetic.quantize(x, fmt)
        decoded = arithmetic.dequantize(payload, fmt, torch.float32).double()
        total = decoded.mean(0) if average else decoded.sum(0)
        found = arithmetic.dequantize_sum(payload, fmt, torch.float32, average)
        # log2(rotate) + rows additions of terms whose absolute values add up to at most
        # rotate * rows * max|decoded|, each rounded to 2**-24 of that.
        depth = math.log2(rotate) + rows
        rounding = depth * 2.0**-24 * rotate * rows * decoded.abs().max()
        assert ((found - total).abs() <= rounding).all(), fmt

        # requantize makes one more round trip, in the rotated domain.
        again = arithmetic.dequantize(
            arithmetic.requantize(payload, fmt, average), fmt, torch.float32
        )
        r = rotate**0.5 * in_groups(found[None], fmt).abs().amax(-1, keepdim=True)
        error = (in_groups(again, fmt) - in_groups(found[None], fmt)).abs()
        assert (error <= rotate**0.5 * (fmt.max_error() * r + rounding)).all(), fmt


@pytest.mark.parametrize("fmt", FAMILIES, ids=str)
def test_nan_of_one_row_reaches_the_sum_and_its_new_code(fmt: QuantFormat) -> None:
    x = torch.randn(3, 1024)
    x[1, 700] = math.nan
    payload = arithmetic.quantize(x, fmt)
    total = arithmetic.dequantize_sum(payload, fmt, torch.float32)
    size = fmt.group_elements(1024)
    first = 700 // size * size
    hit = torch.zeros(1024, dtype=torch.bool)
    hit[first : first + size] = True
    assert torch.equal(total.isnan(), hit)
    again = arithmetic.dequantize(arithmetic.requantize(payload, fmt), fmt, torch.float32)
    assert torch.equal(again.flatten().isnan(), hit)


# ---- the bytes themselves ------------------------------------------------------------------------


def fixed_values() -> Tensor:
    """300 values of many magnitudes from integer arithmetic: the same on any machine."""
    hashed = [(i * 2654435761) % 2**32 for i in range(1, 601)]
    values = [(h / 2**31 - 1) * 2.0 ** (i % 9 - 4) for i, h in enumerate(hashed)]
    return torch.tensor(values, dtype=torch.float32).reshape(2, 300)


GOLDEN = {
    "2b:g128:rise": "b942abcf8a8e5a09",
    "2b:g32:tread:stoch": "46b0da5956fa8d8d",
    "2b:tensor:rise": "d6de4a41bbf65440",
    "2b:g64:rise:h16": "e22624016ea7718b",
    "2b:g128:rise:h128:saturate": "0c6888a62f51973c",
    "3b:g128:rise": "8ef936048ef8c70b",
    "3b:g32:tread:stoch": "aa83e4e1fb8c5424",
    "3b:tensor:rise": "0ee8a93408a5980f",
    "3b:g64:rise:h16": "b2dbe8d82f7b507d",
    "3b:g128:rise:h128:saturate": "accbe76c3831226d",
    "4b:g128:rise": "90f9a3186bb90b87",
    "4b:g32:tread:stoch": "05347ad98684504f",
    "4b:tensor:rise": "cd98b042d2fdb33c",
    "4b:g64:rise:h16": "17adce8a0f59dfcb",
    "4b:g128:rise:h128:saturate": "f9181b1a5d22ce15",
    "5b:g128:rise": "904f90ac315a2e46",
    "5b:g32:tread:stoch": "568ca7904645f4bb",
    "5b:tensor:tread": "0726e9ed25bd9cbb",
    "5b:g64:tread:h16": "41e7a4af6dcc5ddb",
    "5b:g128:tread:h128:saturate": "391629e42aef4a01",
    "6b:g128:rise": "52b4e75f9e3bad1d",
    "6b:g32:tread:stoch": "d407b707f5e77afe",
    "6b:tensor:tread": "add9133e43af1821",
    "6b:g64:tread:h16": "dd67af1ba184e2f3",
    "6b:g128:tread:h128:saturate": "de5c9ce8ef83d50c",
    "8b:g128:rise": "8cff747bb57757e5",
    "8b:g32:tread:stoch": "06bdc08e401478ee",
    "8b:tensor:tread": "2857e0722e2e1cec",
    "8b:g64:tread:h16": "5e2eab2599711624",
    "8b:g128:tread:h128:saturate": "0883aabb7c2c8769",
    "2b:g128:tread": "e0b9b36253159ed9",
    "2b:g128:tread:full": "57ae8cbcd136e11f",
    "2b:g128:rise:full": "ac35df9b6acfd898",
    "3b:g128:tread": "1d4f0ac5a05cf7b7",
    "3b:g128:tread:full": "b473a7204936bbc8",
    "3b:g128:rise:full": "6111a1868ec28dcb",
    "4b:g128:tread": "83c4a1a5c435308b",
    "4b:g128:tread:full": "ca374439e0816668",
    "4b:g128:rise:full": "c696cd59ec0b8def",
}


@pytest.mark.parametrize("fmt", [*FAMILIES, *CLIPPED], ids=str)
def test_bytes_are_those_of_this_release(fmt: QuantFormat) -> None:
    """A change here changes the wire: ranks of two versions no longer understand one another."""
    payload = arithmetic.quantize(fixed_values(), fmt)
    again = arithmetic.requantize(payload, fmt)
    found = hashlib.sha256(bytes(torch.cat([payload, again]).flatten().tolist())).hexdigest()
    assert found[:16] == GOLDEN[fmt.for_kind("activations").spec], fmt


def test_bytes_of_one_small_group_by_name() -> None:
    x = torch.tensor(
        [[-4.0, -3.5, -2.0, -1.0, -0.5, -0.1, -0.0, 0.0, 0.1, 0.5, 1, 2, 3, 3.4, 4, 4]]
    )
    found = bytes(arithmetic.quantize(x, QuantFormat(4, 16)).flatten().tolist())
    assert found.hex(" ") == "80 81 94 b6 d7 e7 f8 f8 09 3f"


# ---- a rank that flushes denormal numbers to zero -----------------------------------------------


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("spec", ["8b", "4b", "4b:tread", "2b", "3b:h32", "8b:stoch", "5b:g64:s7"])
def test_flushing_changes_no_bytes_from_a_peak_of_2_to_the_minus_100(spec: str) -> None:
    fmt = QuantFormat.parse(spec)
    for exponent in range(-149, -90):
        x = torch.randn(16, 256, generator=torch.Generator().manual_seed(exponent + 200))
        peaks = x.view(16, -1, fmt.group_size).abs().amax(-1, keepdim=True)
        x = (x.view(16, -1, fmt.group_size).double() / peaks * 2.0**exponent).float()
        payload = rf.quantize(x.flatten(), fmt)
        decoded = rf.dequantize(payload, fmt, (x.numel(),), torch.float32)
        with flushing():
            other = rf.quantize(x.flatten(), fmt)
            again = rf.dequantize(payload, fmt, (x.numel(),), torch.float32)
        assert torch.equal(again.view(torch.int32), decoded.view(torch.int32)), exponent
        if exponent >= -100:
            assert torch.equal(payload, other), exponent
