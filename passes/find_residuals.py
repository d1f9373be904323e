"""A pass that finds every residual add of a graph by its data flow and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from rfcompile.codec.formats import dtype_text
from rfcompile.find.dataflow import Dataflow, Value
from rfcompile.find.residual_sums import Residual, ResidualSums
from rfcompile.find.sums import Summand
from rfcompile.graph.pipeline import PassResult
from rfcompile.graph.places import module_of, source_of
from rfcompile.graph.text import target_text

Kind = Literal["block", "local", "long", "projection"]


@dataclass(frozen=True)
class ResidualAdd:
    """One residual add: a branch computed from a tensor is added to that tensor.

    Args:
        kind: "block": on the stream that runs through the model. "local": inside the branch of
            another one (an adapter, the D term of a state space model). "long": across others (a
            skip over a whole stage). "projection": the skip passes a convolution or a resampling
            (the downsampling block of a ResNet).
        module: dotted path of the module that performs the add, "" for the outermost.
        source: "file.py:123", the user's line, "" where unknown.
        order: its number in the graph, from 0.
        node: name of the fx node that adds; in a nested graph "body.node".
        spelling: what the node calls: "aten.add.Tensor", "operator.iadd", "torch.lerp".
        operand: which term is the skip: 0 for ``x + f(x)``, 1 for ``f(x) + x``.
        skip: name of the node that is this operand.
        stream: name of the node whose value the operand is a copy of, where the branch starts.
        shape: of the sum, symbolic sizes as texts; dtype: "f32"; () and "" where unknown.
        branch: paths of the modules whose contractions the branch goes through, in order.
    """

    kind: Kind
    module: str
    source: str
    order: int
    node: str
    spelling: str
    operand: int
    skip: str
    stream: str
    shape: tuple[int | str, ...]
    dtype: str
    branch: tuple[str, ...]

    @property
    def place(self) -> str:
        """Its module and line, as far as they are known."""
        return " ".join(part for part in (self.module, self.source) if part) or "(unknown place)"


@dataclass(frozen=True)
class FindResiduals:
    """Find the residual adds of a graph; the graph stays as it is and the facts are ResidualAdds.

    A sum (see :func:`~rfcompile.find.sums.summands`) is a residual add if for one of its
    terms, the skip, and another one, the branch:

    1. The skip is added, has the shape of the sum and is floating point.
    2. The skip is a copy of a tensor ``s`` (cast, reshaped, dropped out, scaled by a gain), or of
       a sum that ``s`` is a term of, and the branch is computed from ``s``.
    3. A contraction lies on the way from ``s`` to the branch. So a gelu polynomial, rotary
       embeddings and norms are none.
    4. ``s`` enters the branch by itself. If it only enters as a term of other sums, as a position
       embedding does, it must come from a contraction and the branch hold no other residual add.

    Failing that, it is one of kind "projection" if the skip is made of ``s`` by convolutions, norms
    and resamplings only, and the branch has two or more contractions, something that is not linear,
    and no other residual add. (A skip through a matrix looks the same as a LoRA path: it is none.)

    Source: the rule is ours. Why skips matter to quantization: arXiv:2605.25880.
    """

    name: str = "find-residuals"
    tier: Literal["bitwise"] = "bitwise"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(gm, 0, find_residuals(gm))


def find_residuals(gm: fx.GraphModule) -> tuple[ResidualAdd, ...]:
    """The residual adds of a graph in order; see :class:`FindResiduals`."""
    flow = Dataflow(gm)
    sums = ResidualSums(flow)
    kinds = _kinds(sums.streams())
    contractions = [value for value in flow.values if value.is_contraction]
    return tuple(
        _describe(add, sums.branch(add), kind, order, contractions)
        for order, (add, kind) in enumerate(kinds.items())
    )


def _kinds(streams: Mapping[Residual, Value]) -> dict[Residual, Kind]:
    """Block, unless one lies in the branch of another.

    Then the outer one is long if its branch holds two or more adds of one stream, its own or
    another; or one that starts where it starts; or if the inner stream has more adds. Else the
    inner one is local.
    """
    sizes = Counter(streams.values())
    kinds: dict[Residual, Kind] = dict.fromkeys(streams, "block")
    for outer in streams:
        inside = [add for add in streams if add is not outer and _holds(outer, add)]
        own = [add for add in inside if streams[add] is streams[outer]]
        larger = [add for add in inside if sizes[streams[add]] > sizes[streams[outer]]]
        several = max(Counter(streams[add] for add in inside).values(), default=0) > 1
        if several or larger or any(add.stream is outer.stream for add in own):
            kinds[outer] = "long"
        else:
            kinds |= dict.fromkeys(inside, "local")
    return {add: "projection" if add.is_projection else kind for add, kind in kinds.items()}


def _holds(outer: Residual, inner: Residual) -> bool:
    """The inner add, from its stream to its sum, is a part of the outer one's branch."""
    return inner.stream.comes_from(outer.stream) and outer.passes(inner.total)


def _describe(
    add: Residual,
    branch: tuple[Summand, ...],
    kind: Kind,
    order: int,
    contractions: Sequence[Value],
) -> ResidualAdd:
    node = add.total.node
    meta: Any = add.total.meta
    known = isinstance(meta, torch.Tensor)
    whole = replace(add, others=branch)
    inside = [c for c in contractions if c is not add.stream and whole.passes(c)]
    if any(term.is_contraction for term in add.others):
        inside.append(add.total)
    return ResidualAdd(
        kind=kind,
        module=module_of(node),
        source=source_of(node),
        order=order,
        node=add.total.name,
        spelling=target_text(node),
        operand=add.skip.operand,
        skip=add.skip.factors[0].name,
        stream=add.stream.name,
        shape=tuple(s if isinstance(s, int) else str(s) for s in meta.shape) if known else (),
        dtype=dtype_text(meta.dtype) if known else "",
        branch=tuple(dict.fromkeys(module_of(value.node) for value in inside)),
    )
