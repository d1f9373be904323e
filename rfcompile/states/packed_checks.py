"""Recognizes packed states in a state_dict, and refuses damaged ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from rfcompile.codec.formats import DTYPES as CODED
from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import FormatError, PayloadError
from rfcompile.states.sharded_payloads import IN_ROWS

KEYS = {"payload", "format", "shape", "dtype", "root"}
CHECK = "check"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODED}


def is_packed(value: object) -> TypeGuard[dict[str, Any]]:
    """It is a packed state, whole or damaged; :func:`check_packed` tells."""
    return isinstance(value, dict) and len(KEYS & value.keys()) >= 3


def check_packed(packed: Mapping[str, Any], name: str) -> None:
    """Refuse a packed state that is not as :func:`pack` or :func:`sealed` made it.

    Raises:
        PayloadError: a key is missing, unknown or has a value that it cannot have.
    """
    if packed.keys() - {CHECK} != KEYS:
        keys = ", ".join(sorted(map(str, packed)))
        damaged(name, packed, f"a dict of {keys}", f"{', '.join(sorted(KEYS))} (and {CHECK})")
    spec, shape, root = packed["format"], packed["shape"], packed["root"]
    try:
        fmt = QuantFormat.parse(spec) if isinstance(spec, str) else None
    except FormatError:
        fmt = None
    if fmt is None:
        damaged(name, packed, f"of format {spec!r}", "the text of a format")
    if not isinstance(packed["dtype"], str) or packed["dtype"] not in DTYPES:
        damaged(name, packed, f"of dtype {packed['dtype']!r}", " or ".join(DTYPES))
    if type(root) is not int or root not in (IN_ROWS, 1, 4):
        damaged(name, packed, f"a root of {root!r}", "1 or 4")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        damaged(name, packed, f"of shape {shape!r}", "a list of sizes")
    payload = packed["payload"]
    if not isinstance(payload, Tensor) or payload.dtype != torch.uint8:
        got = str(payload.dtype) if isinstance(payload, Tensor) else type(payload).__name__
        damaged(name, packed, got, "a tensor of torch.uint8")
    size = fmt.row_bytes(math.prod(shape))
    if root != IN_ROWS and (payload.dim() != 1 or len(payload) != size):
        damaged(name, packed, f"{list(payload.shape)} bytes", f"{size} for {shape}")
    check = packed.get(CHECK, checksum(packed))  # earlier versions wrote none
    if type(check) is not int or check != checksum(packed):
        damaged(name, packed, f"described by {_described(packed)}", "what its checksum is of")


def damaged(name: str, packed: Mapping[str, Any], got: str, expected: str) -> NoReturn:
    rule = f"{name} is damaged, or of another version of rfcompile; load another copy of it."
    raise PayloadError(got, expected, str(packed.get("format"))[:100], rule)


def checksum(packed: Mapping[str, Any]) -> int:
    return zlib.crc32(_described(packed).encode())


def _described(packed: Mapping[str, Any]) -> str:
    return " ".join(str(packed[key]) for key in ("format", "shape", "dtype", "root"))
