"""A pass that applies Token Graying to the tokens that enter blocks or attentions of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from rfcompile.errors import GrayingError
from rfcompile.find.attention_cores import Core, argument, cores_of
from rfcompile.find.dataflow import operator_name, words
from rfcompile.graph.boundaries import find_blocks, match_paths
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import ModuleCall, module_calls
from rfcompile.nn.graying import gray_tokens

Where = Literal["input", "attention"] | tuple[str, ...]


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
    GrayedInput.

    Rewrites:
        layer_norm = layer_norm(x)  # in block 0
            -> gray_tokens = gray_tokens(x, None, 0.95, 'dct'); layer_norm(gray_tokens)

    Raises:
        GrayingError: there is no such place, or the attention is causal: graying mixes all tokens,
        so that each would know later ones. BoundaryError: a path matches nothing.
    """

    form: str = "dct"
    epsilon: float = 0.95
    where: Where = "input"
    name: str = "gray-tokens"
    tier: Literal["model"] = "model"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        causal = [module for core in cores_of(gm.graph) if (module := _causal(core)) is not None]
        if causal:
            raise GrayingError(
                f"the graph has causal attention ({causal[0] or 'outermost module'}): graying "
                "mixes tokens, and each would know those after it.",
                causal,
            )
        facts = [self._gray(gm, call) for call in self._places(gm)]
        found = tuple(fact for fact in facts if fact is not None)
        if not found:
            raise GrayingError(
                f"where={self.where!r}: no module there reads a tensor [batch, tokens, features]; "
                "the graph needs shapes and the modules' names in its metadata, as torch.export "
                "writes them."
            )
        return PassResult(gm, len(found), found)

    def _places(self, gm: fx.GraphModule) -> list[ModuleCall]:
        stacks = [module_calls(node) for node in gm.graph.nodes]
        calls = list(dict.fromkeys(call for stack in stacks for call in stack))
        if self.where == "attention":
            paths = {_module(core.weights) for core in cores_of(gm.graph)}
        elif self.where == "input":
            blocks = find_blocks({call.path: call.cls for call in calls})
            lists = {path.rpartition(".")[0]: path for path in reversed(blocks)}
            paths = set(lists.values())
        else:
            paths = set(match_paths(self.where, [call.path for call in calls]))
        return [call for call in calls if call.path in paths and call.path]

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


def _module(node: fx.Node) -> str:
    calls = module_calls(node)
    return calls[-1].path if calls else ""


def _tokens_read(inside: list[fx.Node]) -> Iterator[fx.Node]:
    within = set(inside)
    for node in inside:
        for read in node.all_input_nodes:
            value: Any = read.meta.get("val", read.meta.get("example_value"))
            is_tokens = isinstance(value, torch.Tensor) and value.dim() == 3
            if read not in within and is_tokens and value.is_floating_point():
                yield read


_ORDER = words("le ge lt gt less_equal greater_equal less greater")


def _causal(core: Core) -> str | None:
    """The attention's module if it is causal: by its flag, or by a mask made of an order."""
    if core.is_fused and argument(core.weights, 5, "is_causal", False):
        return _module(core.weights)
    seen, pending = {core.query, core.key, core.value}, list(core.weights.all_input_nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
        name = operator_name(node)
        if name in ("tril", "triu") or (name in _ORDER and _compares_positions(node)):
            return _module(core.weights)
    return None


def _compares_positions(node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 2 and all(map(_counts, node.all_input_nodes))


def _counts(node: fx.Node) -> bool:
    """It is made of ``arange``."""
    seen, pending = set(), [node]
    while pending:
        n = pending.pop()
        if operator_name(n) == "arange":
            return True
        if n not in seen:
            seen.add(n)
            pending += n.all_input_nodes
    return False
