"""Loads the operators of ``torch.ops.rfcompile`` when one of them is first used.

Private torch symbol used here, tried on torch 2.11 to 2.15: ``torch._ops._OpNamespace``, what
``torch.ops.NAME`` is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._ops import _OpNamespace

BEFORE_COMPILING: list[Callable[[], object]] = []
"""Run, each time, while Dynamo traces a caller of an operator of this package."""


class Operators(_OpNamespace):
    """``torch.ops.rfcompile``: a name that is not defined yet loads the modules that define them.

    So a graph that was saved with operators of this package needs its import and no more.
    """

    __module__ = _OpNamespace.__module__  # operators are pickled as parts of it
    is_defining = False
    """torch looks for an operator's name before it defines the operator."""

    def __init__(self, name: str, load: Callable[[], object]) -> None:
        super().__init__(name)
        self._load = load

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or self.is_defining:
                raise
        self._load()
        # Loading made the one object that stands for the operator: __getattr__ would make another.
        return vars(self)[name] if name in vars(self) else super().__getattr__(name)


@contextmanager
def defining() -> Iterator[None]:
    """Inside, a name that is not defined is just that."""
    before, Operators.is_defining = Operators.is_defining, True
    try:
        yield
    finally:
        Operators.is_defining = before
