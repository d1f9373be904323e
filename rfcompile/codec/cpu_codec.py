"""The codec operators on a CPU: ``cpu_kernels.cpp``, called by ctypes.

Hooks, compiled graphs and the first large tensor have the library built: in some seconds, once a
machine. Small tensors until then, and all where there is no C++ compiler, are coded by the
formula of ``arithmetic.py`` as torch operators. The bytes are the same.

Private torch symbol used here, tried on torch 2.11 to 2.15: ``_inductor.codecache.CppCodeCache``.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rfcompile.codec import arithmetic
from rfcompile.codec.bitmath import MIN_SCALE, largest_scale, mixed_seed
from rfcompile.codec.formats import QuantFormat
from rfcompile.codec.rotation import axes_of, sign_bits

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=off", "-fsigned-zeros", "-fno-math-errno")
"""After Inductor's own, which turn the first off and the third around."""
_WORTH_BUILDING = 2**18
"""Bytes; loading the library takes a second or two in each process, building it some more."""
_ELEMENTS_A_THREAD = 2**14
"""At least: less takes longer to hand out than to code."""


class _Format(ctypes.Structure):
    """``Format`` of cpu_kernels.cpp."""

    _fields_ = (
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("low_width", ctypes.c_int32),
        ("high_width", ctypes.c_int32),
        ("is_mid_rise", ctypes.c_int32),
        ("is_stochastic", ctypes.c_int32),
        ("saturates", ctypes.c_int32),
        ("smallest_scale", ctypes.c_int32),
        ("largest_scale", ctypes.c_int32),
        ("clip_over_half_range", ctypes.c_float),
        ("zero_offset", ctypes.c_float),
        ("seed", ctypes.c_uint32),
        ("num_axes", ctypes.c_int32),
        ("axis_size", ctypes.c_int64 * 4),
        ("axis_step", ctypes.c_int64 * 4),
        ("axis_signs", ctypes.c_uint32 * 4),
    )


_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FORMAT = ctypes.POINTER(_Format)
_OF_PAYLOAD = (_POINTER, _INT64, _INT64, _FORMAT)  # payload, rows, groups
_ARGUMENTS = {
    "quantize": (_POINTER, _INT, *[_INT64] * 4, _FORMAT, _INT, _POINTER),
    "dequantize": (*_OF_PAYLOAD, _INT, _INT, _POINTER),
    "dequantize_sum": (*_OF_PAYLOAD, _INT, _INT, _INT, _POINTER),
    "requantize": (*_OF_PAYLOAD, _INT, _INT, _POINTER),
}

_library: ctypes.CDLL | None = None
_failure = ""


def load_kernels() -> str:
    """Build the library, or find it built, and load it; returns why there is none, or ""."""
    global _library, _failure
    if _library is None and not _failure:
        from torch._inductor.codecache import CppCodeCache

        try:
            library = CppCodeCache.load(SOURCE.read_text(), extra_flags=_FLAGS)
            for name, arguments in _ARGUMENTS.items():
                function = getattr(library, f"rfcompile_{name}")
                function.argtypes, function.restype = arguments, None
        except Exception as error:  # whatever a compiler may say
            _failure = f"{type(error).__name__}: {error}"
            what = "Without a C++ compiler (g++) the codec is several times slower on this CPU: %s"
            log.warning(what, _failure)
        else:
            _library = library
    return _failure


def load_kernels_for(devices: Iterable[torch.device]) -> None:
    """:func:`load_kernels`, where one of the devices is a CPU: for hooks, as they are installed."""
    if any(device.type == "cpu" for device in devices):
        load_kernels()


def runs_on(x: Tensor) -> bool:
    """Whether the kernels code ``x``, which is not empty; a large one has them loaded."""
    is_small = x.numel() == 0 or (_library is None and x.nbytes < _WORTH_BUILDING)
    return x.device.type == "cpu" and not is_small and not load_kernels()


