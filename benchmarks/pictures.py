"""What the pictures share: colours, sizes and legends; and how to draw them again.

    python benchmarks/pictures.py                     # all of results/, from the JSON lines there
    python benchmarks/pictures.py residual_study      # one, with its appendix

Nothing is measured. The rules: a thing has one colour in all pictures; a legend says what the thing
means, not how its option is spelt; a panel has at most six lines, what is left goes to an appendix
picture; a picture can be read at the width of a page of the docs, 800 pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

BLACK, GREY = "#000000", "#8C8C8C"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILLION, ORANGE, PURPLE = "#D55E00", "#E69F00", "#CC79A7"
"""The palette of Okabe and Ito, which colour-blind people can tell apart (without its yellow)."""
INDIGO, WINE, OLIVE = "#332288", "#882255", "#999933"
"""Of Paul Tol's muted palette: for the appendix pictures."""

AT_MOST = 6
"""Lines in a panel."""

WIRES = {
    "float32": BLACK, "bfloat16": GREY, "8 bits": BLUE, "4 bits": GREEN, "3 bits": ORANGE,
    "2 bits": VERMILLION,
}  # fmt: skip
"""What a number is on the wire: its colour in every picture of traffic."""

RESULTS = Path(__file__).parent / "results"


def panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure as wide as a page, and its axes: always an array of rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9.5, "axes.titlesize": 10, "legend.fontsize": 9.5, "axes.grid": True,
        "axes.axisbelow": True, "grid.alpha": 0.3, "axes.spines.top": False,
        "axes.spines.right": False,
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            rows, columns, figsize=(8, height), squeeze=False, layout="constrained", **options
        )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, axes


def legend_below(figure: Any, columns: int, first: bool = False) -> None:
    """One legend for all panels, in the order in which things were drawn.

    What several panels draw looks as it does in the last of them, or in the first.
    """
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if not (first and label in found):
                found[label] = handle
    if found:
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=columns,
            frameon=False, fontsize=9.5,
        )  # fmt: skip


def save(figure: Any, path: Path) -> None:
    """1,000 pixels wide."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=125)
    pyplot.close(figure)
    print(f"written: {path}")


def beside(path: Path, name: str) -> Path:
    """The path of an appendix picture."""
    return path.with_name(f"{path.stem}_{name}{path.suffix}")


def smooth(losses: list[float], width: int = 20) -> list[float]:
    """The mean of each value and those before it, ``width`` in all where there are so many."""
    starts = [max(0, i + 1 - width) for i in range(len(losses))]
    return [sum(losses[s : i + 1]) / (i + 1 - s) for i, s in enumerate(starts)]


def band(axis: Any, xs: Iterable[float], seeds: list[list[float]], color: str, **line: Any) -> None:
    """The mean of the seeds as a line, and from the lowest to the highest of them as a band."""
    xs, columns = list(xs), list(zip(*seeds, strict=True))
    axis.plot(xs, [sum(values) / len(values) for values in columns], color=color, **line)
    if len(seeds) > 1:
        low, high = [min(v) for v in columns], [max(v) for v in columns]
        axis.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)


def range_of(values: list[float]) -> tuple[float, float, float]:
    """The mean, and how far it is to the lowest and to the highest value: an error bar."""
    mean = sum(values) / len(values)
    return mean, max(0.0, mean - min(values)), max(0.0, max(values) - mean)


# ---- drawing again ------------------------------------------------------------------------------


def _demo(rows: list[dict[str, Any]], path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_tensor_parallel import Result, plot

    results = [Result(**{k: v for k, v in row.items() if k != "torch"}) for row in rows]
    plot(results, path, ranks=2)


def _drawers() -> dict[str, Callable[[list[dict[str, Any]], Path], None]]:
    import anneal_study
    import companions_adapters
    import companions_low_rank
    import companions_plots
    import plan
    import slow_link
    import study_plots
    import traffic_plots

    return {
        "demo": _demo,
        "slow_link": slow_link.plot,
        "traffic": traffic_plots.plot,
        "residual_study": study_plots.plot,
        "anneal_study": anneal_study.plot,
        "plan": plan.plot,
        "companions_attention": companions_plots.plot,
        "companions_low_rank": companions_low_rank.plot,
        "companions_adapters": companions_adapters.plot,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="of results, without .jsonl; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the pictures")
    options = parser.parse_args()
    drawers = _drawers()
    for name in options.names or drawers:
        lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        drawers[name]([json.loads(line) for line in lines], options.out / f"{name}.png")


if __name__ == "__main__":
    main()
