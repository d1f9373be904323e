"""The rule that says which sums of a graph are residual adds; see ``FindResiduals``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rfcompile.find.dataflow import Dataflow, Value
from rfcompile.find.sums import (
    Summand,
    carried,
    is_convolution,
    is_negation,
    is_norm,
    is_part,
    is_resampling,
    is_smaller,
    projected,
    summands,
)


@dataclass(frozen=True)
class Residual:
    """``total`` adds the term ``skip``, which is made of ``stream``, and others: the branch."""

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


class ResidualSums:
    """The residual adds of a graph, in order, and the streams that they are on."""

    def __init__(self, flow: Dataflow) -> None:
        self.values = flow.values
        self.terms = {value: terms for value in flow.values if (terms := summands(value))}
        self.found: dict[Value, Residual] = {}
        for total, terms in self.terms.items():
            residual = self._read(total, terms)
            if residual is not None:
                self.found[total] = residual

    def _read(self, total: Value, terms: Sequence[Summand]) -> Residual | None:
        for rule, is_projection in ((self._copied, False), (self._projected, True)):
            for skip, branch in itertools.permutations(terms, 2):
                stream = rule(skip, branch) if _may_skip(total, skip) else None
                if stream is not None:
                    others = tuple(term for term in terms if term is not skip)
                    return Residual(total, skip, stream, others, is_projection)
        return None

    # ---- the skip is a copy --------------------------------------------------------------------

    def _copied(self, skip: Summand, branch: Summand) -> Value | None:
        """The nearest tensor that the skip is a copy of and that enters the branch."""
        for stream, is_partial in self._sources(skip.factors[0]):
            if self._enters(stream, branch, is_partial):
                return stream
        return None

    def _sources(self, skip: Value) -> Iterator[tuple[Value, bool]]:
        """What the skip is a copy of, nearest first, and whether only of a part."""
        pending = {skip: (False, False)}
        while pending:
            value = next(iter(pending))
            is_partial, is_negative = pending.pop(value)
            if not is_negative:
                yield value, is_partial
            source = carried(value)
            if source is not None:
                parted = is_partial or is_part(value)
                pending[source] = parted, is_negative != is_negation(value)
            elif value not in self.found:
                terms = (term for term in self.terms.get(value, ()) if _may_skip(value, term))
                pending |= {term.factors[0]: (is_partial, is_negative) for term in terms}

    def _enters(self, stream: Value, branch: Summand, is_partial: bool) -> bool:
        """The branch contracts the stream, which enters it by itself (rules 3 and 4)."""
        ends = branch.factors
        if not any(end.comes_from(stream) for end in ends):
            return False
        copies, entrances = self._readers(stream, is_partial)
        if branch.is_contraction and any(end in copies for end in ends):
            return True
        if any(_contracted_on_the_way(entrance, branch) for entrance in entrances):
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

    def _readers(self, stream: Value, is_partial: bool) -> tuple[set[Value], list[Value]]:
        """The stream with its copies, and what computes with them but sums that they are terms of.

        If the skip is a part of the stream, other parts of it are not read: they are other tensors.
        """
        copies, entrances = {stream}, []
        pending = [stream]
        while pending:
            value = pending.pop()
            for user in value.users:
                if carried(user) is value:
                    if not (is_partial and is_part(user)) and user not in copies:
                        copies.add(user)
                        pending.append(user)
                elif all(term.factors != (value,) for term in self.terms.get(user, ())):
                    entrances.append(user)
        return copies, entrances

    # ---- the skip is a projection --------------------------------------------------------------

    def _projected(self, skip: Summand, branch: Summand) -> Value | None:
        """The nearest tensor that the skip projects and that the branch is a block on."""
        if len(branch.factors) != 1:
            return None
        is_projected = False
        value: Value | None = skip.factors[0]
        while value is not None and not is_negation(value):
            if is_projected and self._is_block(value, branch.factors[0]):
                return value
            is_projected |= is_convolution(value) or is_resampling(value)
            value = carried(value) or projected(value)
        return None

    def _is_block(self, stream: Value, end: Value) -> bool:
        inside = [
            value
            for value in self.values[stream.index + 1 : end.index + 1]
            if value.comes_from(stream) and end.comes_from(value)
        ]
        return (
            sum(value.is_contraction and not is_resampling(value) for value in inside) >= 2
            and any(map(self._bends, inside))
            and self.found.keys().isdisjoint(inside)
        )

    def _bends(self, value: Value) -> bool:
        is_linear = value.is_contraction or carried(value) is not None or value in self.terms
        return not (is_linear or is_norm(value) or value.operator == "getitem")

    # ---- the whole branch ----------------------------------------------------------------------

    def branch(self, add: Residual) -> tuple[Summand, ...]:
        """Its other terms, and those that are added later and computed beside it: ``x + f + g``."""
        terms, total = list(add.others), add.total
        while len(total.users) == 1 and total.users[0] not in self.found:
            (user,) = total.users
            later = [term for term in self.terms.get(user, ()) if term.factors != (total,)]
            beside = [f for t in later for f in t.factors if f.comes_from(add.stream)]
            if carried(user) is not total and not beside:
                break
            if any(factor.comes_from(add.total) for factor in beside):
                break
            terms += later
            total = user
        return tuple(terms)

    # ---- streams -------------------------------------------------------------------------------

    def streams(self) -> dict[Residual, Value]:
        """Where each add's stream begins: at the contraction, embedding or input that gave it.

        Going back from a skip, a residual add leads on to its own skip, and any other operator but
        a contraction to its main input.
        """
        origins: dict[Value, Value] = {}
        for value in self.values:
            add = self.found.get(value)
            before = add.stream if add else None if value.is_contraction else _main_input(value)
            origins[value] = origins[before] if before else value
        return {add: origins[add.stream] for add in self.found.values()}


def _may_skip(total: Value, term: Summand) -> bool:
    """Rule 1: it is added, spans the sum and is floating point."""
    if term.is_negative or len(term.factors) != 1:
        return False
    (value,) = term.factors
    meta = value.meta
    if not isinstance(meta, torch.Tensor):
        return True
    is_float = meta.is_floating_point() or meta.is_complex()
    return is_float and meta.dim() > 0 and not is_smaller(value, total)


def _contracted_on_the_way(start: Value, branch: Summand) -> bool:
    contracts = start.is_contraction or branch.is_contraction
    return any(
        end.contracts(start) or (contracts and end.comes_from(start)) for end in branch.factors
    )


def _main_input(value: Value) -> Value | None:
    """The operand of as many dimensions as the value, else the first."""
    operands = list(value.operands.values())
    dims = value.meta.dim() if isinstance(value.meta, torch.Tensor) else None
    same = (o for o in operands if isinstance(o.meta, torch.Tensor) and o.meta.dim() == dims)
    return next(same, operands[0] if operands else None)
