"""A pass that rewrites ``reduce(a) + reduce(b)`` to ``reduce(a + b)``: half the traffic."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from rfcompile.find.collectives import (
    Collective,
    find_collectives,
    sent_by_each,
    size_to_compare,
    traffic_kind,
)
from rfcompile.find.directions import Directions
from rfcompile.find.origins import Origin
from rfcompile.find.statistics import Statistics
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import module_of, source_of
from rfcompile.report.report import Site
from rfcompile.wire.policy import Policy, exact

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

    value: fx.Node
    views: tuple[fx.Node, ...]
    collective: Collective

    @property
    def consumer(self) -> fx.Node:
        """The addition: nothing else reads the value."""
        (consumer,) = self.value.users
        return consumer


@dataclass(frozen=True)
class MergeCollectives:
    """Sum first, then reduce once, where reduced tensors are only added up.

    Tensor-parallel backward graphs reduce the input gradient of each column-parallel linear by
    itself and then add them up. Works in sums of any length and through equal chains of views;
    all_reduce and reduce_scatter, "sum" or "avg", same group, dtype and shape.

    With a policy only sites that it sends in one and the same format are merged: what it leaves
    exact among others stays as it is, statistics too. (If it leaves everything exact, everything is
    merged, but no statistic with traffic: a run with it is the baseline of a quantized one.)
    The work is linear in the size of the graph.

    The order of the additions changes: the tier is "rounding", the bound that of a float sum.

    Rewrites:
        a1 = wait(all_reduce(a)); b1 = wait(all_reduce(b)); return t + a1 + b1
            -> return t + wait(all_reduce(a + b))
    """

    direction: str = "forward"
    policy: Policy | None = None
    parameters: frozenset[str] | None = frozenset()
    saved: Mapping[str, Origin] = field(default_factory=dict)
    name: str = "merge-collectives"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        linear = [c for c in find_collectives(gm) if c.wait is not None and _is_linear(c)]
        if not linear:
            return PassResult(gm, 0)
        known = self.parameters or frozenset()
        statistics = Statistics(gm, self.direction, known, self.saved)
        formats = {c.node: self._format(c, statistics) for c in linear}
        by_wait = {c.wait: c for c in linear if c.wait is not None}
        sites: list[Site] = []
        # The outermost additions last, and what merging adds on top of them.
        roots = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        seen: set[fx.Node] = set()
        while roots:
            root = roots.pop()
            if root in seen:
                continue
            terms, adds = _sum(root, by_wait)
            seen |= adds
            for group in _alike(terms, formats):
                while len(group) > 1:
                    gone, kept = group[:2]
                    sites.append(self._merged_site(gone.collective, statistics.directions))
                    merged = _merge(gone, kept)
                    formats[merged.collective.node] = formats[kept.collective.node]
                    assert merged.collective.wait is not None
                    by_wait[merged.collective.wait] = merged.collective
                    total = merged.collective.node.args[0]
                    assert isinstance(total, fx.Node)
                    roots.append(total)
                    del group[:2]
                    insort(group, merged, key=lambda term: term.value)
        return PassResult(gm, len(sites), tuple(sites))

    def _format(self, c: Collective, statistics: Statistics) -> object:
        """What must be equal to merge; None: not at all."""
        module = module_of(c.node)
        is_named = self.policy is not None and self.policy.override_for(module) is not None
        is_statistic = not is_named and bool(statistics.why_exact(c.sent, c.node))
        if self.policy is None or self.policy.is_exact:
            return "a statistic" if is_statistic else "traffic"
        if is_statistic:
            return None
        kind = traffic_kind(c, statistics.directions, self.parameters)
        if kind == "unknown":
            return None
        return self.policy.decide(kind, module, size_to_compare(c)).format

    def _merged_site(self, c: Collective, directions: Directions) -> Site:
        return Site.of(
            exact("merged", "merged: added to a later site's tensor"),
            c.input.shape,
            c.input.dtype,
            (sent_by_each(c), 0),
            collective=c.kind,
            direction=directions.of(c.node),
            kind=traffic_kind(c, directions, self.parameters),
            module=module_of(c.node),
            source=source_of(c.node),
            group=c.group,
            world_size=c.world,
        )


def _alike(terms: Iterable[_Term], formats: Mapping[fx.Node, object]) -> list[list[_Term]]:
    """Terms that can share a reduction, each list in the order of the graph."""
    groups: dict[object, list[_Term]] = {}
    for term in terms:
        fmt = formats[term.collective.node]
        if fmt is not None:
            groups.setdefault((fmt, _signature(term)), []).append(term)
    return list(groups.values())


def _sum(root: fx.Node, by_wait: Mapping[fx.Node, Collective]) -> tuple[list[_Term], set[fx.Node]]:
    """The reduced tensors that the sum ending in ``root`` adds up, and the additions it is made of.

    Each of them is in no other sum: only the next addition reads it.
    """
    terms: list[_Term] = []
    adds: set[fx.Node] = set()
    left = [root]
    while left:
        add = left.pop()
        adds.add(add)
        if add.kwargs or not all(isinstance(arg, fx.Node) for arg in add.args):
            continue
        if add.args[0] is add.args[1]:
            continue
        for arg in add.args:
            assert isinstance(arg, fx.Node)
            if len(arg.users) != 1 or arg.meta["val"].shape != add.meta["val"].shape:
                continue
            if arg.target is aten.add.Tensor:
                left.append(arg)
                continue
            below, views = _strip_views(arg)
            if below in by_wait and len(below.users) == 1:
                terms.append(_Term(arg, tuple(views), by_wait[below]))
    return sorted(terms, key=lambda term: term.value), adds


def _signature(term: _Term) -> tuple[object, ...]:
    c = term.collective
    views = tuple((view.target, str(view.args[1:])) for view in term.views)
    return c.kind, c.op, c.group, c.input.dtype, str(tuple(c.input.shape)), views


def _is_linear(c: Collective) -> bool:
    return c.kind in ("all_reduce", "reduce_scatter") and c.op in ("sum", "avg")


def _strip_views(value: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node below a chain of views that nothing else reads, and the chain, outermost last."""
    chain: list[fx.Node] = []
    while value.target in _VIEWS and len(value.users) == 1:
        chain.append(value)
        assert isinstance(value.args[0], fx.Node)
        value = value.args[0]
    return value, chain[::-1]


