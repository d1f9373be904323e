"""Times of kernels, not of the host that launches them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from common import in_turn

Call = Callable[[], object]


def medians(
    tasks: Mapping[str, Call], device: str, *, runs: int, calls: int
) -> dict[str, dict[str, float]]:
    """Median and interquartile range of a call of each task, in ms.

    On a GPU a task is captured as a CUDA graph of ``calls`` calls, and the time is that between two
    events around one replay, divided by ``calls``: no Python and no launch from the host is in it.
    Tasks take turns, so that a clock that falls meanwhile falls for all of them. A call reads what
    the call before it read: what fits the L2 cache is in it ("warm").
    """
    clocks = {name: _clock(task, device, calls) for name, task in tasks.items()}
    return in_turn(clocks, runs, warm_up=2)


def _clock(task: Call, device: str, calls: int) -> Callable[[], float]:
    """Milliseconds of a call, the mean of ``calls`` calls."""

    def repeated() -> None:
        for _ in range(calls):
            task()

    if device == "cpu":

        def on_cpu() -> float:
            begin = time.perf_counter()
            repeated()
            return 1e3 * (time.perf_counter() - begin) / calls

        return on_cpu
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled at the first call is not captured
        task()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated()

    def on_gpu() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls

    return on_gpu
