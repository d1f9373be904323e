"""A factor of an adapter: a parameter during training, codes of a few bits afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.functions import dequantize, quantize
from rfcompile.rewrites.adapters.codebooks import (
    Codebook,
    codebook_of,
    pack_codes,
    unpack_codes,
)


class Factor(nn.Module):
    """A matrix ``weight``; the module is there for its name, which is PEFT's."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class CodebookFactor(nn.Module):
    """A matrix as codes of a codebook; buffers ``codes`` (uint8, a stream of bits) and ``levels``.

    Decoded at each call: what is kept is what is stored. Levels are float32; a call gives the dtype
    that the matrix had.
    """

    codes: Tensor
    levels: Tensor

    def __init__(
        self, codes: Tensor, levels: Tensor, bits: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, shape, dtype
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)

    @classmethod
    def of(cls, matrix: Tensor, bits: int, codebook: Codebook) -> CodebookFactor:
        codes, levels = codebook_of(matrix, bits, codebook)
        shape = (matrix.shape[0], matrix.shape[1])
        return cls(pack_codes(codes, bits), levels, bits, shape, matrix.dtype)

    def forward(self) -> Tensor:
        rows, columns = self.shape
        codes = unpack_codes(self.codes, self.bits, rows * columns)
        return self.levels[codes].to(self.dtype).view(self.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Another adapter may have another number of levels: up to ``2**bits``."""
        levels = state_dict.get(f"{prefix}levels")
        if isinstance(levels, Tensor) and levels.dim() == 1 and len(levels) <= 2**self.bits:
            self.levels = self.levels.new_empty(levels.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class WireFactor(nn.Module):
    """A matrix as a payload of the wire; buffer ``payload``."""

    payload: Tensor

    def __init__(
        self, payload: Tensor, format: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, shape, dtype
        self.register_buffer("payload", payload)

    @classmethod
    def of(cls, matrix: Tensor, fmt: QuantFormat) -> WireFactor:
        shape = (matrix.shape[0], matrix.shape[1])
        return cls(quantize(matrix.detach(), fmt), fmt.spec, shape, matrix.dtype)

    def forward(self) -> Tensor:
        return dequantize(self.payload, self.format, self.shape, self.dtype)


AnyFactor = Factor | CodebookFactor | WireFactor


def nbytes_of(factor: AnyFactor) -> int:
    """Bytes that the factor takes, at rest and in a file."""
    return sum(tensor.nbytes for tensor in factor.state_dict().values())
