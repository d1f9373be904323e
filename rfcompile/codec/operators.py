"""The codec as torch operators, so that a graph shows ``rfcompile.quantize`` as one node.

Every operator has an eager kernel (``triton_codec.py`` on GPUs, ``cpu_codec.py`` on CPUs once its
library is loaded, otherwise ``arithmetic.py`` itself), a fake kernel that works on symbolic sizes,
and, once ``inductor/lowering.py`` is loaded, an Inductor lowering of the same formula. An operator
takes a format as its text (:attr:`QuantFormat.spec`). So graphs are readable, and every format has
its own cache key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rfcompile.codec import arithmetic, cpu_codec, triton_codec
from rfcompile.codec.derivatives import Library
from rfcompile.codec.formats import DTYPES, QuantFormat
from rfcompile.errors import DtypeError, NonFiniteError, PayloadError, ShapeError

_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY = Library("rfcompile")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products of ``x`` keep their dtype: torch runs our kernels with autocast still on."""
    device = x.device.type
    is_known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if is_known else nullcontext()


def as_autocast(x: Tensor) -> Tensor:
    """In the dtype of autocast, where it is on; float64 stays, as it does in torch's operators."""
    device = x.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not is_on or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def _define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> OpOverload[..., Tensor]:
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(name, fake, "Meta")
    overload: OpOverload[..., Tensor] = getattr(torch.ops.rfcompile, name).default
    return overload


# ---- checks (run by eager and fake kernels, so that compiling fails as early as running) -------


def check_codec_input(x: Tensor, what: str = "the input of quantize") -> None:
    if not isinstance(x, Tensor):
        raise DtypeError(what, type(x).__name__, [str(dtype) for dtype in DTYPES])
    if x.dtype not in DTYPES:
        raise DtypeError(what, x.dtype, [str(dtype) for dtype in DTYPES])


