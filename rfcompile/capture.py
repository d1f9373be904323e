"""A module as a graph: where diffs and reports get theirs when the user gives a module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from rfcompile.errors import CaptureError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def inputs_of(model: nn.Module, example_inputs: Any) -> Inputs:
    """Example inputs as (args, kwargs); left out, they come from ``model.dummy_inputs``.

    Takes a tuple of args, an ``(args, kwargs)`` pair, a dict of kwargs, or one tensor.

    Raises:
        CaptureError: there are none, or they are none of these.
    """
    if example_inputs is None:
        dummy = getattr(model, "dummy_inputs", None)
        if isinstance(dummy, Mapping):
            return (), dict(dummy)
        raise CaptureError(
            f"{type(model).__name__} has no example inputs: pass example_inputs=(x,) (a tuple of "
            "arguments) or example_inputs=(args, kwargs)."
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        match tuple(example_inputs):
            case (tuple() | list() as args, Mapping() as kwargs):
                return tuple(args), dict(kwargs)
            case items:
                return items, {}
    raise CaptureError(
        f"example_inputs is a {type(example_inputs).__name__}: pass a tuple of arguments, an "
        "(args, kwargs) pair, or a dict of keyword arguments."
    )


def capture(model: nn.Module, example_inputs: Any = None) -> fx.GraphModule:
    """The model's forward as an fx graph of aten operators, by ``torch.export``.

    Raises:
        CaptureError: no example inputs, or the model cannot be exported; the cause is chained.
    """
    if isinstance(model, fx.GraphModule):
        return model
    graph: fx.GraphModule = exported(model, inputs_of(model, example_inputs)).graph_module
    return graph


def exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The model as ``torch.export`` sees it, without the cache that a transformers model returns.

    Raises:
        CaptureError: the model cannot be exported; the cause is chained.
    """
    args, kwargs = inputs
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache:
            config.use_cache = False
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export: {error}. Compile it with "
            'torch.compile(model, backend="rfquant") instead, which may split the graph.'
        ) from error
    finally:
        if use_cache:
            config.use_cache = use_cache


def without_einsum(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same program, its einsums written as the batched products that they are."""
    einsum = torch.ops.aten.einsum.default
    if not program.graph.find_nodes(op="call_function", target=einsum):
        return program
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # einsum's own kernel, in C++

    def products(*args: Any, **kwargs: Any) -> Any:
        return einsum._op_dk(key, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own
        decomposed: torch.export.ExportedProgram = program.run_decompositions({einsum: products})
        return decomposed


# ---- running a model to learn about it ---------------------------------------------------------


def copied(inputs: Inputs) -> Inputs:
    """Inputs that a model may change in place."""
    copies: Inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.detach().clone(), inputs)
    return copies


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module in one mode, and torch's own layers as they are written."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with layers_spelled_out():
            yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def layers_spelled_out() -> Iterator[None]:
    """In eval mode, torch's own transformer layers would be one operator, their adds within."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
