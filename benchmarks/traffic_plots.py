"""The table and the picture of ``traffic.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


def places(rows: list[Row]) -> list[tuple[str, int]]:
    """Kinds and numbers of ranks; what was measured on one rank belongs to all numbers."""
    found = dict.fromkeys((r["kind"], r["world"]) for r in rows)
    several = {kind for kind, world in found if world > 1}
    return [place for place in found if place[1] > 1 or place[0] not in several]


def results(rows: list[Row], kind: str, world: int, task: str) -> dict[str, Row]:
    """By wire; those of one rank where there are none of this number."""
    mine = [r for r in rows if r["kind"] == kind and r["task"] == task]
    for ranks in (world, 1):
        if found := {r["wire"]: r for r in mine if r["world"] == ranks}:
            return found
    return {}


def change(losses: dict[str, Row], wire: str) -> float | None:
    """Of the loss, to that of float32, in percent."""
    values = [losses.get(w, {}).get("loss") for w in (wire, "float32")]
    return 100 * (values[0] / values[1] - 1) if all(values) else None


def table(rows: list[Row]) -> str:
    lines = [
        f"{'kind':12} ranks {'wire':>15} {'loss':>7} {'to float32':>10} {'ms':>7} {'iqr':>6} "
        f"{'x float32':>9} {'x bf16':>7} {'sent MB':>8} {'to report':>9}"
    ]
    for kind, world in places(rows):
        losses, times = (results(rows, kind, world, task) for task in ("loss", "time"))
        for wire in losses | times:
            line = f"{kind:12} {world:5} {wire:>15}"
            loss, clock = losses.get(wire, {}), times.get(wire, {})
            if error := loss.get("error") or clock.get("error"):
                lines.append(f"{line} fails: {error}")
                continue
            difference = change(losses, wire)
            line += f" {loss['loss']:7.4f}" if loss else " " * 8
            line += " " * 11 if difference is None else f" {difference:+9.2f}%"
            if clock:
                line += f" {clock['median_ms']:7.1f} {clock['iqr_ms']:6.1f}"
                for base, width in (("float32", 9), ("bf16", 7)):
                    known = times.get(base, {}).get("median_ms")
                    faster = f"{known / clock['median_ms']:.2f}" if known else ""
                    line += f" {faster:>{width}}"
                line += f" {clock['sent_bytes'] / 1e6:8.3f}"
                if expected := clock["predicted_bytes"]:
                    line += f" {100 * (clock['sent_bytes'] / expected - 1):+8.1f}%"
            lines.append(line)
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Time against loss: a row of panels a number of ranks, a column a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [
        (kind, world) for kind, world in places(rows)
        if results(rows, kind, world, "time") and results(rows, kind, world, "loss")
    ]  # fmt: skip
    if not drawn:
        return
    kinds = list(dict.fromkeys(kind for kind, _ in drawn))
    worlds = sorted({world for _, world in drawn})
    figure, panels = pyplot.subplots(
        len(worlds), len(kinds), figsize=(4.2 * len(kinds), 3.6 * len(worlds)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for i, world in enumerate(worlds):
        for j, kind in enumerate(kinds):
            if (kind, world) in drawn:
                _panel(panels[i][j], rows, kind, world)
            else:
                panels[i][j].set_visible(False)
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


def _panel(axis: Any, rows: list[Row], kind: str, world: int) -> None:
    losses, times = (results(rows, kind, world, task) for task in ("loss", "time"))
    for wire, row in times.items():
        difference = change(losses, wire)
        if "error" in row or difference is None:
            continue
        color = "tab:green" if wire.startswith("int") else "0.4"
        axis.errorbar(row["median_ms"], difference, xerr=row["iqr_ms"] / 2, fmt="o", color=color)
        place = (row["median_ms"], difference)
        axis.annotate(wire, place, (4, 4), textcoords="offset points", fontsize="small")
    what = "broadcast" if kind.startswith("states") else "step"
    axis.set(title=f"{kind}, {world} ranks", xlabel=f"{what} over the slow link, ms")
    axis.set(ylabel="validation loss to float32, %")
    axis.axhline(0, color="0.8", zorder=0)
    axis.margins(x=0.2, y=0.15)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3, which="both")
