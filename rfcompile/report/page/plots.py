"""Plots as static SVG: points, lines and bars, with the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rfcompile.report.page.texts import number, short_bytes

WIDTH, HEIGHT = 360, 232
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
BAR = 16


@dataclass(frozen=True)
class Points:
    """Data of a plot.

    Args:
        name: for the legend; style: a class of the style sheet, "c0" to "c5" or "limit".
        texts: what is said of each point when the pointer is on it; empty for none.
        is_line: the points are joined; is_step: by steps.
    """

    name: str
    style: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    texts: tuple[str, ...] = ()
    is_line: bool = False
    is_step: bool = False
    has_marks: bool = True


@dataclass(frozen=True)
class Axis:
    """A scale with its ticks; ``is_log``: values are above 0."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    write: Callable[[float], str] = number
    is_log: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high end."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear(
    label: str,
    values: Sequence[float],
    *,
    zero: bool = False,
    write: Callable[[float], str] = number,
) -> Axis:
    """A linear axis for finite values; ``zero``: it starts there."""
    low, high = min(values), max(values)
    low = min(0.0, low) if zero else low
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = _nice((high - low) / 5)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    room = 0.03 * (high - low)
    return Axis(label, low if zero else low - room, high + room, ticks, write)


def _nice(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    unit: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= step * 0.999)


def power(value: float) -> str:
    """A tick of a logarithmic axis: "5", "0.1", "1e-4"."""
    if 0.01 <= value < 10000:
        return number(value)
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def logarithmic(
    label: str, values: Sequence[float], *, write: Callable[[float], str] = power
) -> Axis:
    """A logarithmic axis for values above 0, with ticks at 1, 2 and 5 times powers of ten."""
    low, high = min(values), max(values)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [f * 10.0**e for e in range(first, last + 1) for f in (1, 2, 5)]
    start = max((s for s in steps if s <= low * 1.0001), default=steps[0])
    end = min((s for s in steps if s >= high * 0.9999 and s > start), default=steps[-1])
    inside = [s for s in steps if start <= s <= end]
    if len(inside) > 6:
        inside = [s for s in inside if abs(math.log10(s) - round(math.log10(s))) < 1e-9]
    stride = -(-len(inside) // 6)
    return Axis(label, start, end, tuple(inside[::stride]), write, is_log=True)


def plot(title: str, x: Axis, y: Axis, data: Sequence[Points]) -> str:
    """A figure with points and lines; points outside the axes are left at their edges."""
    body = "".join([*_axes(x, y), *(part for points in data for part in _points(x, y, points))])
    names = [(points.name, points.style) for points in data if points.name]
    return _figure(title, HEIGHT, body, names)


Series = tuple[str, str, Sequence[float]]
"""(name, style, values)."""


def bars(title: str, labels: Sequence[str], data: Sequence[Series]) -> str:
    """A figure with horizontal bars of bytes: for each label one bar a series."""
    top = max((value for _, _, values in data for value in values), default=1.0) or 1.0
    group = BAR * len(data) + 34
    width = WIDTH - 96
    parts = []
    for i, label in enumerate(labels):
        y = 18 + i * group
        parts.append(f'<text class="t" x="8" y="{y}">{escape(label)}</text>')
        for j, (name, style, values) in enumerate(data):
            size = max(1.0, width * values[i] / top)
            at = y + 7 + j * BAR
            said = f"{label}, {name}: {values[i]:,.0f} bytes"
            parts.append(
                f'<rect class="{style}" x="8" y="{at}" width="{size:.1f}" height="{BAR - 4}" '
                f'rx="2"><title>{escape(said)}</title></rect>'
                f'<text class="v" x="{size + 14:.1f}" y="{at + 10}">{short_bytes(values[i])}</text>'
            )
    names = [(name, style) for name, style, _ in data]
    return _figure(title, max(90, group * len(labels) + 8), "".join(parts), names)


def _figure(title: str, height: int, body: str, names: Sequence[tuple[str, str]]) -> str:
    legend = "".join(
        f'<span><i class="key {style}"></i>{escape(name)}</span>' for name, style in names
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f'<p class="legend">{legend}</p></figure>'
    )


def _axes(x: Axis, y: Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in y.ticks:
        at = _y(y, tick)
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>'
        yield f'<text class="a e" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(y.write(tick))}</text>'
    for tick in x.ticks:
        at = _x(x, tick)
        yield f'<path class="grid" d="M{at:.1f} {bottom}v4"/>'
        yield f'<text class="a m" x="{at:.1f}" y="{bottom + 16}">{escape(x.write(tick))}</text>'
    yield f'<path class="axis" d="M{LEFT} {bottom}H{right}"/>'
    middle = (LEFT + right) / 2
    yield f'<text class="a m" x="{middle}" y="{HEIGHT - 6}">{escape(x.label)}</text>'
    centre = (TOP + bottom) / 2
    yield (
        f'<text class="a m" transform="translate(10 {centre}) rotate(-90)">{escape(y.label)}</text>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, axis.place(value)))


def _y(axis: Axis, value: float) -> float:
    bottom = HEIGHT - BOTTOM
    return bottom - (bottom - TOP) * min(1.0, max(0.0, axis.place(value)))


def _points(x: Axis, y: Axis, points: Points) -> Iterator[str]:
    places = [(_x(x, a), _y(y, b)) for a, b in zip(points.x, points.y, strict=True)]
    if points.is_line and places:
        yield f'<path class="line {points.style}" d="{_path(places, points.is_step)}"/>'
    if points.has_marks:
        for i, (a, b) in enumerate(places):
            said = f"<title>{escape(points.texts[i])}</title>" if points.texts else ""
            at = f'cx="{a:.1f}" cy="{b:.1f}" r="3.2"'
            yield f'<circle class="{points.style}" {at}>{said}</circle>'


def _path(places: Sequence[tuple[float, float]], is_step: bool) -> str:
    (a, b), *rest = places
    path = f"M{a:.1f} {b:.1f}"
    for a, b in rest:
        path += f"H{a:.1f}V{b:.1f}" if is_step else f"L{a:.1f} {b:.1f}"
    return path
