"""The codec outside compiled graphs: as eager operators or as generated kernels.

DDP, FSDP2 and pipelines code between eager collectives. Eagerly the codec runs operator by
operator; compiled, each of its operators is one kernel, with the same bytes. A kernel is made once
for each operator, format and dtype, for all sizes: torch compiles again only where a size becomes 1
(rows or elements), and sums once for each number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rfcompile.codec import operators
from rfcompile.codec.compiling import before_compiling
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.operators import OPERATORS, Coder
from rfcompile.errors import OptionError

CoderName = Literal["eager", "compiled"]
"""What ``coder=`` takes."""


def coder_of(name: CoderName) -> Coder:
    """What a wire passes on as ``coder``.

    Raises:
        OptionError: there is no such coder.
    """
    if name not in get_args(CoderName):
        rule = "choose 'eager', or 'compiled' for kernels that Inductor generates (same bytes)."
        raise OptionError("coder", name, rule)
    if name == "eager":
        return OPERATORS
    before_compiling()
    return COMPILED


def _quantize(x: Tensor, format: str, seed: int = 0) -> Tensor:
    if _is_stochastic(format):
        return operators.quantize(x, format, seed)
    return _kernel(operators.quantize, x.dtype, format)(x)


def _dequantize(payload: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    return _kernel(operators.dequantize, dtype, format, dtype)(payload)


def _dequantize_sum(
    payload: Tensor, format: str, dtype: torch.dtype, average: bool = False
) -> Tensor:
    return _kernel(operators.dequantize_sum, dtype, format, dtype, average)(payload)


def _requantize(payload: Tensor, format: str, average: bool = False, seed: int = 0) -> Tensor:
    if _is_stochastic(format):
        return operators.requantize(payload, format, average, seed)
    return _kernel(operators.requantize, None, format, average)(payload)


COMPILED = Coder(_quantize, _dequantize, _dequantize_sum, _requantize)


@cache
def _is_stochastic(format: str) -> bool:
    """Such formats stay eager: a seed is a constant of the kernel, and each call has another."""
    return QuantFormat.parse(format).rounding == "stochastic"


@cache
def _kernel(op: Any, dtype: torch.dtype | None, *arguments: Any) -> Callable[[Tensor], Tensor]:
    """``op(x, *arguments)`` compiled; ``dtype`` is that of the float tensor, in or out."""

    def code(x: Tensor) -> Tensor:
        result: Tensor = op(x, *arguments)
        return result

    # torch counts recompilations by code object, and gives up after 8: each kernel has its own.
    name = "_".join(str(part) for part in (op.name(), dtype, *arguments))
    code.__code__ = code.__code__.replace(co_name=name)
    return torch.compile(code, dynamic=True)
