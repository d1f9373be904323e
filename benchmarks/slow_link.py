"""How much time do quantized collectives save on a slow link, in one all-reduce and in a step?

    python benchmarks/slow_link.py            # about 10 minutes; root, ip and tc (iproute2)
    python benchmarks/slow_link.py --quick    # about 2 minutes: 2 ranks, one rate

Ranks are processes of this machine in network namespaces (``network.py``), joined by links of
1 Gbit or 200 Mbit a second, or without a limit. One thread a rank. Two tasks:

- ``all-reduce``: 16 MB of float32 (4,194,304 Gaussian values). "exact" is ``dist.all_reduce``;
  "bf16" casts to bfloat16, reduces, casts back; "int8", "int4" and "int2" are ``rf.all_reduce``
  under ``torch.compile``, "/k" with k segments in flight (without it: the default number).
- ``step``: a tensor-parallel training step (forward, backward, AdamW) of ``examples/gpt.py``, width
  256, 4 blocks, batch 4 x 128. "exact" and "intN" are the backend ``rfquant`` with ``bits=None``
  and ``bits=N``, block by block, as that compiles once for all blocks; "bf16" is the exact run with
  casts to bfloat16 around every all-reduce. The arithmetic stays float32 in all of them.

A line of the result: median and interquartile range of the runs after warm-up, bytes that left an
interface (TCP and IP headers included, mean of the ranks) beside the predicted bytes, relative
error of the sum.
16 MB is far above the 128 kB that the rate limiter lets through at once. Without root or without
the tools the script says so and exits with 0. Results: ``benchmarks/results/slow_link.jsonl`` and
``slow_link.png``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pictures
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import RESULTS, machine, write
from ranks import Work, clock, measure, ready, serve
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import rfcompile as rf
from rfcompile.wire import cost

ELEMENTS = 4_194_304
BITS = {"int8": 8, "int4": 4, "int2": 2}
WIRES = {
    "all-reduce": ["exact", "bf16", "int8", "int4", "int4/1", "int4/4", "int4/8", "int2"],
    "step": ["exact", "bf16", "int8", "int4", "int2"],
}
WARM_UP = 2


# ---- on the ranks ------------------------------------------------------------------------------

_works: dict[str, dict[str, Work]] = {}
"""By task: compiled once, for every rate."""


def answer(job: dict[str, Any]) -> list[dict[str, Any]]:
    task = job["task"]
    if task not in _works:
        make = all_reduce if task == "all-reduce" else step
        _works[task] = {wire: make(wire) for wire in WIRES[task]}
    return clock(_works[task], job["runs"], WARM_UP)


def all_reduce(wire: str) -> Work:
    """One all-reduce of 16 MB."""
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(ELEMENTS, generator=generator)
    exact = x.clone()
    dist.all_reduce(exact)

    def plain(dtype: torch.dtype) -> Work:
        buffer = x.clone()

        def run() -> torch.Tensor:
            y = buffer.to(dtype)
            dist.all_reduce(y)
            return y.to(torch.float32)

        prediction = cost.sent_bytes("all_reduce", ELEMENTS * dtype.itemsize, world)
        return Work(run, {"predicted_bytes": prediction}, prepare=lambda: buffer.copy_(x))

    def quantized() -> Work:
        name, _, segments = wire.partition("/")
        fmt = rf.QuantFormat(BITS[name])
        more = {"segments": int(segments)} if segments else {}
        reduce = torch.compile(lambda x: rf.all_reduce(x, fmt, **more), dynamic=False)
        row = fmt.payload_bytes(-(-ELEMENTS // world))
        prediction = cost.sent_bytes("all_to_all", row * world, world)
        prediction += cost.sent_bytes("all_gather", row, world)
        return Work(lambda: reduce(x), {"predicted_bytes": prediction})

    dtypes = {"exact": torch.float32, "bf16": torch.bfloat16}
    work = plain(dtypes[wire]) if wire in dtypes else quantized()
    work.prepare()
    result = work.run()
    assert isinstance(result, torch.Tensor)
    work.facts["error"] = ((result - exact).norm() / exact.norm()).item()
    return work


def step(wire: str) -> Work:
    """One training step of the tensor-parallel GPT."""
    from gpt import BYTES, GPT, GPTConfig, parallelize  # examples/ is on the ranks' PYTHONPATH

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = GPT(GPTConfig(width=256, layers=4, heads=4, context=128))
    if wire == "bf16":
        cast_linears(model, torch.bfloat16)  # hooks run in order: cast, all-reduce of DTensor, cast
    parallelize(model, mesh)
    if wire == "bf16":
        cast_linears(model, torch.float32)
    options = {"bits": BITS.get(wire)}
    for block in model.blocks:  # alike: the first one's graph serves them all
        block.compile(backend="rfquant", options=options, dynamic=False)
    parameters = list(model.parameters())
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    replicated = [p for p in parameters if not isinstance(p, DTensor)]
    optimizer = torch.optim.AdamW([{"params": sharded}, {"params": replicated}], fused=True)
    tokens = torch.randint(BYTES, (4, 129))

    def run() -> None:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    report = rf.merge_reports(rf.reports(clear=True))  # a graph that blocks share counts for each
    return Work(run, {"predicted_bytes": report.bytes_after})


def cast_linears(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Hook casts in where an all-reduce is: after ``out`` and ``down``, and before ``qkv`` and
    ``up``, whose all-reduce is the backward's."""
    for name, module in model.named_modules():
        if name.endswith((".qkv", ".up")):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))
        elif name.endswith((".out", ".down")):
            module.register_forward_hook(lambda _, __, output: output.to(dtype))


