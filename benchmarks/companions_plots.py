"""Table and picture of the study of attention and Token Graying."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

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


def plot(rows: Rows, path: Path) -> None:
    """Loss against the step, time against length, condition numbers by block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    (learned, conditioned), lengths = axes
    for number, (arm, mine) in enumerate(_by_arm(_part(rows, "language")).items()):
        for row in mine:
            losses = row["losses"]
            smooth = [mean(losses[max(0, i - 20) : i + 1]) for i in range(len(losses))]
            label = arm if row is mine[0] else None
            learned.plot(range(1, len(smooth) + 1), smooth, color=f"C{number}", label=label, lw=0.8)
    learned.set(title="Shakespeare: training loss, mean of 20 steps", xlabel="step", ylabel="nats")
    for number, (arm, mine) in enumerate(_by_arm(_part(rows, "digits")).items()):
        values = [mean(v) for v in zip(*(row["condition_in"] for row in mine), strict=True)]
        style = ":" if arm.startswith("free") else "-"
        conditioned.plot(values, style, marker="o", label=arm, color=f"C{number % 10}")
    conditioned.set(
        title="Digits: log condition number of what enters each block, after training",
        xlabel="block",
    )
    for axis, width in zip(lengths, (16, 64), strict=True):
        mine = [row for row in _part(rows, "length") if row["width"] == width]
        for arm in mine[0]["times"] if mine else ():
            xs = [row["length"] for row in mine]
            axis.plot(xs, [row["times"][arm]["median_ms"] for row in mine], marker="o", label=arm)
        axis.set(title=f"Causal attention, 4 heads of {width}, forward and backward, one core")
        axis.set(xlabel="tokens", ylabel="ms", yscale="log")
        axis.set_xscale("log", base=2)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
