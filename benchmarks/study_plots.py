"""The residual study's table and pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

Rows = list[dict[str, Any]]

SHOWN = ("4b tensor tread", "4b g128 rise", "3b g128 rise", "2b g128 rise")
ROTATED = " rotated"


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


def plot(rows: Rows, path: Path) -> None:
    """Kurtosis and loss against the step, and the loss increase against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    boundary = "cut" if rows[0]["increases"]["cut"] else "stream"
    figure, axes = plt.subplots(2, 2, figsize=(14, 10), layout="constrained")
    (grown, per_tensor), (trained, grouped) = axes
    for number, (arm, mine) in enumerate(by_arm(rows).items()):
        color = f"C{number}"
        for row in mine:
            label = arm if row is mine[0] else None
            steps, (cuts, last) = [int(step) for step in row["kurtosis"]], peaks(row)
            grown.plot(steps, cuts, color=color, label=label)
            grown.plot(steps, last, ":", color=color, lw=0.8)
            smooth = [mean(row["losses"][max(0, i - 20) : i + 1]) for i in range(row["steps"])]
            trained.plot(range(1, row["steps"] + 1), smooth, color=color, label=label, lw=0.8)
        for axis, size, grid in ((per_tensor, "tensor", "tread"), (grouped, "g128", "rise")):
            styles = [("", "-")] + ([(ROTATED, ":")] if arm == "residual+muon" else [])
            for suffix, style in styles:
                bits = (4, 3, 2) if suffix else (8, 4, 3, 2)
                names = [f"{b}b {size} {grid}{suffix}" for b in bits]
                values = [max(increase(mine, boundary, n), 1e-4) for n in names]
                label = arm + (", Hadamard" if suffix else "")
                axis.plot(bits, values, style, marker="o", color=color, label=label)
    grown.set(title="Largest excess kurtosis of a cut; dotted: of the last stream", xlabel="step")
    grown.set_yscale("symlog", linthresh=1)
    trained.set(title="Training loss (mean of 20 steps)", xlabel="step", ylabel="nats")
    trained.set_yscale("log")
    for axis, title in (
        (per_tensor, "one scale a tensor, mid-tread"),
        (grouped, "groups of 128, mid-rise"),
    ):
        axis.set(title=f"Loss gained by quantizing every {boundary}, {title}", xlabel="bits")
        axis.set(ylabel="nats", yscale="log")
        axis.invert_xaxis()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
