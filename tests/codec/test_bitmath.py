"""The arithmetic on the bits of floats, where devices differ."""

from __future__ import annotations

import torch

from rfcompile.codec.bitmath import floor_by_truncating, floor_to_int

BITS = (
    *(0, 1, 2, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x40400000, 0x40490FDB),
    *(0x42FE0000, 0x42FF8000, 0x43000000, 0x4B7FFFFF, 0x4B800000),
)
"""Zero, subnormals, 2**-126, around 1, 3, pi, 127, 127.75, 128, 2**24 and the float before."""


def test_truncating_gives_the_floor_of_all_values() -> None:
    special = torch.tensor(BITS, dtype=torch.int32).view(torch.float32)
    x = torch.cat([special, torch.randn(10_000) * torch.logspace(-44, 7, 10_000)])
    x = torch.cat([x, -x])
    assert bool(((x < 0) & (x > -(2.0**-126))).any()), "no negative subnormals"
    expected = torch.floor(x).to(torch.int32)
    assert torch.equal(floor_by_truncating(x), expected)
    assert torch.equal(floor_to_int(x), expected)
