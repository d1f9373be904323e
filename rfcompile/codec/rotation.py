"""The randomized Hadamard rotation of a group, which spreads outliers before coding.

A block of ``n`` values becomes ``y = H D x / n`` with Sylvester's Hadamard matrix ``H`` and random
signs ``D``, drawn among those that spread a constant block evenly; back it is ``x = D H y``. ``n``
is a power of two and the rest is additions in a fixed order, so every device computes the same
bits. The orthogonal rotation is ``H D / sqrt(n)``; the group's scale absorbs the difference.
Dividing by all of ``n`` before the sums keeps ``|y| <= max|x|``, so that no input overflows.

With ``p = min(n, 8)`` a block is ``n / p`` neighbours from each of ``p`` places of a group that lie
``E / p`` apart (``E`` elements a group): outliers of a channel are spread over other channels,
however large the group. It is an array with the axes :func:`axes_of`, first axis slowest, and each
axis is rotated by itself: ``H`` is the Kronecker product of the axes' matrices, ``D`` of their
signs.

Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456) for the use before low-bit coding; the
power-of-two normalization, the signs by axis and their choice are ours.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

Number = TypeVar("Number", int, Tensor)


@lru_cache(maxsize=256)
def signs(n: int, seed: int) -> tuple[int, ...]:
    """``n <= 16`` signs (+1 or -1), the same on every rank and platform for a seed.

    Only signs ``d`` with ``max |H d| <= 2^ceil(log2(n) / 2)`` are drawn, the least there is: a mean
    that the elements of a block share (often, activations have one) goes to all of them alike.
    Signs that resemble a row of ``H`` would heap it on one, as every second draw does at ``n = 4``.
    """
    generator = random.Random(seed * 1031 + n)
    least = 2 ** math.ceil(math.log2(n) / 2)
    while True:
        bits = generator.getrandbits(n)
        drawn = [1 - 2 * (bits >> i & 1) for i in range(n)]
        if max(map(abs, _butterfly(drawn))) <= least:
            return tuple(drawn)


def sign_bits(n: int, seed: int) -> int:
    """:func:`signs` as bits: bit i is 1 where sign i is -1."""
    return sum(1 << i for i, sign in enumerate(signs(n, seed)) if sign < 0)


def axes_of(block: int) -> tuple[int, ...]:
    """``block`` as a product of axes small enough to unroll: at most 8, then at most 16 each.

    Larger butterflies compile for minutes: Inductor expands the tree of each of their outputs.
    """
    axes = [min(block, 8)]
    rest = block // axes[0]
    while rest > 1:
        axes.append(min(rest, 16))
        rest //= axes[-1]
    return tuple(axes)


def rotate_parts(parts: list[Tensor], block: int, seed: int) -> list[Tensor]:
    """Rotate along the list: elements ``parts[j], parts[j + n/block], ...`` form a block."""
    factors = [sign / block for sign in signs(block, seed)]
    return _each_block(
        parts, block, lambda xs: _butterfly([x * f for x, f in zip(xs, factors, strict=True)])
    )


def unrotate_parts(parts: list[Tensor], block: int, seed: int) -> list[Tensor]:
    """Inverse of :func:`rotate_parts`, exact up to float32 rounding of the sums."""
    flips = signs(block, seed)
    return _each_block(
        parts,
        block,
        lambda ys: [y if s > 0 else -y for y, s in zip(_butterfly(ys), flips, strict=True)],
    )


def _each_block(
    parts: list[Tensor], block: int, f: Callable[[list[Tensor]], list[Tensor]]
) -> list[Tensor]:
    stride = len(parts) // block
    result = list(parts)
    for j in range(stride):
        result[j::stride] = f(parts[j::stride])
    return result


def _butterfly(xs: list[Number]) -> list[Number]:
    """``H x``, in ``log2 n`` steps of additions and subtractions."""
    width = 1
    while width < len(xs):
        mixed = list(xs)
        for i in range(len(xs)):
            if i & width == 0:
                a, b = xs[i], xs[i | width]
                mixed[i], mixed[i | width] = a + b, a - b
        xs, width = mixed, 2 * width
    return xs
