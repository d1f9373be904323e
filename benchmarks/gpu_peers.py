"""What else quantizes a tensor on a GPU: other libraries, and the chain of operators one writes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Peer = tuple[Callable[[Tensor], object], float]
"""Codes a bfloat16 tensor; bits an element of the result, scales included."""

GROUP = 128


def chain(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric codes and scales, as a few lines of torch; two 4-bit codes a byte."""
    groups = x.view(-1, GROUP)
    half = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / half
    codes = (groups / scale).round().clamp(-half, half).to(torch.int8)
    if bits == 4:
        low, high = (codes + 8).view(torch.uint8).chunk(2, 1)
        codes = low | high << 4
    return codes, scale.to(torch.bfloat16)


def peers() -> tuple[dict[str, Peer], dict[str, str]]:
    """Those that are installed, and why the others are missing."""
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    scale = 16 / GROUP
    for bits in (8, 4):
        eager = lambda x, bits=bits: chain(x, bits)  # noqa: E731
        found[f"eager chain, {bits} bits"] = eager, bits + scale
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        found[f"compiled chain, {bits} bits"] = compiled, bits + scale
    for name, add in (("bitsandbytes", _bitsandbytes), ("torchao", _torchao)):
        if find_spec(name) is None:
            missing[name] = "not installed"
            continue
        try:
            found |= add()
        except Exception as error:  # whatever a library of another version may say
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _bitsandbytes() -> dict[str, Peer]:
    from bitsandbytes import functional as bnb

    return {
        "bitsandbytes quantize_4bit": (
            lambda x: bnb.quantize_4bit(x, blocksize=GROUP, quant_type="nf4"),
            4 + 32 / GROUP,
        ),
        "bitsandbytes quantize_blockwise": (
            lambda x: bnb.quantize_blockwise(x, blocksize=256),
            8 + 32 / 256,
        ),
    }


def _torchao() -> dict[str, Peer]:
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        quantize_affine,
    )

    def code(x: Tensor) -> Tensor:
        groups = x.view(-1, GROUP)
        scale, zero = choose_qparams_affine(
            groups, MappingType.SYMMETRIC, (1, GROUP), torch.int8, scale_dtype=torch.bfloat16
        )
        return quantize_affine(groups, (1, GROUP), scale, zero, torch.int8)

    compiled = torch.compile(code, fullgraph=True, dynamic=False)
    bits = 8 + 16 / GROUP
    return {"torchao int8, eager": (code, bits), "torchao int8, compiled": (compiled, bits)}
