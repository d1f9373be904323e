"""Which tensors of a graph are statistics: analysis only, for the passes that decide what travels.

A quantized activation is off by a little in each of thousands of features, and what reads it next
is a contraction, which averages that. A statistic stands for a whole row (or for all rows of a
feature): the sum under a softmax, a maximum, a norm's mean square, a picked logit, a count. Nothing
averages its error, and what is computed from it (a loss, a norm, who routes where) is wrong for the
whole row. It is also small: one value where traffic has a row. So a statistic stays exact unless a
pattern of ``sites`` names its module.

The rule. Values are followed through the graph; what a value is, its last contraction or reduction
says. (A contraction: matrices, convolutions, attention, pooling; see ``dataflow.py``.)

1. Traffic: what a contraction or an embedding gives, and what comes from outside the graph.
2. A reduction over the features gives a statistic: sum, mean, amax, logsumexp, var, norm, any,
   top-k, and ``gather`` or ``index`` that pick single values of a row. So does one over everything,
   and in a forward graph one over all but the features (how often experts are chosen, the moments
   of a batch norm) or, of probabilities, over anything. Other sums keep the features and stay
   traffic: over the experts of a token, over a sequence. The features are the last axis; after a
   convolution the axis 1; a permutation moves them. A sum over a product of factors that are both
   broadcast is a contraction that is written out. ``cumsum`` is no reduction.
3. A max or min all-reduce gives a statistic, and so do the further results of attention (its
   logsumexp) and norms (mean and rstd).
4. A count is what comes from booleans, integers and positions only; it is exact as well. (Integers
   that a cast made of floats are what the floats were.)
5. Elementwise operations, casts, views, collectives and selections of rows pass on what they read.
   Of operands of different origin those that fill the result decide: a statistic before traffic,
   traffic before a count, so masks and weights of rows change nothing. A statistic or count that is
   broadcast, or spread by ``scatter``, does not decide where a full-size operand is traffic:
   ``x * rsqrt(mean(x**2))`` is traffic. A tensor that holds both side by side (``cat``, a slice
   that is written into a buffer) is exact in a forward graph: quantizing it would change the
   statistic.
6. From outside (graph inputs, kernels that torch does not know): integers are counts, and a tensor
   with one value a row (``[..., 1]``) is a statistic, but for parameters. What the forward graph
   saved for the backward graph is what it was there.
7. Gradients. A reduction over rows (axis 0) gives a weight's gradient, which is traffic. One over
   the features gives the gradient of a statistic. And as data flows the other way, what a forward
   pass reduced a backward pass spreads: a collective of a backward graph sends a statistic's
   gradient too if its result is broadcast over the features or over all rows, and no contraction
   reads it before. What is recomputed from the forward pass follows the forward rule.
8. A single element is a statistic whatever made it: a loss, a squared norm of all gradients.

All of this depends on the graph alone, so ranks that run the same program decide alike.

Limits. A graph break right before a collective hides what made its input: shapes other than
``[..., 1]`` and a single element then count as traffic. One column of a matrix product
(``logits[:, 0]``) is traffic as the whole is, and so are gathered logits. A pooling that is written
as a mean over the last axis of a tensor from outside is taken for a statistic, and so is a bias
gradient in a forward graph (compiled autograd): exact, which is safe. The bodies of loops are read
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from rfcompile.graph import target_text
from rfcompile.passes.axes import (
    arguments_of,
    broadcast_axes,
    has_one_element,
    is_one,
    is_spread,
    moved_axis,
    picks_single_values,
    puts_single_values,
    reduced_axes,
    shape_of,
    shared_axes,
    value_of,
)
from rfcompile.passes.dataflow import bodies, is_contraction, is_custom, operator_name, words
from rfcompile.passes.find_collectives import is_recomputed


class Kind(IntEnum):
    """What a value is; of the operands of an operation the highest decides."""

    CONSTANT = 0
    COUNT = 1
    SPREAD = 2
    """A statistic at the size of traffic: broadcast, or the maximum over ranks."""
    TRAFFIC = 3
    STATISTIC = 4


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Args:
        kind: see above; why: of what it was made, unless it is traffic.
        features: the axis of the features, from the end.
        paired: axes over which a sum would be a contraction, from the end.
        is_probability: it comes from a softmax, an exp or a sigmoid.
        is_assumed: only its shape says that it is a statistic; broadcast it may be a scale.
    """

    kind: Kind
    why: str = ""
    features: int = -1
    paired: frozenset[int] = frozenset()
    is_probability: bool = False
    is_assumed: bool = False


