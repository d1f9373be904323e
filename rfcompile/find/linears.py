"""Finds the linears of an exported graph: each multiplication by a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rfcompile.graph.places import module_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A multiplication by a parameter: ``y = x W^T + b``, or ``x W + b`` where ``is_transposed``.

    ``weight``, ``bias`` and ``scale``, which multiplies the result by itself (LayerScale), are
    names of parameters; ``module`` is the path of the module that multiplies. A stack of linears
    (mixture of experts) has a weight of three dimensions. A weight that ``is_computed`` (by
    ``weight_norm``, from integers) is no parameter: its name is the module's with ".weight".
    """

    weight: str
    bias: str | None
    module: str
    is_transposed: bool
    scale: str | None = None
    is_computed: bool = False


_LINEAR = {aten.linear.default, nn.functional.linear}
_INPUT_AND_WEIGHT = {
    aten.linear.default: (0, 1),
    nn.functional.linear: (0, 1),  # of graphs that nobody exported
    torch.addmm: (1, 2),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
}
_ADDS = {torch.addmm, aten.addmm.default, aten.baddbmm.default}
_TRANSPOSE = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
}
_COPY = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default}
_PART_OF_A_STACK = {aten.select.int, aten.index.Tensor, aten.unbind.int, aten.index_select.default}
_MOVE = {*_TRANSPOSE, *_COPY, aten.dropout.default, aten.view.default, aten.reshape.default}


def linears_in(
    graph: fx.Graph, model: nn.Module
) -> tuple[dict[fx.Node, Linear], dict[fx.Node, fx.Node]]:
    """The nodes of a graph of ``model`` that multiply by a parameter, and the input of each."""
    linears, inputs = {}, {}
    parameters = _names(model)
    fed = fed_in(graph)
    for node in graph.nodes:
        places = _input_and_weight(node)
        if places is None:
            continue
        x, weight = (node.args[place] for place in places)
        found = _parameter(weight, parameters)
        is_computed = found is None and node.target in _LINEAR and weight not in fed
        if is_computed:
            found = f"{module_of(node)}.weight", 0
        if found is None or x not in fed:
            continue
        name, turns = found
        linears[node] = Linear(
            name,
            _bias(node, parameters),
            module_of(node),
            is_transposed=(turns % 2 == 0) != (node.target in _LINEAR),
            scale=_scale(node, parameters),
            is_computed=is_computed,
        )
        inputs[node] = x
    return linears, inputs


def fed_in(graph: fx.Graph) -> set[fx.Node]:
    """The inputs and all that is made of them."""
    fed = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return fed


def _names(model: nn.Module) -> dict[str, str]:
    """Of every name of a parameter, the first name of the same parameter."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(parameter, name) for name, parameter in named}


def _input_and_weight(node: fx.Node) -> tuple[int, int] | None:
    if node.target in _INPUT_AND_WEIGHT:
        return _INPUT_AND_WEIGHT[node.target]
    target = node.target
    # A kernel that torch does not know, of the shapes of a product with a stack of matrices.
    if isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims"):
        shapes = [shape_of(argument) for argument in node.args[:2]]
        if len(shapes) == 2 and len(shapes[1]) == 3 and shapes[0] and shape_of(node):
            x, (_, inner, outer) = shapes[0], shapes[1]
            return (0, 1) if (x[-1], shape_of(node)[-1]) == (inner, outer) else None
    return None


def shape_of(argument: object) -> tuple[int, ...]:
    """Of the tensor that a node gives; () for all else."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _parameter(node: object, names: Mapping[str, str]) -> tuple[str, int] | None:
    """The parameter that a node is a view, cast or part of, and how often it was transposed."""
    turns = 0
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            name = names.get(str(node.target))
            return None if name is None else (name, turns)
        is_stack = len(shape_of(node.args[0])) == 3 if node.args else False
        if node.target in _TRANSPOSE:
            turns += 1
        elif is_stack and node.target in _PART_OF_A_STACK:
            pass
        elif "getitem" not in str(node.target) and node.target not in _COPY:
            return None
        node = node.args[0]
    return None


def _bias(node: fx.Node, names: Mapping[str, str]) -> str | None:
    place = 2 if node.target in _LINEAR else 0 if node.target in _ADDS else len(node.args)
    found = _parameter(node.args[place], names) if place < len(node.args) else None
    return found[0] if found else None


def _scale(node: fx.Node, names: Mapping[str, str]) -> str | None:
    """The parameter that the result is multiplied with, with nothing in between."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.mul.Tensor, aten.mul_.Tensor):
            (other,) = [argument for argument in user.args if argument is not node] or [None]
            while isinstance(other, fx.Node) and other.target in _MOVE | {aten.unsqueeze.default}:
                other = other.args[0]
            return names.get(str(other.target)) if isinstance(other, fx.Node) else None
        if user.target not in _MOVE:
            return None
        node = user
    return None
