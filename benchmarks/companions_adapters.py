"""What is left of LoRA, Sine-LoRA and DoRA adapters after post-training quantization?

    python benchmarks/companions_adapters.py

A byte-level GPT is trained on Shakespeare; adapters then teach it another author: the text of the
Python reference manual that ships with every Python (``pydoc_data.topics``). With the first seed
and rank 4 every method's learning rate is searched, for the sine with its omega; then ranks 1 to 16
are trained with every seed, and each adapter's factors are quantized to 1 to 8 bits
(``rfcompile.adapters.quantize``), with the first seed by three kinds of codebooks. Quality is the
validation loss on the last tenth of the manual; memory is what the packed factors take, codebooks
included. At the end the Bjontegaard delta: how many bytes one method's curve over the ranks needs
against another's, at equal loss. One JSON line an adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pictures
import torch
from common import RESULTS, machine, write
from study_measures import validation_loss
from study_tasks import GPT, GPTConfig, Language
from torch import nn

import rfcompile as rf

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "Sine-LoRA": {"sine": True},
    "DoRA": {"dora": True},
}
RATES = (3e-3, 1e-2)
GROWTHS = (10, 30)
"""Omega over the square root of the inputs: how much faster than a plain adapter one grows."""
Rows = list[dict[str, Any]]


class Manual(Language):
    """Next byte of the Python reference manual; the last tenth of the text is for validation."""

    def __init__(self, config: GPTConfig, batch: int, seed: int) -> None:
        super().__init__(config, batch, seed)
        topics = pydoc_data.topics.topics
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.cut = len(self.text) * 9 // 10


def train(task: Language, model: nn.Module, rate: float, steps: int) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(steps):
        loss = task.loss(model, task.batch())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def base_model(args: Any) -> nn.Module:
    torch.manual_seed(0)
    config = GPTConfig(32, 2, 2, 16) if args.tiny else GPTConfig(128, 2, 4, 64)
    model = GPT(config)
    train(Language(config, 16, 0), model, 3e-3, args.base_steps)
    return model.eval()


def tune(
    base: Any, method: str, rank: int, rate: float, growth: float, seed: int, args: Any
) -> tuple[nn.Module, float]:
    task = Manual(base.config, 8, seed)
    model = rf.transform(base, rf.Adapters(rank, growth=growth, seed=seed, **METHODS[method]))
    train(task, model, rate, args.steps)
    return model, validation_loss(task, model, 8)


def search(base: Any, args: Any) -> tuple[Rows, dict[str, tuple[float, float]]]:
    """Each method's best learning rate, and growth, at rank 4 with the first seed."""
    rows: Rows = []
    best: dict[str, tuple[float, float]] = {}
    for method in args.methods:
        tried = {}
        for growth in args.growths if METHODS[method].get("sine") else (1.0,):
            for rate in args.rates:
                _, loss = tune(base, method, 4, rate, growth, 0, args)
                tried[rate, growth] = loss if math.isfinite(loss) else math.inf
                rows.append({"kind": "search", "method": method, "rank": 4, "rate": rate})
                rows[-1] |= {"growth": growth, "seed": 0, "loss": loss}
                print(rows[-1], flush=True)
        best[method] = min(tried, key=lambda key: tried[key])
    return rows, best


