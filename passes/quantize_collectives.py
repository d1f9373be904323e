"""The main pass: rewrites the collectives of a graph to quantized collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from rfcompile.codec import operators
from rfcompile.codec.formats import QuantFormat
from rfcompile.find.collectives import (
    WAIT,
    Collective,
    find_collectives,
    rows_to_others,
    sent_by_each,
    size_to_compare,
    splits,
    traffic_kind,
)
from rfcompile.find.directions import NO_DIRECTION
from rfcompile.find.origins import Origin
from rfcompile.find.statistics import Statistics
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import module_of, source_of
from rfcompile.graph.splicing import Decompositions, splice
from rfcompile.report.report import Site
from rfcompile.wire import exchanges
from rfcompile.wire.by_size import along_dim, by_size
from rfcompile.wire.collectives import REDUCTIONS
from rfcompile.wire.cost import sent_bytes
from rfcompile.wire.policy import Decision, Policy, exact


@dataclass(frozen=True)
class QuantizeCollectives:
    """Replace each collective the policy covers by quantize, the same bytes moved, dequantize.

    Every collective becomes a :class:`~rfcompile.Site` of the result's facts, quantized or not.
    A statistic (``find/statistics.py``) stays exact unless a pattern of ``sites`` names its module.

    Rewrites:
        all_reduce = all_reduce(x, 'sum', group); wait = wait_tensor(all_reduce)
            -> quantize(x), all_to_all_single, wait_tensor, requantize, all_gather_into_tensor,
               wait_tensor, dequantize
        and likewise reduce_scatter, all_gather, all_to_all and broadcast (``wire/collectives.py``);
        registered = vllm.all_reduce(x, 'tp:0') -> the same, or, where the size is symbolic,
            rfcompile.by_size(x, ...), which chooses at run time (``wire/by_size.py``)

    The tier is "rounding"; the bounds are those of the functions in ``wire/collectives.py``.

    Args:
        policy: which traffic in which format.
        direction: "forward" (activations), "backward" (gradients), or "joint": a graph with both,
            whose nodes say where they run (``find/directions.py``).
        parameters: names of the placeholders that are parameters; an all-gather of one is weights.
            None: not known, so all-gathers of placeholders stay exact.
        saved: what the placeholders are that the forward graph saved, by name.
        decompositions: operator decompositions that the graph went through already; what is put
            into it goes through them too.
        groups: the process groups whose ranks agreed on the policy, each as (name in a registered
            operator, torch's name); a collective in another one stays exact. None: all.
        device: where the graph is to run: the number of segments depends on it. None: where the
            collective's tensor is.
    """

    policy: Policy
    direction: str = "forward"
    parameters: frozenset[str] | None = frozenset()
    decompositions: Decompositions = field(default_factory=dict)
    saved: Mapping[str, Origin] = field(default_factory=dict)
    device: torch.device | None = None
    groups: frozenset[tuple[str, str]] | None = None
    name: str = "quantize-collectives"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        sites = []
        changes = 0
        collectives = find_collectives(gm)
        if not collectives:
            return PassResult(gm, 0)
        known = self.parameters or frozenset()
        statistics = Statistics(gm, self.direction, known, self.saved)
        directions = statistics.directions
        for collective in collectives:
            kind = traffic_kind(collective, directions, self.parameters)
            decision = self._decide(collective, kind, statistics)
            fmt, before = decision.format, sent_by_each(collective)
            segments = self._segments(collective, fmt) if fmt else 1
            site = Site.of(
                decision,
                collective.input.shape,
                collective.input.dtype,
                (before, _sent_quantized(collective, fmt, segments) if fmt else before),
                collective=collective.kind,
                direction=directions.of(collective.node),
                kind=kind,
                module=module_of(collective.node),
                source=source_of(collective.node),
                group=collective.group,
                world_size=collective.world,
            )
            sites.append(site)
            if fmt is not None:
                smallest = self._smallest(collective)
                _replace(collective, fmt, smallest, segments, site.place, self.decompositions)
                changes += 1
        return PassResult(gm, changes, tuple(sites))

    def _segments(self, c: Collective, fmt: QuantFormat) -> int:
        device = self.device or c.input.device
        return self.policy.segments or exchanges.default_segments(c.input.numel(), fmt, device)

    def _decide(self, c: Collective, kind: str, statistics: Statistics) -> Decision:
        module, sent = module_of(c.node), c.sent
        if isinstance(sent, fx.Node) and sent.target in _CODED:
            return exact("not traffic", "its input is quantized already")
        # Of an all_to_all no size tells: a rank that has nothing to send may still receive.
        numel = None if c.kind == "all_to_all" else c.input.numel()
        size = size_to_compare(c)
        facts: dict[str, Any] = {"dtype": c.input.dtype, "numel": numel, "world": c.world}
        if kind == "unknown":
            why = _why_unknown(statistics.directions.of(c.node))
            return self.policy.decide_without_kind(why, module, size, **facts)
        decision = self.policy.decide(kind, module, size, **facts)
        if decision.why in ("one rank", "dtype", "empty"):
            return decision
        if c.op and c.op not in REDUCTIONS:
            reason = f"the reduction {c.op!r} of rounded values is not the rounded reduction"
            return exact("not traffic", reason)
        is_named = self.policy.override_for(module) is not None
        if kind != "weights" and not is_named and (why := statistics.why_exact(sent, c.node)):
            return exact("statistic", why)
        if decision.format is None:
            return decision
        smallest = self._smallest(c)
        if reason := _out_of_reach(c, smallest) or self._without_consent(c):
            return exact("out of reach", reason)
        if smallest:
            reason = f"exact below {smallest} bytes, which each call decides"
            return replace(decision, reason=reason)
        return decision

    def _smallest(self, c: Collective) -> int:
        """From how many bytes on a collective is quantized, where only its run knows the size; 0
        where that is decided here.

        Torch's own collectives of symbolic size count as large: a choice at run time hides from
        Inductor what they are made of.
        """
        is_named = self.policy.override_for(module_of(c.node)) is not None
        is_decided = c.foreign is None or size_to_compare(c) is not None or is_named
        return 0 if is_decided else self.policy.smallest

    def _without_consent(self, c: Collective) -> str:
        """Why a collective stays exact as long as its ranks did not agree, "" if they did."""
        if self.groups is None:
            return ""
        if c.foreign is not None and (str(c.foreign.theirs), c.group) in self.groups:
            return ""
        if c.foreign is None and any(name == c.group for _, name in self.groups):
            return ""
        name = c.foreign.theirs if c.foreign else c.group
        return f"the ranks of process group {name!r} have not agreed on policy and operators"


def _out_of_reach(c: Collective, smallest: int) -> str:
    """Why a collective cannot be quantized although it should be, "" if it can."""
    if not c.is_known:
        return f"{c.kind} is not rewritten in this version"
    if c.foreign is not None and c.foreign.problem:
        return c.foreign.problem
    if c.world == 0:
        return f"process group {c.group!r} is not known in this process"
    if "val" not in c.node.meta:
        return "its graph has no shapes"
    if c.result is None:
        return f"it has {len(c.node.users)} readers; expected a single wait_tensor"
    if c.kind == "all_to_all" and any(map(free_unbacked_symbols, splits(c))):
        return "its split sizes depend on data that only the run has"
    if smallest and c.foreign is not None and not c.foreign.as_text():
        return f"its size and its arguments are symbolic, so min_bytes={smallest} cannot be kept"
    return ""


def _why_unknown(direction: str) -> str:
    """Why nobody knows what kind of traffic a collective of a joint graph is."""
    if direction == "unknown":
        return NO_DIRECTION
    return "it gathers an input of the graph, and nothing says whether that is a parameter"


_CODED: frozenset[object] = frozenset(
    {operators.quantize, operators.requantize, operators.require_finite}
)


def _sent_quantized(c: Collective, fmt: QuantFormat, segments: int) -> int | None:
    """Bytes one rank sends in the collectives that replace ``c``."""
    n = c.input.numel()
    if not isinstance(n, int):
        return None
    if c.kind == "all_reduce":
        return exchanges.all_reduce_sent_bytes(n, fmt, c.world, segments)
    if c.kind == "all_gather":
        return exchanges.all_gather_sent_bytes(n, fmt, c.world)
    if c.kind == "reduce_scatter":
        return exchanges.reduce_scatter_sent_bytes(n, fmt, c.world)
    if c.kind == "broadcast":
        sent = sent_bytes(c.kind, fmt.payload_bytes(n), c.world)
    else:
        rows, inner = rows_to_others(c), c.input.shape[1:].numel()
        if rows is None:
            return None
        sent = sum(fmt.row_bytes(number * inner) for number in rows)
    return sent + exchanges.flag_sent_bytes(fmt, c.world)


def _replacement(
    c: Collective, fmt: QuantFormat, smallest: int, segments: int, place: str
) -> Callable[..., Tensor]:
    site = f"{c.kind} at {place}"
    if c.kind == "all_to_all":
        return _all_to_all(c, fmt, site)
    if c.kind == "broadcast":
        source: Any = c.node.args[1]
        return partial(
            exchanges.broadcast_wire,
            fmt=fmt.spec,
            src=source,
            world=c.world,
            group=c.group,
            site=site,
        )
    if smallest and c.foreign is not None:
        call = c.foreign.as_text()
        rest = (fmt.spec, c.op, c.world, c.group, c.foreign.dim, segments, smallest, call, site)
        return lambda x: by_size(x, c.kind, *rest)
    return partial(
        along_dim,
        kind=c.kind,
        fmt=fmt.spec,
        op=c.op,
        world=c.world,
        group=c.group,
        dim=c.foreign.dim if c.foreign else 0,
        segments=segments,
        site=site,
    )


def _all_to_all(c: Collective, fmt: QuantFormat, site: str) -> Callable[..., Tensor]:
    args: Any = c.node.args
    outputs, inputs = len(args[1]), len(args[2])
    fixed = [None if isinstance(size, fx.Node) else size for size in (*args[1], *args[2])]

    def exchange(x: Tensor, *symbolic: Any) -> Tensor:
        given = iter(symbolic)
        sizes = [next(given) if size is None else size for size in fixed]
        assert len(sizes) == outputs + inputs
        return exchanges.all_to_all_wire(
            x, fmt.spec, sizes[:outputs], sizes[outputs:], c.group, site
        )

    return exchange


def _replace(
    c: Collective,
    fmt: QuantFormat,
    smallest: int,
    segments: int,
    place: str,
    decompositions: Decompositions,
) -> None:
    assert c.result is not None
    inputs: list[Any] = [c.sent]
    if c.kind == "all_to_all":
        sizes: Any = [*c.node.args[1], *c.node.args[2]]  # type: ignore[misc]
        inputs += [size for size in sizes if isinstance(size, fx.Node)]
    # Coding and sending start where the collective did, and the rest comes where it was waited
    # for: what was computed meanwhile still is.
    place_of_next = c.node

    def before(node: fx.Node) -> fx.Node:
        nonlocal place_of_next
        if node.target is WAIT and c.wait is not None:
            place_of_next = c.wait
        return place_of_next

    replacement = _replacement(c, fmt, smallest, segments, place)
    result = splice(replacement, inputs, c.node, before, decompositions)
    graph = c.node.graph
    c.result.replace_all_uses_with(result)
    for dead in dict.fromkeys((c.result, c.node)):
        graph.erase_node(dead)
