"""Cost: what a plan sends and takes, as formulas of batch, sequence, width and world size.

The formulas are those by which a plan counts: :func:`~rfcompile.planning.link.link_bytes` and
:func:`~rfcompile.planning.link.link_seconds`, called with sympy symbols instead of numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import OptionError
from rfcompile.planning.link import Link, link_bytes, link_seconds, sent_elements
from rfcompile.report.table import TableReport, table
from rfcompile.wire import exchanges

Shape = tuple[int, ...]


class Counted(Protocol):
    """A site with a format: what :class:`~rfcompile.planning.plan.Choice` has."""

    @property
    def site(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def calls(self) -> Mapping[Shape, int]: ...
    @property
    def itemsize(self) -> int: ...


@dataclass(frozen=True)
class CallCost:
    """What a site sends for a tensor of one shape, as sympy expressions.

    Args:
        format: the text of the format, "" for exact.
        often: how often in a batch, a sympy rational.
        bytes: that one rank sends.
        seconds: on the link, as a formula of ``bytes``; None without a link.
    """

    site: str
    format: str
    often: Any
    bytes: Any
    seconds: Any


@dataclass(frozen=True)
class Cost(TableReport):
    """What a plan sends and takes, as formulas: ``print`` it, or evaluate it with :meth:`at`.

    The symbols are sizes of what crosses: ``batch`` is its first dimension, ``width`` its last,
    ``sequence`` the one between (of several: ``dim1``, ``dim2``, ...). A dimension that differs
    from what most sites have has a symbol of its own, such as ``width_256``. ``world`` is the
    number of ranks of a collective; ``latency``, ``bandwidth`` and ``coding`` are those of
    :class:`~rfcompile.Link`. ``segments(p)`` is into how many segments an all-reduce on a CPU cuts
    a payload of p bytes: 1, 2, 4 or 8; ``rewrite(sympy.Piecewise)`` writes it out.

    Args:
        calls: one entry for each site and shape, in order of the model.
        values: of each symbol, as it was scored and as the link has it.
    """

    calls: tuple[CallCost, ...]
    values: Mapping[str, float]

    @property
    def bytes(self) -> Any:
        """A sympy expression of the bytes that one rank sends for one batch, forward."""
        return _sympy().Add(*(call.often * call.bytes for call in self.calls))

    @property
    def seconds(self) -> Any:
        """A sympy expression of the seconds of one batch, one site after another; None without a
        link.
        """
        if any(call.seconds is None for call in self.calls):
            return None
        return _sympy().Add(
            *(call.often * call.seconds.subs(_symbol("bytes"), call.bytes) for call in self.calls)
        )

    def at(self, **values: float) -> dict[str, float | None]:
        """``{"bytes": .., "seconds": ..}`` with these values of symbols, the others as scored.

        Raises:
            OptionError: there is no such symbol, or a value is not what the symbol can be.
        """
        for name, value in values.items():
            if name not in self.values:
                raise OptionError(name, value, f"the symbols are {', '.join(self.values)}.")
            if name not in _REAL and (type(value) is not int or value < 1):
                raise OptionError(name, value, "give a whole number above 0.")
            if name in _REAL and not (isinstance(value, (int, float)) and value >= 0):
                raise OptionError(name, value, "give a number, 0 or more.")
        known = {_symbol(name): value for name, value in {**self.values, **values}.items()}

        def number(formula: Any) -> float | None:
            return None if formula is None else float(formula.subs(known))

        return {"bytes": number(self.bytes), "seconds": number(self.seconds)}

    def lines(self) -> Iterator[str]:
        yield "what one rank sends for one batch"
        has_seconds = all(call.seconds is not None for call in self.calls)
        head = ["calls", "format", "bytes of a call", "seconds of a call"]
        rows = [head if has_seconds else head[:3]]
        alike: Counter[tuple[Any, ...]] = Counter()
        for call in self.calls:
            alike[call.format or "exact", call.bytes, call.seconds] += call.often
        for (fmt, sent, seconds), often in alike.items():
            rows.append([str(often), fmt, str(sent), str(seconds)][: len(rows[0])])
        yield from table(rows)
        yield " ".join(f"{name}={value:g}" for name, value in self.values.items())


def cost_of(choices: Iterable[Counted], kind: str, link: Link | None, batches: int) -> Cost:
    """The formulas of sites in their formats; ``batches`` is how many their calls are of."""
    choices = list(choices)
    names = _Names.of(choices)
    values: dict[str, float] = dict(names.values)
    if link is not None:
        values |= {"world": link.world} if link.carrier != "send" else {}
        values |= {"latency": link.latency, "bandwidth": link.bandwidth}
        values |= {"coding": link.coding} if math.isfinite(link.coding) else {}
    calls = [
        _call(choice, names.symbols(shape), _sympy().Rational(times, batches), kind, link)
        for choice in choices
        for shape, times in choice.calls.items()
    ]
    return Cost(tuple(calls), values)


def _call(choice: Counted, sizes: list[Any], often: Any, kind: str, link: Link | None) -> CallCost:
    fmt = QuantFormat.parse(choice.format) if choice.format else None
    how = link or Link(math.inf)
    numel = sent_elements(_sympy().Mul(*sizes), kind, how.carrier, _symbol("world"))
    exact = _tidy(numel) * choice.itemsize
    sent = link_bytes(
        how.carrier, numel, choice.itemsize, fmt, _symbol("world"), how.device, _segments
    )
    seconds = None
    if link is not None:
        coding = _symbol("coding") if math.isfinite(link.coding) else _sympy().oo
        coded = 0 if fmt is None else exact
        carrier = _symbol("latency"), _symbol("bandwidth")
        seconds = link_seconds(_symbol("bytes"), coded, *carrier, coding)
    return CallCost(choice.site, choice.format, often, _tidy(sent), seconds)


# ---- names of dimensions -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """The name of each dimension of a site's output, and the size that the plain names mean."""

    usual: Mapping[str, int]
    values: Mapping[str, int]

    @classmethod
    def of(cls, choices: Iterable[Counted]) -> _Names:
        counts: dict[str, Counter[int]] = {}
        for choice in choices:
            for shape, times in choice.calls.items():
                for name, n in zip(_positions(len(shape)), shape, strict=True):
                    counts.setdefault(name, Counter())[n] += times
        usual = {name: sizes.most_common(1)[0][0] for name, sizes in counts.items()}
        values = {
            name if n == usual[name] else f"{name}_{n}": n
            for name, sizes in counts.items()
            for n, _ in sizes.most_common()
        }
        return cls(usual, values)

    def symbols(self, shape: Shape) -> list[Any]:
        pairs = zip(_positions(len(shape)), shape, strict=True)
        return [_symbol(name if n == self.usual[name] else f"{name}_{n}") for name, n in pairs]


