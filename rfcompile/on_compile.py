"""What must be loaded before the first graph is compiled; it is not loaded with the package."""

from __future__ import annotations

from collections.abc import Callable

BEFORE_COMPILING: list[Callable[[], object]] = []
"""Run, each time, while Dynamo traces a caller of an operator of this package."""
