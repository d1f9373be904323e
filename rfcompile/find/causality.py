"""Whether an attention of a graph is causal: the one rule, which every rewrite asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from rfcompile.find.attention_cores import Core, argument
from rfcompile.find.axes import value_of
from rfcompile.find.dataflow import changes_its_input, is_contraction, operator_name, words

Causality = Literal["open", "causal", "unknown", "one token"]

HIDDEN = -64.0
"""A score that a mask brings to this or below is hidden: softmax gives it the weight e^-64.

Polynomial attention has another bound, :data:`~rfcompile.nn.polynomial.MASKED`: it asks which
scores it has to leave out. There a finite bias must not pass for a mask; here that only refuses
more."""


def causality(core: Core) -> Causality:
    """Say whether an attention lets each token know only some of those that know it.

    ``see[i, j]`` is true where query ``i`` gives weight to key ``j`` when every product ``q_i k_j``
    is 1 and each input has the value that hides least. So only masks decide. Each sample and each
    head has its own ``see``; what one of them shows holds for all:

    - "causal": some ``see[i, j]`` differs from ``see[j, i]``, and ``i`` and ``j`` are both keys
      that some query sees. Lower triangles, causal windows and prefixes are causal. A window to
      both sides is not.
    - "unknown": an input hides single pairs of tokens (a mask ``[queries, keys]`` that is an
      argument, numbers of packed samples), a mask cannot be computed from the graph, or queries are
      not as many as keys and see different ones. Such an attention may be causal: who asks has to
      take it for causal.
    - "one token": there is one query and one key, where all masks look the same.
    - "open": none of these. Padding, which hides whole keys or whole queries, leaves it open.

    The rule reads the graph and never the user's inputs, so a module and its captured graph get the
    same answer. ``is_causal=True`` and what the graph computes or holds (``tril``, comparisons of
    ``arange``, buffers, ``masked_fill``, ``where``, changes in place, weights that are multiplied
    by a mask) are computed as they stand. What depends on an input is computed several times, with
    zeros, ones and random values in place of the input.

    Args:
        core: an attention of a graph with shapes. Queries are axis -2 of its weights, keys axis -1
            (of an einsum, the axes that its equation says). A symbolic size is taken for its hint.

    Source: ours. Limits: a bias that a contraction of the inputs computes counts as finite, so it
    hides nothing. An order that is in no attention (a recurrence, a causal convolution) is not
    seen. In a graph that a graph calls (a checkpoint, a branch of ``cond``) a mask from outside is
    an input.
    """
    try:
        if core.is_fused and argument(core.weights, 5, "is_causal", False) is not False:
            return "one token" if _lengths(core) == (1, 1) else "causal"
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            masks = _Masks.of(core)
            fills = _FILLS if masks.has_inputs else _FILLS[:1]
            seen = [masks.seen(fill, generator) for fill in fills]
    except Exception:  # whatever stands in the graph runs here
        return "unknown"
    return _judged(seen)


def _judged(seen: Sequence[Tensor]) -> Causality:
    """The rule, on ``[.., queries, keys]`` for each filling of the inputs."""
    most = torch.stack(list(seen)).any(0)
    queries, keys = most.shape[-2:]
    if (queries, keys) == (1, 1):
        return "one token"
    known = most.any(-2)
    if queries == keys:
        both = known.unsqueeze(-1) & known.unsqueeze(-2)
        if bool((both & (most != most.mT)).any()):
            return "causal"
    elif not bool((most == most[..., :1, :]).all()):
        return "unknown"
    if len(seen) == 1:
        return "open"
    whole = [most & s.any(-1, keepdim=True) & s.any(-2, keepdim=True) for s in seen]
    is_padding = all(torch.equal(s, w) for s, w in zip(seen, whole, strict=True))
    return "open" if is_padding and bool(known.all()) else "unknown"


# ---- the values of masks -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fill:
    """What stands for the inputs: each element of a tensor is one of two numbers, at random."""

    integers: tuple[int, int]
    floats: tuple[float, float]

    def like(self, fake: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self.floats if fake.dtype.is_floating_point else self.integers
        is_high = torch.randint(2, _sizes(fake), generator=generator) > 0
        return torch.where(is_high, high, low).to(fake.device, fake.dtype)


_MANY = 1 << 15
_FILLS = (
    _Fill((0, 0), (0.0, 0.0)),
    _Fill((1, 1), (1.0, 1.0)),
    _Fill((_MANY, _MANY), (1.0, 1.0)),  # where integers are lengths
    *[_Fill((0, 1), (0.0, 1.0))] * 4,
    *[_Fill((0, 1), (0.0, -1e4))] * 4,
)


@dataclass(frozen=True)
class _Masks:
    """The nodes of what an attention adds to its scores, or multiplies its weights by, in order.

    ``goal`` is the mask of a fused attention, or the weights that meet the values. ``opaque`` nodes
    are computed from inputs in a way that no mask is, and random numbers stand for them.
    """

    core: Core
    goal: fx.Node | None
    nodes: tuple[fx.Node, ...]
    opaque: frozenset[fx.Node]
    has_inputs: bool

    @staticmethod
    def of(core: Core) -> _Masks:
        goal = argument(core.weights, 3, "attn_mask") if core.is_fused else _weights_read(core)
        order = list(core.result.graph.nodes)
        order = order[: order.index(core.result)]
        fed: set[fx.Node] = set()
        for node in order:
            is_made = node is not core.scores and not fed.isdisjoint(node.all_input_nodes)
            if (is_made or node.op == "placeholder") and not _is_size(node):
                fed.add(node)
        opaque = frozenset(node for node in fed if _is_opaque(node))

        def reads(node: fx.Node) -> list[fx.Node]:
            if node is core.scores:
                return node.all_input_nodes[:1] if operator_name(node) == "baddbmm" else []
            if node is core.weights:
                return node.all_input_nodes[:1]
            return [] if node in opaque or _is_size(node) else node.all_input_nodes

        goals = [goal] if isinstance(goal, fx.Node) else []
        needed = _needed(goals, order, reads)
        nodes = tuple(node for node in order if node in needed)
        return _Masks(core, goal, nodes, opaque, not fed.isdisjoint(needed))

    def seen(self, fill: _Fill, generator: torch.Generator) -> Tensor:
        """Which query sees which key, ``[samples and heads, queries, keys]``."""
        run = fx.Interpreter(_owner(self.core.result), garbage_collect_values=False)
        run.env = {}
        for node in self.nodes:
            run.env[node] = self._value(run, node, fill, generator)
        if self.core.is_fused:
            queries, keys = _lengths(self.core)
            mask = (
                torch.ones(1, keys, dtype=torch.bool) if self.goal is None else run.env[self.goal]
            )
            seen = mask if mask.dtype == torch.bool else mask > HIDDEN
            seen = seen.expand(*mask.shape[:-2], queries, keys)
        else:
            assert self.goal is not None
            seen = _queries_and_keys(self.core.result, self.goal, run.env[self.goal]) != 0
        return seen.reshape(-1, *seen.shape[-2:])

    def _value(
        self, run: fx.Interpreter, node: fx.Node, fill: _Fill, generator: torch.Generator
    ) -> Any:
        name, meta = operator_name(node), value_of(node)
        if _is_size(node):
            return _hint(meta)
        if node.op == "placeholder":
            return fill.like(meta, generator)
        if node in self.opaque:
            return torch.randn(_sizes(meta), generator=generator).to(meta.device, meta.dtype)
        if node is self.core.scores:
            ones = torch.ones(_sizes(meta), device=meta.device, dtype=meta.dtype)
            if name != "baddbmm":
                return ones
            beta: Any = node.kwargs.get("beta", 1)
            return ones + run.env[node.all_input_nodes[0]] * beta
        if node is self.core.weights:
            scores = run.env[node.all_input_nodes[0]]
            return (scores > HIDDEN).to(scores.dtype)
        if "dropout" in name.lower():
            kept = run.env[node.all_input_nodes[0]]
            return (kept, torch.ones_like(kept)) if isinstance(meta, (tuple, list)) else kept
        if _is_foreign(node):
            raise ValueError(f"{node.target} is not run to learn about a mask")
        value = run.run_node(node)
        # A later change in place is to change no buffer of the model.
        return value.clone() if node.op == "get_attr" and isinstance(value, Tensor) else value


def _needed(
    goals: Iterable[fx.Node], order: Sequence[fx.Node], reads: Callable[[fx.Node], list[fx.Node]]
) -> set[fx.Node]:
    """What the goals are computed from, and what changes any of that in place."""
    needed: set[fx.Node] = set()
    pending = list(goals)
    changes = [node for node in order if changes_its_input(node)]
    while pending:
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += reads(node)
        memory = {_memory(node) for node in needed}
        pending = [n for n in changes if n not in needed and _memory(n) in memory]
    return needed


_MAYBE_VIEWS = words(
    "view reshape contiguous to expand unsqueeze squeeze transpose permute t mT select slice "
    "getitem diagonal flatten unflatten narrow chunk split unbind detach float"
)


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory a node's result may be a view of."""
    while node.args and isinstance(node.args[0], fx.Node):
        if not (changes_its_input(node) or operator_name(node) in _MAYBE_VIEWS):
            break
        node = node.args[0]
    return node


