"""The randomized Hadamard rotation of a group; open this file to see how outliers are spread.

A block of ``n`` values becomes ``y = 2^-k H D x`` with the Hadamard matrix ``H`` (entries +-1), random
signs ``D`` and ``k = floor(log2(n) / 2)``; back it is ``x = 2^(k - log2 n) D H y``. Both factors are
powers of two and the rest is additions in a fixed order, so every device computes the same bits.
``H D / sqrt(n)`` is orthogonal; ours differs from it by at most a factor ``sqrt(2)``, which the
scale of the group absorbs.

Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456) for the use before low-bit coding; the
power-of-two normalization and the two-axis signs are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

from torch import Tensor

MAX_UNROLLED = 32
"""A block up to this size is one unrolled butterfly; a larger one is two (32 by n / 32)."""

Join = Callable[[Sequence[Tensor]], Tensor]


@lru_cache(maxsize=256)
def signs(n: int, seed: int) -> tuple[int, ...]:
    """``n`` signs (+1 or -1), the same on every rank and platform for a seed."""
    bits = random.Random(seed * 1031 + n).getrandbits(n)
    return tuple(1 - 2 * (bits >> i & 1) for i in range(n))


def split_block(block: int) -> tuple[int, int]:
    """``block = outer * inner``, each axis small enough to unroll."""
    outer = min(block, MAX_UNROLLED)
    return outer, block // outer


def rotate_parts(parts: list[Tensor], block: int, seed: int) -> list[Tensor]:
    """Rotate along the list: elements ``parts[j], parts[j + n/block], ...`` form a block."""
    return _each_block(parts, block, lambda xs: _scaled(_butterfly(_signed(xs, seed)), -_k(block)))


def unrotate_parts(parts: list[Tensor], block: int, seed: int) -> list[Tensor]:
    """Inverse of :func:`rotate_parts`, exact up to float32 rounding of the sums."""
    log2 = block.bit_length() - 1

    def inverse(ys: list[Tensor]) -> list[Tensor]:
        return _signed(_scaled(_butterfly(ys), _k(block) - log2), seed)

    return _each_block(parts, block, inverse)


def _k(block: int) -> int:
    return (block.bit_length() - 1) // 2


def _each_block(
    parts: list[Tensor], block: int, f: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    stride = len(parts) // block
    result = list(parts)
    for j in range(stride):
        result[j::stride] = f(parts[j::stride])
    return result


def _butterfly(xs: list[Tensor]) -> list[Tensor]:
    width = 1
    while width < len(xs):
        mixed = list(xs)
        for i in range(len(xs)):
            if i & width == 0:
                a, b = xs[i], xs[i | width]
                mixed[i], mixed[i | width] = a + b, a - b
        xs, width = mixed, 2 * width
    return xs


def _signed(xs: list[Tensor], seed: int) -> list[Tensor]:
    return [x if sign > 0 else -x for x, sign in zip(xs, signs(len(xs), seed), strict=True)]


def _scaled(xs: list[Tensor], exponent: int) -> list[Tensor]:
    return xs if exponent == 0 else [x * 2.0**exponent for x in xs]
