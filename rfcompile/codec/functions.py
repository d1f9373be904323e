"""The public functions quantize and dequantize, which take any tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rfcompile.codec import arithmetic, operators
from rfcompile.codec.compiling import before_compiling
from rfcompile.codec.derivatives import refuse_tangents
from rfcompile.codec.formats import QuantFormat, as_format
from rfcompile.errors import OptionError, ShapeError


def quantize(x: Tensor, fmt: QuantFormat | str | int, *, seed: int = 0) -> Tensor:
    """Code a tensor: its payload, uint8 ``[fmt.payload_bytes(x.numel())]``.

    Args:
        x: float32, bfloat16 or float16, any shape and stride.
        fmt: a :class:`~rfcompile.QuantFormat` (formula and error bound there), bits, or its text.
            Nothing says what kind of traffic ``x`` is: a grid that is not named is that of
            activations, mid-rise up to 4 bits. Name mid-tread where zeros have to stay zero.
        seed: added to the format's seed; matters for stochastic rounding only.

    Raises:
        DtypeError, FormatError; NonFiniteError with ``nonfinite="raise"``; DerivativeError: ``x``
        is the dual number of a forward-mode derivative, which codes do not have.
    """
    if torch.compiler.is_compiling():
        before_compiling()
    operators.check_codec_input(x)
    refuse_tangents("rfcompile.quantize", x)
    format = _required(fmt)
    payload = operators.quantize(
        x.reshape(1, -1) if x.numel() else x.reshape(1, 0), format.spec, seed
    )
    if format.nonfinite == "raise":
        payload = operators.require_finite(payload, operators.nonfinite_flag(x), "quantize")
    return payload.reshape(-1)


def dequantize(
    payload: Tensor,
    fmt: QuantFormat | str | int,
    shape: Sequence[int] | int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode what :func:`quantize` returned for a tensor of ``shape``; a number is one dimension.

    Raises:
        PayloadError: the payload's length or dtype does not fit the format and shape.
        ShapeError: ``shape`` is none. DtypeError, FormatError.
    """
    if torch.compiler.is_compiling():
        before_compiling()
    format = _required(fmt)
    sizes = _sizes(shape)
    numel = math.prod(sizes)
    arithmetic.check_payload(payload, format, numel, 1)
    operators.check_codec_output(dtype)
    values = operators.dequantize(payload.reshape(1, -1), format.spec, dtype)
    return values.narrow(1, 0, numel).reshape(sizes)


def _sizes(shape: object) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else (shape,)
    for size in sizes:
        is_size = isinstance(size, (int, np.integer, torch.SymInt)) and not isinstance(size, bool)
        if not is_size or size < 0:
            raise ShapeError("the result", sizes, "use whole numbers of elements, 0 or more.")
    return sizes


def _required(fmt: QuantFormat | str | int) -> QuantFormat:
    format = as_format(fmt)
    if format is None:
        raise OptionError("fmt", fmt, "give a format; there is no payload of an exact tensor.")
    # Read from the text, its numbers are constants while compiling too.
    return QuantFormat.parse(format.spec) if torch.compiler.is_compiling() else format
