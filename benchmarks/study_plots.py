"""The residual study's table and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pictures
from pictures import BLACK, BLUE, GREEN, INDIGO, OLIVE, ORANGE, PURPLE, SKY, VERMILLION, WINE

Rows = list[dict[str, Any]]

SHOWN = ("4b tensor tread", "4b g128 rise", "3b g128 rise", "2b g128 rise")
ROTATED = " rotated"
FLOOR = 1e-3
"""Nats: less is noise, and does not show on a logarithmic scale."""

MAIN = ("residual+muon", "residual+adamw", "free+muon+annealed", "free+muon", "free+adamw")
"""The arms of the main picture; with the rotated wire they are six lines."""

COLORS = {
    "residual+muon": BLUE, "residual+adamw": SKY, "free+muon+annealed": GREEN,
    "free+muon": VERMILLION, "free+adamw": ORANGE, "residual+muon+orthogonal": INDIGO,
    "free+muon-orthogonal": PURPLE, "free+muon-rotary": BLACK, "free+muon-temperature": WINE,
    "free+muon+annealed-temperature": OLIVE,
}  # fmt: skip
"""An arm has its colour in every picture, this study's and those of a trained model."""

WORDS = {
    "free": "residual-free", "+muon": "Muon", "+adamw": "AdamW", "+annealed": "skips annealed",
    "+orthogonal": "orthogonal start", "-orthogonal": "no orthogonal start",
    "-rotary": "learned positions", "-temperature": "no temperature rule",
}  # fmt: skip


def meaning(arm: str) -> str:
    """The name of an arm in plain words.

    >>> meaning("free+muon+annealed")
    'residual-free, skips annealed, Muon'
    """
    first, *more = arm.split(", ")
    name, _, rate = first.partition(" ")
    found = []
    for part in re.split(r"(?=[+-])", name):
        plain = f"without {part[1:]}" if part.startswith("-") else part.lstrip("+")
        found.append(WORDS.get(part, plain))
    if "skips annealed" in found:  # what becomes of the skips stands before the optimizer
        found.insert(1, found.pop(found.index("skips annealed")))
    return ", ".join([*found, *([f"rate {rate}"] if rate else []), *more])


def color_of(arm: str, number: int) -> str:
    """An arm of its own gets a colour by its number."""
    return COLORS.get(arm) or list(COLORS.values())[number % len(COLORS)]


