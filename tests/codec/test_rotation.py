"""The rotation against a dense orthogonal matrix; see test_arithmetic.py for rotated formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rfcompile.codec import arithmetic
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.rotation import axes_of, rotate_parts, signs, unrotate_parts
from rfcompile.report.measures import excess_kurtosis

Matrix = Callable[[Sequence[int], int], Tensor]
Blocks = Callable[[Tensor, int], Tensor]


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 3])
def test_parts_rotate_by_the_matrix_and_back(rotation_matrix: Matrix, n: int, stride: int) -> None:
    # Small integers divided by a power of two: every sum is exact, so the results are equal.
    x = torch.randint(-50, 50, (n, stride, 7)).float()
    signed_hadamard = (rotation_matrix([n], 3) * n**0.5).round().float()
    expected = (signed_hadamard @ x.reshape(n, -1)).reshape(x.shape) / n

    y = rotate_parts(list(x.reshape(n * stride, 7)), n, seed=3)

    assert torch.equal(torch.stack(y).view_as(x), expected)
    back = unrotate_parts(y, n, seed=3)
    assert torch.equal(torch.stack(back).view_as(x), x)


@pytest.mark.parametrize("n", [2, 8, 32, 64, 128, 1024])
def test_the_matrix_is_orthogonal(rotation_matrix: Matrix, n: int) -> None:
    q = rotation_matrix(axes_of(n), 1)
    torch.testing.assert_close(q @ q.T, torch.eye(n).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [16, 32, 64, 128, 256, 512, 1024])
def test_a_large_block_is_rotated_by_its_own_matrix(
    rotation_matrix: Matrix, rotation_blocks: Blocks, n: int
) -> None:
    # 8 bits resolve the rotated values well enough to tell this matrix from any other.
    fmt = QuantFormat(8, 1024, rotate=n, seed=5)
    x = torch.randn(1, 1024)
    plain = QuantFormat(8, 1024)
    levels = arithmetic.dequantize(arithmetic.quantize(x, fmt), plain, torch.float32)
    expected = rotation_matrix(axes_of(n), 5) @ rotation_blocks(x.double(), n) / n**0.5
    error = (rotation_blocks(levels, n) - expected).abs().max() / expected.abs().max()
    assert error <= plain.max_error()


@pytest.mark.parametrize(("group_size", "spread"), [(128, 128), (None, 16)])
def test_an_outlier_channel_is_spread_over_others(group_size: int | None, spread: int) -> None:
    """Over m channels alike, an outlier's excess kurtosis falls to 1/m; twice is allowed."""
    x = torch.randn(64, 128)
    x[:, 5] *= 30
    payload = arithmetic.quantize(x.reshape(1, -1), QuantFormat(8, group_size, rotate=128))
    rotated = arithmetic.dequantize(payload, QuantFormat(8, group_size), torch.float32)
    assert excess_kurtosis(rotated) < excess_kurtosis(x) / (spread / 2)


def test_signs_are_fixed_for_a_seed_and_differ_between_seeds() -> None:
    assert "".join("+-"[s < 0] for s in signs(16, 0)) == "++-+---+--+----+"
    assert len({signs(16, seed) for seed in range(20)}) > 15


@pytest.mark.parametrize(("n", "peak"), [(2, 2), (4, 2), (8, 4), (16, 4)])
@pytest.mark.parametrize("seed", range(20))
def test_a_constant_block_is_spread(n: int, peak: int, seed: int) -> None:
    """Parseval: the squares of ``H d`` sum to ``n^2``, so some element is at least ``sqrt(n)``."""
    y = torch.stack(rotate_parts(list(torch.ones(n)), n, seed)) * n
    assert y.square().sum() == n * n
    assert y.abs().max() == peak


def test_a_block_is_split_into_short_axes() -> None:
    assert [axes_of(n) for n in (2, 8, 16, 128, 1024)] == [(2,), (8,), (8, 2), (8, 16), (8, 16, 8)]
    for n in (2**k for k in range(1, 11)):
        assert math.prod(axes_of(n)) == n


@pytest.mark.parametrize("rotate", [8, 128])
def test_an_outlier_is_spread(rotate: int) -> None:
    x = torch.randn(1, 1024)
    x.view(-1, 128).select(1, 5).mul_(50.0)
    errors = []
    for fmt in (QuantFormat(4, 128), QuantFormat(4, 128, rotate=rotate)):
        decoded = arithmetic.dequantize(arithmetic.quantize(x, fmt), fmt, torch.float32)
        ordinary = x.abs() < 10
        errors.append((decoded - x)[ordinary].norm())
    # One outlier of size c costs an ordinary value about c / 15 plain, c / 15 / sqrt(rotate)
    # rotated; the clip and the other values leave at least half of that gain.
    assert errors[1] < errors[0] / (rotate**0.5 / 2)
