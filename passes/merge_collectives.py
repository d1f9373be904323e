"""Rewrite ``reduce(a) + reduce(b)`` to ``reduce(a + b)``: the same sum for half the traffic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from rfcompile.cost import sent_bytes
from rfcompile.graph import dtype_text, module_of, source_of
from rfcompile.passes.find_collectives import (
    Collective,
    find_collectives,
    size_to_compare,
    traffic_kind,
)
from rfcompile.pipeline import PassResult
from rfcompile.policy import Policy
from rfcompile.report import Site

aten = torch.ops.aten
_VIEWS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.permute.default,
        aten.t.default,
        aten.transpose.int,
    }
)


@dataclass(frozen=True)
class _Term:
    """One reduced tensor in a sum: ``consumer = other + views(wait(reduce(input)))``."""

    consumer: fx.Node
    value: fx.Node
    views: tuple[fx.Node, ...]
    collective: Collective


@dataclass(frozen=True)
class MergeCollectives:
    """Sum first, then reduce once, where reduced tensors are only added up.

    Tensor-parallel backward graphs reduce the input gradient of each column-parallel linear by
    itself and then add them up. Works in sums of any length and through equal chains of views;
    all_reduce and reduce_scatter, "sum" or "avg", same group, dtype and shape.

    With a policy only sites that it sends in one and the same format are merged: what it leaves
    exact among others stays as it is. (If it leaves everything exact, everything is merged, so that
    a run with it is the baseline of a quantized one.)

    The order of the additions changes: the tier is "rounding", the bound that of a float sum.

    Rewrites:
        a1 = wait(all_reduce(a)); b1 = wait(all_reduce(b)); return t + a1 + b1
            -> return t + wait(all_reduce(a + b))
    """

    direction: str = "forward"
    policy: Policy | None = None
    name: str = "merge-collectives"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        sites: list[Site] = []
        while (pair := _find_pair(gm, self._format)) is not None:
            sites.append(self._merged_site(pair[0].collective))
            _merge(gm, *pair)
        return PassResult(gm, len(sites), tuple(sites))

    def _format(self, c: Collective) -> object:
        """What must be equal to merge; None: not at all."""
        if self.policy is None or self.policy.is_exact:
            return "any"
        kind = traffic_kind(c, self.direction)
        return self.policy.format_for(kind, module_of(c.node), size_to_compare(c))[0]

    def _merged_site(self, c: Collective) -> Site:
        size = c.input.numel() * c.input.element_size()
        return Site(
            collective=c.kind,
            direction=self.direction,
            kind="gradients" if self.direction == "backward" else "activations",
            module=module_of(c.node),
            source=source_of(c.node),
            shape=tuple(s if isinstance(s, int) else str(s) for s in c.input.shape),
            dtype=dtype_text(c.input.dtype),
            group=c.group,
            world_size=c.world,
            format=None,
            reason="merged: added to a later site's tensor",
            eligible=False,
            bytes_before=sent_bytes(c.kind, size, c.world) if isinstance(size, int) else None,
            bytes_after=0,
            merged=True,
        )


def _find_pair(
    gm: fx.GraphModule, format_of: Callable[[Collective], object]
) -> tuple[_Term, _Term] | None:
    """Two terms of one sum that can share a reduction, in graph order."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    linear = [c for c in find_collectives(gm) if c.wait is not None and _is_linear(c)]
    by_wait = {c.wait: c for c in linear if c.wait is not None}
    formats = {c.node: format_of(c) for c in linear}
    for root in reversed(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        terms = _terms(root, by_wait)
        terms.sort(key=lambda term: order[term.value])
        for i, first in enumerate(terms):
            for second in terms[i + 1 :]:
                if _signature(first) != _signature(second):
                    continue
                fmt = formats[first.collective.node]
                if fmt is not None and fmt == formats[second.collective.node]:
                    return first, second
    return None


def _terms(add: fx.Node, by_wait: dict[fx.Node, Collective]) -> list[_Term]:
    """The reduced tensors that the sum ending in ``add`` adds up."""
    if add.kwargs or not all(isinstance(arg, fx.Node) for arg in add.args):
        return []
    if add.args[0] is add.args[1]:
        return []
    terms: list[_Term] = []
    for arg in add.args:
        assert isinstance(arg, fx.Node)
        if len(arg.users) != 1 or arg.meta["val"].shape != add.meta["val"].shape:
            continue
        if arg.target is aten.add.Tensor:
            terms += _terms(arg, by_wait)
            continue
        below, views = _strip_views(arg)
        if below in by_wait and len(below.users) == 1:
            terms.append(_Term(add, arg, tuple(views), by_wait[below]))
    return terms


def _signature(term: _Term) -> tuple[object, ...]:
    c = term.collective
    views = tuple((view.target, str(view.args[1:])) for view in term.views)
    return c.kind, c.op, c.group, c.input.dtype, tuple(c.input.shape), views


def _is_linear(c: Collective) -> bool:
    return c.kind in ("all_reduce", "reduce_scatter") and c.op in ("sum", "avg")


def _strip_views(value: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node below a chain of views that nothing else reads, and the chain, outermost last."""
    chain: list[fx.Node] = []
    while value.target in _VIEWS and len(value.users) == 1:
        chain.insert(0, value)
        assert isinstance(value.args[0], fx.Node)
        value = value.args[0]
    return value, chain


def _merge(gm: fx.GraphModule, gone: _Term, kept: _Term) -> None:
    """Add ``gone``'s tensor to ``kept``'s before reducing, and drop ``gone`` from the sum."""
    graph = gm.graph
    a, b = gone.collective, kept.collective
    with graph.inserting_before(kept.consumer):
        total = graph.call_function(aten.add.Tensor, (a.node.args[0], b.node.args[0]))
        total.meta = {**kept.consumer.meta, "val": b.input}
        new = total
        assert b.wait is not None
        for old in (b.node, b.wait, *kept.views):
            assert callable(old.target)
            new = graph.call_function(old.target, (new, *old.args[1:]), old.kwargs)
            new.meta = dict(old.meta)
    if gone.consumer is kept.consumer:
        gone.consumer.replace_all_uses_with(new)
        graph.erase_node(gone.consumer)
    else:
        kept.consumer.replace_input_with(kept.value, new)
        x, y = gone.consumer.args
        rest = y if x is gone.value else x
        assert isinstance(rest, fx.Node)
        gone.consumer.replace_all_uses_with(rest)
        graph.erase_node(gone.consumer)
    for term in (gone, kept):
        assert term.collective.wait is not None
        for dead in (*term.views[::-1], term.collective.wait, term.collective.node):
            graph.erase_node(dead)
