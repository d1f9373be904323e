"""Finds the linears of any captured graph, and their weights as parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, fx

from rfcompile.errors import OptionError
from rfcompile.find.linears import linears_in
from rfcompile.graph.modules import Modules, patterns_of
from rfcompile.rewrites.low_rank.targets import is_conv1d, is_linear, match_linears


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
    """The chosen linears of a graph. "auto": those whose path has a number, as in a list of blocks.

    Raises:
        OptionError: nothing is chosen, a pattern matches nothing, or a weight is tied.
    """
    every = _linears(gm)
    if modules == "auto":
        chosen = [path for path in every if re.search(r"(^|\.)\d+\.", path)]
    elif callable(modules):
        chosen = [path for path in every if modules(path, gm.get_submodule(path))]
    else:
        chosen = match_linears(patterns_of(modules), list(every))
    if not chosen:
        rule = f"it chooses no linear of the graph; its linears are {', '.join(every) or '(none)'}."
        raise OptionError("modules", modules, rule)
    for path in chosen:
        names = _names(gm, every[path].weight)
        if len(names) > 1:
            rule = f"the weight is tied, {' = '.join(names)}: leave it out, or untie it first."
            raise OptionError("modules", path, rule)
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
    return found


def _names(gm: fx.GraphModule, weight: Tensor) -> list[str]:
    return [n for n, p in gm.named_parameters(remove_duplicate=False) if p is weight]