# ---- the four operators --------------------------------------------------------------------------


def quantize(x_CM: Tensor, fmt: QuantFormat, seed: int = 0) -> Tensor:
    """``arithmetic.quantize``."""
    C, M = x_CM.shape
    payload = x_CM.new_empty((C, fmt.row_bytes(M)), dtype=torch.uint8)
    G, E = arithmetic.groups_of(payload.shape[1], fmt)
    x = x_CM.to(_carried(x_CM.dtype))
    if M > 1 and x.stride(1) != 1:
        x = x.contiguous()
    _call(
        "quantize",
        *(x.data_ptr(), _is_bfloat16(x), C, M, x.stride(0), G),
        *(_format(fmt, E, x_CM.dtype, seed), _threads(C * G * E), payload.data_ptr()),
    )
    return payload


def dequantize(payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> Tensor:
    """``arithmetic.dequantize``."""
    payload, rows, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((rows, G * E), dtype=_carried(dtype))
    _call(
        "dequantize",
        *(payload.data_ptr(), rows, G, _format(fmt, E), _threads(rows * G * E)),
        *(_is_bfloat16(out), out.data_ptr()),
    )
    if fmt.rotate is not None and dtype == torch.float16:
        out.clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return out.to(dtype)


def dequantize_sum(
    payload_CB: Tensor, fmt: QuantFormat, dtype: torch.dtype, average: bool = False
) -> Tensor:
    """``arithmetic.dequantize_sum``."""
    payload, rows, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    out = payload.new_empty((G * E,), dtype=_carried(dtype))
    _call(
        "dequantize_sum",
        *(payload.data_ptr(), rows, G, _format(fmt, E), average),
        *(_threads(rows * G * E), _is_bfloat16(out), out.data_ptr()),
    )
    return out.to(dtype)


def requantize(
    payload_CB: Tensor, fmt: QuantFormat, average: bool = False, seed: int = 0
) -> Tensor:
    """``arithmetic.requantize``."""
    payload, rows, G, E = arithmetic.in_one_piece(payload_CB, fmt)
    total = payload.new_empty((1, payload.shape[1]))
    _call(
        "requantize",
        *(payload.data_ptr(), rows, G, _format(fmt, E, torch.float32, seed + 1), average),
        *(_threads(rows * G * E), total.data_ptr()),
    )
    return total


# ---- arguments -----------------------------------------------------------------------------------


def _call(name: str, *arguments: object) -> None:
    getattr(_library, f"rfcompile_{name}")(*arguments)


def _carried(dtype: torch.dtype) -> torch.dtype:
    """The dtype the library is given: float16 goes through float32, which holds its values."""
    return torch.float32 if dtype == torch.float16 else dtype


def _is_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _threads(numel: int) -> int:
    return max(1, min(torch.get_num_threads(), numel // _ELEMENTS_A_THREAD))


@lru_cache(maxsize=256)
def _format(
    fmt: QuantFormat, group: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> _Format:
    low, high = (*fmt.planes, 0)[:2]
    format = _Format(
        group=group,
        bits=fmt.bits,
        low_width=low,
        high_width=high,
        is_mid_rise=fmt.is_mid_rise,
        is_stochastic=fmt.rounding == "stochastic",
        saturates=fmt.nonfinite == "saturate",
        smallest_scale=MIN_SCALE,
        largest_scale=largest_scale(fmt, dtype),
        clip_over_half_range=fmt.clip / fmt.half_range,
        zero_offset=fmt.zero_offset,
        seed=mixed_seed(fmt.seed + seed) % 2**32,
    )
    after = fmt.rotate or 1
    for place, n in enumerate(axes_of(fmt.rotate) if fmt.rotate else ()):
        after //= n
        format.axis_size[place] = n
        format.axis_step[place] = after if place else group // n
        format.axis_signs[place] = sign_bits(n, fmt.seed)
        format.num_axes = place + 1
    return format