def _merge(gone: _Term, kept: _Term) -> _Term:
    """Add ``gone``'s tensor to ``kept``'s before reducing, and drop ``gone`` from the sum."""
    a, b = gone.collective, kept.collective
    graph = b.node.graph
    with graph.inserting_before(kept.consumer):
        total = graph.call_function(aten.add.Tensor, (a.node.args[0], b.node.args[0]))
        total.meta = {**kept.consumer.meta, "val": b.input}
        new, copies = total, []
        assert b.wait is not None
        for old in (b.node, b.wait, *kept.views):
            assert callable(old.target)
            new = graph.call_function(old.target, (new, *old.args[1:]), old.kwargs)
            new.meta = dict(old.meta)
            copies.append(new)
    consumer = gone.consumer
    if consumer is kept.consumer:
        consumer.replace_all_uses_with(new)
    else:
        kept.consumer.replace_input_with(kept.value, new)
        x, y = consumer.args
        rest = y if x is gone.value else x
        assert isinstance(rest, fx.Node)
        consumer.replace_all_uses_with(rest)
    graph.erase_node(consumer)
    for term in (gone, kept):
        assert term.collective.wait is not None
        for dead in (*term.views[::-1], term.collective.wait, term.collective.node):
            graph.erase_node(dead)
    node, wait, *views = copies
    return _Term(new, tuple(views), replace(b, node=node, wait=wait))
