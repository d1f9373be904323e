"""Rewrite collectives to their quantized form: the pass this package is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rfcompile import ops, wire
from rfcompile.codec import DTYPES
from rfcompile.collectives import REDUCTIONS
from rfcompile.cost import sent_bytes
from rfcompile.formats import QuantFormat
from rfcompile.graph import dtype_text, module_of, source_of
from rfcompile.passes.find_collectives import KNOWN, Collective, find_collectives
from rfcompile.pipeline import PassResult
from rfcompile.policy import Policy
from rfcompile.report import Site

aten = torch.ops.aten
_KEEPS_A_WEIGHT = frozenset(
    {
        torch.ops.prims.convert_element_type.default,
        aten._to_copy.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.clone.default,
        aten.t.default,
        aten.permute.default,
        aten.transpose.int,
        aten.slice.Tensor,
        aten.constant_pad_nd.default,
        aten.detach.default,
        aten.alias.default,
    }
)


@dataclass(frozen=True)
class QuantizeCollectives:
    """Replace each collective the policy covers by quantize, the same bytes moved, dequantize.

    Every collective becomes a :class:`~rfcompile.Site` of the result's facts, quantized or not.

    Rewrites:
        all_reduce = all_reduce(x, 'sum', group); wait = wait_tensor(all_reduce)
            -> quantize(x), all_to_all_single, wait_tensor, requantize, all_gather_into_tensor,
               wait_tensor, dequantize
        and likewise reduce_scatter, all_gather, all_to_all and broadcast (``collectives.py``).

    The tier is "rounding"; the bounds are those of the functions in ``collectives.py``.

    Args:
        policy: which traffic in which format.
        direction: "forward" (activations) or "backward" (gradients).
        parameters: names of the placeholders that are parameters; an all-gather of one is weights.
        decompositions: operator decompositions that the graph went through already; what is put
            into it goes through them too.
    """

    policy: Policy
    direction: str = "forward"
    parameters: frozenset[str] = frozenset()
    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    name: str = "quantize-collectives"
    tier: Literal["rounding"] = "rounding"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        sites = []
        changes = 0
        for collective in find_collectives(gm):
            kind = self._kind(collective)
            module = module_of(collective.node)
            size = collective.input.numel() * collective.input.element_size()
            known_size = size if isinstance(size, int) else None
            fmt: QuantFormat | None = None
            reason = _why_not(collective)
            eligible = not reason
            if not reason:
                fmt, reason = self.policy.format_for(kind, module, known_size or 2**62)
                eligible = fmt is not None or "min_bytes" in reason
            before = _sent(collective, known_size)
            site = Site(
                collective=collective.kind,
                direction=self.direction,
                kind=kind,
                module=module,
                source=source_of(collective.node),
                shape=tuple(s if isinstance(s, int) else str(s) for s in collective.input.shape),
                dtype=dtype_text(collective.input.dtype),
                group=collective.group,
                world_size=collective.world,
                format=fmt.spec if fmt else None,
                reason=reason,
                eligible=eligible,
                bytes_before=before,
                bytes_after=_sent_quantized(collective, fmt) if fmt else before,
            )
            sites.append(site)
            if fmt is not None:
                _replace(gm, collective, fmt, site.place, self.decompositions)
                changes += 1
        return PassResult(gm, changes, tuple(sites))

    def _kind(self, collective: Collective) -> str:
        if collective.kind == "all_gather" and self._is_parameter(collective.node.args[0]):
            return "weights"
        # Activation checkpointing runs forward collectives again in the backward graph: they must
        # give the values of the first time.
        is_recomputed = collective.node.meta.get("partitioner_tag") == "is_forward"
        is_gradient = self.direction == "backward" and not is_recomputed
        return "gradients" if is_gradient else "activations"

    def _is_parameter(self, value: object) -> bool:
        while isinstance(value, fx.Node) and value.target in _KEEPS_A_WEIGHT:
            value = value.args[0]
        return isinstance(value, fx.Node) and value.name in self.parameters


def _why_not(c: Collective) -> str:
    """Why a collective cannot be quantized, "" if it can."""
    sent = c.node.args[0]
    if isinstance(sent, fx.Node) and sent.target in _CODED:
        return "its input is quantized already"
    if c.input.dtype not in DTYPES:
        return f"{dtype_text(c.input.dtype)} data is not quantized"
    if c.node.target not in KNOWN:
        return f"{c.kind} is not rewritten in this version"
    if c.op and c.op not in REDUCTIONS:
        return f"the reduction {c.op!r} of rounded values is not the rounded reduction"
    if c.world == 0:
        return f"process group {c.group!r} is not known in this process"
    if c.world == 1:
        return "one rank: nothing is sent"
    if c.wait is None:
        return f"it has {len(c.node.users)} readers; expected a single wait_tensor"
    if c.kind == "all_to_all" and _has_symbols(c.node.args[1:3]):
        return "its split sizes are not known while compiling"
    if isinstance(c.input.numel(), int) and c.input.numel() == 0:
        return "empty tensor"
    return ""


def _has_symbols(splits: Any) -> bool:
    return not all(isinstance(size, int) for sizes in splits for size in sizes)


_CODED: frozenset[object] = frozenset({ops.quantize, ops.requantize, ops.require_finite})


def _sent(c: Collective, size: int | None) -> int | None:
    if c.node.target not in KNOWN or size is None:
        return size
    return sent_bytes(c.kind, size, c.world) if c.world else None


def _sent_quantized(c: Collective, fmt: QuantFormat) -> int | None:
    """Bytes one rank sends in the collectives that replace ``c``."""
    n = c.input.numel()
    if not isinstance(n, int):
        return None
    if c.kind == "all_reduce":
        segments = wire.default_segments(c.input, fmt)
        unit = c.world * segments * fmt.group_elements(8)
        payload = fmt.payload_bytes(-(-n // unit) * unit, c.world * segments)
        sent = sent_bytes("all_to_all", payload, c.world)
        sent += sent_bytes("all_gather", payload // c.world, c.world)
    elif c.kind == "all_gather" or c.kind == "broadcast":
        sent = sent_bytes(c.kind, fmt.payload_bytes(n), c.world)
    else:
        sent = sent_bytes("all_to_all", fmt.payload_bytes(n, c.world), c.world)
    flag = sent_bytes("all_gather", 1, c.world) if fmt.nonfinite == "raise" else 0
    return sent + flag


def _replacement(c: Collective, fmt: QuantFormat, place: str) -> Callable[[Tensor], Tensor]:
    args: Any = c.node.args
    site = f"{c.kind} at {place}"
    if c.kind == "all_reduce":
        segments = wire.default_segments(c.input, fmt)
        return partial(
            wire.all_reduce_wire,
            fmt=fmt.spec,
            op=c.op,
            world=c.world,
            group=c.group,
            segments=segments,
            site=site,
        )
    if c.kind == "reduce_scatter":
        return partial(
            wire.reduce_scatter_wire,
            fmt=fmt.spec,
            op=c.op,
            world=c.world,
            group=c.group,
            site=site,
        )
    if c.kind == "all_gather":
        return partial(wire.all_gather_wire, fmt=fmt.spec, world=c.world, group=c.group, site=site)
    if c.kind == "broadcast":
        return partial(
            wire.broadcast_wire,
            fmt=fmt.spec,
            src=args[1],
            world=c.world,
            group=c.group,
            site=site,
        )
    return partial(
        wire.all_to_all_wire,
        fmt=fmt.spec,
        output_splits=args[1],
        input_splits=args[2],
        group=c.group,
        site=site,
    )


def _replace(
    gm: fx.GraphModule,
    c: Collective,
    fmt: QuantFormat,
    place: str,
    decompositions: Mapping[Any, Callable[..., Any]],
) -> None:
    graph = gm.graph
    fake_mode = c.input.fake_mode  # type: ignore[attr-defined]
    with fake_mode:
        body = make_fx(
            _replacement(c, fmt, place),
            decomposition_table=decompositions,
            tracing_mode="symbolic" if fake_mode.shape_env is not None else "fake",
        )(c.input)
    assert c.wait is not None
    copies: dict[fx.Node, Any] = {}
    with graph.inserting_before(c.wait):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = c.node.args[0]
            elif node.op == "output":
                c.wait.replace_all_uses_with(copies[node.args[0]])
            else:
                copy = graph.node_copy(node, copies.__getitem__)
                origin = {k: v for k, v in c.node.meta.items() if k not in node.meta or k != "val"}
                copy.meta = {**origin, "val": node.meta.get("val")}
                copies[node] = copy
    graph.erase_node(c.wait)
    graph.erase_node(c.node)
