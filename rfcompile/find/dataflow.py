"""Tells which tensor of a graph is computed from which, nested graphs included."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from rfcompile.wire.foreign import registered


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# ---- operators, by one name for all their spellings --------------------------------------------

_SAME = {
    **dict.fromkeys(("subtract", "isub"), "sub"),
    **dict.fromkeys(("multiply", "imul", "rmul"), "mul"),
    **dict.fromkeys(("divide", "truediv", "itruediv", "true_divide"), "div"),
    **dict.fromkeys(("iadd", "radd"), "add"),
    **dict.fromkeys(("imatmul", "rmatmul"), "matmul"),
}
_CONTRACTING = words(
    "linear matmul mm bmm addmm baddbmm addbmm addmv mv dot vdot inner einsum tensordot bilinear "
    "cdist conv conv1d conv2d conv3d convolution deform attention attn lstm gru rnn fft gemm"
)
_POOLING = ("avg_pool", "max_pool", "lp_pool")
_SIZES = words("size sym_size shape dim numel sym_numel stride device dtype")
_POSITIONS = words("argmax argmin argsort multinomial nonzero searchsorted bucketize")
_RANDOM = words("bernoulli uniform normal inductor_random philox_rand")
_TORCH = words(
    "aten prims prim _c10d_functional c10d_functional c10d _dtensor inductor rfcompile profiler "
    "higher_order quantized_decomposed"
)


def operator_name(node: fx.Node) -> str:
    """One name for all spellings, so ``+``, ``+=``, ``torch.add``, ``Tensor.add_`` and
    ``aten.add_.Tensor`` are "add". The class of a module that is called; "" for what is not called.
    """
    target = node.target
    if node.op == "call_module":
        return type(_owned(node)).__name__
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
    elif node.op == "call_method":
        name = str(target)
    elif node.op == "call_function":
        name = getattr(target, "__name__", type(target).__name__)
        if name == "getattr":  # Tensor.real, Tensor.mT, Tensor.shape
            name = str(node.args[1])
    else:
        return ""
    name = name.strip("_") if name.startswith("__") else name.rstrip("_")
    return _SAME.get(name, name)


def is_contraction(node: fx.Node) -> bool:
    """It sums products over an axis, or mixes positions: matrices, convolutions, attention,
    recurrent layers, Fourier transforms, pooling; and any kernel that torch does not know.
    """
    if node.op == "call_module":
        module = _owned(node)
        return not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and (
            any(parameter.dim() >= 2 for parameter in module.parameters())
            or "Pool" in type(module).__name__
        )
    name = operator_name(node)
    return is_custom(node) or not _CONTRACTING.isdisjoint(name.split("_")) or is_pooling(node)


def is_custom(node: fx.Node) -> bool:
    """It calls a kernel that torch does not know, and that is no registered collective."""
    target = node.target
    is_foreign = isinstance(target, torch._ops.OpOverload) and target.namespace not in _TORCH
    return is_foreign and registered(target) is None


def is_pooling(node: fx.Node) -> bool:
    name = operator_name(node)
    is_named = any(kind in name for kind in _POOLING)
    return is_named or (node.op == "call_module" and "Pool" in name)


def _owned(node: fx.Node) -> Any:
    module: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        module = getattr(module, name, None)
    return module


# ---- values ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Value:
    """A tensor (or tuple of tensors) of the graph.

    Args:
        index: its place in ``Dataflow.values``; what it is computed from comes before it.
        node: that computes it; path: of the nested graph that the node is in, "" for the graph.
        operator: see :func:`operator_name`.
        operands: the values that the nodes in its arguments stood for when it was computed.
        ancestors: bit ``i`` is set where it is computed from value ``i``.
        contracted: as ``ancestors``, where a contraction lies after ``i`` on some way to here,
            which may be this value itself.
        is_random: random numbers and nothing else.
        is_mixed: some ancestor, or itself, is a contraction.
    """

    index: int
    node: fx.Node
    path: str
    operator: str
    operands: Mapping[fx.Node, Value]
    is_contraction: bool
    ancestors: int = 0
    contracted: int = 0
    is_random: bool = False
    is_mixed: bool = False
    users: list[Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        for operand in self.operands.values():
            self.ancestors |= operand.ancestors | 1 << operand.index
            self.contracted |= operand.contracted
            self.is_mixed |= operand.is_mixed
            operand.users.append(self)
        if self.is_contraction:
            self.contracted, self.is_mixed = self.ancestors, True
        inputs = self.operands.values()
        self.is_random = (
            self.operator.startswith("rand")
            or self.operator in _RANDOM
            or (bool(inputs) and all(operand.is_random for operand in inputs))
        )

    @property
    def name(self) -> str:
        return f"{self.path}{self.node.name}"

    @property
    def meta(self) -> Any:
        """Its fake tensor, or a tuple of them; None where the graph has no shapes."""
        return self.node.meta.get("val", self.node.meta.get("example_value"))

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument of the call, tensors as values; ``names`` are its keywords."""
        args = self.node.args
        given = [self.node.kwargs[name] for name in names if name in self.node.kwargs]
        found = args[position] if position < len(args) else (*given, default)[0]
        return self.operands.get(found, found) if isinstance(found, fx.Node) else found

    def comes_from(self, other: Value) -> bool:
        return self is other or bool(self.ancestors >> other.index & 1)

    def contracts(self, other: Value) -> bool:
        """It is computed from ``other`` by way of a contraction."""
        return bool(self.contracted >> other.index & 1)


