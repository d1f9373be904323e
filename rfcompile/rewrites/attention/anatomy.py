"""Finds the role of each linear of a model: query, key, value or output of which head.

Names and layouts say nothing reliable (fused, interleaved, grouped heads), so the model is asked:
its graph runs once on the example inputs, every linear's output is cut from what made it, and the
gradients of the attention's operands say which feature of which linear feeds which head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rfcompile.find.attention_cores import Core, cores_of
from rfcompile.find.linears import Linear, fed_in, linears_in
from rfcompile.graph.capture import Inputs, Interpreter, buffers_kept, copied, in_mode, plain_graph
from rfcompile.graph.places import module_of


@dataclass(frozen=True)
class Heads:
    """Which features of a linear are which head's: ``features[h]`` in the order of the head."""

    linear: Linear
    features: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Attention:
    """One attention: where it is, and the heads of its linears, None where no linear feeds it.

    ``output`` has the features of the output linear's input, by query head. ``is_self``: queries
    and keys are made of the same tokens.
    """

    module: str
    is_self: bool
    query: Heads | None
    key: Heads | None
    value: Heads | None
    output: Heads | None


@dataclass(frozen=True)
class Anatomy:
    """The linears of a model in order of use, and its attentions."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]


def anatomy(model: nn.Module, inputs: Inputs, module: fx.GraphModule | None = None) -> Anatomy:
    """Ask a model on example inputs; its parameters, modes and gradients stay as they are.

    Args:
        module: its :func:`~rfcompile.graph.capture.plain_graph` in eval mode; left out, it is
            captured.

    Raises:
        CaptureError: it cannot be captured.
    """
    with torch.enable_grad(), in_mode(model, training=False), buffers_kept(model):
        module = plain_graph(model, inputs) if module is None else module
        run = _CutRun(module, model)
        run.run(*pytree.tree_leaves(copied(inputs)), enable_io_processing=False)
        attentions = [run.ask(core) for core in cores_of(module.graph)]
    return Anatomy(tuple(run.linears.values()), tuple(attentions))


# ---- the question ------------------------------------------------------------------------------


class _CutRun(Interpreter):
    """Runs a graph and keeps every value; outputs of linears and attentions start a new history."""

    def __init__(self, module: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(module)
        self.linears, self.inputs = linears_in(module.graph, model)
        self.cuts = {*self.linears, *(core.result for core in cores_of(module.graph))}
        self.leaves: dict[fx.Node, Tensor] = {}
        self.placeholders = module.graph.find_nodes(op="placeholder")
        self.order = {node: number for number, node in enumerate(module.graph.nodes)}
        self.fed = fed_in(module.graph)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.cuts and isinstance(value, Tensor) and value.is_floating_point():
            self.leaves[n] = value.detach().requires_grad_()
            return self.leaves[n].clone()  # which may be changed in place
        return value

    def ask(self, core: Core) -> Attention:
        sides = ((core.query,), (core.key, *core.key_axes), (core.value,))
        nodes, (query, key, value) = zip(*(self._feeding(*side) for side in sides), strict=True)
        is_self = self._is_same(nodes[0], nodes[1])
        module = module_of(core.result)
        return Attention(module, is_self, query, key, value, self._reading(core))

    def _is_same(self, query: fx.Node, key: fx.Node) -> bool:
        """There is a tensor that the key is made of, and of the inputs' tensors only it the query.

        Both are what the linears read. A decoder's queries also come from its own tokens.
        """
        common = _above(query) & _above(key) & self.fed
        meeting = {node for node in common if _is_float(self.env[node])}
        if not meeting:
            return False
        last = max(meeting, key=self.order.__getitem__)
        return not _above(query, without=last) & set(self.placeholders)

    def _feeding(
        self, node: fx.Node, tokens: int = -2, features_axis: int = -1
    ) -> tuple[fx.Node, Heads | None]:
        """The linear whose output is a head's operand, and what it reads."""
        operand: Tensor = self.env[node]
        if not operand.requires_grad:
            return node, None
        codes = _codes(operand.shape[features_axis], operand)
        features: list[tuple[int, ...]] = []
        feeding: fx.Node | None = None
        before = [n for n in self.linears if self.order[n] <= self.order[node]]
        candidates = [n for n in before if n in self.leaves]
        for head in _heads_in(operand):
            first = head.select(tokens, 0)
            if not candidates:
                return node, None
            grads = _grads((first * codes).sum(), [self.leaves[n] for n in candidates])
            fed = {n: _row(g) for n, g in zip(candidates, grads, strict=True) if g is not None}
            if not fed:
                return node, None
            feeding = feeding or max(fed, key=lambda n: int(fed[n].count_nonzero()))
            if feeding not in fed:
                return node, None
            features.append(_in_order(fed[feeding], codes))
        assert feeding is not None
        heads = Heads(self.linears[feeding], tuple(dict.fromkeys(features)))
        return self.inputs[feeding], heads

    def _reading(self, core: Core) -> Heads | None:
        """The linear whose input is the attention's result."""
        result = self.leaves[core.result]
        for node, linear in self.linears.items():
            if self.order[node] < self.order[core.result]:
                continue
            operand = self.env[self.inputs[node]]
            if not (isinstance(operand, Tensor) and operand.requires_grad):
                continue
            flat = operand.reshape(-1, operand.shape[-1])[0]
            numbers = torch.arange(len(flat), device=flat.device)
            # In two digits, which every dtype holds exactly.
            codes = [(digit + 1).to(flat.dtype) for digit in (numbers // BASE, numbers % BASE)]
            high, low = (_grads((flat * code).sum(), [result])[0] for code in codes)
            if high is None or low is None or not high.count_nonzero():
                continue
            features = _places(high) * BASE + _places(low)
            unchanged = features.numel() <= len(flat) and torch.equal(
                features.flatten().sort().values, features.flatten().unique()
            )
            if not unchanged or not _is_whole(high, low):  # a gate in between: side by side
                features = numbers[: features.numel()].view_as(features)
            return Heads(linear, tuple(tuple(row) for row in features.tolist()))
        return None


def _heads_in(operand: Tensor) -> tuple[Tensor, ...]:
    """The heads of one sample of ``[.., heads, tokens, features]``; of ``[batch * heads, ..]``,
    those of all samples, which read the same features.
    """
    while operand.dim() > 3:
        operand = operand[0]
    return operand.unbind(0)


BASE = 128


def _places(grad: Tensor) -> Tensor:
    """Digits by head and feature: one token of an attention's result has a gradient."""
    heads = grad.sum(-2).reshape(-1, grad.shape[-1])
    return heads[heads.any(-1)].round().long() - 1


def _is_whole(*grads: Tensor) -> bool:
    return all(torch.equal(grad, grad.round()) for grad in grads)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _above(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """The node and all that it is computed from, some other ways than through ``without``."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        n = pending.pop()
        if n is not without and n not in found:
            found.add(n)
            pending += n.all_input_nodes
    return found


def _codes(n: int, like: Tensor) -> Tensor:
    """``n`` numbers that differ, 1, 2, 3 ..."""
    return torch.arange(1, n + 1, dtype=like.dtype, device=like.device)


def _grads(y: Tensor, xs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(y, xs, retain_graph=True, allow_unused=True)


def _row(grad: Tensor) -> Tensor:
    """Gradients by feature."""
    return grad.reshape(-1, grad.shape[-1]).abs().sum(0)


def _in_order(grad: Tensor, codes: Tensor) -> tuple[int, ...]:
    """The features that a head reads, in its order if each is read once and unchanged."""
    features = grad.nonzero().flatten()
    read = grad[features]
    is_exact = len(codes.unique()) == len(codes)
    if is_exact and len(read) == len(codes) and torch.equal(read.sort().values, codes):
        features = features[read.argsort()]
    return tuple(features.tolist())
