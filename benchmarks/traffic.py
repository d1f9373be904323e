"""What does quantizing the traffic of a training save, and what does it cost in loss?

    python benchmarks/traffic.py                  # an hour; root, ip and tc (iproute2)
    python benchmarks/traffic.py --kinds ddp --worlds 2 --steps 0

Ranks are processes of this machine in network namespaces (``network.py``), one thread each. For
each kind of traffic (``traffic_kinds.py``) two tasks:

- ``loss``: a small GPT trained on Shakespeare's bytes, no limit on the link. The validation loss of
  the exact weights after ``--steps`` steps, beside that of float32.
- ``time``: a step in which there is much to send, over links of ``--rate``. The wires take turns
  step by step in the same processes; median and interquartile range of the slowest rank's time, and
  the bytes that left an interface (TCP and IP headers included) beside the bytes that the report
  predicts, both mean of the ranks.

Kinds "states ..." have their loss on one rank, and in place of a step the broadcast of the states.
A wire that fails has its error in the row. ``--also powersgd`` adds torch's PowerSGD hook of rank 4
at the end: it starts collectives in callbacks of others, which gloo's threads may run in another
order on another rank, and then the processes abort.

Rows that are there with the same settings are not measured again: delete them, or the file, to
start anew. A timed row is one of a run of all wires, which are measured again together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RESULTS, machine, write
from ranks import Work, clock, measure, ready, serve
from study_tasks import GPT, Language
from torch import Tensor
from traffic_kinds import TIMED_ONLY, WIRES, trainer
from traffic_plots import plot, table
from traffic_settings import Setting, Size, size_of

WARM_UP = 4
"""Steps before timing: PowerSGD's first two are plain, DDP rebuilds its buckets."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What stands in every row of it but for the wires, which tell the rows apart."""

    kind: str
    task: str
    world: int
    rate: str
    steps: int
    seed: int
    size: Size

    def is_of(self, row: Row) -> bool:
        return all(row.get(name) == value for name, value in asdict(self).items())


# ---- on the ranks ------------------------------------------------------------------------------


def answer(job: Row) -> list[Row]:
    setting = Setting(job["kind"], job["task"], job["seed"], Size(**job["size"]), job["steps"])
    return (losses if setting.task == "loss" else times)(setting, job["wires"])


def losses(setting: Setting, wires: list[str]) -> list[Row]:
    rows = []
    for wire in wires:
        start = time.perf_counter()
        try:
            training = trainer(wire, setting)
            for _ in range(setting.steps):
                training.step()
        except Exception as error:
            check_it_may_fail(wire)
            rows.append({"wire": wire, "error": last_line(error)})
        else:
            rows.append({"wire": wire, "loss": validation(setting, training.weights())})
        say(f"{rows[-1]} {time.perf_counter() - start:.0f} s")
    return rows


@torch.no_grad()
def validation(setting: Setting, weights: dict[str, Tensor]) -> float:
    model = GPT(setting.size.config)
    model.load_state_dict(weights)
    task = Language(setting.size.config, setting.size.batch, 0)
    found = [task.loss(model, batch).item() for batch in task.validation(16)]
    return sum(found) / len(found)


def times(setting: Setting, wires: list[str]) -> list[Row]:
    trainings, failed = {}, []
    for wire in wires:
        try:
            training = trainer(wire, setting)
            training.step()
        except Exception as error:
            check_it_may_fail(wire)
            failed.append({"wire": wire, "error": last_line(error)})
        else:
            trainings[wire] = training
            say(f"{wire} is ready")
    works = {wire: Work(t.step, t.facts or {}) for wire, t in trainings.items()}
    rows = clock(works, setting.steps, WARM_UP)
    return failed + [row | {"predicted_bytes": trainings[row["wire"]].predicted()} for row in rows]


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def check_it_may_fail(wire: str) -> None:
    """Raise what is being handled, unless it is torch's own hook that fails, on every rank."""
    if not wire.startswith(("torch", "powersgd")):
        raise


def last_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


# ---- on the machine ----------------------------------------------------------------------------


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    tasks = [("loss", options.steps), ("time", options.runs)]
    for kind in options.kinds:
        for task, steps in tasks[kind in TIMED_ONLY :]:
            is_alone = kind.startswith("states") and task == "loss"
            for world in [1] if is_alone else options.worlds:
                rate = options.rate if task == "time" else "none"
                size = size_of(kind, task, world)
                if steps:
                    yield Job(kind, task, world, rate, steps, options.seed, size)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=WIRES, default=list(WIRES))
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--also", nargs="+", choices=["powersgd"], default=[])
    parser.add_argument("--rate", default="200mbit", help="of the links in the task time")
    parser.add_argument("--steps", type=int, default=200, help="of the task loss; 0 skips it")
    parser.add_argument("--runs", type=int, default=9, help="timed steps; 0 skips them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "traffic.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(answer)
        return 0
    if not ready("traffic"):
        return 0
    rows: list[Row] = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    jobs = sorted(jobs_of(options), key=lambda job: job.world)
    for world in dict.fromkeys(job.world for job in jobs):
        missing: list[tuple[Job, list[str]]] = []
        for job in (job for job in jobs if job.world == world):
            done = [row["wire"] for row in rows if job.is_of(row)]
            wires = WIRES[job.kind] + (options.also if job.kind == "ddp" else [])
            new = [wire for wire in wires if wire not in done]
            if job.task == "loss":  # each by itself: what is done stays when the script is stopped
                missing += [(job, [wire]) for wire in new]
            elif new:
                missing.append((job, wires))
        if not missing:
            continue
        given = [
            (None if job.rate == "none" else job.rate, asdict(job) | {"wires": wires})
            for job, wires in missing
        ]
        answers = measure(__file__, world, given)
        for (job, wires), found in zip(missing, answers, strict=True):
            rows = [row for row in rows if not (job.is_of(row) and row["wire"] in wires)]
            rows += [asdict(job) | row | machine() for row in found]
            write(options.out, rows)
    print(table(rows))
    with contextlib.suppress(ImportError):
        plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
