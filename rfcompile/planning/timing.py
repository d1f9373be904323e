"""Times tasks on the ranks of a group: in turn, the slowest rank counts, all get the same times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rfcompile.errors import ProcessGroupError
from rfcompile.torch_versions import all_gather_single, reduce_scatter_single
from rfcompile.wire.process_groups import resolve

WARM_UP = 3

Task = Callable[[], object]


def group_to_time(group: Any) -> tuple[Any, torch.device]:
    """The process group, and the device of its tensors.

    Raises:
        ProcessGroupError: there is no group, or it has one rank.
    """
    group = resolve(group)
    if group.size() < 2:
        raise ProcessGroupError("a link needs two ranks or more, and this process group has one.")
    return group, torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def seconds_in_turn(
    group: Any, tasks: Sequence[Task], share: float, device: torch.device, runs: tuple[int, int]
) -> list[list[float]]:
    """For each task its seconds in each run, for about ``share`` seconds in all.

    ``runs``: at least and at most so many.
    """

    def once() -> list[float]:
        return [_seconds(group, task, device) for task in tasks]

    for _ in range(WARM_UP):
        estimate = sum(_slowest(group, once(), device))
    count = max(runs[0], min(runs[1], int(share / max(estimate, 1e-6))))  # the same on all ranks
    found = _slowest(group, [second for _ in range(count) for second in once()], device)
    return [found[place :: len(tasks)] for place in range(len(tasks))]


def exact_carrier(group: Any, carrier: str, x: Tensor) -> Task:
    """Lets the carrier send ``x`` once, exactly."""
    world, rank = group.size(), group.rank()
    gathered = x.new_empty(world * x.numel()) if carrier == "all_gather" else x
    part = x.new_empty(x.numel() // world)

    def send() -> None:
        if rank == 0:
            dist.send(x, group=group, group_dst=1)
        elif rank == 1:
            dist.recv(x, group=group, group_src=0)

    carry: dict[str, Task] = {
        "send": send,
        "all_reduce": lambda: dist.all_reduce(x, dist.ReduceOp.MAX, group=group),
        "all_gather": lambda: all_gather_single(gathered, x, group=group),
        "reduce_scatter": lambda: reduce_scatter_single(part, x, group=group),
    }
    return carry[carrier]


def _seconds(group: Any, task: Task, device: torch.device) -> float:
    dist.barrier(group)
    begin = time.perf_counter()
    task()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _slowest(group: Any, seconds: list[float], device: torch.device) -> list[float]:
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
    found: list[float] = times.tolist()
    return found