def _is_opaque(node: fx.Node) -> bool:
    return is_contraction(node) or "embedding" in operator_name(node).lower() or _is_foreign(node)


def _is_foreign(node: fx.Node) -> bool:
    """It calls an operator that is not torch's own arithmetic: a collective, a kernel."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace not in ("aten", "prims")


# ---- where queries and keys are ------------------------------------------------------------------


def _weights_read(core: Core) -> fx.Node:
    """The operand of the product with the values that is made of the weights."""
    made, found = {core.weights}, []
    for node in core.result.graph.nodes:
        if node is core.result:
            found = [n for n in node.all_input_nodes if n in made]
            break
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    (operand,) = found
    return operand


def _queries_and_keys(product: fx.Node, operand: fx.Node, weights: Tensor) -> Tensor:
    """The weights with queries in axis -2 and keys, which the product sums over, in axis -1."""
    is_left = operand is product.all_input_nodes[-2:][0]
    if operator_name(product) != "einsum":
        return weights if is_left else weights.mT
    equation = str(product.args[0]).replace(" ", "")
    terms, _, result = equation.partition("->")
    sides = terms.split(",")
    mine, other = sides if is_left else sides[::-1]
    (key,) = set(mine) & set(other) - set(result)
    (query,) = set(mine) & set(result) - set(other)
    if "." in mine[3:]:
        raise ValueError(f"{equation} has axes without names behind those with names")
    axes = [mine.index(axis) - len(mine) for axis in (query, key)]
    return weights.movedim(axes, (-2, -1))


def _lengths(core: Core) -> tuple[int, int]:
    """How many queries and keys a fused attention has; (0, 0) without shapes."""
    query, key = value_of(core.query), value_of(core.key)
    if not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        return 0, 0
    return _hint(query.shape[-2]), _hint(key.shape[-2])


def _is_size(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, torch.SymInt))


def _sizes(fake: Tensor) -> list[int]:
    return [_hint(size) for size in fake.shape]


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _owner(node: fx.Node) -> fx.GraphModule:
    owner = node.graph.owning_module
    assert owner is not None
    return owner
