"""Are sine-activated low-rank weights better than plain ones of as many parameters?

    python benchmarks/companions_low_rank.py

Three tasks, trained from scratch, their repeated linears dense, of low rank, and of low rank with a
sine (``rfcompile.transform(model, LowRank(..., start="fresh"))``): a GPT on Shakespeare's
bytes, the transformers package's ViT on scikit-learn's digits, and a network from pixel coordinates
to colors, which learns one photograph that scikit-learn ships. Every arm is run at each of some
learning rates with the first seed, then with the other seeds at its best one, because omega acts
much like a learning rate. Then, with one seed, other phase spreads than the default; the fit to the
weights of the trained dense model; and what a training step costs. One JSON line a run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import pictures
import torch
import torch.nn.functional as F
from common import RESULTS, alternate, machine, write
from study_measures import validation_loss
from study_tasks import Digits, GPTConfig, Language
from torch import Tensor, nn

import rfcompile as rf

RATES = {"language": (1e-3, 3e-3, 1e-2), "digits": (1e-3, 3e-3), "picture": (3e-3, 1e-2)}
STEPS = {"language": 300, "digits": 200, "picture": 200}
SPREADS = (0.3, 1.0, 6.0, 20.0)
Rows = list[dict[str, Any]]


class Picture:
    """A photograph of 53 x 80 pixels as a function of place; quality is the PSNR in dB."""

    modules = ("2", "4", "6")

    def __init__(self, width: int, seed: int) -> None:
        from sklearn.datasets import load_sample_image

        pixels = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(pixels, scale_factor=1 / 8, mode="area")[0]
        height, length = small.shape[1:]
        grid = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, length))
        generator = torch.Generator().manual_seed(seed)
        phases = grid @ torch.randn(2, width // 2, generator=generator) * 6
        self.features = torch.cat([phases.sin(), phases.cos()], dim=1)
        self.colors = small.flatten(1).t().contiguous()
        self.width, self.generator = width, generator

    def model(self) -> nn.Module:
        sizes = [self.width] * 5
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(self.width, 3))

    def batch(self) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self.colors), (1024,), generator=self.generator)
        return self.features[chosen], self.colors[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])


def task_of(name: str, seed: int, tiny: bool) -> Any:
    small = GPTConfig(width=32, layers=2, heads=2, context=16)
    if name == "language":
        return Language(small if tiny else GPTConfig(128, 3, 4, 64), 8, seed)
    if name == "digits":
        return Digits(small if tiny else GPTConfig(64, 2, 4, 16), 32, seed)
    return Picture(32 if tiny else 128, seed)


def modules_of(name: str) -> Any:
    return Picture.modules if name == "picture" else "auto"


@torch.no_grad()
def quality(name: str, task: Any, model: nn.Module) -> float:
    """Validation loss in nats (lower is better), accuracy in %, or PSNR in dB (higher is)."""
    model.eval()
    if name == "picture":
        return -10 * math.log10(float(task.loss(model, (task.features, task.colors))))
    if name == "digits":
        hits = [model(x).logits.argmax(-1) == y for x, y in task.validation(4)]
        return 100 * float(torch.cat(hits).float().mean())
    return validation_loss(task, model, 8)


def is_better(name: str, a: float, b: float) -> bool:
    return (a < b) == (name == "language")


def train(name: str, rank: rf.LowRank | None, rate: float, seed: int, args: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    task = task_of(name, seed, args.tiny)
    model = task.model()
    row: dict[str, Any] = {"task": name, "rate": rate, "seed": seed}
    row["steps"] = steps = args.steps or STEPS[name]
    if rank is not None:
        model = rf.transform(model, replace(rank, modules=modules_of(name)))
        report: Any = rf.rewrites_of(model)[0]
        row |= {"rank": rank.rank, "sine": rank.sine, "weights": report.parameters}
        row["spread"] = report.sites[0].spread
    row["parameters"] = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    times = []
    model.train()
    for _ in range(steps):
        start = time.perf_counter()
        loss = task.loss(model, task.batch())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
    value = quality(name, task, model)
    if rank is not None:  # the ranks after training
        trained = [m for m in model.modules() if isinstance(m, rf.low_rank.LowRankLinear)]
        ranks = [rf.low_rank.effective_ranks(m.matrix()) for m in trained]
        row |= {"stable_rank": mean(r[0] for r in ranks), "rank_1e-3": mean(r[1] for r in ranks)}
    row |= {"quality": value, "step_ms": 1e3 * median(times)}
    print(row, flush=True)
    return row | {"model": model}


def arms(name: str, args: Any) -> Iterator[tuple[str, rf.LowRank | None]]:
    yield "dense", None
    for rank in args.ranks:
        for sine in (False, True):
            kind = "sine" if sine else "plain"
            yield f"{kind} rank {rank}", rf.LowRank(rank, start="fresh", sine=sine)


def compare(name: str, args: Any) -> Iterator[dict[str, Any]]:
    for arm, rank in arms(name, args):
        rows = [train(name, rank, rate, 0, args) for rate in args.rates or RATES[name]]
        best = rows[0]
        for row in rows[1:]:
            best = row if is_better(name, row["quality"], best["quality"]) else best
        for row in rows:
            yield {k: v for k, v in row.items() if k != "model"} | {
                "arm": arm, "kind": "main" if row is best else "rate",
            }  # fmt: skip
        if rank is None:
            yield from fits(name, best["model"], args)
        for seed in range(1, args.seeds):
            row = train(name, rank, best["rate"], seed, args)
            del row["model"]
            yield row | {"arm": arm, "kind": "main"}
        if rank is not None and rank.sine and rank.rank == args.ranks[-1]:
            yield from spreads(name, rank.rank, best["rate"], args)


def spreads(name: str, rank: int, rate: float, args: Any) -> Iterator[dict[str, Any]]:
    """Other phase spreads at the start, by omega; one seed, the best learning rate."""
    for spread in SPREADS:
        row = train(name, rf.LowRank(rank, start="fresh", spread=spread), rate, 0, args)
        del row["model"]
        yield row | {"arm": f"sine rank {rank}", "kind": "spread", "asked_spread": spread}


def fits(name: str, model: nn.Module, args: Any) -> Iterator[dict[str, Any]]:
    """How near a fit comes to the trained dense weights, and what is left of the model."""
    task = task_of(name, 0, args.tiny)
    before = quality(name, task, model)
    for rank in args.ranks:
        for sine in (False, True):
            low = rf.LowRank(rank, sine=sine)
            start = time.perf_counter()
            fitted = rf.transform(model, replace(low, modules=modules_of(name)))
            seconds = time.perf_counter() - start
            report: Any = rf.rewrites_of(fitted)[-1]
            yield {
                "task": name, "kind": "fit", "rank": rank, "sine": sine, "seconds": seconds,
                "error": mean(site.error for site in report.sites),
                "quality_before": before, "quality": quality(name, task, fitted),
            }  # fmt: skip


def costs(args: Any) -> Iterator[dict[str, Any]]:
    """Forward and backward of one square linear, in turns."""
    for width, tokens in [(64, 64)] if args.tiny else [(512, 512), (512, 4096), (1024, 4096)]:
        x = torch.randn(tokens, width)
        dense = nn.Sequential(nn.Linear(width, width))
        models = {"dense": dense}
        for kind, sine in (("plain", False), ("sine", True)):
            low = rf.LowRank(16, start="fresh", sine=sine)
            models[kind] = rf.transform(dense, replace(low, modules="0"))
        tasks = {kind: _step(model, x) for kind, model in models.items()}
        times = alternate(tasks, 3 if args.tiny else 15)
        base = times["dense"]["median_ms"]
        for kind, measured in times.items():
            yield {
                "kind": "cost", "arm": kind, "width": width, "tokens": tokens, **measured,
                "ratio": measured["median_ms"] / base,
            }  # fmt: skip


def _step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: model(x).sum().backward()


# ---- table and picture -------------------------------------------------------------------------

TITLES = {
    "language": "A GPT on Shakespeare\n(lower is better)",
    "digits": "A ViT on digits\n(higher is better)",
    "picture": "A photograph\n(higher is better)",
}
UNITS = {"language": "validation loss, nats a byte", "digits": "accuracy, %", "picture": "PSNR, dB"}


def table(rows: Rows) -> str:
    lines = []
    for name in sorted({row["task"] for row in rows} & UNITS.keys()):
        lines += ["", f"{name} ({UNITS[name]})", f"{'arm':16} {'parameters':>10} {'rate':>7}"]
        mine = [row for row in rows if row["task"] == name]
        main = [row for row in mine if row["kind"] == "main"]
        for arm in dict.fromkeys(row["arm"] for row in main):
            runs = [row for row in main if row["arm"] == arm]
            values = [row["quality"] for row in runs]
            text = f"{arm:16} {runs[0]['parameters']:10,} {runs[0]['rate']:7g}"
            text += f" {mean(values):8.3f} ± {(max(values) - min(values)) / 2:.3f}"
            if "stable_rank" in runs[0]:
                text += f"  stable rank {mean(r['stable_rank'] for r in runs):.1f}"
            lines.append(text)
        for row in mine:
            if row["kind"] == "spread":
                lines.append(f"  phase spread {row['asked_spread']:<5g} {row['quality']:.3f}")
            if row["kind"] == "fit":
                kind = "sine" if row["sine"] else "plain"
                lines.append(
                    f"  fit, {kind} rank {row['rank']}: error {row['error']:.3f}, "
                    f"{row['quality_before']:.3f} -> {row['quality']:.3f}"
                )
    for row in rows:
        if row["kind"] == "cost":
            size = f"{row['width']} wide, {row['tokens']} tokens"
            lines.append(f"cost, {size}, {row['arm']}: {row['ratio']:.2f} of dense")
    return "\n".join(lines)


def plot(rows: Rows, path: Path) -> None:
    """Quality against the number of parameters, a panel a task."""
    names = [name for name in TITLES if any(row["task"] == name for row in rows)]
    figure, axes = pictures.panels(1, len(names), 3.6)
    styles = {"plain": ("s", pictures.BLUE, 0.98), "sine": ("o", pictures.VERMILLION, 1.02)}
    for axis, name in zip(axes[0], names, strict=True):
        main = [r for r in rows if r["task"] == name and r["kind"] == "main"]
        dense = [r["quality"] for r in main if r["arm"] == "dense"]
        label = "dense weights (more parameters)"
        axis.axhline(mean(dense), color=pictures.BLACK, ls="--", lw=1.3, label=label)
        axis.axhspan(min(dense), max(dense), color=pictures.BLACK, alpha=0.1, lw=0)
        for kind, (marker, color, aside) in styles.items():
            runs = [r for r in main if r["arm"].startswith(kind)]
            ranks = sorted({r["rank"] for r in runs})
            groups = [[r for r in runs if r["rank"] == rank] for rank in ranks]
            sizes = [group[0]["parameters"] for group in groups]
            values = [pictures.range_of([r["quality"] for r in group]) for group in groups]
            means, below, above = zip(*values, strict=True)
            label = "low rank, plain" if kind == "plain" else "low rank with a sine"
            xs = [size * aside for size in sizes]
            axis.plot(xs, means, marker=marker, color=color, label=label)
            axis.errorbar(xs, means, [below, above], fmt="none", ecolor=color, elinewidth=1.2)
        axis.set(title=TITLES[name], xlabel="parameters of the model", ylabel=UNITS[name])
        axis.set(xscale="log")
        text = [f"{size:,}\n(rank {rank})" for size, rank in zip(sizes, ranks, strict=True)]
        axis.set_xticks(sizes, text)
        axis.minorticks_off()
        axis.margins(x=0.3)
    pictures.legend_below(figure, 3)
    pictures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = ["cost", *UNITS]
    parser.add_argument("--tasks", nargs="+", default=every, help="rows of the others stay")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rates", type=float, nargs="+", help="default: RATES")
    parser.add_argument("--steps", type=int, help="default: STEPS")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small models, for a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS / "companions_low_rank.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    rows: Rows = []
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        rows = [row for row in rows if row["task"] not in args.tasks]
    for name in args.tasks:
        made = costs(args) if name == "cost" else compare(name, args)
        rows += [{"task": name, **row, **facts} for row in made]
        write(args.out, rows)
    if any(row["task"] in UNITS for row in rows):
        plot(rows, args.out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