_Result = Origin | tuple[Origin, ...]
_CONSTANT = Origin(Kind.CONSTANT)
_TRAFFIC = Origin(Kind.TRAFFIC)

_REDUCING = words(
    "sum nansum mean nanmean prod amax amin aminmax max min var std var_mean std_mean logsumexp "
    "norm linalg_vector_norm vector_norm any all count_nonzero median nanmedian mode kthvalue topk"
)
_ADDING = words("sum nansum mean nanmean")
_VALUE_AND_POSITION = words("max min median nanmedian mode kthvalue topk sort cummax cummin")
_VALUE_AND_MASK = words("native_dropout")
_COUNTING = words(
    "argmax argmin argsort nonzero searchsorted bucketize histc bincount one_hot arange iota "
    "randint randperm"
)
_CONSTANTS = words(
    "full full_like zeros zeros_like ones ones_like empty empty_like empty_strided empty_permuted "
    "new_full new_zeros new_ones new_empty new_empty_strided scalar_tensor eye linspace"
)
_LOSSES = words("nll_loss_forward nll_loss2d_forward")
_PROBABILITIES = words("exp exp2 sigmoid softmax _softmax _safe_softmax")
_REPEATING = words("expand expand_as broadcast_to broadcast_in_dim repeat tile repeat_interleave")
_SPREADING = words("nll_loss_backward nll_loss2d_backward")
_SELECTING = words("gather take_along_dim index _unsafe_index index_select take")
_SIDE_BY_SIDE = words("cat concat stack slice_scatter select_scatter")
_KEEPS_EXACT = (Kind.COUNT, Kind.SPREAD, Kind.STATISTIC)


