"""The codec operators on GPUs: which formats have a Triton kernel, and its launch.

Eager operators use it on a GPU. In a compiled graph Inductor generates the kernels, fused with
their neighbours, and calls these only for what it cannot do in one launch: rotations.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec import arithmetic
from rfcompile.codec.bitmath import largest_scale, mixed_seed
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.rotation import axes_of, sign_bits

TILE = 1024
"""Elements of a tile: 8 for each of 128 threads, which load them by one or two instructions."""


def runs_on(device: torch.device, fmt: QuantFormat) -> bool:
    """Whether the kernels run there and ``fmt`` has some: it has groups."""
    return device.type == "cuda" and fmt.group_size is not None and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def quantize(x_CM: Tensor, fmt: QuantFormat, seed: int = 0) -> Tensor:
    """``arithmetic.quantize``."""
    from rfcompile.codec import triton_kernels

    C, M = x_CM.shape
    payload = x_CM.new_empty((C, fmt.row_bytes(M)), dtype=torch.uint8)
    G, E = arithmetic.groups_of(payload.shape[1], fmt)
    if M > 1 and x_CM.stride(1) != 1:
        x_CM = x_CM.contiguous()
    _launch(
        triton_kernels.quantize, C, G, E,
        x_CM, payload, M, x_CM.stride(0), G, _codes_size(G, fmt), mixed_seed(fmt.seed + seed),
        layout_of(fmt), largest_scale(fmt, x_CM.dtype), fmt.num_parts,
    )  # fmt: skip
    return payload


def dequantize(payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> Tensor:
    """``arithmetic.dequantize``."""
    from rfcompile.codec import triton_kernels

    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((C, G * E), dtype=dtype)
    is_clamped = fmt.rotate is not None and dtype == torch.float16
    _launch(
        triton_kernels.dequantize, C, G, E,
        payload, out, G, _codes_size(G, fmt),
        layout_of(fmt), torch.finfo(dtype).max if is_clamped else None, fmt.num_parts,
    )  # fmt: skip
    return out


def dequantize_sum(
    payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype, average: bool = False
) -> Tensor:
    """``arithmetic.dequantize_sum``."""
    from rfcompile.codec import triton_kernels

    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((G * E,), dtype=dtype)
    _launch(
        triton_kernels.dequantize_sum, 1, G, E,
        payload, out, G, _codes_size(G, fmt), C, 1.0 / C, layout_of(fmt), average, fmt.num_parts,
    )  # fmt: skip
    return out


def requantize(
    payload_CB: Tensor, fmt: QuantFormat, average: bool = False, seed: int = 0
) -> Tensor:
    """``arithmetic.requantize``."""
    from rfcompile.codec import triton_kernels

    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    total = payload.new_empty((1, payload.shape[1]))
    _launch(
        triton_kernels.requantize, 1, G, E,
        payload, total, G, _codes_size(G, fmt), C, 1.0 / C, mixed_seed(fmt.seed + seed + 1),
        layout_of(fmt), largest_scale(fmt, torch.float32), average, 8 // fmt.planes[-1],
    )  # fmt: skip
    return total


def _codes_size(groups: int, fmt: QuantFormat) -> int:
    """Bytes of the codes in a payload row."""
    assert fmt.group_size is not None
    return groups * fmt.group_size * fmt.bits // 8


def _launch(kernel: Any, rows: int, groups: int, group: int, *arguments: Any) -> None:
    parts = arguments[-1]
    block = max(TILE * parts // group, 1)
    programs = rows * -(-groups // block)
    if programs:
        warps = 2 if torch.version.hip else 4  # 128 threads
        # No fused multiply-adds: a rotation may round where its signs are multiplied in.
        _run(kernel, programs, (*arguments, block), num_warps=warps, enable_fp_fusion=False)


def _run(kernel: Any, programs: int, arguments: tuple[Any, ...], **options: Any) -> None:
    first = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(programs,)](*arguments, **options)


@cache
def layout_of(fmt: QuantFormat) -> Any:
    """The :class:`triton_kernels.Layout` of a format with groups."""
    from rfcompile.codec.triton_kernels import Layout

    assert fmt.group_size is not None
    axes, after = [], fmt.rotate or 1
    for place, n in enumerate(axes_of(fmt.rotate) if fmt.rotate else ()):
        after //= n
        axes.append((n, after if place else 0, sign_bits(n, fmt.seed)))
    return Layout(
        bits=fmt.bits,
        planes=fmt.planes,
        group=fmt.group_size,
        is_mid_rise=fmt.is_mid_rise,
        is_stochastic=fmt.rounding == "stochastic",
        saturates=fmt.nonfinite == "saturate",
        clip_over_half_range=fmt.clip / fmt.half_range,
        zero_offset=fmt.zero_offset,
        axes=tuple(axes),
    )
