"""The size from which quantized messages are faster here, as measured: what "auto" means.

:func:`rfcompile.measure_crossover` measures it and keeps it in this process; all ranks of the group
have the same number.
"""

from __future__ import annotations

from rfcompile.errors import PolicyError

NEVER = 2**62
"""Bytes that no tensor has: everything stays exact."""

_measured: int | None = None


def keep(min_bytes: int) -> None:
    global _measured
    _measured = min_bytes


def measured() -> int:
    """What ``min_bytes="auto"`` is in this process.

    Raises:
        PolicyError: nothing was measured.
    """
    if _measured is None:
        rule = "call rf.measure_crossover(format) on every rank first, or give a number of bytes."
        raise PolicyError("min_bytes", "auto", rule)
    return _measured
