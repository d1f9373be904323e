"""The fake wire: what a quantized transfer does to a tensor, on one machine and without sending.

``rfcompile::fake_wire(x, forward, backward)`` quantizes and dequantizes ``x`` in the format of the
text ``forward``; the gradient passes straight through, itself quantized in the format ``backward``
("" leaves a direction exact).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfcompile import collectives, ops
from rfcompile.formats import QuantFormat
from rfcompile.policy import Policy


def round_trip(x: Tensor, fmt: str) -> Tensor:
    """``dequantize(quantize(x))`` in the shape and dtype of ``x``; a copy where ``fmt`` is ""."""
    if not fmt or x.numel() == 0:
        return x.clone()
    rows = x.reshape(1, -1)
    payload = ops.quantize(rows, fmt)
    if QuantFormat.parse(fmt).nonfinite == "raise":
        payload = ops.require_finite(payload, ops.nonfinite_flag(x), "a fake wire")
    return ops.dequantize(payload, fmt, x.dtype).narrow(1, 0, rows.shape[1]).reshape(x.shape)


def _wire(x: Tensor, forward: str, backward: str) -> Tensor:
    ops.check_codec_input(x, "the tensor on a fake wire")
    return round_trip(x, forward)


fake_wire = collectives.define_operator(
    "fake_wire(Tensor x, str forward, str backward) -> Tensor",
    _wire,
    lambda x, forward, backward: x.new_empty(x.shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backward_format = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return fake_wire(grad, ctx.backward_format, ""), None, None


torch.library.register_autograd(fake_wire, _backward, setup_context=_setup, lib=ops.LIBRARY)


# ---- the hook that puts it into a model --------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """A tensor that went through a fake wire while :func:`watch` was on."""

    module: str
    tensor: Tensor
    wire: FakeWire


_WATCHERS: list[list[Crossing]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Crossing]]:
    """Collect what crosses the fake wires (eagerly) inside the ``with`` block."""
    crossings: list[Crossing] = []
    _WATCHERS.append(crossings)
    try:
        yield crossings
    finally:
        _WATCHERS.remove(crossings)


class FakeWire:
    """A forward hook that sends a module's output over a fake wire.

    Of a tuple, list or dict (a model output) the first floating-point tensor travels: the hidden
    state; what a block hands on beside it (caches, attention maps) does not.
    """

    def __init__(self, module: str, policy: Policy) -> None:
        self.module = module
        activations = policy.format_for("activations", module, 2**62)[0]
        gradients = policy.format_for("gradients", module, 2**62)[0]
        self.forward = activations.spec if activations else ""
        self.backward = gradients.spec if gradients else ""
        self.min_bytes = 0 if _is_named(policy, module) else policy.min_bytes

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
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
                    changed = type(output)(**output)  # ModelOutput and dict alike
                    changed[key] = self.send(item)
                    return changed
        return output

    def send(self, x: Tensor) -> Tensor:
        if not _travels(x):
            return x
        if torch.compiler.is_compiling():
            collectives.before_compiling()
        elif _WATCHERS:
            _WATCHERS[-1].append(Crossing(self.module, x.detach(), self))
        if x.numel() * x.element_size() < self.min_bytes:
            return x
        return fake_wire(x, self.forward, self.backward)

    def __repr__(self) -> str:
        return (
            f"FakeWire({self.module!r}, forward={self.forward or 'exact'}, "
            f"backward={self.backward or 'exact'})"
        )


def _travels(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_named(policy: Policy, module: str) -> bool:
    return policy.override_for(module) is not None