def check_codec_output(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise DtypeError("the output of dequantize", dtype, [str(d) for d in DTYPES])


def _check_rows(x: Tensor, op: str) -> None:
    if x.dim() != 2:
        raise ShapeError(f"the input of {op}", x.shape, "give one row a chunk, [chunks, elements].")


def _check_payload(payload: Tensor, fmt: QuantFormat, op: str) -> None:
    _check_rows(payload, op)
    row = payload.shape[1]
    G, E = arithmetic.groups_of(row, fmt)
    if payload.dtype != torch.uint8 or (
        isinstance(row, int) and (E < 0 or row != fmt.row_bytes(G * E))
    ):
        raise PayloadError(
            f"{payload.dtype} rows of {row} bytes",
            "uint8 rows of whole groups",
            fmt.spec,
            "pass the tensor that quantize returned, with the format it was made with.",
        )


# ---- pack ----------------------------------------------------------------------------------


def _pack_fake(pieces: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    rows = pieces[0].shape[0]
    total = sum(piece.shape[1] * piece.shape[2] for piece in pieces)
    return pieces[0].new_empty((rows, total))


pack = _define(
    "pack(Tensor[] pieces, int[] counts) -> Tensor", arithmetic.pack_reference, _pack_fake
)


# ---- the four codec operators ----------------------------------------------------------------


def quantize_formula(
    x: Tensor, format: str, seed: int = 0, pack: arithmetic.Pack = arithmetic.pack_reference
) -> Tensor:
    return arithmetic.quantize(x, QuantFormat.parse(format), seed, pack)


def dequantize_formula(
    payload: Tensor,
    format: str,
    dtype: torch.dtype,
    pack: arithmetic.Pack = arithmetic.pack_reference,
) -> Tensor:
    return arithmetic.dequantize(payload, QuantFormat.parse(format), dtype, pack)


def dequantize_sum_formula(
    payload: Tensor,
    format: str,
    dtype: torch.dtype,
    average: bool = False,
    pack: arithmetic.Pack = arithmetic.pack_reference,
) -> Tensor:
    return arithmetic.dequantize_sum(payload, QuantFormat.parse(format), dtype, average, pack)


def requantize_formula(
    payload: Tensor,
    format: str,
    average: bool = False,
    seed: int = 0,
    pack: arithmetic.Pack = arithmetic.pack_reference,
) -> Tensor:
    return arithmetic.requantize(payload, QuantFormat.parse(format), average, seed, pack)


def _codec_for(x: Tensor) -> Any:
    """What codes ``x``: a kernel of its device, or the formula."""
    if cpu_codec.runs_on(x):
        return cpu_codec
    return triton_codec if triton_codec.runs_on(x.device) else arithmetic


def _quantize(x: Tensor, format: str, seed: int = 0) -> Tensor:
    check_codec_input(x)
    _check_rows(x, "quantize")
    fmt = QuantFormat.parse(format)
    result: Tensor = _codec_for(x).quantize(x, fmt, seed)
    return result


def _quantize_fake(x: Tensor, format: str, seed: int = 0) -> Tensor:
    check_codec_input(x)
    _check_rows(x, "quantize")
    fmt = QuantFormat.parse(format)
    return x.new_empty((x.shape[0], fmt.row_bytes(x.shape[1])), dtype=torch.uint8)


def _dequantize(payload: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    fmt = QuantFormat.parse(format)
    _check_payload(payload, fmt, "dequantize")
    result: Tensor = _codec_for(payload).dequantize(payload, fmt, dtype)
    return result


def _dequantize_fake(payload: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    fmt = QuantFormat.parse(format)
    _check_payload(payload, fmt, "dequantize")
    G, E = arithmetic.groups_of(payload.shape[1], fmt)
    return payload.new_empty((payload.shape[0], G * E), dtype=dtype)


def _dequantize_sum(
    payload: Tensor, format: str, dtype: torch.dtype, average: bool = False
) -> Tensor:
    fmt = QuantFormat.parse(format)
    _check_payload(payload, fmt, "dequantize_sum")
    result: Tensor = _codec_for(payload).dequantize_sum(payload, fmt, dtype, average)
    return result


def _dequantize_sum_fake(
    payload: Tensor, format: str, dtype: torch.dtype, average: bool = False
) -> Tensor:
    fmt = QuantFormat.parse(format)
    _check_payload(payload, fmt, "dequantize_sum")
    G, E = arithmetic.groups_of(payload.shape[1], fmt)
    return payload.new_empty((G * E,), dtype=dtype)


def _requantize(payload: Tensor, format: str, average: bool = False, seed: int = 0) -> Tensor:
    fmt = QuantFormat.parse(format)
    _check_payload(payload, fmt, "requantize")
    result: Tensor = _codec_for(payload).requantize(payload, fmt, average, seed=seed)
    return result


def _requantize_fake(payload: Tensor, format: str, average: bool = False, seed: int = 0) -> Tensor:
    _check_payload(payload, QuantFormat.parse(format), "requantize")
    return payload.new_empty((1, payload.shape[1]))


quantize = _define(
    "quantize(Tensor x, str format, int seed=0) -> Tensor", _quantize, _quantize_fake
)
dequantize = _define(
    "dequantize(Tensor payload, str format, ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
dequantize_sum = _define(
    "dequantize_sum(Tensor payload, str format, ScalarType dtype, bool average=False) -> Tensor",
    _dequantize_sum,
    _dequantize_sum_fake,
)
requantize = _define(
    "requantize(Tensor payload, str format, bool average=False, int seed=0) -> Tensor",
    _requantize,
    _requantize_fake,
)


# ---- nonfinite="raise" -------------------------------------------------------------------------


def nonfinite_flag(x: Tensor) -> Tensor:
    """One byte ``[1]``: 1 where ``x`` holds NaN or Inf anywhere."""
    return x.isfinite().logical_not().any().to(torch.uint8).reshape(1)


def _require_finite(payload: Tensor, flags: Tensor, site: str) -> Tensor:
    if bool(flags.any()):
        ranks = [int(rank) for rank in flags.nonzero().flatten()]
        raise NonFiniteError(site, ranks if flags.numel() > 1 else None)
    return payload.clone()


require_finite = _define(
    "require_finite(Tensor payload, Tensor flags, str site) -> Tensor",
    _require_finite,
    lambda payload, flags, site: torch.empty_like(payload),
)
"""Passes the payload through, or raises NonFiniteError naming the ranks whose flag is set.

It returns a copy, so that no pass can drop it as unused.
"""

FORMULAS: dict[Any, Callable[..., Tensor]] = {
    quantize: quantize_formula,
    dequantize: dequantize_formula,
    dequantize_sum: dequantize_sum_formula,
    requantize: requantize_formula,
}
"""The tensor code behind each operator, with ``pack`` left open: what Inductor lowers."""
