"""QuantFormat: how a tensor is coded for the wire, and how many bytes its payload takes.

Open this file to see what a format means; ``arithmetic.py`` holds the arithmetic.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch

from rfcompile.errors import FormatError

Grid = Literal["auto", "mid-rise", "mid-tread"]
Rounding = Literal["nearest", "stochastic"]
NonFinite = Literal["propagate", "raise", "saturate"]
Range = Literal["fitted", "full"]

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What can be coded."""
SCALE_BYTES = 2
"""A scale is one bfloat16."""

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Codes are stored in planes whose width divides 8, low bits first: none straddles a byte."""

_GAUSSIAN_STEP = {3: 1.2240, 4: 0.9957, 7: 0.6508, 8: 0.5860, 15: 0.3534, 16: 0.3352}
"""Step of the best uniform quantizer of N(0, 1) by its number of levels (Max 1960, Table II)."""


@dataclass(frozen=True)
class QuantFormat:
    """How to code a tensor: ``bits`` bits for each element, one scale for each group of elements.

    With ``h`` grid steps from zero to the outermost level and ``a = max|x|`` over a group, the
    scale is ``s = bf16_round_up(clip * a / h)``. Each ``x`` becomes the nearest level. ``u`` is its
    code:

    ========= ================================ ===================== ======================
    grid      levels                           h                     codes
    ========= ================================ ===================== ======================
    mid-rise  ``(u - h) * s``, no exact zero   ``(2**bits - 1) / 2`` u = 0 .. 2**bits - 1
    mid-tread ``(u - 2**(bits-1)) * s``        ``2**(bits-1) - 1``   u = 1 .. 2**bits - 1
    ========= ================================ ===================== ======================

    Args:
        bits: 2, 3, 4, 5, 6 or 8 bits an element.
        group_size: how many elements share a scale: a power of two from 16 to 1024. None: one scale
            for the whole tensor (in a collective: one scale for each destination rank).
        grid: "mid-rise", "mid-tread" or "auto". With "auto" the kind of traffic chooses the grid,
            see :meth:`for_kind`. Where the kind is not known (a bare :func:`~rfcompile.quantize`),
            "auto" means the grid of activations. A group that holds only zeros decodes to zeros on
            both grids. A single zero stays exact on mid-tread only.
        scale: "bf16", the only scale type so far.
        rotate: size of the Hadamard block with random signs that spreads outliers before coding: a
            power of two from 2 to the group size (at most 1024). None: no rotation. A block that
            holds only zeros decodes to zeros. A zero beside other values does not stay zero on any
            grid. So use a rotation only for tensors whose zeros may change: activations.
        rounding: "nearest" (ties to even on mid-tread, up on mid-rise), or "stochastic" (unbiased;
            never clips).
        nonfinite: "propagate": a group with NaN or Inf decodes to NaN. "raise":
            :class:`~rfcompile.errors.NonFiniteError`. "saturate": Inf becomes the largest finite
            magnitude of its group, with the sign of the Inf. A group with a NaN, or without any
            finite value other than zero, still decodes to NaN.
        seed: seed of the signs of the rotation and of the stochastic rounding.
        range: where the grid ends at up to 4 bits. "fitted": where the error of a Gaussian is
            smallest; this clips the largest values (see :attr:`clip`). "full": at the largest
            magnitude of the group.

    Raises:
        FormatError: a field has a value outside its rule.

    Error bound (one round trip, finite input, ``a`` the group's largest magnitude, float32 out):
    ``|decoded - x| <= max_error() * a + 2**-120``; see :meth:`max_error`. Finite input decodes to
    finite values. For that, groups with ``a`` above 64992 in float16 may add ``2**-7 * a``, and
    rotation clips rotated values above ``3e38 / rotate``.

    Source: symmetric group quantization is standard; the Gaussian-fitted clip is ours.
    """

    bits: int
    group_size: int | None = 128
    grid: Grid = "auto"
    scale: Literal["bf16"] = "bf16"
    rotate: int | None = None
    rounding: Rounding = "nearest"
    nonfinite: NonFinite = "propagate"
    seed: int = 0
    range: Range = "fitted"

    def __post_init__(self) -> None:
        for name in ("bits", "group_size", "rotate", "seed"):
            object.__setattr__(self, name, _constant(getattr(self, name)))
        if type(self.bits) is not int or self.bits not in BITS:
            raise FormatError("bits", self.bits, f"choose one of {BITS}.")
        group = self.group_size
        if group is not None and not _is_power_of_two(group, 16, 1024):
            raise FormatError(
                "group_size",
                group,
                "use a power of two from 16 to 1024, or None for one scale a tensor.",
            )
        if self.rotate is not None and not _is_power_of_two(self.rotate, 2, group or 1024):
            raise FormatError(
                "rotate",
                self.rotate,
                f"use a power of two from 2 to {group or 1024} (it must divide the group), "
                "or None for no rotation.",
            )
        _one_of("grid", self.grid, get_args(Grid))
        _one_of("scale", self.scale, ("bf16",))
        _one_of("rounding", self.rounding, get_args(Rounding))
        _one_of("nonfinite", self.nonfinite, get_args(NonFinite))
        _one_of("range", self.range, get_args(Range))
        if type(self.seed) is not int or not 0 <= self.seed < 2**31:
            raise FormatError("seed", self.seed, "use an integer from 0 to 2**31 - 1.")
        # A text: torch.compile takes numbers that change between calls for symbols.
        object.__setattr__(self, "_spec", self._text())

    # ---- the grid ------------------------------------------------------------------------

    def for_kind(self, kind: str) -> QuantFormat:
        """Return the format with the grid that suits a kind of traffic, if the grid is "auto".

        Activations: mid-rise up to 4 bits, which wastes no level, and mid-tread above. Gradients,
        weights, differences of weights and optimizer states: mid-tread for every number of bits.
        There a zero has a meaning: a pruned weight, a row that is not trained.

        Args:
            kind: a kind of traffic, as in :class:`~rfcompile.Policy`.
        """
        if self.grid != "auto":
            return self
        is_mid_rise = kind == "activations" and self.is_mid_rise
        return replace(self, grid="mid-rise" if is_mid_rise else "mid-tread")

    @property
    def is_mid_rise(self) -> bool:
        return self.grid == "mid-rise" or (self.grid == "auto" and self.bits <= 4)

    @property
    def half_range(self) -> float:
        """Grid steps from zero to the outermost level."""
        return (2**self.bits - 1) / 2 if self.is_mid_rise else 2.0 ** (self.bits - 1) - 1

    @property
    def zero_offset(self) -> float:
        """The code of zero. A level is ``(u - zero_offset) * s``."""
        return (2**self.bits - 1) / 2 if self.is_mid_rise else 2.0 ** (self.bits - 1)

    @property
    def clip(self) -> float:
        """The outermost level as a share of the group's largest magnitude.

        ``min(1, step * h / E[max|z|])`` at up to 4 bits. ``step`` is the best step of a grid with
        ``2 h + 1`` levels for N(0, 1), and ``z`` is a group of N(0, 1) values. ``clip`` is 1 above
        4 bits, with ``range="full"``, and with stochastic rounding, because clipping would bias it.
        The rule is ours.
        """
        if self.bits > 4 or self.range == "full" or self.rounding == "stochastic":
            return 1.0
        step = _GAUSSIAN_STEP[round(2 * self.half_range) + 1]
        return min(1.0, step * self.half_range / expected_peak(self.group_size or 1024))

    def max_error(self) -> float:
        """The largest error of one round trip as a share of the group's largest magnitude.

        ``max(1 - clip, clip / (2 h)) * (1 + 2**-7) + 2**-13`` for nearest rounding. For stochastic
        rounding ``clip / h`` takes the place of ``clip / (2 h)``. ``2**-7`` covers the rounding of
        the scale to bf16, and ``2**-13`` the rounding of the reciprocal to 15 bits.

        With rotation let ``r`` be the largest magnitude of the group after the orthogonal rotation
        ``H D / sqrt(rotate)`` (at most ``sqrt(rotate) * a``). Then the root mean square error of a
        block is at most ``max_error() * r``. The error of one element is at most ``sqrt(rotate)``
        times that, plus ``2**-120 * rotate``.
        """
        step = self.clip / self.half_range
        inside = step if self.rounding == "stochastic" else step / 2
        return max(1 - self.clip, inside) * (1 + 2**-7) + 2**-13

    # ---- the payload ---------------------------------------------------------------------

    @property
    def planes(self) -> tuple[int, ...]:
        return PLANES[self.bits]

    @property
    def num_parts(self) -> int:
        """Into how many equal runs the codec cuts a group. Codes of different runs share a byte."""
        return max(8 // self.planes[-1], min(self.rotate or 1, 8))

    def group_elements(self, row_numel: int) -> int:
        """Elements in a group of a payload row of ``row_numel`` elements (symbolic is fine)."""
        if self.group_size is not None:
            return self.group_size
        unit = max(8, self.rotate or 1)
        return (row_numel + unit - 1) // unit * unit

    def row_bytes(self, row_numel: int) -> int:
        """Bytes of one payload row: codes, then scales (``row_numel`` may be symbolic)."""
        if self.group_size is None:
            codes = self.group_elements(row_numel) * self.bits // 8
            return codes + SCALE_BYTES
        groups = (row_numel + self.group_size - 1) // self.group_size
        return groups * (self.group_size * self.bits // 8 + SCALE_BYTES)

    def payload_bytes(self, numel: int, chunks: int = 1) -> int:
        """Bytes of the payload of ``numel`` elements in ``chunks`` equal rows.

        At most ``ceil(numel / group) * (group * bits / 8 + 2) + 16`` for one row (one scale a
        tensor: ``group`` is ``numel`` rounded up to a multiple of ``rotate``).
        """
        return chunks * self.row_bytes(-(-numel // chunks))

    # ---- text ----------------------------------------------------------------------------

    @property
    def spec(self) -> str:
        """The format as a short text, such as ``"4b:g128:rise"``; :meth:`parse` reads it back.

        Without a word for the grid it is "auto".
        """
        return self._spec  # type: ignore[attr-defined,no-any-return]  # set by __post_init__

    def _text(self) -> str:
        parts = [f"{self.bits}b", "tensor" if self.group_size is None else f"g{self.group_size}"]
        if self.grid != "auto":
            parts.append(self.grid.removeprefix("mid-"))
        if self.rotate is not None:
            parts.append(f"h{self.rotate}")
        if self.rounding == "stochastic":
            parts.append("stoch")
        if self.nonfinite != "propagate":
            parts.append(self.nonfinite)
        if self.range == "full":
            parts.append("full")
        if self.seed:
            parts.append(f"s{self.seed}")
        return ":".join(parts)

    @classmethod
    def parse(cls, spec: str) -> QuantFormat:
        """Read a text such as ``"4b"``, ``"4b:g64:tread:h32:stoch:s7:raise"`` or ``"8b:tensor"``.

        Raises:
            FormatError: a part is not understood.
        """
        head, *rest = spec.split(":")
        rule = 'write it as "4b:g128:rise", with h32, stoch, s7, raise, saturate or full if wanted.'
        if not (head.endswith("b") and _is_number(head[:-1])):
            raise FormatError("format", spec, rule)
        values: dict[str, object] = {"bits": int(head[:-1])}
        for part in rest:
            if part in _WORDS:
                ((name, value),) = _WORDS[part].items()
            elif part[:1] in _NUMBERS and _is_number(part[1:]):
                name, value = _NUMBERS[part[0]], int(part[1:])
            else:
                raise FormatError("format", spec, f"{part!r} is not understood; {rule}")
            if name in values:
                raise FormatError("format", spec, f"{part!r} says {name} once more; {rule}")
            values[name] = value
        return cls(**values)  # type: ignore[arg-type]  # checked by __post_init__

    def __str__(self) -> str:
        return self.spec


_WORDS: dict[str, dict[str, object]] = {
    "rise": {"grid": "mid-rise"},
    "tread": {"grid": "mid-tread"},
    "tensor": {"group_size": None},
    "stoch": {"rounding": "stochastic"},
    "raise": {"nonfinite": "raise"},
    "saturate": {"nonfinite": "saturate"},
    "full": {"range": "full"},
}
_NUMBERS = {"g": "group_size", "h": "rotate", "s": "seed"}


def as_format(value: object, **changes: object) -> QuantFormat | None:
    """A format from what users write: a QuantFormat, its fields, bits, a text, or None for exact.

    Raises:
        FormatError: it is none of these.
    """
    if value is None or value == "exact":
        return None
    if isinstance(value, QuantFormat):
        return replace(value, **changes) if changes else value  # type: ignore[arg-type]
    if isinstance(value, str):
        return as_format(QuantFormat.parse(value), **changes)
    if isinstance(value, (int, np.integer)):
        return QuantFormat(value, **changes)  # type: ignore[arg-type]
    if isinstance(value, Mapping) and value.keys() <= set(FORMAT_FIELDS) and "bits" in value:
        return QuantFormat(**{**value, **changes})
    rule = "give a QuantFormat, its fields, bits, a text such as '4b:g128', or None for exact."
    raise FormatError("format", value, rule)


FORMAT_FIELDS = tuple(f.name for f in fields(QuantFormat))


@lru_cache(maxsize=64)
def expected_peak(n: int) -> float:
    """``E[max|z|]`` of ``n`` independent N(0, 1) values: integral of ``1 - (2 Phi(t) - 1)^n``."""
    t = np.linspace(0.0, 9.0, 9001)
    below = np.array([math.erf(v / math.sqrt(2)) for v in t])
    return float(np.trapezoid(1 - below**n, t))


def _is_number(text: str) -> bool:
    """Digits that a field can hold: ``int`` takes other scripts too, and refuses some lengths."""
    return text.isascii() and text.isdecimal() and len(text) <= 10


def _constant(value: object) -> object:
    """A number as a Python int that is known while compiling; anything else as it is."""
    if isinstance(value, np.integer):
        return int(value)
    return operator.index(value) if type(value) is int else value


def _is_power_of_two(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high and value & (value - 1) == 0


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FormatError(field, value, f"choose one of {', '.join(map(repr, allowed))}.")


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype; its first number is its bits: f32, bf16, i64, u8, b8, f8e4m3fn."""
    text = str(dtype).removeprefix("torch.").replace("bool", "b8").replace("_", "")
    return re.sub(r"float|uint|int|complex", lambda match: match[0][0], text)
