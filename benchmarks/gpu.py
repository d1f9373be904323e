"""How close do the codec's kernels come to the GPU's copy bandwidth?

    python benchmarks/gpu.py                        # 1 MB to 1 GB of bfloat16, all bit widths
    python benchmarks/gpu.py --device cpu --tiny    # a dry run

First the bytes of the GPU are compared with the CPU's. Then quantize, dequantize, dequantize_sum
(8 rows) and requantize (8 rows) run in turn with a copy of the same input; ``share`` is the
operator's bandwidth (bytes in and out) over the copy's of the same run. Sizes from 64 MB on do
not fit an L2 cache; smaller ones are measured warm. Runs on torch 2.11 (Triton 3.6) and later,
needs no download, under 8 minutes. Results: ``benchmarks/results/gpu.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from common import RESULTS, alternate, machine, write

import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings
from rfcompile.codec import operators

BITS = (8, 6, 5, 4, 3, 2)
MEGABYTES = (1, 16, 64, 256, 1024)
ROWS = 8
LIMIT_S = 450
"""No new format is started after this long."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="one small size, one bit width")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (dry run: --device cpu --tiny)")
        return 1
    out = args.out or RESULTS / f"{'gpu' if args.device == 'cuda' else 'gpu_dry_run'}.jsonl"
    sizes = (2**12,) if args.tiny else tuple(mb * 2**19 for mb in MEGABYTES)  # of 2 bytes each
    begin, rows = time.monotonic(), []
    for bits in (3,) if args.tiny else BITS:
        if time.monotonic() - begin > LIMIT_S:
            print(f"out of time before {bits} bits: left out")
            continue
        compare_with_cpu(f"{bits}b", args.device)
        for numel in sizes:
            for row in measure(f"{bits}b", numel, args.device, runs=3 if args.tiny else 20):
                rows.append(row | machine(args.device))
                print(
                    f"{row['format']:4}{row['megabytes']:10.3f} MB{row['operator']:>16}"
                    f"{row['median_ms']:10.3f} ms  share {row['share']:.2f}",
                    flush=True,
                )
    write(out, rows)
    return 0


def compare_with_cpu(fmt: str, device: str) -> None:
    """Raise AssertionError unless the device's bytes are the CPU's, eager and compiled."""
    x = torch.randn(4, 5000) * torch.logspace(-6, 6, 5000)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    expected = operators.quantize(x, fmt)
    compiled = torch.compile(lambda t: operators.quantize(t, fmt), fullgraph=True)
    for name, run in (("eager", lambda t: operators.quantize(t, fmt)), ("compiled", compiled)):
        got = run(x.to(device)).cpu()
        assert torch.equal(got, expected), f"{fmt}: {name} bytes on {device} differ from the CPU's"


def measure(fmt: str, numel: int, device: str, runs: int) -> list[dict[str, object]]:
    """Every operator of one format and size against a copy of its input."""
    torch.manual_seed(0)
    x = torch.randn(1, numel, dtype=torch.bfloat16, device=device)
    payload = operators.quantize(x, fmt)
    rows = operators.quantize(x.view(ROWS, -1), fmt)
    calls = {
        "quantize": (lambda t: operators.quantize(t, fmt), x),
        "dequantize": (lambda p: operators.dequantize(p, fmt, torch.bfloat16), payload),
        "dequantize_sum": (lambda p: operators.dequantize_sum(p, fmt, torch.bfloat16), rows),
        "requantize": (lambda p: operators.requantize(p, fmt), rows),
    }
    results: list[dict[str, object]] = []
    for name, (call, argument) in calls.items():
        torch._dynamo.reset()
        begin = time.monotonic()
        run = torch.compile(call, fullgraph=True, dynamic=False)
        output = run(argument)
        compile_s = time.monotonic() - begin
        times = alternate({"copy": x.clone, name: lambda r=run, a=argument: r(a)}, runs, device)
        moved = argument.nbytes + output.nbytes
        copy_GBps = 2 * x.nbytes / times["copy"]["median_ms"] / 1e6
        GBps = moved / times[name]["median_ms"] / 1e6
        results.append(
            {
                "format": fmt,
                "operator": name,
                "megabytes": x.nbytes / 2**20,
                **times[name],
                "GBps": GBps,
                "copy_GBps": copy_GBps,
                "share": GBps / copy_GBps,
                "compile_s": compile_s,
            }
        )
    return results


if __name__ == "__main__":
    sys.exit(main())
