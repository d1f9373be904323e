"""Finds the linears of any captured graph, and their weights as parameters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from rfcompile.find.linears import linears_in
from rfcompile.graph.boundaries import blocks_of_graph
from rfcompile.graph.modules import Modules
from rfcompile.rewrites.low_rank.targets import (
    check_weight,
    choose_linears,
    is_conv1d,
    is_linear,
)


@dataclass(frozen=True)
class GraphLinear:
    """A weight that the graph multiplies by; ``is_transposed``: it is [in, out]."""

    path: str
    weight: Tensor
    is_transposed: bool

    @property
    def matrix(self) -> Tensor:
        weight = self.weight.detach()
        return weight.t() if self.is_transposed else weight


def find_graph_linears(gm: fx.GraphModule, modules: Modules) -> tuple[GraphLinear, ...]:
    """The chosen linears of a graph, by the rules of
    :func:`~rfcompile.rewrites.low_rank.targets.find_linears`.

    A graph shows multiplications and weights, not modules. So a linear that is never called is not
    here, one whose class has a forward of its own is, and a module with two paths looks tied.

    Raises:
        OptionError: as :func:`~rfcompile.rewrites.low_rank.targets.find_linears`.
    """
    every = _linears(gm)
    chosen = choose_linears(gm, modules, every, lambda: blocks_of_graph(gm))
    for path in chosen:
        check_weight(path, every[path].weight, _names(gm, every[path].weight))
    return tuple(every[path] for path in chosen)


def _linears(gm: fx.GraphModule) -> dict[str, GraphLinear]:
    found: dict[str, GraphLinear] = {}
    for node in gm.graph.find_nodes(op="call_module"):
        path = str(node.target)
        module = gm.get_submodule(path)
        if is_linear(module):
            weight = module.get_parameter("weight")
            found[path] = GraphLinear(path, weight, is_conv1d(module))
    linears, _ = linears_in(gm.graph, gm)
    for linear in linears.values():
        if linear.is_computed or linear.weight.rpartition(".")[2] != "weight":
            continue
        weight = gm.get_parameter(linear.weight)
        if weight.dim() == 2:
            for alias in _names(gm, weight):
                path = alias.rpartition(".")[0]
                found[path] = GraphLinear(path, weight, linear.is_transposed)
    # In the order of the modules, as far as the graph's parameters have kept it.
    order = {name: i for i, (name, _) in enumerate(gm.named_parameters(remove_duplicate=False))}
    place = {path: order[f"{path}.weight".lstrip(".")] for path in found}
    return {path: found[path] for path in sorted(found, key=place.__getitem__)}


def _names(gm: fx.GraphModule, weight: Tensor) -> list[str]:
    return [n for n, p in gm.named_parameters(remove_duplicate=False) if p is weight]
