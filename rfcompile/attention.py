"""What each linear of a model does: query, key, value or output of which head, or something else.

Names and layouts say nothing reliable (fused, interleaved, grouped heads), so the model is asked:
its graph runs once on the example inputs, every linear's output is cut from what made it, and the
gradients of the attention's operands say which feature of which linear feeds which head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rfcompile.capture import Inputs, copied, exported, in_mode
from rfcompile.graph import module_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """A multiplication by a parameter: ``y = x W^T + b``, or ``x W + b`` where ``is_transposed``.

    ``weight`` and ``bias`` are names of parameters; ``module`` is the path of the module that
    multiplies. A stack of linears (mixture of experts) has a weight of three dimensions.
    """

    weight: str
    bias: str | None
    module: str
    is_transposed: bool


@dataclass(frozen=True)
class Heads:
    """Which features of a linear are which head's: ``features[h]`` in the order of the head."""

    linear: Linear
    features: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Attention:
    """One attention: where it is, and the heads of its linears, None where no linear feeds it.

    ``output`` has the features of the output linear's input, by query head.
    """

    module: str
    query: Heads | None
    key: Heads | None
    value: Heads | None
    output: Heads | None


@dataclass(frozen=True)
class Anatomy:
    """The linears of a model in order of use, and its attentions."""

    linears: tuple[Linear, ...]
    attentions: tuple[Attention, ...]


def anatomy(model: nn.Module, inputs: Inputs) -> Anatomy:
    """Ask a model on example inputs; its parameters, modes and gradients stay as they are.

    Raises:
        CaptureError: it cannot be captured.
    """
    with torch.enable_grad(), in_mode(model, training=False):
        module = exported(model, inputs).module()
        run = _CutRun(module)
        run.run(*pytree.tree_leaves(copied(inputs)), enable_io_processing=False)
        attentions = [run.ask(core) for core in cores_of(module.graph)]
    return Anatomy(tuple(run.linears.values()), tuple(attentions))


# ---- linears -----------------------------------------------------------------------------------

_INPUT_AND_WEIGHT = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
}


_TRANSPOSE = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.numpy_T.default,
    aten.mT.default,
}
_COPY = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.contiguous.default}


def _parameter(node: object, names: set[str]) -> tuple[str, int] | None:
    """The parameter that a node is a view or cast of, and how often it was transposed."""
    turns = 0
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return (str(node.target), turns) if node.target in names else None
        if node.target in _TRANSPOSE:
            turns += 1
        elif node.target not in _COPY:
            return None
        node = node.args[0]
    return None


def _linear(node: fx.Node, names: set[str]) -> Linear | None:
    if node.target not in _INPUT_AND_WEIGHT:
        return None
    weight = _parameter(node.args[_INPUT_AND_WEIGHT[node.target][1]], names)
    if weight is None:
        return None
    name, turns = weight
    bias = None
    if node.target is aten.linear.default and len(node.args) > 2:
        bias = _parameter(node.args[2], names)
    elif node.target is aten.addmm.default:
        bias = _parameter(node.args[0], names)
    is_transposed = (turns % 2 == 0) != (node.target is aten.linear.default)
    return Linear(name, bias[0] if bias else None, module_of(node), is_transposed)


