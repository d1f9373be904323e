"""How fast is the compiled codec on a CPU, next to a copy of the same tensor?

    python benchmarks/codec.py            # 64 MB of float32, all bit widths, 1 and 2 threads
    python benchmarks/codec.py --tiny     # a dry run

For each format the compiled quantize, dequantize, dequantize_sum (4 rows) and requantize (4 rows)
run in turn with ``torch.clone`` of the 64 MB float32 tensor; ``ratio`` is the median time over the
clone's, of the same run. GB/s counts bytes read and written. Outputs above 32 MB are mapped anew on
every call, and the page faults then take longer than the work; the script therefore starts itself
again with glibc's thresholds raised, for clone and codec alike.
Results: ``benchmarks/results/codec.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from common import RESULTS, alternate, machine, write

import rfcompile.inductor.lowering  # noqa: F401  # registers the lowerings
from rfcompile.codec import operators

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
FORMATS = ("8b", "6b", "5b", "4b", "3b", "2b", "4b:h8", "4b:h128")
ROWS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small tensor and one format")
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="FORMAT")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--out", type=Path, default=RESULTS / "codec.jsonl")
    args = parser.parse_args()
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != ALLOCATOR["MALLOC_MMAP_THRESHOLD_"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

    numel, runs = (2**14, 3) if args.tiny else (2**24, 25)
    formats = ("4b",) if args.tiny else args.formats
    rows = []
    print(f"{'format':10}{'threads':>8}{'operator':>16}{'ms':>9}{'iqr':>7}{'GB/s':>7}{'ratio':>7}")
    for threads in (1,) if args.tiny else args.threads:
        torch.set_num_threads(threads)
        for fmt in formats:
            for name, result in measure(fmt, numel, runs).items():
                row = {"format": fmt, "threads": threads, "operator": name, "numel": numel}
                rows.append(row | result | machine())
                print(
                    f"{fmt:10}{threads:8}{name:>16}{result['median_ms']:9.2f}"
                    f"{result['iqr_ms']:7.2f}{result['GBps']:7.1f}{result['ratio']:7.2f}",
                    flush=True,
                )
    write(args.out, rows)
    return 0


def measure(fmt: str, numel: int, runs: int) -> dict[str, dict[str, float]]:
    """Every operator of one format against the clone, at the current number of threads."""
    torch.manual_seed(0)
    x = torch.randn(1, numel)
    payload = operators.quantize(x, fmt)
    rows = operators.quantize(x.view(ROWS, -1), fmt)
    calls = {
        "quantize": (lambda t: operators.quantize(t, fmt), x),
        "dequantize": (lambda p: operators.dequantize(p, fmt, torch.float32), payload),
        "dequantize_sum": (lambda p: operators.dequantize_sum(p, fmt, torch.float32), rows),
        "requantize": (lambda p: operators.requantize(p, fmt), rows),
    }
    results = {}
    for name, (call, argument) in calls.items():
        torch._dynamo.reset()
        run = torch.compile(call, fullgraph=True, dynamic=False)
        output = run(argument)
        assert torch.equal(output, call(argument)), f"{name} {fmt}: compiled differs from eager"
        times = alternate({"clone": x.clone, name: lambda r=run, a=argument: r(a)}, runs)
        milliseconds = times[name]["median_ms"]
        results[name] = times[name] | {
            "clone_ms": times["clone"]["median_ms"],
            "ratio": milliseconds / times["clone"]["median_ms"],
            "GBps": (argument.nbytes + output.nbytes) / milliseconds / 1e6,
        }
    return results


if __name__ == "__main__":
    sys.exit(main())