class Statistics:
    """What the values of a graph are, graphs inside it included; see the module.

    Args:
        gm: an aten graph.
        direction: "forward" or "backward".
        parameters: names of the placeholders that are parameters.
        saved: of placeholders that another graph returned, by name; see :meth:`returned`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        direction: str,
        parameters: frozenset[str] = frozenset(),
        saved: Mapping[str, Origin] | None = None,
    ) -> None:
        self._gm, self._direction = gm, direction
        self._parameters, self._saved = parameters, saved or {}
        self._results: dict[fx.Node, _Result] = {}
        self._uses: dict[fx.Node, _Use] = {}
        self._read(gm, {})
        if direction == "backward":
            self._look_ahead(gm, _Use())

    def why_exact(self, tensor: object, node: fx.Node) -> str:
        """Why ``tensor`` must travel exactly in the collective or transfer ``node``, or "".

        The text starts with "a statistic".
        """
        origin, is_forward = self._origin(tensor), self._is_forward(node)
        if origin.kind in _KEEPS_EXACT and (origin.kind is not Kind.SPREAD or is_forward):
            return f"a statistic: {origin.why}"
        # Not of an all_to_all: each rank has a size of its own, and all must decide alike.
        is_one_element = value_of(tensor) is not None and has_one_element(shape_of(tensor))
        if is_one_element and "all_to_all" not in operator_name(node):
            return "a statistic: a single element"
        use = self._uses.get(node, _Use())
        if not is_forward and use.spreads and not use.is_contracted:
            return f"a statistic: the gradient of one, {use.spreads} spreads it again"
        return ""

    def returned(self) -> dict[str, Origin]:
        """Of what the graph returns, by name of the node: ``saved`` of its backward graph."""
        outputs = tree_leaves(self._gm.graph.output_node().args)
        return {x.name: self._origin(x) for x in outputs if isinstance(x, fx.Node)}

    def _is_forward(self, node: fx.Node) -> bool:
        return self._direction == "forward" or is_recomputed(node)

    def _origin(self, value: object) -> Origin:
        result = self._results.get(value, _CONSTANT) if isinstance(value, fx.Node) else _CONSTANT
        return max(result, key=_kind, default=_CONSTANT) if isinstance(result, tuple) else result

    # ---- what a value was made of ----------------------------------------------------------------

    def _read(self, gm: fx.GraphModule, bound: Mapping[fx.Node, Origin]) -> tuple[Origin, ...]:
        """Note the results of a graph's nodes and return what it returns."""
        for node in gm.graph.nodes:
            if node.op == "output":
                return tuple(map(self._origin, tree_leaves(node.args[0])))
            result = bound[node] if node in bound else self._result(node)
            # Of a graph that is called more than once all calls send what one of them must.
            self._results[node] = _either(self._results.get(node, result), result)
        return ()

    def _result(self, node: fx.Node) -> _Result:
        if node.op == "placeholder":
            if node.name in self._saved:
                return self._saved[node.name]
            return _from_outside(value_of(node), "a graph input", node.name in self._parameters)
        if node.op == "get_attr":
            is_constant = has_one_element(shape_of(node))
            return _CONSTANT if is_constant else _from_outside(value_of(node), "a constant", True)
        if not _is_tensor(node):
            return _CONSTANT
        name = operator_name(node)
        if name == "getitem":
            return self._item(node.args[0], node.args[1])
        called = list(bodies(node))
        if called:
            return self._call(called)
        if isinstance(node.target, torch._ops.HigherOrderOperator) or is_contraction(node):
            return _of_a_kernel(node, name)
        return self._of_an_operator(node, name)

    def _item(self, source: object, number: Any) -> Origin:
        result = self._results.get(source) if isinstance(source, fx.Node) else None
        if isinstance(result, tuple) and isinstance(number, int) and number < len(result):
            return result[number]
        return self._origin(source)

    def _call(self, called: list[tuple[str, fx.GraphModule, list[Any]]]) -> _Result:
        result: _Result | None = None
        for _, body, arguments in called:
            inputs = body.graph.find_nodes(op="placeholder")
            bound = {p: self._origin(a) for p, a in zip(inputs, arguments, strict=False)}
            returned = self._read(body, bound)
            result = returned if result is None else _either(result, returned)
        assert result is not None
        return result

    def _of_an_operator(self, node: fx.Node, name: str) -> _Result:
        operands = [x for x in node.all_input_nodes if x in self._results and _is_tensor(x)]
        first = self._origin(operands[0]) if operands else _CONSTANT
        count = Origin(Kind.COUNT, f"a count made by {_text(node)}")
        if name in _CONSTANTS:
            return _CONSTANT
        if name in _COUNTING or _is_boolean(node):
            return count
        if name.startswith(("embedding", "_embedding", "rand")):
            return _TRAFFIC
        if not operands:
            return _from_outside(value_of(node), f"made by {_text(node)}", False)
        if name in _LOSSES:
            return _statistic(f"made by {_text(node)}")
        if name in _REDUCING and len(operands) == 1:
            reduced = self._reduced(node, name, first)
            several = isinstance(value_of(node), (tuple, list))
            return (reduced, count) if several and name in _VALUE_AND_POSITION else reduced
        if name in _VALUE_AND_POSITION | _VALUE_AND_MASK and len(operands) == 1:
            return first, count
        if "norm" in name and isinstance(value_of(node), (tuple, list)):
            moments = _statistic(f"made by {_text(node)}")
            return _TRAFFIC if "backward" in name else (first, *(moments,) * 4)
        if name == "all_reduce" and arguments_of(node).get("reduce_op") not in ("sum", "avg"):
            op = arguments_of(node).get("reduce_op")
            made = Origin(Kind.SPREAD, f"made by a {op} all_reduce")
            return made if first.kind is Kind.TRAFFIC else first
        if name.endswith("_coalesced") or name == "batch_p2p_ops":
            return tuple(map(self._origin, operands))
        if picks_single_values(node) and first.kind is Kind.TRAFFIC:
            return _statistic(f"made by {_text(node)} over features")
        if name in _SELECTING or (len(operands) == 1 and name not in _REPEATING):
            return _passed_on(node, name, first)
        return self._combined(node, name, operands)

    def _reduced(self, node: fx.Node, name: str, x: Origin) -> Origin:
        if x.kind in (Kind.CONSTANT, Kind.COUNT):
            return x
        rank, axes = len(shape_of(node.args[0])), reduced_axes(node)
        kept = frozenset(range(-rank, 0)) - axes
        is_forward = self._is_forward(node)
        if name in _ADDING and axes <= x.paired:
            return _TRAFFIC
        over = ""
        if not kept:
            over = "all elements"
        elif x.features in axes:
            over = "features" if is_forward or -rank not in axes else ""
        elif is_forward and (kept == {x.features} or x.is_probability):
            over = "rows"
        if over:
            return _statistic(f"made by {_text(node)} over {over}")
        is_kept = len(shape_of(node)) == rank
        shift = 0 if is_kept else sum(axis > x.features for axis in axes)
        return replace(x, features=min(x.features + shift, -1), paired=frozenset())

    def _combined(self, node: fx.Node, name: str, operands: list[fx.Node]) -> Origin:
        """Of an operation that reads several tensors, or repeats one."""
        parts = [(x, self._origin(x), _is_smaller(node, name, x)) for x in operands]
        kinds = {origin.kind for _, origin, _ in parts}
        if name in _SIDE_BY_SIDE and Kind.TRAFFIC in kinds and not kinds.isdisjoint(_KEEPS_EXACT):
            if not self._is_forward(node):
                return _TRAFFIC
            exact = next(origin for _, origin, _ in parts if origin.kind in _KEEPS_EXACT)
            return _statistic(f"beside other values in one tensor: {exact.why}")
        seen = [(_repeated(o) if smaller else o, smaller) for _, o, smaller in parts]
        result, _ = max(seen, key=lambda part: (part[0].kind, not part[1]))
        if result.kind is not Kind.TRAFFIC:
            return replace(result, features=-1)
        factors = [(shape_of(x), smaller) for x, o, smaller in parts if o.kind is Kind.TRAFFIC]
        if len(factors) > 1 and all(smaller for *_, smaller in parts):
            return replace(result, paired=shared_axes([shape for shape, _ in factors]))
        return replace(result, is_probability=len(factors) == 1 and result.is_probability)

    # ---- what becomes of it ----------------------------------------------------------------------

    def _look_ahead(self, gm: fx.GraphModule, returned: _Use) -> None:
        """Note how each value of a graph is used; ``returned``: what it returns, outside of it."""
        for node in reversed(gm.graph.nodes):
            use = _Use()
            for user in node.users:
                use |= returned if user.op == "output" else self._use(node, user)
            self._uses[node] = self._uses.get(node, _Use()) | use
            for _, body, _ in bodies(node):
                self._look_ahead(body, use)

    def _use(self, node: fx.Node, user: fx.Node) -> _Use:
        name = operator_name(user)
        called = list(bodies(user))
        if called:
            use = _Use()
            for _, body, arguments in called:
                inputs = body.graph.find_nodes(op="placeholder")
                for p, argument in zip(inputs, arguments, strict=False):
                    use |= self._uses[p] if argument is node else _Use()
            return use
        if is_contraction(user) or name.startswith("embedding"):
            return _Use(is_contracted=True)
        operands = [x for x in user.all_input_nodes if _is_tensor(x)]
        is_reduced = name in _REDUCING and len(operands) == 1
        if is_reduced or name in _CONSTANTS | _COUNTING or _is_boolean(user):
            return _Use()
        if name in _SPREADING or puts_single_values(user, node):
            return _Use(_text(user))
        is_elementwise = len(operands) > 1 or name in _REPEATING
        is_elementwise &= name not in _SELECTING | _SIDE_BY_SIDE and not _puts(user)
        if is_elementwise and is_spread(shape_of(node), shape_of(user)):
            return _Use(_text(user))
        return self._uses[user]


