"""Makes copies of an optimizer with quantized states quantized too, each with its handle.

torch.optim.Optimizer copies and pickles its parameters and states, and no hooks. So an optimizer
with quantized states carries its handle and a ``__reduce_ex__`` in its own ``__dict__``, where
``copy`` and ``pickle`` look first, and a copy attaches itself to the copy of the handle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch.optim import Optimizer

_HANDLE = "_rfcompile_states"
_REDUCE = "__reduce_ex__"
_SET_STATE = "__setstate__"


class Handle(Protocol):
    """What can hook an optimizer, and is copied along with it."""

    def attach(self, optimizer: Optimizer) -> None: ...


def carry(optimizer: Optimizer, handle: Handle) -> None:
    """From now on copies of the optimizer attach themselves to copies of the handle."""
    optimizer.__dict__[_HANDLE] = handle
    optimizer.__dict__[_REDUCE] = partial(_reduce, optimizer)


def drop(optimizer: Optimizer) -> None:
    """Undo :func:`carry`."""
    optimizer.__dict__.pop(_HANDLE, None)
    optimizer.__dict__.pop(_REDUCE, None)


def handle_of(optimizer: Optimizer) -> Handle | None:
    """The handle that an optimizer carries."""
    return optimizer.__dict__.get(_HANDLE)


def _reduce(optimizer: Optimizer, protocol: Any) -> tuple[Any, ...]:
    reduced = type(optimizer).__reduce_ex__(optimizer, protocol)
    assert isinstance(reduced, tuple)
    new, arguments, state, *rest = reduced
    if isinstance(state, dict):  # a class of its own __getstate__ may give all it has
        state = {key: value for key, value in state.items() if key not in (_HANDLE, _REDUCE)}
    return (_restored, (new, arguments, optimizer.__dict__[_HANDLE]), state, *rest)


def _restored(
    new: Callable[..., Optimizer], arguments: tuple[Any, ...], handle: Handle
) -> Optimizer:
    """A copy without its state, which attaches itself to the handle when it gets that."""
    optimizer = new(*arguments)
    optimizer.__dict__[_SET_STATE] = partial(_set_state, optimizer, handle)
    return optimizer


def _set_state(optimizer: Optimizer, handle: Handle, state: dict[str, Any]) -> None:
    del optimizer.__dict__[_SET_STATE]
    optimizer.__setstate__(state)
    handle.attach(optimizer)
