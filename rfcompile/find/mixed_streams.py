"""Finds streams that pass on by more than an addition: hyper-connections, attention over depth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rfcompile.find.dataflow import Dataflow, Value
from rfcompile.find.sums import Summand, carried, summands
from rfcompile.graph.places import module_of, source_of


@dataclass(frozen=True)
class MixedStream:
    """A place where a stream passes on: "hyper-connection" or "attention over depth", the module
    and the line.
    """

    kind: str
    module: str
    source: str


def find_mixed_streams(gm: fx.GraphModule) -> tuple[MixedStream, ...]:
    """Where a model has connections over its depth that are no residual adds.

    A hyper-connection is a sum of a product that mixes parallel streams by a matrix, and of a
    branch that is computed from these streams. An attention over depth reads what several layers
    gave, stacked along an axis of its own. Either counts only where a later one follows on it.

    Source: the rules are ours, for arXiv:2409.19606 and models that weight the results of all
    layers before.
    """
    flow = Dataflow(gm)
    places = dict.fromkeys(_hyper_connections(flow), "hyper-connection")
    places |= dict.fromkeys(_depth_attentions(flow), "attention over depth")
    return tuple(
        MixedStream(kind, module_of(value.node), source_of(value.node))
        for value, kind in sorted(places.items(), key=lambda item: item[0].index)
    )


def why_none(found: tuple[MixedStream, ...]) -> str:
    """A sentence on what a model has instead of residual adds; "" if it has nothing."""
    if not found:
        return ""
    kinds = dict.fromkeys(place.kind for place in found)
    listing = []
    for kind in kinds:
        places = [place for place in found if place.kind == kind]
        first = " ".join(part for part in (places[0].module, places[0].source) if part)
        listing.append(f"{len(places)} times {kind} (the first at {first})")
    return (
        f"it has {' and '.join(listing)}: there the skip passes a matrix or weights, it is no copy "
        "that could be dropped, so rfcompile leaves it."
    )


# ---- hyper-connections -------------------------------------------------------------------------


def _hyper_connections(flow: Dataflow) -> Iterator[Value]:
    streams: dict[Value, Value] = {}
    for value in flow.values:
        for term in summands(value):
            stream = _mixed(value, term)
            if stream is not None:
                streams[value] = stream
    sources = {value: _sum_before(stream, streams) for value, stream in streams.items()}
    chained = {value for value, before in sources.items() if before is not None}
    chained |= {before for before in sources.values() if before is not None}
    return (value for value in streams if value in chained)


def _mixed(total: Value, term: Summand) -> Value | None:
    """The streams that a term of a sum mixes, if another term is a branch on them."""
    product = _computed(term.factors[0])
    if len(term.factors) != 1 or not product.is_contraction:
        return None
    others = [f for t in summands(total) if t is not term for f in t.factors]
    for stream in product.operands.values():
        is_branch = any(other.contracts(stream) for other in others)
        if is_branch and _shape(stream) == _shape(product) and _mixes_parallel(product, stream):
            return stream
    return None


def _computed(value: Value) -> Value:
    """The value of which this is a copy."""
    while (source := carried(value)) is not None:
        value = source
    return value


def _mixes_parallel(product: Value, stream: Value) -> bool:
    """The other factor is a square matrix over an axis of the stream that is not the last."""
    shape = _shape(stream)
    for matrix in product.operands.values():
        sizes = _shape(matrix)
        is_square = len(sizes) >= 2 and sizes[-1] == sizes[-2]
        if matrix is not stream and is_square and sizes[-1] in shape[1:-1]:
            return True
    return False


def _shape(value: Value) -> tuple[object, ...]:
    return tuple(value.meta.shape) if isinstance(value.meta, torch.Tensor) else ()


def _sum_before(stream: Value, sums: dict[Value, Value]) -> Value | None:
    value: Value | None = stream
    while value is not None:
        if value in sums:
            return value
        value = carried(value)
    return None


# ---- attention over depth ----------------------------------------------------------------------


def _depth_attentions(flow: Dataflow) -> Iterator[Value]:
    """Stacks of what several layers gave, of which a later one has all and more."""
    stacks = {value: held for value in flow.values if len(held := _stacked(value)) > 1}
    for value, held in stacks.items():
        if any(held < other or other < held for other in stacks.values()):
            yield value


def _stacked(value: Value) -> frozenset[Value]:
    """The values along an axis of its own, if some of them are layers on others."""
    parts = [value.operands[n] for n in value.node.all_input_nodes if n in value.operands]
    is_joined = value.operator in ("cat", "concat", "concatenate")
    if is_joined and all(part.operator == "unsqueeze" for part in parts):
        parts = [_computed(part) for part in parts]
    elif value.operator != "stack":
        return frozenset()
    is_deep = any(later.contracts(part) for part in parts for later in parts)
    return frozenset(parts) if is_deep else frozenset()
