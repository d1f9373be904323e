"""Which optimizers hold and step the states, inside of wrappers and of several as one."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from rfcompile.errors import HookError
from rfcompile.states.composite import Optimizers

_INNER = ("optimizer", "_optimizer", "optim", "base_optimizer")
"""Where wrappers keep the optimizer that has the states."""


def parts_of(optimizer: Any) -> tuple[list[Optimizer], list[Optimizer]]:
    """The optimizers that hold and step the states, and the wrappers around them.

    Raises:
        HookError: there is none.
    """
    if isinstance(optimizer, Optimizers):
        found = [parts_of(part) for part in optimizer.optimizers]
        return [p for parts, _ in found for p in parts], [w for _, outer in found for w in outer]
    if isinstance(optimizer, Optimizer) or hasattr(optimizer, "param_groups"):
        for name in _INNER:
            inner = getattr(optimizer, name, None)
            if inner is not optimizer and (isinstance(inner, Optimizer) or _is_wrapper(inner)):
                parts, wrappers = parts_of(inner)
                return parts, [optimizer, *wrappers]
    if not isinstance(optimizer, Optimizer):
        raise HookError(
            type(optimizer).__name__,
            "pass a torch.optim.Optimizer, or a wrapper that has one as .optimizer.",
        )
    return [optimizer], []


def _is_wrapper(x: Any) -> bool:
    return hasattr(x, "param_groups") and hasattr(x, "step")
