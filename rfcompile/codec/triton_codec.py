"""The codec operators on GPUs: Triton kernels and their launches.

Eager operators use them on a GPU. In a compiled graph Inductor generates the kernels, fused with
their neighbours, and calls these only for what it cannot do in as few launches: see
``inductor/lowering.py``.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec import arithmetic
from rfcompile.codec.bitmath import largest_scale, mixed_seed
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.triton_launch import TILE, largest_of, layout_of, run


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there."""
    return device.type == "cuda" and has_triton()


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def quantize(x_CM: Tensor, fmt: QuantFormat, seed: int = 0) -> Tensor:
    """``arithmetic.quantize``."""
    C, M = x_CM.shape
    payload = x_CM.new_empty((C, fmt.row_bytes(M)), dtype=torch.uint8)
    if M > 1 and x_CM.stride(1) != 1:
        x_CM = x_CM.contiguous()
    if fmt.group_size is None:
        from rfcompile.codec import triton_tensor_codec

        triton_tensor_codec.quantize(x_CM, payload, fmt, seed)
        return payload
    from rfcompile.codec import triton_kernels

    G, E = arithmetic.groups_of(payload.shape[1], fmt)
    _launch(
        triton_kernels.quantize, C, G, E,
        x_CM, payload, M, x_CM.stride(0), G, _codes_size(G, fmt), mixed_seed(fmt.seed + seed),
        layout_of(fmt, E), largest_scale(fmt, x_CM.dtype), fmt.num_parts,
    )  # fmt: skip
    return payload


def dequantize(payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> Tensor:
    """``arithmetic.dequantize``."""
    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((C, G * E), dtype=dtype)
    if fmt.group_size is None:
        from rfcompile.codec import triton_tensor_codec

        triton_tensor_codec.dequantize(payload, out, fmt)
        return out
    from rfcompile.codec import triton_kernels

    _launch(
        triton_kernels.dequantize, C, G, E,
        payload, out, G, _codes_size(G, fmt),
        layout_of(fmt, E), largest_of(fmt, dtype), fmt.num_parts,
    )  # fmt: skip
    return out


def dequantize_sum(
    payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype, average: bool = False
) -> Tensor:
    """``arithmetic.dequantize_sum``."""
    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((G * E,), dtype=dtype)
    if fmt.group_size is None:
        from rfcompile.codec import triton_tensor_codec

        triton_tensor_codec.dequantize_sum(payload, out, fmt, average)
        return out
    from rfcompile.codec import triton_kernels

    _launch(
        triton_kernels.dequantize_sum, 1, G, E,
        payload, out, G, _codes_size(G, fmt), C, 1.0 / C, layout_of(fmt, E), average,
        fmt.num_parts,
    )  # fmt: skip
    return out


def requantize(
    payload_CB: Tensor, fmt: QuantFormat, average: bool = False, seed: int = 0
) -> Tensor:
    """``arithmetic.requantize``."""
    payload, C, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    total = payload.new_empty((1, payload.shape[1]))
    if fmt.group_size is None:
        from rfcompile.codec import triton_tensor_codec

        triton_tensor_codec.requantize(payload, total, fmt, average, seed)
        return total
    from rfcompile.codec import triton_kernels

    _launch(
        triton_kernels.requantize, 1, G, E,
        payload, total, G, _codes_size(G, fmt), C, 1.0 / C, mixed_seed(fmt.seed + seed + 1),
        layout_of(fmt, E), largest_scale(fmt, torch.float32), average, 8 // fmt.planes[-1],
    )  # fmt: skip
    return total


def _codes_size(groups: int, fmt: QuantFormat) -> int:
    """Bytes of the codes in a payload row."""
    assert fmt.group_size is not None
    return groups * fmt.group_size * fmt.bits // 8


def _launch(kernel: Any, rows: int, groups: int, group: int, *arguments: Any) -> None:
    parts = arguments[-1]
    block = max(TILE * parts // group, 1)
    run(kernel, rows * -(-groups // block), (*arguments, block))
