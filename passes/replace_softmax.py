"""A pass that replaces the softmax attention of a graph by polynomial attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from rfcompile.find.attention_cores import Core, all_cores, argument
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import module_of, source_of
from rfcompile.graph.text import target_text
from rfcompile.nn.attention_operators import GAIN, polynomial_attention, polynomial_weights
from rfcompile.nn.polynomial import Scale


@dataclass(frozen=True)
class ReplacedAttention:
    """An attention that is polynomial now: its module and line, and what its softmax was."""

    module: str
    source: str
    spelling: str

    @staticmethod
    def of(core: Core) -> ReplacedAttention:
        node = core.weights
        return ReplacedAttention(module_of(node), source_of(node), target_text(node))


@dataclass(frozen=True)
class ReplaceSoftmax:
    """Every softmax between two products, and every fused attention, becomes polynomial.

    Other softmaxes (routers, output probabilities) stay. With ``scale="learned"`` the graph's
    module gets a parameter ``attention_gain_0``, ``attention_gain_1`` ... for each. Facts are
    ReplacedAttention.

    Rewrites:
        scaled_dot_product_attention(q, k, v, mask) ->
            rfcompile.polynomial_attention(q, k, v, mask, power=3, rows='row')
        softmax(scores, -1) -> rfcompile.polynomial_weights(scores, 3, 'row')
    """

    power: int = 3
    scale: Scale = "row"
    form: str = "auto"
    name: str = "polynomial-attention"
    tier: Literal["model"] = "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        cores = [core for core in all_cores(gm) if core.kind == "softmax"]
        facts = [self._replace(core) for core in cores]
        return PassResult(gm, len(facts), tuple(facts))

    def _replace(self, core: Core) -> ReplacedAttention:
        node, graph = core.weights, core.weights.graph
        owner = graph.owning_module
        assert owner is not None
        fact = ReplacedAttention.of(core)
        with graph.inserting_before(node):
            gain = self._gain(owner, graph) if self.scale == "learned" else None
            if core.is_fused:
                options: dict[str, Any] = {"power": self.power, "rows": self.scale, "gain": gain}
                options = {**node.kwargs, **options, "form": self.form}
                new = graph.call_function(polynomial_attention, node.args, options)
            else:
                new = graph.call_function(
                    polynomial_weights,
                    (argument(node, 0, "input"), self.power, self.scale, gain, _dtype_of(node)),
                )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return fact

    def _gain(self, owner: fx.GraphModule, graph: fx.Graph) -> fx.Node:
        number = sum(name.startswith(GAIN) for name in owner._parameters)
        like = next(owner.parameters(), torch.empty(0))
        owner.register_parameter(
            f"{GAIN}_{number}", nn.Parameter(torch.ones(1, device=like.device))
        )
        return graph.get_attr(f"{GAIN}_{number}")


def _dtype_of(softmax: fx.Node) -> torch.dtype | None:
    if softmax.op == "call_module":
        return None
    found = [a for a in softmax.args if isinstance(a, torch.dtype)]
    return found[0] if found else softmax.kwargs.get("dtype")  # type: ignore[return-value]