@dataclass(frozen=True)
class _Use:
    """What the next operations do with a value, until one of them decides.

    Args:
        spreads: the operation that repeats it over the features or over all rows; "" if none does.
        is_contracted: a contraction reads it.
    """

    spreads: str = ""
    is_contracted: bool = False

    def __or__(self, other: _Use) -> _Use:
        return _Use(self.spreads or other.spreads, self.is_contracted or other.is_contracted)


def _of_a_kernel(node: fx.Node, name: str) -> _Result:
    """Of a contraction, or of an operator whose inside is not known."""
    value = value_of(node)
    is_outside = is_custom(node) or not is_contraction(node)
    if is_outside:
        leaves = tree_leaves(value)
        origins = tuple(_from_outside(leaf, f"made by {_text(node)}", False) for leaf in leaves)
        return origins if isinstance(value, (tuple, list)) else max(origins, key=_kind)
    if "conv" in name or "convolution" in name:
        return replace(_TRAFFIC, features=min(1 - len(shape_of(node)), -1))
    if isinstance(value, (tuple, list)) and "attention" in name and "backward" not in name:
        return _TRAFFIC, *(_statistic(f"made by {_text(node)}"),) * (len(value) - 1)
    return _TRAFFIC


def _from_outside(value: Any, what: str, is_parameter: bool) -> Origin:
    """Of what only dtype and shape tell about."""
    if not isinstance(value, torch.Tensor):
        return _CONSTANT
    if not (value.is_floating_point() or value.is_complex()):
        return Origin(Kind.COUNT, f"a count: {what} of integers")
    shape = tuple(value.shape)
    if not is_parameter and has_one_element(shape):
        return _statistic(f"{what} of a single element")
    if not is_parameter and is_one(shape[-1]):
        return Origin(Kind.STATISTIC, f"{what} with one value a row", is_assumed=True)
    return _TRAFFIC


