"""Tells whether a model in training mode computes what it computes in eval mode."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from rfcompile.graph.capture import Inputs, buffers_kept, copied, in_mode


def trains_as_it_evaluates(model: nn.Module, inputs: Inputs) -> bool:
    """In both modes a model calls the same functions of torch, from the same lines, in the same
    order and on the same tensors, as far as these show on the inputs.

    Dropout and normalization are one function in both modes. False where it does not run in one of
    them. Modes, buffers and random numbers stay as they are.
    """
    try:
        return _calls(model, inputs, training=False) == _calls(model, inputs, training=True)
    except Exception:  # it does not run: whoever asks finds out how far it gets
        return False


def _calls(model: nn.Module, inputs: Inputs, *, training: bool) -> list[Any]:
    args, kwargs = copied(inputs)
    calls = _Calls(sys._getframe())
    no_activations = torch.autograd.graph.saved_tensors_hooks(lambda _: None, _no_backward)
    with in_mode(model, training=training), buffers_kept(model), torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.enable_grad(), no_activations, calls:
            model(*args, **kwargs)
    return calls.found


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("the model computes gradients itself")


class _Calls(TorchFunctionMode):
    """Notes each function of torch that is called: its caller's lines up to a frame, and which
    calls made the tensors that it gets.
    """

    def __init__(self, outermost: FrameType) -> None:
        super().__init__()
        self.outermost = outermost
        self.found: list[Any] = []
        self.numbers = WeakTensorKeyDictionary()
        self.given = itertools.count(1)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        read = tuple(map(self._number, _tensors((args, kwargs))))
        self.found.append((func, tuple(self._lines(sys._getframe(1))), read))
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self.numbers[tensor] = len(self.found)
        return result

    def _number(self, tensor: Tensor) -> int:
        """Of the call that made it; of an input or a parameter, one of its own."""
        if tensor not in self.numbers:
            self.numbers[tensor] = -next(self.given)
        return int(self.numbers[tensor])

    def _lines(self, frame: FrameType | None) -> Any:
        while frame is not None and frame is not self.outermost:
            yield frame.f_code, frame.f_lineno
            frame = frame.f_back


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
