"""A pass that computes a weight of a graph from two low-rank factors with a sine between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from rfcompile.graph.pipeline import PassResult
from rfcompile.nn.low_rank import low_rank_weight


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """The weight of the module at ``path``, and the factors that it, or what is added to it, has.

    Args:
        left, right, omega, gain: as :func:`~rfcompile.nn.low_rank.low_rank_weight` takes
            them.
        is_transposed: the weight is [in, out].
        is_added: the weight stays, and the product is added to it: an adapter.
        names: of the factors, which become parameters beside the weight.
    """

    path: str
    left: Tensor
    right: Tensor
    omega: float | None
    gain: float
    is_transposed: bool = False
    is_added: bool = False
    names: tuple[str, str] = ("left", "right")


@dataclass(frozen=True)
class FactorWeights:
    """Each ``weights[i]`` is computed where the graph read it; a called ``nn.Linear`` is spelled
    out for that.

    Rewrites:
        y = linear(x, weight)   ->   y = linear(x, div(sin(mm(mul(left, omega), right)), gain))
    """

    weights: tuple[FactoredWeight, ...]
    name: str = "sine-low-rank"
    tier: Literal["model"] = "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        for weight in self.weights:
            _spell_out(gm, weight.path)
            _compute(gm, weight)
        return PassResult(gm, len(self.weights), self.weights)


def _spell_out(gm: fx.GraphModule, path: str) -> None:
    module = gm.get_submodule(path)
    for call in gm.graph.find_nodes(op="call_module", target=path):
        with gm.graph.inserting_before(call):
            weight = gm.graph.get_attr(f"{path}.weight")
            bias = gm.graph.get_attr(f"{path}.bias") if _has_bias(module) else None
            x = call.args[0] if call.args else call.kwargs["input"]
            linear = gm.graph.call_function(nn.functional.linear, (x, weight, bias))
        linear.meta = dict(call.meta)
        call.replace_all_uses_with(linear)
        gm.graph.erase_node(call)


def _has_bias(module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def _compute(gm: fx.GraphModule, new: FactoredWeight) -> None:
    owner = gm.get_submodule(new.path)
    target = ".".join(filter(None, [new.path, "weight"]))
    reads = gm.graph.find_nodes(op="get_attr", target=target)
    for name, value in zip(new.names, (new.left, new.right), strict=True):
        owner.register_parameter(name, nn.Parameter(value))
    first = reads[0]
    before = set(gm.graph.nodes)
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    with gm.graph.inserting_before(first.next):
        stem = target.removesuffix("weight")
        # The formula itself, on proxies: it writes its own nodes.
        left, right = (_proxy(gm.graph.get_attr(stem + name), tracer) for name in new.names)
        result: Any = low_rank_weight(left, right, new.omega, new.gain)
        result = torch.t(result) if new.is_transposed else result
        result = torch.add(_proxy(first, tracer), result) if new.is_added else result
    made = [node for node in gm.graph.nodes if node not in before]
    for read in reads:
        read.replace_all_uses_with(result.node, delete_user_cb=lambda user: user not in made)
    for read in reads[1:] if new.is_added else reads:
        gm.graph.erase_node(read)
    _set_values(gm, made, first)
    if not new.is_added:
        del owner.weight


def _proxy(node: fx.Node, tracer: fx.proxy.GraphAppendingTracer) -> Any:
    return fx.Proxy(node, tracer)


def _set_values(gm: fx.GraphModule, made: list[fx.Node], like: fx.Node) -> None:
    """Give the new nodes the shapes that the graph's others have, if they have any."""
    known = like.meta.get("val")
    mode = getattr(known, "fake_mode", None)
    if mode is None:
        return
    for node in made:
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(
                gm.get_parameter(str(node.target)), static_shapes=True
            )
        else:
            args = [a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args]
            assert callable(node.target)
            with mode:
                node.meta["val"] = node.target(*args)
        if "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