def _repeated(x: Origin) -> Origin:
    if x.kind is not Kind.STATISTIC:
        return x
    return _TRAFFIC if x.is_assumed else replace(x, kind=Kind.SPREAD)


def _passed_on(node: fx.Node, name: str, x: Origin) -> Origin:
    """Of an operation that changes or moves the values of one tensor."""
    if x.kind is not Kind.TRAFFIC:
        return x
    is_same_shape = str(shape_of(node)) == str(shape_of(node.args[0]))
    return Origin(
        Kind.TRAFFIC,
        features=moved_axis(node, x.features) if name not in _SELECTING else x.features,
        paired=x.paired if is_same_shape else frozenset(),
        is_probability=x.is_probability or name in _PROBABILITIES,
    )


def _is_smaller(node: fx.Node, name: str, operand: fx.Node) -> bool:
    """The operand is repeated, or put into a larger tensor."""
    if name in _SIDE_BY_SIDE:
        return False
    if _puts(node):
        return puts_single_values(node, operand)
    return bool(broadcast_axes(shape_of(operand), shape_of(node)))


def _puts(node: fx.Node) -> bool:
    name = operator_name(node)
    return "scatter" in name or name in ("index_put", "_unsafe_index_put", "index_add")


def _statistic(why: str) -> Origin:
    return Origin(Kind.STATISTIC, why)


def _kind(origin: Origin) -> Kind:
    return origin.kind


def _either(one: _Result, other: _Result) -> _Result:
    """Of a value that is one or the other, whichever keeps it exact."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return tuple(max(pair, key=_kind) for pair in zip(one, other, strict=True))
    if isinstance(one, tuple) or isinstance(other, tuple):
        return one
    return max(one, other, key=_kind)


def _is_tensor(node: fx.Node) -> bool:
    value = value_of(node)
    return value is None or any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value))


def _is_boolean(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _text(node: fx.Node) -> str:
    """What a node calls, without its overload: "aten.sum"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return target_text(node)
