"""How a Triton kernel of the codec is launched, and what it is told of a format."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.rotation import axes_of, sign_bits

TILE = 1024
"""Elements of a tile: 8 for each of 128 threads, which load them by one or two instructions."""


def run(kernel: Any, programs: int, arguments: tuple[Any, ...]) -> None:
    """Launch ``kernel`` on the device of its first argument, if there is anything to do."""
    if programs:
        warps = 2 if torch.version.hip else 4  # 128 threads
        # No fused multiply-adds: a rotation may round where its signs are multiplied in.
        launch(kernel, programs, arguments, num_warps=warps, enable_fp_fusion=False)


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
    first = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, **options)


def largest_of(fmt: QuantFormat, dtype: torch.dtype) -> float | None:
    """What decoded values are clamped to: errors that meet in one may carry it past float16."""
    is_clamped = fmt.rotate is not None and dtype == torch.float16
    return torch.finfo(dtype).max if is_clamped else None


@cache
def layout_of(fmt: QuantFormat, group: int) -> Any:
    """The :class:`triton_parts.Layout` of a format, for tiles of ``group`` elements together."""
    from rfcompile.codec.triton_parts import Layout

    axes, after = [], fmt.rotate or 1
    for place, n in enumerate(axes_of(fmt.rotate) if fmt.rotate else ()):
        after //= n
        axes.append((n, after if place else 0, sign_bits(n, fmt.seed)))
    return Layout(
        bits=fmt.bits,
        planes=fmt.planes,
        group=group,
        is_mid_rise=fmt.is_mid_rise,
        is_stochastic=fmt.rounding == "stochastic",
        saturates=fmt.nonfinite == "saturate",
        clip_over_half_range=fmt.clip / fmt.half_range,
        zero_offset=fmt.zero_offset,
        axes=tuple(axes),
    )
