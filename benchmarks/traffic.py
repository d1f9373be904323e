"""What does quantizing the traffic of a training save, and what does it cost in loss?

    python benchmarks/traffic.py                  # about half an hour; root, ip and tc (iproute2)
    python benchmarks/traffic.py --kinds ddp --worlds 2 --steps 50

Ranks are processes of this machine in network namespaces (``network.py``), one thread each. For
each kind of parallelism two tasks, every wire in the same processes:

- ``loss``: a small GPT trained on Shakespeare's bytes, AdamW, no limit on the link. The validation
  loss after ``--steps`` steps, beside that of float32.
- ``time``: a step of a larger GPT on few tokens over links of ``--rate``. The wires take turns step
  by step; median and interquartile range of the slowest rank's time, and the bytes that left rank
  0's interface (TCP and IP headers included) beside the bytes that the report predicts.

Wires: "float32" is plain torch. "bf16" casts before and after. "torch int8" is torch's
quantization_pertensor_hook, "torch bf16" its bf16_compress_hook; where one of them fails, its error
stands in the row. "int8" and "int4" are this package's. ``--also powersgd`` adds torch's PowerSGD
hook of rank 4 at the end: it starts collectives in callbacks of others, which gloo's threads may
run in another order on another rank, and then the processes abort.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import RESULTS, machine
from network import Network, available, sent_bytes
from study_tasks import GPT, GPTConfig, Language
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[1]
WIRES = {
    "ddp": [
        *("float32", "bf16", "torch bf16", "torch int8"),
        *("int8", "int4", "int4 feedback", "int4 stochastic"),
    ],
}
WARM_UP = 4
"""Steps before timing: PowerSGD's first two are plain, DDP rebuilds its buckets."""


@dataclass(frozen=True)
class Job:
    kind: str
    task: str
    steps: int
    wires: list[str]
    seed: int = 0


@dataclass
class Trainer:
    """One model on one wire: ``step`` trains, ``loss`` validates, ``predicted`` bytes a step."""

    step: Callable[[], object]
    loss: Callable[[], float]
    predicted: Callable[[], int | None]


# ---- on the ranks ------------------------------------------------------------------------------


