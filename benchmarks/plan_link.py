"""Does a plan send the bytes and take the seconds that it says, on real ranks and a slow link?

    python benchmarks/plan_link.py --checkpoint gpt.pt    # about 10 minutes; root, ip and tc

The GPT of ``plan.py`` is scored once, at the outputs that tensor parallelism sums. Ranks are
processes of this machine in network namespaces (``network.py``), joined by links of 1 Gbit or 200
Mbit a second. They measure their link (``rf.measure_link``). Then, for each of some uniform
policies, they make the plan that is fastest for the loss increase predicted of that policy, and
time both: the all-reduces of all sites of a batch, one after another.

A line of the result: planned and measured bytes of a rank (on the interface, TCP and IP headers
included, mean of the ranks), planned and measured milliseconds (median and interquartile range of
the slowest rank). Without root or without the tools the script says so and exits with 0. Results:
``benchmarks/results/plan_link.jsonl``.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, write
from plan_cases import GPTConfig, gpt
from ranks import Work, clock, measure, ready, serve

import rfcompile as rf

FORMATS = [f"{bits}b:g128" for bits in (2, 3, 4, 6, 8)]
UNIFORM = ["2b:g128:rise", "3b:g128:rise", "4b:g128:rise", "8b:g128:tread"]
SITES = ["blocks.*.attention.out", "blocks.*.mlp.down"]
WARM_UP = 2
Row = dict[str, Any]


# ---- on the ranks ------------------------------------------------------------------------------


def answer(job: Row) -> list[Row]:
    scores = rf.Scores.load(job["scores"])
    link = rf.measure_link(seconds=job["seconds"]).link("all_reduce")
    works = {"exact": work(scores, dict.fromkeys(sites_of(scores), ""), link)}
    for uniform in UNIFORM:
        works[uniform] = work(scores, dict.fromkeys(sites_of(scores), uniform), link)
        plan = rf.plan(scores, loss=works[uniform].facts["increase"], link=link)
        chosen = {choice.site: choice.format for choice in plan.choices}
        works[f"plan as good as {uniform}"] = planned = work(scores, chosen, link)
        assert math.isclose(planned.facts["planned_bytes"], plan.bytes)
        assert plan.seconds is not None
        assert math.isclose(planned.facts["planned_ms"], 1e3 * plan.seconds)
    facts = {"bandwidth": link.bandwidth, "latency": link.latency, "coding": link.coding}
    return [row | facts for row in clock(works, job["runs"], WARM_UP)]


def sites_of(scores: rf.Scores) -> list[str]:
    return [site.site for site in scores.sites]


def work(scores: rf.Scores, formats: dict[str, str], link: rf.Link) -> Work:
    """The all-reduces of one batch, in these formats; "" is exact."""
    calls, sent, seconds, increase = [], 0.0, 0.0, 0.0
    for site in scores.sites:
        fmt = rf.QuantFormat.parse(formats[site.site]) if formats[site.site] else None
        for score in site.formats:
            increase += scores.increase(site, score) if fmt and score.format == fmt.spec else 0.0
        for shape, times in site.calls.items():
            often = times // scores.batches  # batches have one shape
            calls += [(torch.randn(shape), fmt)] * often
            sent += often * link.sent(math.prod(shape), site.itemsize, fmt)
            seconds += often * link.seconds(math.prod(shape), site.itemsize, fmt)

    def run() -> None:
        for x, fmt in calls:
            if fmt is None:
                dist.all_reduce(x, dist.ReduceOp.MAX)
            else:
                rf.all_reduce(x, fmt)

    formats_now = {fmt: list(formats.values()).count(fmt) for fmt in sorted(set(formats.values()))}
    facts = {"planned_bytes": sent, "planned_ms": 1e3 * seconds, "increase": increase}
    return Work(run, {**facts, "formats": {fmt or "exact": n for fmt, n in formats_now.items()}})


# ---- on the machine ----------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    lines = [
        f"{'ranks':5} {'rate':>7} {'wire':32} {'sent/planned':>12} {'planned ms':>10}"
        f" {'median ms':>9} {'iqr':>6} {'ratio':>5} {'loss':>9}"
    ]
    for row in rows:
        lines.append(
            f"{row['ranks']:5} {row['rate']:>7} {row['wire']:32}"
            f" {row['sent_bytes'] / row['planned_bytes']:12.4f} {row['planned_ms']:10.1f}"
            f" {row['median_ms']:9.1f} {row['iqr_ms']:6.1f}"
            f" {row['median_ms'] / row['planned_ms']:5.2f} {row['increase']:9.2g}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("steps", 400), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 64), ("batches", 4), ("runs", 9),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "200mbit"])
    parser.add_argument("--seconds", type=float, default=8.0, help="to measure a link")
    parser.add_argument("--checkpoint", type=Path, help="read if it is there, else written")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_link.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(answer)
        return 0
    if not ready("plan_link"):
        return 0
    sizes = GPTConfig(args.width, args.layers, args.heads, args.context)
    case = gpt(sizes, args.batch, args.steps, args.checkpoint)
    batches = case.calibration(args.batches, 0)
    loss = case.losses["cross-entropy"]
    scores = rf.score(case.model, batches, loss=loss, formats=FORMATS, modules=SITES)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        scores.save(path := Path(folder) / "scores.json")
        job = {"scores": str(path), "seconds": args.seconds, "runs": args.runs}
        for ranks in args.ranks:
            jobs = [(rate, job) for rate in args.rates]
            for rate, found in zip(args.rates, measure(__file__, ranks, jobs), strict=True):
                rows += [{"ranks": ranks, "rate": rate} | row | machine() for row in found]
                write(args.out, [row | dict(case.facts) for row in rows])
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
