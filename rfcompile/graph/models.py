"""Helpers for whole models: copy them, unwrap compiled ones, give graphs shapes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rfcompile.errors import CaptureError, OptionError
from rfcompile.graph.capture import inputs_of
from rfcompile.nn.rebinding import Rebinding

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        rule = "give a torch.nn.Module or fx.GraphModule; an ExportedProgram has one, .module()."
        raise OptionError("model", model, rule)


def copy_of(model: ModuleT, *, share: bool) -> ModuleT:
    """A copy of the modules; it may share their parameters and buffers.

    It calls its own parts, also where a ``forward`` was replaced on the instance.

    Raises:
        CaptureError: the model cannot be copied.
    """
    rebinding = Rebinding(model)
    tensors = [*model.parameters(), *model.buffers()] if share else []
    # torch does not copy what has a history, such as the weight that an old weight_norm computed.
    held = [value for module in model.modules() for value in vars(module).values()]
    tensors += [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    with warnings.catch_warnings():
        # An exported module holds a structure of torch whose own copying warns.
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        try:
            memo = {id(tensor): tensor for tensor in tensors} | rebinding.memo
            twin = copy.deepcopy(model, memo)
            rebinding.finish(memo)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: {error}. transform changes a copy of "
                "the modules: set what cannot be copied after it, or give its class a __deepcopy__."
            ) from error
    return twin


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned."""
    while isinstance(model, OptimizedModule):
        model = model._orig_mod
    return model


_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""Where torch.compile and activation checkpointing keep the module that they wrap."""


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """For a while, the submodules that ``torch.compile`` and activation checkpointing wrapped
    stand in their places: a graph then tells them by their own names.
    """
    places = [
        (m._modules, name, child) for m in model.modules() for name, child in m._modules.items()
    ]
    wrapped = [place for place in places if _inner(place[2]) is not place[2]]
    for modules, name, child in wrapped:
        modules[name] = _inner(child)
    try:
        yield
    finally:
        for modules, name, child in wrapped:
            modules[name] = child


def _inner(module: nn.Module | None) -> nn.Module | None:
    while module is not None:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None:
            return module
        module = inner
    return None


def without_nested_tensors(model: nn.Module, changed: Callable[[nn.Module], bool]) -> None:
    """Encoders of torch that hold a changed module pass on no tensors that only torch's own kernel
    for whole layers takes.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor &= not any(map(changed, module.modules()))


def has_collectives(model: nn.Module) -> bool:
    """It is parallel by DTensor parameters, so that its graphs will have collectives."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


NO_COLLECTIVES = (
    "{} has no collective in its graphs, so it is exact. In a process group of several ranks "
    "transform quantizes the collectives that a model has; rf.Wire(4, modules='blocks') (or "
    "'branches', or paths of modules) puts a fake wire into it."
)


def is_compiled_for_wire(model: nn.Module, modules: object) -> bool:
    """Its traffic is that of its graphs: it has DTensor parameters, or no ``modules`` are named
    and there are other ranks, so that its forward may call collectives.
    """
    return has_collectives(model) or (modules == "auto" and _is_in_process_group())


def _is_in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def with_shapes(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
    """A copy of the graph, the same nodes with shapes, if it has them or there are inputs."""
    gm = copy_of(gm, share=True)
    if example_inputs is not None and not has_shapes(gm):
        _propagate_shapes(gm, example_inputs)
    return gm


def has_shapes(gm: fx.GraphModule) -> bool:
    """Some node's metadata has a value."""
    return any("val" in node.meta or "example_value" in node.meta for node in gm.graph.nodes)


def _propagate_shapes(gm: fx.GraphModule, example_inputs: Any) -> None:
    args, kwargs = inputs_of(gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    # A placeholder's own argument is its default.
    later = [kwargs.get(str(node.target), *node.args) for node in placeholders[len(args) :]]
    try:
        FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*args, *later)
    except Exception as error:
        raise CaptureError(
            f"the graph does not run on example_inputs: {error}. Its inputs are "
            f"{', '.join(str(node.target) for node in placeholders)}."
        ) from error