# ---- attentions --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """The nodes of an attention: operands with the axes (head, token, feature), and the result.

    ``weights`` is where probabilities are made: the fused attention or the softmax.
    """

    weights: fx.Node
    query: tuple[fx.Node, tuple[int, int, int]]
    key: tuple[fx.Node, tuple[int, int, int]]
    value: tuple[fx.Node, tuple[int, int, int]]
    result: fx.Node


_STANDARD = (-3, -2, -1)
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_PRODUCT = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default}


def cores_of(graph: fx.Graph) -> Iterator[Core]:
    """The attentions of an exported graph, fused or written out, in order."""
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v = _nodes(node.args[:3])
            yield Core(node, (q, _STANDARD), (k, _STANDARD), (v, _STANDARD), node)
        elif node.target in _SOFTMAX:
            scores = _nearest_product(node, lambda n: n.all_input_nodes)
            result = _nearest_product(node, lambda n: n.users)
            if scores is not None and result is not None:
                q, k = _nodes(scores.args[-2:])
                (v,) = _nodes(result.args[-1:])
                yield Core(node, (q, _STANDARD), (k, (-3, -1, -2)), (v, _STANDARD), result)


def _nodes(arguments: Sequence[object]) -> list[fx.Node]:
    return [argument for argument in arguments if isinstance(argument, fx.Node)]


def _nearest_product(
    start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> fx.Node | None:
    """The product of two tensors that is reached in the fewest steps."""
    reached = [start]
    for node in itertools.islice(reached, REACH):  # grows while it runs
        if node is not start and node.target in _PRODUCT:
            return node
        reached += [n for n in neighbours(node) if n not in reached]
    return None


REACH = 64
"""How many nodes (masks, casts, dropout) may lie around a softmax before its products."""


# ---- the question ------------------------------------------------------------------------------


class _CutRun(fx.Interpreter):
    """Runs a graph and keeps every value; outputs of linears and attentions start a new history."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        names = {name for name, _ in module.named_parameters()}
        self.linears = {n: found for n in module.graph.nodes if (found := _linear(n, names))}
        self.cuts = {*self.linears, *(core.result for core in cores_of(module.graph))}
        self.leaves: dict[fx.Node, Tensor] = {}
        self.placeholders = module.graph.find_nodes(op="placeholder")

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.cuts and isinstance(value, Tensor) and value.is_floating_point():
            self.leaves[n] = value.detach().requires_grad_()
            return self.leaves[n].clone()  # which may be changed in place
        return value

    def ask(self, core: Core) -> Attention:
        module = module_of(core.result)
        query, key, value = (self._feeding(*side) for side in (core.query, core.key, core.value))
        return Attention(module, query, key, value, self._reading(core))

    def _feeding(self, node: fx.Node, axes: tuple[int, int, int]) -> Heads | None:
        """The linear whose output is a head's operand."""
        operand: Tensor = self.env[node]
        if not operand.requires_grad:
            return None
        codes = _codes(operand.shape[axes[2]], operand)
        features: list[tuple[int, ...]] = []
        feeding: fx.Node | None = None
        candidates = [n for n in self.linears if n in self.leaves]
        for head in _of_the_first_sample(operand, axes[0], self):
            first = head.select(axes[1] if axes[1] < 0 else axes[1] - 1, 0)  # the first token
            if not candidates:
                return None
            grads = _grads((first * codes).sum(), [self.leaves[n] for n in candidates])
            fed = {n: _row(g) for n, g in zip(candidates, grads, strict=True) if g is not None}
            if not fed:
                return None
            feeding = feeding or max(fed, key=lambda n: int(fed[n].count_nonzero()))
            if feeding not in fed:
                return None
            features.append(_in_order(fed[feeding], codes))
        assert feeding is not None
        return Heads(self.linears[feeding], tuple(dict.fromkeys(features)))

    def _reading(self, core: Core) -> Heads | None:
        """The linear whose input is the attention's result."""
        result = self.leaves[core.result]
        for node, linear in self.linears.items():
            x = node.args[_INPUT_AND_WEIGHT[node.target][0]]
            operand = self.env[x]
            if not (isinstance(operand, Tensor) and operand.requires_grad):
                continue
            flat = operand.reshape(-1, operand.shape[-1])[0]
            codes = _codes(len(flat), flat)
            (grad,) = _grads((flat * codes).sum(), [result])
            if grad is None or not grad.count_nonzero():
                continue
            heads = grad.sum(-2).reshape(-1, grad.shape[-1])  # one token of it has a gradient
            heads = heads[heads.any(-1)]
            if not torch.equal(heads, heads.round()):  # a gate in between: heads lie side by side
                heads = codes[: heads.numel()].view_as(heads)
            return Heads(linear, tuple(tuple(row) for row in (heads.long() - 1).tolist()))
        return None


def _of_the_first_sample(operand: Tensor, head_axis: int, run: _CutRun) -> Iterable[Tensor]:
    """The heads of the first sample: ``[batch, heads, ..]``, or ``[batch * heads, ..]``."""
    if operand.dim() == 4:
        return operand[0].unbind(0)
    inputs = (run.env[node] for node in run.placeholders)
    batch = next(x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim())
    return operand[: max(1, operand.shape[0] // batch)].unbind(0)


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
    if len(read) == len(codes) and torch.equal(read.sort().values, codes):
        features = features[read.argsort()]
    return tuple(features.tolist())