# ---- on the machine ----------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """One line a measurement; "x exact" and "x bf16" say how many times faster it is than those."""
    lines = [
        f"{'task':10} ranks {'rate':>7} {'wire':>7} {'median ms':>10} {'iqr ms':>7} {'x exact':>7}"
        f" {'x bf16':>7} {'sent MB':>8} {'predicted':>9} {'error':>8}"
    ]
    place = ("task", "ranks", "rate")
    times = {(*(row[k] for k in place), row["wire"]): row["median_ms"] for row in rows}
    for row in sorted(rows, key=lambda row: (row["task"], row["ranks"])):
        where = tuple(row[k] for k in place)
        faster = [times[*where, wire] / row["median_ms"] for wire in ("exact", "bf16")]
        error = f"{row['error']:.1e}" if "error" in row else ""
        lines.append(
            f"{row['task']:10} {row['ranks']:5} {row['rate']:>7} {row['wire']:>7}"
            f" {row['median_ms']:10.1f} {row['iqr_ms']:7.1f} {faster[0]:7.2f} {faster[1]:7.2f}"
            f" {row['sent_bytes'] / 1e6:8.2f} {row['predicted_bytes'] / 1e6:9.2f} {error:>8}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the median times, with the interquartile range, one panel a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    wires = {
        "exact": "float32", "bf16": "bfloat16", "int8": "8 bits", "int4": "4 bits",
        "int2": "2 bits",
    }  # fmt: skip
    rates = {"none": "no limit", "1gbit": "1 Gbit/s", "200mbit": "200 Mbit/s"}
    figure, panels = pictures.panels(len(tasks), 1, 0.6 + 3.2 * len(tasks))
    titles = {
        "all-reduce": "One all-reduce of 16 MB",
        "step": "One step of training a small GPT, tensor parallel",
    }
    for axes, task in zip(panels[:, 0], tasks, strict=True):
        mine = [row for row in rows if row["task"] == task]
        groups = list(dict.fromkeys((row["ranks"], row["rate"]) for row in mine))
        for i, (wire, label) in enumerate(wires.items()):
            bars = [r for r in mine if r["wire"] == wire]
            drawn = axes.bar(
                [groups.index((r["ranks"], r["rate"])) + 0.16 * (i - 2) for r in bars],
                [r["median_ms"] for r in bars],
                width=0.16,
                color=pictures.WIRES[label],
                label=label,
                yerr=[r["iqr_ms"] / 2 for r in bars],
                error_kw={"ecolor": "0.6"},
            )
            axes.bar_label(drawn, fmt=" %.0f", rotation=90, fontsize=8)
        labels = [f"{ranks} ranks\n{rates.get(rate, rate)}" for ranks, rate in groups]
        axes.set_xticks(range(len(groups)), labels)
        axes.set(title=titles[task], ylabel="median time, ms")
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.01, y=0.17)
    pictures.legend_below(figure, 5)
    pictures.save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 ranks at 200 Mbit, all-reduce only")
    parser.add_argument("--ranks", help="comma-separated numbers of ranks (default 2,4)")
    parser.add_argument("--rates", help="comma-separated tc rates (default none,1gbit,200mbit)")
    parser.add_argument("--tasks", help="all-reduce, step or both (default)")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each, at least 2")
    parser.add_argument("--out", type=Path, default=RESULTS / "slow_link.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(answer)
        return 0
    if not ready("slow_link"):
        return 0
    ranks = [int(n) for n in (args.ranks or ("2" if args.quick else "2,4")).split(",")]
    rates = (args.rates or ("200mbit" if args.quick else "none,1gbit,200mbit")).split(",")
    tasks = (args.tasks or ("all-reduce" if args.quick else "all-reduce,step")).split(",")
    places = [{"rate": rate, "task": task, "runs": args.runs} for rate in rates for task in tasks]
    jobs = [(None if place["rate"] == "none" else place["rate"], place) for place in places]
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    print("compiling first, for each number of ranks ...", file=sys.stderr, flush=True)
    for n in ranks:
        for place, found in zip(places, measure(__file__, n, jobs), strict=True):
            rows += [{"ranks": n} | place | row | machine() for row in found]
            seconds = time.perf_counter() - started
            text = f"{n} ranks, {place['rate']}, {place['task']}, after {seconds:.0f} s"
            print(text, file=sys.stderr, flush=True)
    write(args.out, rows)
    plot(rows, args.out.with_suffix(".png"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
