"""Where a model adds what it skipped: every residual add of a graph, by data flow alone."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from rfcompile.graph import dtype_text, module_of, source_of, target_text
from rfcompile.passes.canonicalize import (
    Summand,
    carried,
    is_convolution,
    is_norm,
    is_part,
    is_resampling,
    is_smaller,
    projected,
    summands,
)
from rfcompile.passes.dataflow import Dataflow, Value
from rfcompile.pipeline import PassResult

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
        return " ".join(part for part in (self.module, self.source) if part) or "(unknown place)"


@dataclass(frozen=True)
class FindResiduals:
    """Find the residual adds of a graph; the graph stays as it is and the facts are ResidualAdds.

    A sum (see :func:`~rfcompile.passes.canonicalize.summands`) is a residual add if for one of its
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
    finder = _Finder(Dataflow(gm))
    found = finder.find()
    kinds = _kinds(found, finder.streams(found))
    return tuple(
        _describe(add, kind, order, finder.contractions)
        for order, (add, kind) in enumerate(zip(found, kinds, strict=True))
    )


@dataclass(frozen=True)
class _Add:
    """``total`` adds the term ``skip``, made of ``stream``, and others: the branch."""

    total: Value
    skip: Summand
    stream: Value
    others: tuple[Summand, ...]
    is_projection: bool = False

    def passes(self, value: Value) -> bool:
        """The value lies on the way from the stream to the branch's end, ends included."""
        return value.comes_from(self.stream) and any(
            factor.comes_from(value) for term in self.others for factor in term.factors
        )


class _Finder:
    def __init__(self, flow: Dataflow) -> None:
        self.values = flow.values
        self.contractions = [value for value in flow.values if value.is_contraction]
        self.terms = {value: terms for value in flow.values if (terms := summands(value))}
        self.found: dict[Value, _Add] = {}

    def find(self) -> list[_Add]:
        for total, terms in self.terms.items():
            pairs = list(itertools.permutations(terms, 2))
            for rule in (self._identity, self._projection):
                for skip, branch in pairs:
                    if total not in self.found and (stream := rule(total, skip, branch)):
                        others = tuple(term for term in terms if term is not skip)
                        is_projection = rule == self._projection
                        self.found[total] = _Add(total, skip, stream, others, is_projection)
        return list(self.found.values())

    # ---- the skip is a copy --------------------------------------------------------------------

    def _identity(self, total: Value, skip: Summand, branch: Summand) -> Value | None:
        if not _may_skip(total, skip):
            return None
        for stream, is_partial in self._sources(skip.factors[0]):
            if any(factor.comes_from(stream) for factor in branch.factors):
                return stream if self._enters(stream, branch, is_partial) else None
        return None

    def _sources(self, skip: Value) -> Iterator[tuple[Value, bool]]:
        """What the skip is a copy of, nearest first, and whether only of a part."""
        pending = [(skip, False)]
        while pending:
            value, is_partial = pending.pop(0)
            yield value, is_partial
            source = carried(value)
            if source is not None:
                pending.append((source, is_partial or is_part(value)))
            elif value not in self.found:
                kept = (term for term in self.terms.get(value, ()) if _may_skip(value, term))
                pending += [(term.factors[0], is_partial) for term in kept]

    def _enters(self, stream: Value, branch: Summand, is_partial: bool) -> bool:
        ends = branch.factors
        if any(
            _contracts_to(entrance, ends, branch.is_contraction)
            for entrance in self._entrances(stream, is_partial)
        ):
            return True
        return (
            stream.is_mixed
            and not is_partial
            and any(end.contracts(stream) for end in ends)
            and not any(
                add.comes_from(stream) and any(end.comes_from(add) for end in ends)
                for add in self.found
            )
        )

    def _entrances(self, stream: Value, is_partial: bool) -> Iterator[Value]:
        """What computes with the stream itself: not the sums in which it is a term."""
        pending = [stream]
        while pending:
            value = pending.pop()
            for user in value.users:
                if carried(user) is value:
                    if not (is_partial and is_part(user)):
                        pending.append(user)
                elif not any(value in term.factors[:1] for term in self.terms.get(user, ())):
                    yield user
            if value is not stream:
                yield value  # a copy may be the branch's factor itself

    # ---- the skip is a projection --------------------------------------------------------------

    def _projection(self, total: Value, skip: Summand, branch: Summand) -> Value | None:
        if not _may_skip(total, skip) or len(branch.factors) != 1:
            return None
        (end,) = branch.factors
        steps: list[Value] = []
        value: Value | None = skip.factors[0]
        while value is not None:
            is_projected = any(is_convolution(step) or is_resampling(step) for step in steps)
            if is_projected and end.comes_from(value) and self._is_block(value, end):
                return value
            steps.append(value)
            value = carried(value) or projected(value)
        return None

    def _is_block(self, stream: Value, end: Value) -> bool:
        inside = [v for v in self.values[stream.index + 1 : end.index + 1] if v.comes_from(stream)]
        inside = [value for value in inside if end.comes_from(value)]
        matrices = [v for v in inside if v.is_contraction and not is_resampling(v)]
        return (
            len(matrices) >= 2
            and not any(value in self.found for value in inside)
            and any(map(self._bends, inside))
        )

    def _bends(self, value: Value) -> bool:
        is_linear = value.is_contraction or carried(value) is not None or value in self.terms
        return not (is_linear or is_norm(value) or value.operator == "getitem")

    # ---- streams -------------------------------------------------------------------------------

    def streams(self, found: Sequence[_Add]) -> dict[_Add, Value]:
        """Where each add's stream begins: at what contractions, embeddings or inputs gave it.

        Going back from a skip, a residual add leads on to its own skip, and any other operator but
        a contraction to its main input.
        """
        origins: dict[Value, Value] = {}
        for value in self.values:
            add = self.found.get(value)
            before = add.stream if add else None if value.is_contraction else _main_input(value)
            origins[value] = origins[before] if before else value
        return {add: origins[add.stream] for add in found}