def worker() -> None:
    """Serve the jobs on stdin; rank 0 answers each with a line of JSON on stdout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for line in sys.stdin:
        job = Job(**json.loads(line))
        answer = train(job) if job.task == "loss" else clock(job)
        if dist.get_rank() == 0:
            print(json.dumps(answer), flush=True)
    dist.destroy_process_group()


def train(job: Job) -> list[dict[str, Any]]:
    rows = []
    for wire in job.wires:
        start = time.perf_counter()
        try:
            trainer = TRAINERS[job.kind](wire, job)
            for _ in range(job.steps):
                trainer.step()
        except Exception as error:
            rows.append({"wire": wire, "error": last_line(error)})
        else:
            rows.append({"wire": wire, "loss": trainer.loss()})
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - start
            print(f"{job.kind} {wire}: {rows[-1]} {seconds:.0f} s", file=sys.stderr, flush=True)
    return rows


def clock(job: Job) -> list[dict[str, Any]]:
    trainers, rows = {}, []
    for wire in job.wires:
        try:
            trainer = TRAINERS[job.kind](wire, job)
            for _ in range(WARM_UP):
                trainer.step()
        except Exception as error:
            rows.append({"wire": wire, "error": last_line(error)})
        else:
            trainers[wire] = trainer
    timings: dict[str, list[tuple[float, int]]] = {wire: [] for wire in trainers}
    for _ in range(job.steps):
        for wire, trainer in trainers.items():  # in turn: a busy moment hits every wire alike
            timings[wire].append(timed(trainer))
    for wire, trainer in trainers.items():
        seconds, sent = zip(*timings[wire], strict=True)
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        rows.append(
            {
                "wire": wire, "median_ms": 1e3 * middle, "iqr_ms": 1e3 * (high - low),
                "sent_bytes": median(sent), "predicted_bytes": trainer.predicted(),
            }
        )  # fmt: skip
    return rows


def timed(trainer: Trainer) -> tuple[float, int]:
    """A step: seconds of the slowest rank, and bytes this rank sent."""
    dist.barrier()
    before, start = bytes_sent_here(), time.perf_counter()
    trainer.step()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # also: from here on everything has been sent
    return seconds.item(), bytes_sent_here() - before


def bytes_sent_here() -> int:
    return sent_bytes(Path("/proc/net/dev").read_text())


def last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def setting(job: Job) -> tuple[GPT, Language]:
    """The same model on every rank; windows of the text of its own."""
    torch.manual_seed(job.seed)
    if job.task == "loss":
        config, batch = GPTConfig(width=128, layers=4, heads=4, context=64), 8
    else:
        config, batch = GPTConfig(width=256, layers=4, heads=4, context=32), 1
    return GPT(config), Language(config, batch, 1000 * job.seed + dist.get_rank())


def trainer_of(
    model: GPT,
    task: Language,
    forward: Callable[[Tensor], Tensor],
    predicted: Callable[[], int | None],
) -> Trainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

    def step() -> None:
        tokens, following = task.batch()
        optimizer.zero_grad()
        F.cross_entropy(forward(tokens).flatten(0, 1), following.flatten()).backward()
        optimizer.step()

    @torch.no_grad()
    def loss() -> float:
        losses = [
            F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).item()
            for tokens, following in task.validation(16)
        ]
        return sum(losses) / len(losses)

    return Trainer(step, loss, predicted)


def ddp(wire: str, job: Job) -> Trainer:
    """Data parallel: the gradients are averaged."""
    from torch.distributed.algorithms.ddp_comm_hooks import (
        default_hooks,
        powerSGD_hook,
        quantization_hooks,
    )

    from rfcompile.cost import sent_bytes as cost
    from rfcompile.distributed import quantize_ddp

    model, task = setting(job)
    module = DistributedDataParallel(model)
    world, numel = dist.get_world_size(), sum(p.numel() for p in model.parameters())
    predicted: Callable[[], int | None] = lambda: None  # noqa: E731
    if wire in ("float32", "bf16"):
        width = {"float32": 4, "bf16": 2}[wire]
        predicted = lambda: cost("all_reduce", numel * width, world)  # noqa: E731
    if wire == "bf16":
        module.register_comm_hook(None, bf16_hook)
    elif wire == "torch bf16":
        module.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif wire == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4)
        state.start_powerSGD_iter = 2
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif wire == "torch int8":
        module.register_comm_hook(None, quantization_hooks.quantization_pertensor_hook)
    elif wire != "float32":
        bits, _, option = wire.removeprefix("int").partition(" ")
        fmt = f"{bits}b:tread:stoch" if option == "stochastic" else f"{bits}b"
        handle = quantize_ddp(module, fmt, error_feedback=option == "feedback", compile=True)
        predicted = lambda: handle.report().bytes_after  # noqa: E731
    return trainer_of(model, task, module, predicted)


def bf16_hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP rejects annotations as texts
    """The average in bfloat16, as torch's hook does where it runs."""
    buffer = bucket.buffer()
    halves = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(halves, async_op=True).get_future()
    return future.then(lambda done: buffer.copy_(done.value()[0]))


TRAINERS: dict[str, Callable[[str, Job], Trainer]] = {"ddp": ddp}


# ---- on the machine ----------------------------------------------------------------------------


