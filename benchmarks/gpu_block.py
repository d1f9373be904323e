"""A block of a tensor-parallel Llama on one GPU, its collectives simulated: exact and quantized.

The simulated ranks send nothing, so that the times are those of computing and coding alone. What
the wire adds to a step, against the bytes that it saves, says below which speed of the link it
pays; a real link is in ``benchmarks/crossover.py``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import rfcompile as rf
from rfcompile.wire.process_groups import simulated

RANKS = 8
FORMATS = ("exact", "8b", "4b", "4b:h32")
CYCLES = 100_000_000
"""The GPU waits so long, about 50 ms, while the host hands it the first steps."""


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and beside a skip; sizes of Llama 3 8B."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up, self.gate = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        query, key, value = (
            part(y).view(1, len(x), -1, self.head).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(len(x), -1))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def measure(device: str, tiny: bool) -> list[dict[str, object]]:
    """A row for each format: ms of a step, and what the wire costs and saves in it."""
    tokens, width, hidden, heads = (64, 64, 128, 8) if tiny else (4096, 4096, 14336, 32)
    formats = FORMATS[::2] if tiny else FORMATS
    rows: list[dict[str, object]] = []
    for fmt in formats:
        torch._dynamo.reset()
        rf.reports(clear=True)
        with simulated(RANKS):
            begin = time.monotonic()
            step = _step(fmt, device, tokens, width, hidden, heads)
            step()
            compile_s = time.monotonic() - begin
            ms = _step_ms(step, device, runs=3 if tiny else 10)
        report = rf.merge_reports(rf.reports())
        rows.append(
            {
                "what": "block",
                "format": fmt,
                "tokens": tokens,
                "width": width,
                "ranks": RANKS,
                "quantized_sites": report.num_quantized,
                "bytes_sent": report.bytes_after,
                "median_ms": ms,
                "compile_s": compile_s,
            }
        )
    exact = rows[0]
    for row in rows[1:]:
        added = (row["median_ms"] - exact["median_ms"]) * 1e-3
        saved = exact["bytes_sent"] - row["bytes_sent"]
        row["added_ms"] = 1e3 * added
        row["pays_below_GBps"] = saved / added / 1e9 if added > 0 else None
    return rows


def _step(
    fmt: str, device: str, tokens: int, width: int, hidden: int, heads: int
) -> Callable[[], None]:
    """Forward and backward of a block whose linears are cut over the ranks."""
    torch.manual_seed(0)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = dict.fromkeys(("query", "key", "value", "up", "gate"), columns)
    block = Block(width, hidden, heads).to(device, torch.bfloat16)
    block = parallelize_module(block, mesh, plan | {"out": rows, "down": rows})
    options = {"bits": None if fmt == "exact" else fmt, "min_bytes": 0}
    run = torch.compile(block, backend="rfquant", options=options, dynamic=False)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)

    def step() -> None:
        run(x).backward(grad)
        x.grad = None
        block.zero_grad()

    return step


def _step_ms(step: Callable[[], None], device: str, runs: int) -> float:
    """Median over ``runs`` of the mean of 5 steps."""
    samples = []
    for _ in range(runs):
        if device == "cpu":
            begin = time.perf_counter()
            step()
            samples.append(1e3 * (time.perf_counter() - begin))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(CYCLES)  # else the host, which is slower than the GPU, would be timed
        start.record()
        for _ in range(5):
            step()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 5)
    return statistics.median(samples)