def _may_skip(total: Value, term: Summand) -> bool:
    if term.is_negative or len(term.factors) != 1:
        return False
    (value,) = term.factors
    meta = value.meta
    if not isinstance(meta, torch.Tensor):
        return True
    is_float = meta.is_floating_point() or meta.is_complex()
    return is_float and meta.dim() > 0 and not is_smaller(value, total)


def _contracts_to(start: Value, ends: Sequence[Value], is_contraction: bool) -> bool:
    return any(
        end.contracts(start) or (end.comes_from(start) and (start.is_contraction or is_contraction))
        for end in ends
    )


def _main_input(value: Value) -> Value | None:
    """The operand of as many dimensions as the value, else the first."""
    operands = list(value.operands.values())
    dims = value.meta.dim() if isinstance(value.meta, torch.Tensor) else None
    same = (o for o in operands if isinstance(o.meta, torch.Tensor) and o.meta.dim() == dims)
    return next(same, operands[0] if operands else None)


# ---- what is found ------------------------------------------------------------------------------


def _kinds(found: Sequence[_Add], streams: dict[_Add, Value]) -> list[Kind]:
    """Block, unless one lies in the branch of another.

    Then the outer one is long if both are on one stream and it spans two or more adds of it, or one
    that starts where it starts; or if the inner stream has more adds. Else the inner one is local.
    """
    sizes = Counter(streams.values())
    kinds: dict[_Add, Kind] = dict.fromkeys(found, "block")
    for outer in found:
        inside = [add for add in found if add is not outer and _holds(outer, add)]
        own = [add for add in inside if streams[add] is streams[outer]]
        is_long = len(own) > 1 or any(add.stream is outer.stream for add in own)
        for inner in inside:
            if inner not in own and sizes[streams[inner]] > sizes[streams[outer]]:
                is_long = True
            elif not is_long:
                kinds[inner] = "local"
        if is_long:
            kinds[outer] = "long"
    return ["projection" if add.is_projection else kinds[add] for add in found]


def _holds(outer: _Add, inner: _Add) -> bool:
    """The inner add, from its stream to its sum, is a part of the outer one's branch."""
    return inner.stream.comes_from(outer.stream) and outer.passes(inner.total)


def _describe(add: _Add, kind: Kind, order: int, contractions: Sequence[Value]) -> ResidualAdd:
    node = add.total.node
    meta: Any = add.total.meta
    known = isinstance(meta, torch.Tensor)
    inside = [c for c in contractions if c is not add.stream and add.passes(c)]
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