def measure(world: int, rate: str, jobs: list[Job]) -> Iterator[list[dict[str, Any]]]:
    """Run the jobs on ``world`` hosts, "time" at the rate, "loss" without a limit."""
    env = {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples"))),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo warns that namespaces have no host names
    }
    with Network(world) as network:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, __file__, "--worker"]
        workers = [network.run(rank, command, env, **pipes) for rank in range(world)]
        for job in jobs:
            network.set_rate(rate if job.task == "time" else None)
            for process in workers:
                assert process.stdin is not None
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
            assert workers[0].stdout is not None
            answer = workers[0].stdout.readline()
            if not answer:
                raise RuntimeError(f"a rank stopped during {job}; its error is above.")
            place = {"world": world, "rate": network.rate or "none", **asdict(job)}
            del place["wires"]
            yield [place | row for row in json.loads(answer)]
        for process in workers:
            process.communicate()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'kind':9} ranks {'wire':>16} {'loss':>7} {'to float32':>10} {'ms':>7} {'iqr':>6} "
        f"{'x float32':>9} {'x bf16':>7} {'sent MB':>8} {'predicted':>9}"
    ]
    places = dict.fromkeys((r["kind"], r["world"]) for r in rows)
    for kind, world in places:
        mine = [r for r in rows if (r["kind"], r["world"]) == (kind, world)]
        by_task = {
            task: {r["wire"]: r for r in mine if r["task"] == task} for task in ("loss", "time")
        }
        for wire in dict.fromkeys(r["wire"] for r in mine):
            line = f"{kind:9} {world:5} {wire:>16}"
            loss, clock = (by_task[task].get(wire, {}) for task in ("loss", "time"))
            if error := loss.get("error") or clock.get("error"):
                lines.append(f"{line} fails: {error}")
                continue
            if loss:
                base = by_task["loss"]["float32"]["loss"]
                line += f" {loss['loss']:7.4f} {100 * (loss['loss'] / base - 1):+9.2f}%"
            else:
                line += " " * 18
            if clock:
                times = by_task["time"]
                faster = [times[w]["median_ms"] / clock["median_ms"] for w in ("float32", "bf16")]
                line += f" {clock['median_ms']:7.1f} {clock['iqr_ms']:6.1f}"
                line += f" {faster[0]:9.2f} {faster[1]:7.2f} {clock['sent_bytes'] / 1e6:8.3f}"
                if clock["predicted_bytes"]:
                    line += f" {clock['predicted_bytes'] / 1e6:9.3f}"
            lines.append(line)
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Step time against loss, a panel a kind and number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    places = list(dict.fromkeys((r["kind"], r["world"]) for r in rows))
    figure, panels = plt.subplots(
        1, len(places), figsize=(6 * len(places), 4.5), squeeze=False, layout="constrained"
    )
    for axis, (kind, world) in zip(panels[0], places, strict=True):
        mine = [r for r in rows if (r["kind"], r["world"]) == (kind, world) and "error" not in r]
        losses = {r["wire"]: r["loss"] for r in mine if r["task"] == "loss"}
        for row in (r for r in mine if r["task"] == "time" and r["wire"] in losses):
            change = 100 * (losses[row["wire"]] / losses["float32"] - 1)
            ours = row["wire"].startswith("int")
            axis.errorbar(
                row["median_ms"], change, xerr=row["iqr_ms"] / 2,
                fmt="o", color="tab:green" if ours else "0.4",
            )  # fmt: skip
            place = (row["median_ms"], change)
            axis.annotate(row["wire"], place, (4, 4), textcoords="offset points")
        axis.set(title=f"{kind}, {world} ranks", xlabel="step over the slow link, ms")
        axis.set(ylabel="validation loss to float32, %", xscale="log")
        axis.axhline(0, color="0.8", zorder=0)
        axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--also", nargs="+", choices=["powersgd"], default=[])
    parser.add_argument("--rate", default="200mbit", help="of the links in the task time")
    parser.add_argument("--steps", type=int, default=200, help="of the task loss; 0 skips it")
    parser.add_argument("--runs", type=int, default=9, help="timed steps; 0 skips them")
    parser.add_argument("--out", type=Path, default=RESULTS / "traffic.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return 0
    if reason := available():
        print(f"traffic: skipped: {reason}.")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the namespaces go
    jobs = [
        Job(kind, task, steps, WIRES[kind] + args.also)
        for kind in args.kinds
        for task, steps in (("loss", args.steps), ("time", args.runs))
        if steps
    ]
    rows: list[dict[str, Any]] = []
    for world in args.worlds:
        for answer in measure(world, args.rate, jobs):
            rows += [row | machine() for row in answer]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    with contextlib.suppress(ImportError):
        plot(rows, args.out.with_suffix(".png"))
    print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