def _positions(dims: int) -> list[str]:
    if dims <= 1:
        return ["width"][:dims]
    between = ["sequence"] if dims == 3 else [f"dim{i}" for i in range(1, dims - 1)]
    return ["batch", *between, "width"]


# ---- sympy, which is loaded on use --------------------------------------------------------------


def _sympy() -> Any:
    import sympy

    return sympy


_REAL = ("latency", "bandwidth", "coding")


def _symbol(name: str) -> Any:
    if name in _REAL:
        return _sympy().Symbol(name, nonnegative=True)
    return _sympy().Symbol(name, integer=True, positive=True)


def _segments(numel: Any, fmt: QuantFormat, device: torch.device) -> Any:
    """The default number of segments, as a function of the payload where the size decides it."""
    largest = 2**62
    if exchanges.default_segments(largest, fmt, device) == 1:
        return 1
    return _segments_function()(_tidy(fmt.payload_bytes(numel)))


@cache
def _segments_function() -> Any:
    sympy = _sympy()

    class segments(sympy.Function):  # type: ignore[misc,name-defined]  # its name is printed
        is_integer = True
        is_positive = True

        @classmethod
        def eval(cls, payload: Any) -> Any:
            found = exchanges.segments_of(int(payload)) if payload.is_Integer else None
            return None if found is None else sympy.Integer(found)

        def _eval_rewrite_as_Piecewise(self, payload: Any, **_: Any) -> Any:
            steps = [(n, payload >= n * exchanges.SEGMENT_BYTES) for n in exchanges.SEGMENTS]
            return sympy.Piecewise(*steps, (1, True))

    return segments


def _tidy(formula: Any) -> Any:
    """``floor((x + q - 1) / q)`` of a whole x as ``ceiling(x / q)``, ``-floor(-x)`` likewise."""
    sympy = _sympy()

    def rounded_up(floor: Any) -> Any:
        rest, extra = floor.args[0].as_independent(*floor.args[0].free_symbols, as_Add=True)[::-1]
        q = extra.q if extra.is_Rational else 0
        if q > 1 and extra.p == q - 1 and (rest * q).is_integer:
            return sympy.ceiling(rest)
        if floor.args[0].could_extract_minus_sign():
            return -sympy.ceiling(-floor.args[0])
        return floor

    return sympy.sympify(formula).replace(lambda e: isinstance(e, sympy.floor), rounded_up)
