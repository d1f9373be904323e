"""Table and picture of the study of attention and Token Graying."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pictures
from pictures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

Rows = list[dict[str, Any]]


def _part(rows: Rows, name: str) -> Rows:
    return [row for row in rows if row["part"] == name]


def _by_arm(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return found


def _spread(values: list[float | None], digits: int = 3) -> str:
    if None in values:
        return "singular"
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.{digits}f} ±{deviation:.{digits}f}"


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else mean(values)


def table(rows: Rows) -> str:
    """Means over seeds with the standard deviation."""
    lines: list[str] = []
    for task in ("language", "digits"):
        mine = _part(rows, task)
        if not mine:
            continue
        lines += ["", f"{task}: {mine[0]['task']}"]
        lines.append(
            f"{'arm':16} {'seeds':>5} {'loss':>14} {'accuracy %':>13} {'log cond first in':>18} "
            f"{'mean in':>14} {'Frobenius/sqrt(N)':>18}"
        )
        for arm, seeds in _by_arm(mine).items():
            accuracies = [100 * r["accuracy"] for r in seeds if r["accuracy"] is not None]
            lines.append(
                f"{arm:16} {len(seeds):5} {_spread([r['validation_loss'] for r in seeds]):>14} "
                f"{_spread(accuracies, 1) if accuracies else '':>13} "
                f"{_spread([r['condition_in'][0] for r in seeds], 2):>18} "
                f"{_spread([_mean(r['condition_in']) for r in seeds], 2):>14} "
                f"{_spread([mean(r['frobenius']) / r['bound'] for r in seeds], 2):>18}"
            )
    for row in _part(rows, "time"):
        lines += ["", f"training step, {row['key']}: times that of the plain model"]
        lines.append("  ".join(f"{arm} {ratio:.3f}" for arm, ratio in row["ratios"].items()))
    for row in _part(rows, "length"):
        times = "  ".join(f"{a} {t['median_ms']:.1f}" for a, t in row["times"].items())
        lines.append(f"head {row['width']}, {row['length']} tokens, ms: {times}")
    return "\n".join(lines)


STYLES = {
    "softmax": ("softmax", BLACK, "-"),
    "s^3, row": ("s³, scaled by the row", VERMILLION, "-"),
    "s^3, learned": ("s³, learned scale", ORANGE, "-"),
    "s^2, row": ("s², scaled by the row", BLUE, "-"),
    "dct 0.95": ("softmax, Token Graying by DCT", GREEN, "-"),
    "svd 0.7": ("softmax, Token Graying by SVD", PURPLE, "-"),
    "softmax (SDPA)": ("softmax", BLACK, "-"),
    "s^3, quadratic": ("s³, computed pair by pair", VERMILLION, "-"),
    "s^2, quadratic": ("s², computed pair by pair", BLUE, "-"),
    "s^2, linear": ("s², computed in linear time", BLUE, "--"),
    "s^1, linear": ("s, computed in linear time", SKY, "--"),
}
"""By method: what it means, its colour, and the line of the form that it is computed in."""


def _method(arm: str) -> str:
    """Of an arm, with or without skips."""
    return "softmax" if arm == "free" else arm.removeprefix("free, ")


def _line(name: str) -> dict[str, Any]:
    label, color, style = STYLES.get(name, (name, "0.5", "-"))
    return {"label": label, "color": color, "linestyle": style}


def plot(rows: Rows, path: Path) -> None:
    """Loss, accuracy, and time against length; beside them a picture of condition numbers."""
    figure, axes = pictures.panels(2, 2, 7.4, height_ratios=(1, 1.1))
    (learned, accurate), lengths = axes
    _loss(learned, _part(rows, "language"))
    _accuracy(accurate, _part(rows, "digits"))
    for axis, width in zip(lengths, (16, 64), strict=True):
        _length(axis, [row for row in _part(rows, "length") if row["width"] == width])
        axis.set_title(f"Time of a causal attention,\n4 heads of width {width}, one core")
    limits = [limit for axis in lengths for limit in axis.get_ylim()]
    for axis in lengths:
        axis.set_ylim(min(limits), max(limits))
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)
    if _part(rows, "digits"):
        _conditions(_part(rows, "digits"), pictures.beside(path, "condition"))


def _loss(axis: Any, rows: Rows) -> None:
    """Without the first tenth of the steps, in which all methods fall alike."""
    for arm, mine in _by_arm(rows).items():
        first, last = len(mine[0]["losses"]) // 10, len(mine[0]["losses"])
        seeds = [pictures.smooth(row["losses"])[first:] for row in mine]
        pictures.band(axis, range(first + 1, last + 1), seeds, lw=1.3, **_line(arm))
    axis.set(title="A GPT on Shakespeare:\ntraining loss (mean of 20 steps)")
    axis.set(xlabel="training step", ylabel="loss, nats a byte")


def _accuracy(axis: Any, rows: Rows) -> None:
    """A row a method: its seeds, and their mean as a line; hollow without skips."""
    arms = _by_arm(rows)
    methods = list(dict.fromkeys(map(_method, arms)))
    for arm, mine in arms.items():
        line, free = _line(_method(arm)), arm.startswith("free")
        place = methods.index(_method(arm)) + (0.15 if free else -0.15)
        values = [100 * row["accuracy"] for row in mine]
        fill = "none" if free else line["color"]
        axis.plot(values, [place] * len(values), "o", mec=line["color"], mfc=fill, ms=6)
        axis.plot([mean(values)] * 2, [place - 0.25, place + 0.25], color=line["color"], lw=1.6)
    short = [
        STYLES.get(m, (m,))[0].replace("softmax, Token Graying by", "Graying,") for m in methods
    ]
    axis.set_yticks(
        range(len(methods)), [name.replace(", scaled by the", ", by") for name in short]
    )
    axis.invert_yaxis()
    axis.set_title("A ViT on digits: accuracy\n(hollow: without skip connections)")
    axis.set_xlabel("right answers, % (bar: mean of the seeds)")


def _length(axis: Any, rows: Rows) -> None:
    lengths = [row["length"] for row in rows]
    for name in rows[0]["times"] if rows else ():
        times = [row["times"][name]["median_ms"] for row in rows]
        axis.plot(lengths, times, marker="o", ms=4, **_line(name))
    axis.set(xlabel="tokens", ylabel="forward and backward, ms", xscale="log", yscale="log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")


def _conditions(rows: Rows, path: Path) -> None:
    """Of the tokens that enter each block, with skips and without, each on its own scale."""
    figure, axes = pictures.panels(1, 2, 4.4)
    for axis, free in zip(axes[0], (False, True), strict=True):
        arms = {a: m for a, m in _by_arm(rows).items() if a.startswith("free") is free}
        for arm, mine in arms.items():
            seeds = [row["condition_in"] for row in mine if None not in row["condition_in"]]
            if seeds:
                blocks = range(1, len(seeds[0]) + 1)
                pictures.band(axis, blocks, seeds, marker="o", ms=4, **_line(_method(arm)))
                axis.set_xticks(blocks)
        axis.set_title("Without skip connections" if free else "With skip connections")
        axis.set(xlabel="block", ylabel="condition number of its input,\nnatural logarithm")
    figure.suptitle("A ViT on digits, after training", fontsize=10)
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)
