"""Runs the forward of a module in a torch mode that replaces softmax attention."""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rfcompile.errors import AttentionError
from rfcompile.nn.attention_operators import GAIN, polynomial_attention, polynomial_weights

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}


class PolynomialMode(TorchFunctionMode):
    """While it is entered, fused attentions and softmaxes over the last axis are polynomial.

    torch.compile and torch.export follow it.

    Raises:
        AttentionError: an attention runs in a checkpoint that was begun in the mode. In eager
            backward it would be computed again outside of the mode, with a softmax.
    """

    def __init__(self, power: int, scale: str, form: str, gain: Tensor | None) -> None:
        super().__init__()
        self.power, self.scale, self.form, self.gain = power, scale, form, gain
        self.has_backward = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._check_checkpoint()
            options = {"power": self.power, "rows": self.scale, "gain": self.gain}
            return polynomial_attention(*args, **kwargs, **options, form=self.form)
        if func is checkpointing.checkpoint:
            raise AttentionError(_CHECKPOINTED)
        if func in _SOFTMAX:
            return self._weights(func, *args, **kwargs)
        if getattr(func, "__name__", "") == "unflatten":
            # Tensor's calls its super() in Python, which Dynamo does not trace from within a mode.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)

    def _weights(
        self,
        func: Any,
        input: Tensor,
        dim: int | None = None,
        *stack_level: Any,
        dtype: Any = None,
        **rest: Any,
    ) -> Tensor:
        if dim not in (-1, input.dim() - 1):
            softmax: Tensor = func(input, dim, *stack_level, dtype=dtype, **rest)
            return softmax
        self._check_checkpoint()
        weights: Tensor = polynomial_weights(input, self.power, self.scale, self.gain, dtype)
        return weights

    def _check_checkpoint(self) -> None:
        if torch.compiler.is_compiling() or not self.has_backward:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code is not PolynomialForward.__call__.__code__:
            if frame.f_code.co_filename == checkpointing.__file__:
                raise AttentionError(_CHECKPOINTED)
            frame = frame.f_back


_CHECKPOINTED = (
    "polynomial attention is checkpointed inside its module's forward: checkpoint the module "
    "itself, or the block around it."
)


class PolynomialForward:
    """The forward of one module, which it had, in a :class:`PolynomialMode`.

    It is an attribute of the module, and so is copied and pickled with it.
    """

    def __init__(self, module: nn.Module, power: int, scale: str, form: str) -> None:
        self.module, self.power, self.scale, self.form = module, power, scale, form
        self.before = vars(module).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gain = getattr(self.module, GAIN, None)
        with PolynomialMode(self.power, self.scale, self.form, gain):
            if self.before is not None:
                return self.before(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __code__(self) -> CodeType:  # torch.export asks the outermost module's forward
        return type(self).__call__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        if self.before is not None:
            return inspect.signature(self.before)
        whole = inspect.signature(type(self.module).forward)
        return whole.replace(parameters=list(whole.parameters.values())[1:])