class Dataflow:
    """The values of a graph in the order in which they are computed.

    Numbers, shapes, positions (``argmax``) and other non-tensors carry no data here. An operator
    that changes a tensor in place gives that tensor's node a new value from then on. Graphs in
    graphs (checkpointed blocks, autocast regions, ``cond``) are read as if they stood where they
    are called. What is computed twice from the same values by the same operator is one value to
    those that read it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.values: list[Value] = []
        self._first: dict[Any, Value] = {}
        self._read(gm, "", {})

    def _read(
        self, gm: fx.GraphModule, path: str, bound: dict[fx.Node, Value]
    ) -> tuple[Value | None, ...]:
        """Append the values of a graph; ``bound`` are those of its placeholders."""
        scope = dict(bound)
        tensors = {node: node for node in bound}  # the node that made the tensor a node stands for
        returned: dict[fx.Node, tuple[Value | None, ...]] = {}
        for node in gm.graph.nodes:
            if node.op == "output":
                leaves = tree_leaves(node.args[0])
                return tuple(scope.get(x) if isinstance(x, fx.Node) else None for x in leaves)
            if node in bound or not _may_be_tensor(node):
                continue
            source = node.args[0] if node.args else None
            tensors[node] = node
            if operator_name(node) == "getitem" and source in returned:
                value = returned[source][node.args[1]]
                if value is not None:
                    scope[node] = value
                continue
            value = self._append(node, path, scope)
            results = [
                self._read(body, f"{path}{body_path}.", _bind(body, operands, scope))
                for body_path, body, operands in bodies(node)
            ]
            if len(results) == 1 and _returns_several(node):
                returned[node] = results[0]
            if results:
                value = self._joined(value, itertools.chain(*results))
            if changes_its_input(node) and source in scope:
                tensors[node] = tensor = tensors[source]
                scope.update((name, value) for name in scope if tensors[name] is tensor)
            elif not results:
                value = self._first.setdefault(_computation(value), value)
            scope[node] = value
        return ()

    def _append(self, node: fx.Node, path: str, scope: Mapping[fx.Node, Value]) -> Value:
        name = operator_name(node)
        is_shaped_like = name.endswith("_like") or name.startswith("new_") or name in _SIZES
        reads = not (is_shaped_like or name in _POSITIONS)
        operands = {n: scope[n] for n in node.all_input_nodes if n in scope} if reads else {}
        value = Value(len(self.values), node, path, name, operands, is_contraction(node))
        self.values.append(value)
        return value

    def _joined(self, call: Value, outputs: Iterable[Value | None]) -> Value:
        """All that the call of a graph returns: it also comes from what the graph returns."""
        operands = {**call.operands, **{out.node: out for out in outputs if out is not None}}
        joined = Value(len(self.values), call.node, call.path, call.operator, operands, False)
        self.values.append(joined)
        return joined


def _computation(value: Value) -> Any:
    """What tells a value from others: equal for two nodes that compute the same thing."""
    node = value.node
    is_unique = value.is_random or "dropout" in value.operator.lower() or not value.operands
    if is_unique or node.op not in ("call_function", "call_method"):
        return value

    def text(argument: Any) -> str:
        known = value.operands.get(argument) if isinstance(argument, fx.Node) else None
        return f"{argument!r}" if known is None else f"%{known.index}"

    leaves, structure = tree_flatten((node.args, node.kwargs))
    return (node.op, node.target, str(structure), *map(text, leaves))


def _may_be_tensor(node: fx.Node) -> bool:
    meta = node.meta.get("val", node.meta.get("example_value"))
    if meta is None:
        return not (node.op == "get_attr" and isinstance(_owned(node), nn.Module))
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(meta))


def changes_its_input(node: fx.Node) -> bool:
    """It changes its first argument in place."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable and target._schema.name.endswith("_")
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).startswith("__")
    name = getattr(target, "__name__", "")
    return name == "setitem" or (name in _SAME and name.startswith("i"))


def bodies(node: fx.Node) -> Iterator[tuple[str, fx.GraphModule, list[Any]]]:
    """The graphs that a node calls, each with its path and the arguments it is called with."""
    if node.op == "call_module" and isinstance(_owned(node), fx.GraphModule):
        yield str(node.target), _owned(node), list(node.args)
        return
    if not isinstance(node.target, torch._ops.HigherOrderOperator) or is_contraction(node):
        return  # the graphs that flex attention takes change single scores
    arguments = tree_leaves(node.args)
    attributes = [a for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"]
    graphs = [(a, _owned(a)) for a in attributes if isinstance(_owned(a), fx.GraphModule)]
    if "autograd_function" in operator_name(node):
        graphs = graphs[:1]  # the second is its backward
    for attribute, body in graphs:
        size = len(body.graph.find_nodes(op="placeholder"))
        if size <= len(arguments):
            yield str(attribute.target), body, arguments[len(arguments) - size :]


def _returns_several(node: fx.Node) -> bool:
    ((_, body, _),) = bodies(node)
    return isinstance(body.graph.output_node().args[0], (tuple, list))


def _bind(
    body: fx.GraphModule, arguments: Iterable[Any], scope: Mapping[fx.Node, Value]
) -> dict[fx.Node, Value]:
    placeholders = body.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, arguments, strict=False)
    return {p: scope[a] for p, a in pairs if isinstance(a, fx.Node) and a in scope}