def by_arm(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def is_stream(site: str) -> bool:
    return site.rpartition(".")[2].isdigit()


def peaks(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Excess kurtosis where it was measured: the largest of a cut, and the last stream's."""
    streams = [
        [v["elements"] for name, v in sites.items() if is_stream(name)]
        for sites in row["kurtosis"].values()
    ]
    return [max(values[:-1], default=0.0) for values in streams], [v[-1] for v in streams]


def last_peak(row: dict[str, Any]) -> float:
    """The largest excess kurtosis of any site at the end, branches too."""
    return max(v["elements"] for v in list(row["kurtosis"].values())[-1].values())


def increase(rows: Rows, boundary: str, fmt: str) -> float:
    return mean(row["increases"][boundary][fmt] for row in rows)


def table(rows: Rows) -> str:
    """A line an arm: means over seeds and half the range of the loss."""
    lines = []
    for boundary in ("stream", "cut", "branch"):
        if not rows[0]["increases"][boundary]:  # a model of one block has no cut
            continue
        lines += ["", f"Increase of the validation loss by quantizing every {boundary}:"]
        lines.append(
            f"{'arm':32} {'seeds':>5} {'loss':>13} {'kurtosis':>9}"
            + "".join(f"{name:>17}" for name in SHOWN)
        )
        for arm, mine in by_arm(rows).items():
            losses = [row["validation_loss"] for row in mine]
            spread = (max(losses) - min(losses)) / 2
            start = f"{len(mine):5} {mean(losses):6.3f} ±{spread:.3f} "
            start += f"{max(map(last_peak, mine)):9.2f}"
            lines.append(f"{arm:32} {start}" + _cells(mine, boundary, ""))
            if arm == "residual+muon":
                lines.append(f"{arm + ', Hadamard':32} {start}" + _cells(mine, boundary, ROTATED))
    return "\n".join(lines)


def _cells(rows: Rows, boundary: str, suffix: str) -> str:
    return "".join(f"{increase(rows, boundary, name + suffix):17.3f}" for name in SHOWN)


SIZES = "g128 rise", "tensor tread"
BITS = (4, 3, 2)


def plot(rows: Rows, path: Path) -> None:
    """The main picture, and beside it those of the kurtosis and of the parts of the recipe."""
    arms = by_arm(rows)
    main = {arm: arms[arm] for arm in MAIN if arm in arms}
    main = main or dict(list(arms.items())[: pictures.AT_MOST])
    _main(main, path)
    _kurtosis(main, pictures.beside(path, "kurtosis"))
    rest = {arm: mine for arm, mine in arms.items() if arm not in main}
    if rest:
        _recipe(arms, rest, pictures.beside(path, "recipe"))


def _main(arms: dict[str, Rows], path: Path) -> None:
    """Training loss, and the loss gained by quantizing cuts and branches."""
    first = next(iter(arms.values()))[0]
    boundary = "cut" if first["increases"]["cut"] else "stream"
    sent, (group, tensor) = "what a pipeline stage sends", SIZES
    figure, axes = pictures.panels(2, 2, 7)
    loss, *gained = axes.flat
    _losses(loss, arms)
    loss.set_title("Training loss in full precision\n(mean of 20 steps)")
    _increases(gained[0], arms, boundary, group)
    gained[0].set_title(f"Quantizing {sent},\na scale for 128 values")
    _increases(gained[1], arms, boundary, tensor)
    gained[1].set_title(f"Quantizing {sent},\none scale a tensor")
    _increases(gained[2], arms, "branch", group)
    gained[2].set_title(
        "Quantizing what a tensor-parallel\nall-reduce sums, a scale for 128 values"
    )
    limits = [limit for axis in gained for limit in axis.get_ylim()]
    for axis in gained:
        axis.set_ylim(min(limits), max(limits))
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)


def _losses(axis: Any, arms: dict[str, Rows]) -> None:
    """Without the first tenth of the steps, in which all of them fall alike."""
    for number, (arm, mine) in enumerate(arms.items()):
        first, last = mine[0]["steps"] // 10, min(row["steps"] for row in mine)
        seeds = [pictures.smooth(row["losses"])[first:last] for row in mine]
        steps = range(first + 1, last + 1)
        label, color = meaning(arm), color_of(arm, number)
        pictures.band(axis, steps, seeds, color, label=label, lw=1.3)
    axis.set(xlabel="training step", ylabel="loss, nats a byte")


def _increases(
    axis: Any, arms: dict[str, Rows], boundary: str, fmt: str, rotated: bool = True
) -> None:
    """Points of a width stand beside each other, so that their error bars can be seen."""
    small = []
    lines = [
        (arm, mine, suffix, color_of(arm, number))
        for number, (arm, mine) in enumerate(arms.items())
        for suffix in ("", ROTATED) if not suffix or (rotated and arm == "residual+muon")
    ]  # fmt: skip
    for i, (arm, mine, suffix, color) in enumerate(lines):
        names = [f"{bits}b {fmt}{suffix}" for bits in BITS]
        values = [[row["increases"][boundary][name] for row in mine] for name in names]
        means, below, above = zip(*map(pictures.range_of, values), strict=True)
        if max(means) < FLOOR:  # nothing to lose
            small.append(meaning(arm).rpartition(", ")[2])
            continue
        xs = [place + 0.03 * (i - (len(lines) - 1) / 2) for place in range(len(BITS))]
        label = meaning(arm) + (", Hadamard rotation on the wire" if suffix else "")
        axis.plot(xs, means, "o:" if suffix else "o-", ms=4, color=color, label=label)
        if len(mine) > 1:
            axis.errorbar(xs, means, [below, above], fmt="none", ecolor=color, elinewidth=1.2)
    if small:
        text = f"gain less than {FLOOR:g} nats:\n" + "; ".join(small)
        axis.text(0.03, 0.97, text, transform=axis.transAxes, va="top", fontsize=8.5)
    axis.set_xticks(range(len(BITS)), [str(bits) for bits in BITS])
    axis.set(xlabel="bits a value", ylabel="loss gained, nats a byte", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")


def _kurtosis(arms: dict[str, Rows], path: Path) -> None:
    """Over the training: of the cuts, and of the last block's output."""
    figure, axes = pictures.panels(1, 2, 4.2, sharey=True)
    for number, (arm, mine) in enumerate(arms.items()):
        steps = [int(step) for step in mine[0]["kurtosis"]]
        for axis, seeds in zip(axes[0], zip(*map(peaks, mine), strict=True), strict=True):
            label = meaning(arm)
            pictures.band(axis, steps, list(seeds), color_of(arm, number), label=label, marker=".")
    axes[0][0].set_title("What pipeline stages send:\nthe largest of all blocks but the last")
    axes[0][1].set_title("The last block's output,\nwhich no stage sends")
    for axis in axes[0]:
        axis.set_xlabel("training step")
        axis.axhline(0, color="0.6", lw=0.8, zorder=0)
    axes[0][0].set_ylabel("excess kurtosis (of a Gaussian: 0)")
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)


def _recipe(arms: dict[str, Rows], rest: dict[str, Rows], path: Path) -> None:
    """What the parts of the recipe are worth: each left out or added, beside the whole."""
    start = {a: m for a, m in arms.items() if a == "free+muon" or _dropped(a, rest)}
    wholes = ("residual+muon", "free+muon+annealed")
    skips = {a: m for a, m in arms.items() if a in wholes or (a in rest and a not in start)}
    boundary = "cut" if next(iter(rest.values()))[0]["increases"]["cut"] else "stream"
    columns = [_at_most(found) for found in (start, skips) if found.keys() & rest.keys()]
    figure, axes = pictures.panels(2, len(columns), 7.4, sharey="row")
    for axis in axes.flat:
        axis.tick_params(labelleft=True)
    for column, found in enumerate(columns):
        loss, gained = axes[:, column]
        _losses(loss, found)
        _increases(gained, found, boundary, SIZES[0], rotated=False)
        title = (
            "No skips from the start"
            if found.keys() <= start.keys()
            else "Skips, at first or always"
        )
        loss.set_title(f"{title}:\ntraining loss (mean of 20 steps)")
        gained.set_title(f"{title}: quantizing\nwhat a pipeline stage sends")
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)


def _dropped(arm: str, rest: dict[str, Rows]) -> bool:
    return arm in rest and rest[arm][0]["recipe"]["skips"] == "dropped"


def _at_most(arms: dict[str, Rows]) -> dict[str, Rows]:
    """The first ones: the table has all of them, of a search too."""
    return dict(list(arms.items())[: pictures.AT_MOST])
