"""From which size on is a quantized collective faster than the exact one?

    python benchmarks/crossover.py            # about 6 minutes; root, ip and tc (iproute2)
    python benchmarks/crossover.py --quick    # under a minute: 2 ranks, one rate, 4 bits

``rf.measure_crossover`` for 8, 4 and 2 bits, float32, on 2 and 4 ranks: processes of this machine
in network namespaces (``network.py``) with links of 1 Gbit or 200 Mbit a second, or without a
limit, gloo, one thread a rank. A link's rate limiter lets 128 kB through at once, so at the small
sizes a link is faster than its rate.

A line of the result: a format, ranks, rate, the crossover of each collective in bytes of a rank's
tensor (None: not at any size measured, 4 KiB to 16 MiB), and the times behind it.
Results: ``benchmarks/results/crossover.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, machine, write
from ranks import measure, ready, serve

import rfcompile as rf
from rfcompile.wire.crossover import NEVER

FORMATS = ("8b", "4b", "2b")
RATES = ("none", "1gbit", "200mbit")


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """On a rank."""
    found = rf.measure_crossover(job["format"], seconds=job["seconds"])
    sizes = {name: found.min_bytes_of(name) for name in found.collectives}
    return {
        "min_bytes": {name: None if size == NEVER else size for name, size in sizes.items()},
        "times": found.to_dict()["times"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 ranks at 200 Mbit, 4 bits")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement, about")
    parser.add_argument("--out", type=Path, default=RESULTS / "crossover.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(answer)
        return 0
    if not ready("crossover"):
        return 0
    worlds, rates, formats = (
        ((2,), ("200mbit",), ("4b",)) if args.quick else ((2, 4), RATES, FORMATS)
    )
    places = [{"rate": rate, "format": fmt} for rate in rates for fmt in formats]
    rows: list[dict[str, Any]] = []
    print(f"{'format':7}{'ranks':>6}{'rate':>9}  crossover in bytes")
    for world in worlds:
        jobs = [
            (None if place["rate"] == "none" else place["rate"], place | {"seconds": args.seconds})
            for place in places
        ]
        for place, found in zip(places, measure(__file__, world, jobs), strict=True):
            rows.append({"ranks": world} | place | found | machine())
            text = ", ".join(
                f"{name} {size or 'none'}" for name, size in found["min_bytes"].items()
            )
            print(f"{place['format']:7}{world:6}{place['rate']:>9}  {text}", flush=True)
            write(args.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
