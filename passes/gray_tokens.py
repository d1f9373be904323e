"""A pass that applies Token Graying to the tokens that enter blocks or attentions of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from rfcompile.errors import GrayingError
from rfcompile.find.token_places import token_places
from rfcompile.graph.boundaries import match_paths
from rfcompile.graph.models import has_shapes
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import ModuleCall, module_calls
from rfcompile.nn.graying import gray_tokens


@dataclass(frozen=True)
class GrayedInput:
    """A module whose tokens are grayed on the way in, and their node."""

    module: str
    node: str


@dataclass(frozen=True)
class GrayTokens:
    """Put ``rfcompile.gray_tokens`` before the first block, each attention, or given modules.

    A module's tokens are the first tensor [batch, tokens, features] from outside that it reads; all
    its reads of it change. A graph does not tell padding: every token counts. Facts are
    GrayedInput, and the TokenPlaces.

    Rewrites:
        layer_norm = layer_norm(x)  # in block 0
            -> gray_tokens = gray_tokens(x, None, 0.95, 'dct'); layer_norm(gray_tokens)

    Raises:
        GrayingError: no place may be grayed (:func:`~rfcompile.find.token_places.token_places`),
        or the graph has no shapes or names. BoundaryError: a path matches nothing, or there are no
        blocks.
    """

    form: str = "dct"
    epsilon: float = 0.95
    modules: str | tuple[str, ...] = "input"
    """"input", "attention", or patterns."""
    name: str = "gray-tokens"
    tier: Literal["model"] = "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        if not has_shapes(gm) or not any(map(module_calls, gm.graph.nodes)):
            raise GrayingError(_NOTHING.format(self.modules))
        stacks = [module_calls(node) for node in gm.graph.nodes]
        calls = list(dict.fromkeys(call for stack in stacks for call in stack))
        named = self.modules
        if not isinstance(named, str):
            named = tuple(dict.fromkeys(match_paths(named, [call.path for call in calls])))
        places = token_places(gm, named)
        chosen = [call for call in calls if call.path in places.paths and call.path]
        facts = [self._gray(gm, call) for call in chosen]
        found = tuple(fact for fact in facts if fact is not None)
        if not found:
            raise GrayingError(_NOTHING.format(self.modules))
        return PassResult(gm, len(found), (*found, places))

    def _gray(self, gm: fx.GraphModule, call: ModuleCall) -> GrayedInput | None:
        inside = [n for n in gm.graph.nodes if call in module_calls(n)]
        tokens = next(_tokens_read(inside), None)
        if tokens is None:
            return None
        with gm.graph.inserting_before(inside[0]):
            arguments = (tokens, None, self.epsilon, self.form)
            node = gm.graph.call_function(gray_tokens, arguments)
        node.meta = {**tokens.meta, "nn_module_stack": inside[0].meta["nn_module_stack"]}
        for reader in inside:
            reader.replace_input_with(tokens, node)
        return GrayedInput(call.path, tokens.name)


_NOTHING = (
    "modules={!r}: no module there reads a tensor [batch, tokens, features]; the graph needs "
    "shapes and the modules' names in its metadata, as torch.export writes them."
)


def _tokens_read(inside: list[fx.Node]) -> Iterator[fx.Node]:
    within = set(inside)
    for node in inside:
        for read in node.all_input_nodes:
            value: Any = read.meta.get("val", read.meta.get("example_value"))
            is_tokens = isinstance(value, torch.Tensor) and value.dim() == 3
            if read not in within and is_tokens and value.is_floating_point():
                yield read
