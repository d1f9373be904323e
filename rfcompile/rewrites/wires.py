"""Wire: puts fake wires at the ends of modules, and quantizes traffic in graphs.

A fake wire is a forward hook that quantizes and dequantizes what ``module(x)`` returns. Some models
call ``module.forward(x)``, which runs no hook. In such a model the fake wires stand in ``forward``
itself. If some wires still do not run in the first call of the model, a warning names them.
"""

from __future__ import annotations

import dis
import inspect
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import OptimizedModule

from rfcompile.errors import OptionError, RFCompileWarning
from rfcompile.find.collectives import find_collectives
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.models import has_shapes, uncompiled, with_shapes
from rfcompile.graph.modules import Modules, as_modules, patterns_of
from rfcompile.graph.pipeline import Record, run
from rfcompile.nn.rebinding import Bound
from rfcompile.passes import boundary_pipeline, wire_pipeline
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.fake import FakeWire
from rfcompile.wire.policy import Policy, Policyish


@dataclass(frozen=True)
class Wire:
    """The wire of a model: the format of each kind of traffic, and the places of a fake wire.

    Args:
        policy: bits, a format, a mapping, a :class:`~rfcompile.Policy`, "exact", or the path of a
            TOML file. If left out, the default policy (:func:`~rfcompile.set_default_policy`). Bits
            or a format apply to all kinds of traffic.
        modules: where a fake wire stands in a model without collectives. "auto" and "blocks": at
            the end of each repeated block. "branches": at the end of the branches of each block
            (attention, MLP). Paths or shell patterns: at the end of these modules. A function of
            (path, module): at the end of each module for which it returns True. In a model with
            collectives the wire stands where the collectives are. There ``modules`` has no effect,
            and a warning says so. In a process group of several ranks "auto" means the collectives,
            and any other value means a fake wire.

    Raises:
        PolicyError, FormatError: the policy is not understood, or there is none.
    """

    policy: Policyish = None
    modules: Modules = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", policy_of(self.policy))
        object.__setattr__(self, "modules", as_modules(self.modules))

    @property
    def chosen(self) -> Policy:
        """The policy as it was understood."""
        assert isinstance(self.policy, Policy)
        return self.policy


def wire_of(wire: Wire | None, bits: Policyish) -> Wire:
    """The wire that a caller gave, in one of two ways; neither: ``Wire()``.

    Raises:
        OptionError: ``wire`` is no Wire, or both are given.
    """
    if wire is not None and not isinstance(wire, Wire):
        rule = "give an rf.Wire(...), or bits=4. Inputs go to example_inputs=(x,)."
        raise OptionError("wire", wire, rule)
    if wire is not None and bits is not None:
        raise OptionError("bits", bits, "give bits or a Wire, not both.")
    return Wire(bits) if wire is None else wire


def with_fake_wire(twin: nn.Module, wire: Wire) -> nn.Module:
    """The module, with a fake wire at its boundaries in place of those that it may have."""
    inner = uncompiled(twin)
    found = find_boundaries(inner, wire.modules)
    place(inner, {path: FakeWire(path, wire.chosen) for path in found})
    return twin


def rewrite_graph(gm: fx.GraphModule, wire: Wire, example_inputs: Any) -> Record:
    """:func:`transform` for a graph, with the record of what was done."""
    gm = with_shapes(gm, example_inputs)
    if has_shapes(gm) and find_collectives(gm):
        return run(gm, wire_pipeline(wire.chosen, "forward"))
    if callable(wire.modules) or wire.modules == "branches":
        rule = "a graph has no modules to ask: use 'blocks' or give the paths of the modules."
        raise OptionError("modules", wire.modules, rule)
    if isinstance(wire.modules, str) and wire.modules in ("auto", "blocks"):
        return run(gm, boundary_pipeline(wire.chosen))
    return run(gm, boundary_pipeline(wire.chosen, patterns_of(wire.modules)))


class SendingForward:
    """``module.forward``, with its output sent over a fake wire."""

    def __init__(self, module: nn.Module, wire: FakeWire) -> None:
        self.module, self.wire = module, wire
        self.inner = vars(module).get("forward", Bound(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wire(self.module, args, self.inner(*args, **kwargs))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)


class FirstCall:
    """A forward hook of a model: once, a warning that names the wires that did not run.

    Compiled code does not tell, so nothing is said of a model of which a part may be compiled.
    """

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        for key, hook in list(model._forward_hooks.items()):
            if hook is self:
                del model._forward_hooks[key]
        wires = wires_of(model)
        idle = [wire.module for wire in wires if not wire.has_run]
        if idle and not any(map(_may_be_compiled, model.modules())):
            warnings.warn(
                f"{len(idle)} of {len(wires)} fake wires did not run in the first call of "
                f"{type(model).__name__}: {', '.join(map(repr, idle))}. The model called these "
                "modules in another way than module(x), or not at all. Name the modules that it "
                "calls in modules.",
                RFCompileWarning,
                stacklevel=2,
            )


def _may_be_compiled(module: nn.Module) -> bool:
    own = vars(module).get("forward")
    is_replaced = own is not None and not isinstance(own, SendingForward)
    return isinstance(module, OptimizedModule) or is_replaced or bool(module._compiled_call_impl)


def place(model: nn.Module, found: dict[str, FakeWire]) -> None:
    """Put each wire at the end of the module of its path, in place of those in the model."""
    for module in model.modules():
        remove(module)
    by_name = bool(found) and any(map(calls_forward, model.modules()))
    for path, wire in found.items():
        module = model.get_submodule(path)
        if by_name and path:
            module.forward = SendingForward(module, wire)
        else:
            module.register_forward_hook(wire)


def wires_of(model: nn.Module) -> list[FakeWire]:
    """The wires that stand at the ends of the model's modules, in their order."""
    return [wire for module in model.modules() for wire in _wires_at(module)]


def _wires_at(module: nn.Module) -> Iterator[FakeWire]:
    own = vars(module).get("forward")
    if isinstance(own, SendingForward):
        yield own.wire
    for hook in module._forward_hooks.values():
        if isinstance(hook, FakeWire):
            yield hook


def remove(module: nn.Module) -> None:
    """Take away what :func:`place` put into this module."""
    own = vars(module).get("forward")
    if isinstance(own, SendingForward):
        del module.forward
        if not isinstance(own.inner, Bound):
            module.forward = own.inner
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, (FakeWire, FirstCall)):
            del module._forward_hooks[key]


def calls_forward(module: nn.Module) -> bool:
    """The module's ``forward`` takes the ``forward`` of another object than ``super()`` or
    ``self``, or its class has a ``__call__`` of its own.
    """
    cls = type(module)
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    return cls.__call__ is not nn.Module.__call__ or (code is not None and _takes_forward(code))


def _takes_forward(code: CodeType) -> bool:
    if any(_takes_forward(inner) for inner in code.co_consts if isinstance(inner, CodeType)):
        return True
    if "forward" not in code.co_names:
        return False
    before: deque[Any] = deque(maxlen=4)  # "super", its call, and what lies between
    for instruction in dis.get_instructions(code):
        is_read = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        is_read &= instruction.argval == "forward"
        if is_read and "super" not in before and before[-1] != "self":
            return True
        before.append(instruction.argval)
    return False
