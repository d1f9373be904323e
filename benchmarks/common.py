"""What the benchmark scripts share: the machine in a line, alternating timing, JSON lines."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor or GPU, cores, versions and date of a measurement."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    facts: dict[str, Any] = {
        "processor": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    return facts


def alternate(
    tasks: Mapping[str, Callable[[], object]], runs: int, warm_up: int = 3
) -> dict[str, dict[str, float]]:
    """Time the tasks in turn, ``runs`` times each: median and interquartile range in ms."""
    return in_turn({name: partial(_once, task) for name, task in tasks.items()}, runs, warm_up)


def in_turn(
    clocks: Mapping[str, Callable[[], float]], runs: int, warm_up: int
) -> dict[str, dict[str, float]]:
    """Median and interquartile range of what each clock measures, in ms.

    In turn, because a machine that gets slower meanwhile then slows all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for i in range(warm_up + runs):
        for name, clock in clocks.items():
            elapsed = clock()
            if i >= warm_up:
                samples[name].append(elapsed)
    result = {}
    for name, times in samples.items():
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        result[name] = {"median_ms": statistics.median(times), "iqr_ms": quarters[2] - quarters[0]}
    return result


def _once(task: Callable[[], object]) -> float:
    begin = time.perf_counter()
    task()
    return (time.perf_counter() - begin) * 1e3


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON lines, and say so."""
    store(path, rows)
    print(f"written: {path}")


def store(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
