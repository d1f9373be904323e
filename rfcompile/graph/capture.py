"""Captures a module as a graph, for diffs, reports and rewrites."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
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
    inputs = inputs_of(model, example_inputs)
    graph: fx.GraphModule = program_of(model, inputs).graph_module
    return graph


def exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """The model as ``torch.export`` sees it, without the cache that a transformers model returns.

    Raises:
        CaptureError: the model cannot be exported; the cause is chained.
    """
    args, kwargs = inputs
    try:
        with _without_caches(model):
            return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export: {error}. Compile it with "
            'torch.compile(model, backend="rfquant") instead, which may split the graph.'
        ) from error


@contextmanager
def _without_caches(model: nn.Module) -> Iterator[None]:
    """For a while, no ``config`` of a module, nor one that it holds, says ``use_cache=True``."""
    configs = [vars(m)["config"] for m in model.modules() if "config" in vars(m)]
    using = [vars(config) for config in _objects_in(configs) if vars(config).get("use_cache")]
    before = [(values, values["use_cache"]) for values in using]
    try:
        for values in using:
            values["use_cache"] = False
        yield
    finally:
        for values, use_cache in before:
            values["use_cache"] = use_cache


def program_of(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """:func:`exported`, with tensors in the place of output objects that torch does not know.

    Raises:
        CaptureError: as :func:`exported`.
    """

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return pytree.tree_map(lambda x: x if isinstance(x, _LEAVES) else tensors_of(x), output)

    handle = model.register_forward_hook(hook)
    try:
        return exported(model, inputs)
    finally:
        handle.remove()


_LEAVES = (
    *(torch.Tensor, bool, int, float, complex, str, type(None)),
    *(torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device, torch.layout),
)
"""What the output of an exported program is made of."""


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors in a value, those in objects that torch does not know too, each once."""
    leaves = pytree.tree_leaves(value)
    held = [pytree.tree_leaves(list(vars(thing).values())) for thing in _objects_in(leaves)]
    tensors = (x for x in (*leaves, *itertools.chain(*held)) if isinstance(x, torch.Tensor))
    return list({id(tensor): tensor for tensor in tensors}.values())


def _objects_in(values: list[Any]) -> Iterator[Any]:
    """The plain objects among values, and those that their attributes hold, each once."""
    found: dict[int, Any] = {}
    pending = pytree.tree_leaves(values)
    while pending:
        value = pending.pop(0)
        is_plain = not isinstance(value, (*_LEAVES, nn.Module, type, ModuleType))
        is_plain &= hasattr(value, "__dict__") and not callable(value)
        if is_plain and id(value) not in found:
            found[id(value)] = value
            pending += pytree.tree_leaves(list(vars(value).values()))
            yield value


def flat_graph(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """The model as one flat graph that an :class:`Interpreter` can run on its own parameters.

    What a ``torch.autocast`` or ``torch.no_grad`` region computes stands among the rest.

    Raises:
        CaptureError: as :func:`exported`.
    """
    module: Any = program_of(model, inputs).module()
    return _without_regions(module)


def plain_graph(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """As :func:`flat_graph`; and einsums are the batched products that they are. Where a model has
    an einsum, composite operators of rfcompile are taken apart too.

    Raises:
        CaptureError: as :func:`exported`.
    """
    return plain_graph_of(program_of(model, inputs))


def plain_graph_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """:func:`plain_graph` of a model that was captured by :func:`program_of` already."""
    module: Any = _without_einsum(program).module()
    return _without_regions(module)


def without_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph on the same parameters, to be read: what a ``torch.autocast`` or
    ``torch.no_grad`` region computes stands among the rest.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return _without_regions(fx.GraphModule(gm, graph))


def _without_einsum(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    einsum = torch.ops.aten.einsum.default
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    if not any(graph.find_nodes(op="call_function", target=einsum) for graph in graphs):
        return program
    key = torch._C.DispatchKey.CompositeImplicitAutograd  # einsum's own kernel, in C++

    def products(*args: Any, **kwargs: Any) -> Any:
        return einsum._op_dk(key, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch's own
        decomposed: torch.export.ExportedProgram = program.run_decompositions({einsum: products})
        return decomposed


_REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
"""Where in a region's arguments its graph is, after what it sets."""
_AUTOCAST = "rfcompile_autocast"


def _without_regions(gm: fx.GraphModule) -> fx.GraphModule:
    """Move the nodes of regions into the graph; those of autocast keep its settings as metadata."""
    for call in list(gm.graph.nodes):
        place = _REGIONS.get(getattr(call.target, "__name__", ""))
        if place is None:
            continue
        settings, (graph, *operands) = call.args[:place], call.args[place:]
        inner: Any = gm.get_submodule(graph.target)
        body = without_regions(inner)
        nodes = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
        with gm.graph.inserting_before(call):
            results: Any = gm.graph.graph_copy(body.graph, nodes)
        if place > 1:
            for node in body.graph.nodes:
                if isinstance(copy := nodes.get(node), fx.Node) and node.op != "placeholder":
                    copy.meta.setdefault(_AUTOCAST, settings)
        for user in list(call.users):
            user.replace_all_uses_with(results[user.args[1]])
            gm.graph.erase_node(user)
        gm.graph.erase_node(call)
    gm.recompile()
    return gm


class Interpreter(fx.Interpreter):
    """Runs a graph of :func:`flat_graph` and keeps every value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        if _AUTOCAST not in n.meta:
            return super().run_node(n)
        device, dtype, enabled, cache = n.meta[_AUTOCAST]
        with torch.autocast(device, dtype, enabled, cache):
            return super().run_node(n)


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
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers hold what they held: counters, caches, running averages."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    tensors = {b for _, held in before for b in held.values() if b is not None}
    values = [(b, b._version, b.detach().clone()) for b in tensors if not b.is_inference()]
    try:
        yield
    finally:
        for buffers, held in before:
            buffers.update(held)
        with torch.no_grad():
            for buffer, version, value in values:
                # Batch norms change theirs without a new version.
                if buffer._version != version or not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def layers_spelled_out() -> Iterator[None]:
    """In eval mode, torch's own transformer layers would be one operator, their adds within."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
