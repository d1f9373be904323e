"""The fake wire: quantizes and dequantizes a tensor on one machine, and sends nothing.

``rfcompile::fake_wire(x, forward, backward, site)`` quantizes and dequantizes ``x`` in the format
of the text ``forward``; the gradient passes straight through, itself quantized in the format
``backward`` ("" leaves a direction exact). The tangent of a forward-mode derivative passes as it
is: nothing sends it. ``site`` is what an error calls the place.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from rfcompile.codec import operators
from rfcompile.codec.compiling import before_compiling, constant_while_compiling
from rfcompile.codec.derivatives import differentiable
from rfcompile.codec.formats import DTYPES, QuantFormat
from rfcompile.errors import RFCompileWarning
from rfcompile.wire import collectives
from rfcompile.wire.policy import Policy


def round_trip(x: Tensor, fmt: str, site: str = "a fake wire") -> Tensor:
    """``dequantize(quantize(x))`` in the shape and dtype of ``x``; a copy where ``fmt`` is ""."""
    if not fmt or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    rows = x.reshape(1, -1)
    payload = operators.quantize(rows, fmt)
    if QuantFormat.parse(fmt).nonfinite == "raise":
        payload = operators.require_finite(payload, operators.nonfinite_flag(x), site)
    return operators.dequantize(payload, fmt, x.dtype).narrow(1, 0, rows.shape[1]).reshape(x.shape)


def _wire(x: Tensor, forward: str, backward: str, site: str = "a fake wire") -> Tensor:
    operators.check_codec_input(x, f"the input of {site}")
    return round_trip(x, forward, site)


fake_wire = collectives.define_operator(
    "fake_wire(Tensor x, str forward, str backward, str site='a fake wire') -> Tensor",
    _wire,
    lambda x, forward, backward, site="a fake wire": x.new_empty(x.shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backward_format, ctx.site = inputs[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return send(grad, ctx.backward_format, "", f"{ctx.site}, backward"), None, None, None


_send = differentiable(operators.LIBRARY, fake_wire, _setup, _backward, straight_through=True)


def send(x: Tensor, forward: str, backward: str, site: str = "a fake wire") -> Tensor:
    """The operator as code calls it, with every kind of derivative that torch has."""
    return _send(x, forward, backward, site)


def wire_arguments(policy: Policy, module: str, size_bytes: int | None) -> tuple[str, ...]:
    """What :func:`fake_wire` takes after the tensor; empty where the policy leaves all exact."""
    formats = [
        policy.decide(kind, module, size_bytes).format for kind in ("activations", "gradients")
    ]
    if not any(formats):
        return ()
    texts = tuple(fmt.spec if fmt else "" for fmt in formats)
    # Named only where an error can name it: blocks with the same arguments share compiled code.
    raises = any(fmt and fmt.nonfinite == "raise" for fmt in formats)
    return (*texts, f"the fake wire at {module!r}") if raises else texts


# ---- the hook that puts it into a model --------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """What a boundary handed on while :func:`watch` was on.

    ``tensor`` is None where its output holds nothing to quantize; ``has_gradient``: a gradient
    will come back.
    """

    module: str
    tensor: Tensor | None
    has_gradient: bool = False


_WATCHERS: list[list[Crossing]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Crossing]]:
    """Collect what crosses the fake wires (eagerly) inside the ``with`` block."""
    crossings: list[Crossing] = []
    _WATCHERS.append(crossings)
    try:
        yield crossings
    finally:
        _WATCHERS.pop()


class FakeWire:
    """A forward hook that sends a module's output over a fake wire.

    Of a tuple, list or dict (a model output) the first floating-point tensor travels: the hidden
    state; what a block hands on beside it (caches, attention maps) does not. Where there is none,
    nothing travels, and a warning says so. ``has_run``: it was called, by no compiler.
    """

    def __init__(self, module: str, policy: Policy) -> None:
        self.module = module
        self.has_run = False
        policy = policy.for_fake_wire()
        self.arguments = wire_arguments(policy, module, None)
        self.min_bytes = 0 if policy.override_for(module) is not None else policy.smallest

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.has_run = True
        if _travels(output):
            return self.send(output)
        if isinstance(output, (tuple, list)):
            for i, item in enumerate(output):
                if _travels(item):
                    items = [*output[:i], self.send(item), *output[i + 1 :]]
                    if hasattr(output, "_fields"):
                        return type(output)(*items)
                    return type(output)(items)
        if isinstance(output, dict):
            for key, item in output.items():
                if _travels(item):
                    changed = _copy_of(output)
                    changed[key] = self.send(item)
                    return changed
        _note_idle(self.module, type(output).__name__)
        return output

    def send(self, x: Tensor) -> Tensor:
        if x.is_nested:  # torch.nn.TransformerEncoder with a padding mask, in inference
            sent = [self.send(component) for component in x.unbind()]
            return torch.nested.as_nested_tensor(sent, layout=x.layout)
        if torch.compiler.is_compiling():
            before_compiling()
        elif _WATCHERS:
            _WATCHERS[-1].append(Crossing(self.module, x.detach(), x.requires_grad))
            if x.dtype not in DTYPES:
                return x  # the watcher reports it
        if not self.arguments or x.numel() * x.element_size() < self.min_bytes:
            return x
        if not torch.compiler.is_compiling():
            operators.check_codec_input(x, f"the output of module {self.module!r}")
        return send(x, *self.arguments)

    def __repr__(self) -> str:
        forward, backward, *_ = (*self.arguments, "", "")
        return (
            f"FakeWire({self.module!r}, forward={forward or 'exact'}, "
            f"backward={backward or 'exact'})"
        )


def _travels(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _copy_of(output: dict[Any, Any]) -> dict[Any, Any]:
    if is_dataclass(output):  # a ModelOutput
        return type(output)(**output)
    return output.copy() if type(output) in (dict, OrderedDict) else copy.copy(output)


@constant_while_compiling
def _note_idle(module: str, kind: str) -> bool:
    if _WATCHERS:
        _WATCHERS[-1].append(Crossing(module, None))
    else:
        warnings.warn(
            f"nothing travels at {module!r}: its output, a {kind}, is or directly holds no "
            "floating-point tensor. Name another module in modules.",
            RFCompileWarning,
            stacklevel=2,
        )
    return True