def measure(
    base: Any, method: str, rank: int, rate: float, growth: float, seed: int, args: Any
) -> Iterator[dict[str, Any]]:
    start = time.perf_counter()
    model, loss = tune(base, method, rank, rate, growth, seed, args)
    task = Manual(base.config, 8, seed)
    row = {"kind": "main", "method": method, "rank": rank, "rate": rate, "growth": growth}
    row["seed"] = seed
    factors = [m for m in model.modules() if isinstance(m, rf.adapters.AdaptedLinear)]
    ranks = [rf.low_rank.effective_ranks(m.delta())[0] for m in factors]
    exact = sum(f().nbytes for m in factors for f in (m.lora_A, m.lora_B))
    extra = sum(m.lora_magnitude.nbytes for m in factors if m.lora_magnitude is not None)
    exactly = {"bits": 32, "codebook": "none", "loss": loss, "bytes": exact + extra}
    yield row | exactly | {"stable_rank": mean(ranks)}
    for codebook in args.codebooks if seed == 0 else args.codebooks[:1]:
        for bits in args.bits:
            if codebook == "wire" and bits in (1, 7):
                continue  # the wire has no such format
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rf.errors.RFCompileWarning)  # it is in the row
                packed = rf.adapters.quantize(model, bits, codebook=codebook)
            report: Any = rf.rewrites_of(packed)[-1]
            yield row | {
                "bits": bits, "codebook": codebook, "loss": validation_loss(task, packed, 8),
                "bytes": report.nbytes[1] + extra, "file": file_size(packed),
                "phase_error": max(site.phase_error for site in report.sites),
                "stable_rank": mean(site.stable_ranks[1] for site in report.sites),
            }  # fmt: skip
    print(method, rank, seed, f"{loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


def file_size(model: nn.Module) -> int:
    with TemporaryDirectory() as folder:
        rf.adapters.save(model, folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


# ---- Bjontegaard delta --------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, loss) those that no other beats in both, from small to large."""
    kept: list[tuple[float, float]] = []
    for size, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((size, loss))
    return kept


def bd_rate(
    reference: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]
) -> float | None:
    """Mean difference in bytes of ``other`` at the losses that both curves reach, in percent.

    The integral of log(bytes) over the loss, each curve a monotone piecewise cubic (PCHIP) through
    its Pareto front. None where the curves share no range of losses.
    Source: Bjontegaard, VCEG-M33 (2001), with PCHIP in place of one cubic.
    """
    from scipy.interpolate import PchipInterpolator

    curves = []
    for points in (reference, other):
        kept = front(points)
        if len(kept) < 2:
            return None
        sizes, losses = zip(*reversed(kept), strict=True)
        curves.append((np.array(losses), PchipInterpolator(losses, np.log(sizes))))
    low = max(losses[0] for losses, _ in curves)
    high = min(losses[-1] for losses, _ in curves)
    if low >= high:
        return None
    mine, theirs = (curve.integrate(low, high) / (high - low) for _, curve in curves)
    return 100 * (math.exp(float(theirs - mine)) - 1)


def deltas(rows: Rows) -> list[str]:
    """BD-rates of mean curves: by bits over the ranks, and over all ranks and bits."""
    lines = ["", "Bjontegaard delta of the bytes against LoRA at the same loss (k-means):"]
    main = [row for row in rows if row["kind"] == "main" and row["codebook"] in ("none", "kmeans")]
    every = sorted({row["bits"] for row in main})
    for bits in [*every, None]:
        values = []
        for method in list(METHODS)[1:]:
            curves = [curve(main, name, bits) for name in ("LoRA", method)]
            value = bd_rate(*curves)
            values.append(f"{method} {'no common loss' if value is None else f'{value:+.0f} %'}")
        name = "any bits" if bits is None else f"{bits} bits"
        lines.append(f"  {name:9} " + ", ".join(values))
    return lines


def curve(rows: Rows, method: str, bits: int | None) -> list[tuple[float, float]]:
    mine = [r for r in rows if r["method"] == method and bits in (None, r["bits"])]
    keys = {(r["rank"], r["bits"]) for r in mine}
    groups = [[r for r in mine if (r["rank"], r["bits"]) == key] for key in keys]
    return [(mean(r["bytes"] for r in g), mean(r["loss"] for r in g)) for g in groups]


# ---- table and picture --------------------------------------------------------------------------

COLORS = {"LoRA": pictures.BLUE, "Sine-LoRA": pictures.VERMILLION, "DoRA": pictures.GREEN}


def table(rows: Rows) -> str:
    lines = []
    main = [row for row in rows if row["kind"] == "main"]
    bits = sorted({row["bits"] for row in main})
    for codebook in dict.fromkeys(row["codebook"] for row in main if row["codebook"] != "none"):
        lines += ["", f"Validation loss by bits, {codebook}"]
        lines.append(f"{'':10} {'rank':>4}" + "".join(f"{b:>15}" for b in bits))
        for method in METHODS:
            for rank in sorted({row["rank"] for row in main}):
                text = f"{method:10} {rank:4}"
                for b in bits:
                    runs = [
                        r["loss"] for r in main
                        if (r["method"], r["rank"], r["bits"]) == (method, rank, b)
                        and r["codebook"] in ("none", codebook)
                    ]  # fmt: skip
                    cell = f"{mean(runs):.3f} ± {(max(runs) - min(runs)) / 2:.3f}" if runs else ""
                    text += f"{cell:>15}"
                lines.append(text)
    return "\n".join(lines + deltas(rows))


def plot(rows: Rows, path: Path) -> None:
    """Validation loss against bytes, and against bits at two ranks."""
    main = [row for row in rows if row["kind"] == "main" and row["codebook"] in ("none", "kmeans")]
    figure, axes = pictures.panels(1, 2, 4.6, sharey=True)
    by_bytes, by_bits = axes[0]
    ranks = sorted({row["rank"] for row in main})
    shown = {ranks[len(ranks) // 2]: "o-", ranks[-1]: "s--"}
    for method in dict.fromkeys(row["method"] for row in main):
        color = COLORS.get(method, pictures.BLACK)
        points = curve(main, method, None)
        by_bytes.scatter(*zip(*points, strict=True), s=8, color=color, alpha=0.4)
        by_bytes.plot(*zip(*front(points), strict=True), color=color)
        for rank, style in shown.items():
            mine = [r for r in main if (r["method"], r["rank"]) == (method, rank)]
            bits = sorted({r["bits"] for r in mine if r["bits"] < 32})
            values = [[r["loss"] for r in mine if r["bits"] == b] for b in bits]
            means, below, above = zip(*map(pictures.range_of, values), strict=True)
            label = f"{method}, rank {rank}"
            by_bits.plot(bits, means, style, ms=4, color=color, label=label)
            by_bits.errorbar(bits, means, [below, above], fmt="none", ecolor=color, elinewidth=1)
    title = "Dots: every rank and number of bits;\nlines: the best for so many bytes"
    by_bytes.set(title=title, xlabel="bytes of the adapter, without header", xscale="log")
    by_bits.set(title="By bits, k-means codebooks\n(bars: lowest to highest seed)")
    by_bits.set(xlabel="bits a value")
    by_bits.set_xticks(sorted({r["bits"] for r in main if r["bits"] < 32}))
    for axis in (by_bytes, by_bits):
        axis.set_ylabel("validation loss, nats a byte")
        axis.tick_params(labelleft=True)
    low, high = min(r["loss"] for r in main), max(r["loss"] for r in main)
    by_bytes.set_ylim(low - 0.03, min(high, low + 1.5) + 0.03)
    pictures.legend_below(figure, 3)
    pictures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], help="rows of the others stay")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--codebooks", nargs="+", default=["kmeans", "uniform", "wire"])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--growths", type=float, nargs="+", default=GROWTHS)
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model, for a dry run")
    parser.add_argument("--out", type=Path, default=RESULTS / "companions_adapters.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    base: Any = base_model(args)
    task = Manual(base.config, 8, 0)
    before = validation_loss(task, base, 8)
    rows: Rows = []
    if args.out.exists():
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        rows = [row for row in rows if row["kind"] != "base" and row["method"] not in args.methods]
    rows.append({"kind": "base", "loss": before, **facts})
    searched, best = search(base, args)
    rows += [{**row, **facts} for row in searched]
    for method, (rate, growth) in best.items():
        for rank in args.ranks:
            for seed in range(args.seeds):
                measured = measure(base, method, rank, rate, growth, seed, args)
                rows += [{**row, **facts} for row in measured]
        write(args.out, rows)
    plot(rows, args.out.with_suffix(".png"))
    print(f"before: {before:.3f}; rate and growth: {best}")
    print(table(rows))


if __name__ == "__main__":
    main()
