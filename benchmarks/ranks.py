"""Jobs for ranks on the hosts of a network, and the clock with which they measure.

A script that uses this is both ends: :func:`measure` starts it once more on every host, with
``--worker``, and there it calls :func:`serve`. A job and its answer are values that JSON can hold.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from network import Network, available, sent_bytes

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples"))),
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo warns that namespaces have no host names
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else each rank starts a pool of its own
}


# ---- on the machine ----------------------------------------------------------------------------


def ready(script: str) -> bool:
    """Networks can be made here, and go when the script is stopped; else it says why not."""
    if reason := available():
        print(f"{script}: skipped: {reason}.")
        return False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return True


def measure(script: str, world: int, jobs: Iterable[tuple[str | None, Any]]) -> Iterator[Any]:
    """The answers of ``world`` hosts to jobs, each with the rate of its links, None: no limit.

    The same processes serve all of them.
    """
    with Network(world) as network:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, script, "--worker"]
        workers = [network.run(rank, command, ENVIRONMENT, **pipes) for rank in range(world)]
        for rate, job in jobs:
            network.set_rate(rate)
            for process in workers:
                assert process.stdin is not None
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            assert workers[0].stdout is not None
            answer = workers[0].stdout.readline()
            if not answer:
                raise RuntimeError(f"a rank stopped during {job}; its error is above.")
            yield json.loads(answer)
        for process in workers:
            process.communicate()


# ---- on the ranks ------------------------------------------------------------------------------


def serve(answer: Callable[[Any], Any]) -> None:
    """Answer the jobs on stdin; what rank 0 finds goes back as a line of JSON on stdout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for line in sys.stdin:
        found = answer(json.loads(line))
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
    dist.destroy_process_group()


@dataclass
class Work:
    """Something to time: ``run`` is timed, ``prepare`` runs before it, untimed."""

    run: Callable[[], object]
    facts: dict[str, Any] = field(default_factory=dict)
    """What else its row says."""
    prepare: Callable[[], object] = lambda: None


def clock(works: Mapping[str, Work], runs: int, warm_up: int) -> list[dict[str, Any]]:
    """A row for each: median and interquartile range of the slowest rank's time, and the median
    over the runs of the bytes that a rank sent, headers included, mean of the ranks."""
    timings: dict[str, list[tuple[float, float]]] = {wire: [] for wire in works}
    for _ in range(warm_up + runs):
        for wire, work in works.items():  # in turn: a busy moment hits every wire alike
            timings[wire].append(_timed(work))
    rows = []
    for wire, work in works.items():
        seconds, sent = zip(*timings[wire][warm_up:], strict=True)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        row = {"wire": wire, "median_ms": 1e3 * median, "iqr_ms": 1e3 * (high - low)}
        rows.append(row | {"sent_bytes": statistics.median_low(sent), **work.facts})
    return rows


def _timed(work: Work) -> tuple[float, float]:
    work.prepare()
    dist.barrier()
    before, start = _bytes_sent_here(), time.perf_counter()
    work.run()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # also: from here on everything has been sent
    sent = mean_of_ranks(_bytes_sent_here() - before)
    return seconds.item(), sent


def mean_of_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _bytes_sent_here() -> int:
    return sent_bytes(Path("/proc/net/dev").read_text())
