"""A pass that replaces the residual adds of a graph by calls of ResidualSite modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from rfcompile.errors import ResidualError
from rfcompile.graph.pipeline import PassResult
from rfcompile.nn.residual_site import ResidualSite
from rfcompile.passes.find_residuals import Kind, ResidualAdd, find_residuals

SPELLINGS = {"add", "add_", "iadd"}


@dataclass(frozen=True)
class OpenedSite:
    """A residual add that is a submodule now: the site's path, and the add as it was found."""

    path: str
    add: ResidualAdd


@dataclass(frozen=True)
class OpenResiduals:
    """Every residual add of the chosen kinds becomes a submodule ``residual_0``, ``residual_1``...

    The graph computes what it did until a site changes its mode. Facts are
    OpenedSite for what changed, ResidualAdd for what did not.

    Raises:
        ResidualError: an add of these kinds is spelled in another way than as an addition.
    """

    kinds: tuple[Kind, ...] = ("block",)
    name: str = "open-residuals"
    tier: Literal["bitwise"] = "bitwise"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        nodes = additions(gm)
        facts: list[OpenedSite | ResidualAdd] = []
        left = []
        for add in find_residuals(gm):
            if add.kind not in self.kinds:
                facts.append(add)
            elif add.node not in nodes:
                left.append(add)
            else:
                facts.append(_open(gm, nodes[add.node], add))
        if left:
            places = "; ".join(f"{add.place} ({add.spelling})" for add in left)
            raise ResidualError(
                f"{len(left)} residual adds of the graph cannot be rewritten: {places}. Write them "
                "as x + f(x), or pass the module that the graph was captured from.",
                left,
            )
        return PassResult(gm, sum(isinstance(fact, OpenedSite) for fact in facts), tuple(facts))


def additions(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes that the pass can rewrite, by name; none of a graph that this one calls."""
    return {node.name: node for node in gm.graph.nodes if _is_addition(node)}


def _is_addition(node: fx.Node) -> bool:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return both and str(name).split(".")[0] in SPELLINGS and not set(node.kwargs) - {"alpha"}


def _open(gm: fx.GraphModule, node: fx.Node, add: ResidualAdd) -> OpenedSite:
    taken = sum(name.startswith("residual_") for name in gm._modules)
    path = f"residual_{taken}"
    gm.add_submodule(path, ResidualSite(add.operand))
    with gm.graph.inserting_after(node):
        site = gm.graph.call_module(path, node.args, node.kwargs)
    site.meta = dict(node.meta)
    node.replace_all_uses_with(site)
    gm.graph.erase_node(node)
    return OpenedSite(path, replace(add, node=site.name))
