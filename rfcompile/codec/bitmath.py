"""Arithmetic on the bits of floats, which gives the same result on every device.

Shapes as in ``arithmetic.py``.

Generated CUDA code computes with subnormals, except in ``floor``, which takes them for zero: see
:func:`floor_to_int`.

A CPU that flushes denormal numbers to zero (``torch.set_flush_denormal(True)``) gives the
same bytes for every group whose peak is 2**-100 or more; below, values of less than 2**-126 may get
the next level, and groups of less than 2**-126 a step of 0. All bytes are decoded to the same
values.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from rfcompile.codec.formats import QuantFormat

EXPONENT_BITS = 0x7F800000
NAN_SCALE = 0x7FC00000
MIN_SCALE = (127 - 120) << 23
"""Smallest step, 2**-120: half of it is still a normal float32, so flushing devices agree."""


def scale_bits(peak: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The step of a group as float32 bits (a bfloat16 with 16 zero bits below), ``1 / step``, and
    int32 1 for a finite group, 0 for another.

    A non-finite peak gives a NaN step; a zero peak gives step 0; the grid never leaves the finite
    range of ``dtype``.
    """
    bits = (peak * (fmt.clip / fmt.half_range)).view(torch.int32) & 0x7FFFFFFF
    is_nonfinite = bits >= EXPONENT_BITS
    rounded = (torch.clamp(bits, MIN_SCALE, largest_scale(fmt, dtype)) + 0xFFFF) & -65536
    # Round-to-nearest-even to 15 significant bits: two ulp of device error never change it.
    inverse = (1.0 / rounded.view(torch.float32)).view(torch.int32)
    inverse = (inverse + 0xFF + ((inverse >> 9) & 1)) & -512
    stored = torch.where(is_nonfinite, NAN_SCALE, torch.where(bits == 0, 0, rounded))
    return stored, inverse.view(torch.float32), is_nonfinite.logical_not().to(torch.int32)


def largest_scale(fmt: QuantFormat, dtype: torch.dtype) -> int:
    end = torch.finfo(dtype).max
    if fmt.rotate is not None:  # the sums that rotate back must not overflow
        end = min(end, torch.finfo(torch.bfloat16).max / fmt.rotate)
    largest = struct.unpack("<i", struct.pack("<f", end / fmt.half_range))[0]
    return int(largest) & -65536


def floor_to_int(t: Tensor) -> Tensor:
    """``floor(t)`` as int32, below zero also for subnormals.

    CUDA's ``floor`` in generated code gives 0 for the negative ones (``cvt.rmi.ftz``).
    """
    if t.device.type == "cpu":  # one instruction there
        return torch.floor(t).to(torch.int32)
    return floor_by_truncating(t)


def floor_by_truncating(t: Tensor) -> Tensor:
    """What :func:`floor_to_int` does off the CPU: comparing does not flush."""
    whole = t.to(torch.int32)
    return whole - (t < whole.to(torch.float32)).to(torch.int32)


def noise(x_CGR: Tensor, seed: int, first: int, group: int) -> Tensor:
    """16 hashed bits of (seed, place, the value's own bits): no state, the same on every device.

    Mixing the value in makes the rounding differ from step to step without a new seed. Hash:
    lowbias32 (C. Wellons, "Prospecting for hash functions", 2018).
    """
    C, G, R = x_CGR.shape
    device = x_CGR.device
    group_CG1 = torch.arange(C * G, dtype=torch.int32, device=device).view(C, G, 1)
    place = group_CG1 * group + first + torch.arange(R, dtype=torch.int32, device=device)
    # Otherwise Inductor folds the product below into an index beyond int32, which Triton refuses.
    place = place & -1
    v = mixed_seed(seed) ^ (place * _signed32(0x9E3779B1)) ^ x_CGR.view(torch.int32)
    v = (v ^ ((v >> 16) & 0xFFFF)) * 0x7FEB352D
    v = (v ^ ((v >> 15) & 0x1FFFF)) * _signed32(0x846CA68B)
    return (v >> 16) & 0xFFFF


def mixed_seed(seed: int) -> int:
    """What :func:`noise` makes of a seed, an int32."""
    return _signed32(seed * 0x85EBCA6B)


def _signed32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31
