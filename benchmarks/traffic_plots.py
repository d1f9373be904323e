"""The table and the picture of ``traffic.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures

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


KINDS = {
    "ddp": "DDP", "fsdp": "FSDP2", "pipeline narrow": "pipeline,\nnarrow",
    "pipeline": "pipeline,\nGPT", "states adamw": "states,\nAdamW", "states muon": "states,\nMuon",
}  # fmt: skip
Styles = dict[str, tuple[str, str]]
MAIN: Styles = {
    "float32": ("float32", pictures.WIRES["float32"]),
    "bf16": ("bfloat16", pictures.WIRES["bfloat16"]),
    "int8": ("8 bits", pictures.WIRES["8 bits"]),
    "int4": ("4 bits", pictures.WIRES["4 bits"]),
    "int4 delta": ("4 bits, weight differences too", pictures.PURPLE),
}
"""By wire: what it means, and its colour. The others are for the appendix picture. Of "int4 eager"
there are only older results, of before a library coded outside graphs."""
VARIANTS: Styles = {
    "int4": MAIN["int4"],
    "int4 feedback": ("4 bits, error feedback", pictures.ORANGE),
    "int4 stochastic": ("4 bits, stochastic rounding", pictures.SKY),
    "int4 eager": ("4 bits, codec as torch operators", pictures.VERMILLION),
    "powersgd": ("torch's PowerSGD", pictures.WINE),
}


def plot(rows: list[Row], path: Path) -> None:
    """Times and losses of the wires; beside them a picture of the other ways to send 4 bits."""
    _draw(rows, MAIN, path)
    only = VARIANTS.keys() - MAIN.keys()
    having = {(row["kind"], row["task"]) for row in rows if row["wire"] in only}
    mine = [row for row in rows if (row["kind"], row["task"]) in having]
    _draw(mine, VARIANTS, pictures.beside(path, "variants"))


def _draw(rows: list[Row], styles: Styles, path: Path) -> None:
    groups = {task: _places(rows, task) for task in ("time", "loss")}
    tasks = [task for task, places in groups.items() if places]
    if not tasks:
        return
    figure, axes = pictures.panels(len(tasks), 1, 0.5 + 3.2 * len(tasks))
    for axis, task in zip(axes[:, 0], tasks, strict=True):
        draw = _times if task == "time" else _losses
        axis.set_xticks(*draw(axis, rows, groups[task], styles))
        axis.grid(visible=False, axis="x")
        axis.set_xlim(-0.6, len(groups[task]) - 0.4)
    pictures.legend_below(figure, 3, first=True)
    pictures.save(figure, path)


def _places(rows: list[Row], task: str) -> list[tuple[str, int]]:
    """In the order of KINDS; times need those of float32 to be compared with, and so do losses."""
    known = {"time": "median_ms", "loss": "loss"}[task]
    found = {(r["kind"], r["world"]) for r in rows if r["task"] == task and known in r}
    found = {place for place in found if "float32" in results(rows, *place, task)}
    return sorted(found, key=lambda place: ([*KINDS].index(place[0]), place[1]))


def _times(
    axis: Any, rows: list[Row], places: list[tuple[str, int]], styles: Styles
) -> tuple[range, list[str]]:
    """Bars: how many times faster than float32. The labels of the groups say its milliseconds."""
    drawn = [wire for wire in styles if wire != "float32"]
    ticks = []
    for place, (kind, world) in enumerate(places):
        mine = results(rows, kind, world, "time")
        base = mine["float32"]["median_ms"]
        wires = [wire for wire in drawn if "median_ms" in mine.get(wire, {})]
        width = min(0.28, 0.88 / max(1, len(wires)))
        for i, wire in enumerate(wires):
            label, color = styles[wire]
            median, half = mine[wire]["median_ms"], mine[wire]["iqr_ms"] / 2
            faster = base / median
            error = [[faster - base / (median + half)], [base / max(median - half, 1e-9) - faster]]
            x = place + width * (i - (len(wires) - 1) / 2)
            bar = axis.bar(
                x, faster, width, yerr=error, color=color, label=label, error_kw={"ecolor": "0.6"}
            )
            axis.bar_label(bar, fmt="%.1f", fontsize=7.5, padding=1)
        number = f"{world} stages" if kind.startswith("pipeline") else f"{world} ranks"
        ticks.append(f"{KINDS[kind]}\n{number}\n{base:.0f} ms")
    axis.axhline(1, color=pictures.BLACK, lw=1, label="float32")
    rates = {r["rate"] for r in rows if r["task"] == "time"}
    rate = ", ".join(sorted(rates)).replace("mbit", " Mbit/s").replace("gbit", " Gbit/s")
    what = " (states: a broadcast)" if any(k.startswith("states") for k, _ in places) else ""
    axis.set_title(f"A step{what} over links of {rate}; the ms are float32's")
    axis.set_ylabel("times faster than float32")
    axis.margins(y=0.1)
    return range(len(places)), ticks


def _losses(
    axis: Any, rows: list[Row], places: list[tuple[str, int]], styles: Styles
) -> tuple[range, list[str]]:
    """Points: the change of the validation loss to that of float32."""
    ticks = []
    for place, (kind, world) in enumerate(places):
        mine = results(rows, kind, world, "loss")
        wires = [w for w in styles if w != "float32" and change(mine, w) is not None]
        for i, wire in enumerate(wires):
            label, color = styles[wire]
            x = place + 0.16 * (i - (len(wires) - 1) / 2)
            axis.plot(x, change(mine, wire), "o", ms=7, color=color, label=label)
        number = f"{world} stages" if kind.startswith("pipeline") else f"{world} ranks"
        ticks.append(f"{KINDS[kind]}\n{'at rest' if world == 1 else number}")
    axis.axhline(0, color=pictures.BLACK, lw=1, label="float32", zorder=1)
    axis.set_title("Validation loss of a small GPT after training, one seed")
    axis.set_ylabel("above float32, %")
    axis.margins(y=0.12)
    return range(len(places)), ticks
