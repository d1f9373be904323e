"""Numbers as short texts for people."""

from __future__ import annotations

import math


def short_bytes(count: float) -> str:
    """ "65.5 kB", three digits, in powers of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{_three(count / size)} {unit}"
    return f"{_three(count)} B"


def _three(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text


def number(value: float | None) -> str:
    """Three digits, "" for what is not known."""
    if value is None or math.isnan(value):
        return ""
    return "\N{INFINITY}" if math.isinf(value) else f"{value:.3g}"
