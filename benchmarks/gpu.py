"""How close do the codec's kernels come to the GPU's copy bandwidth?

    python benchmarks/gpu.py                        # under 8 minutes
    python benchmarks/gpu.py --device cpu --tiny    # a dry run

First the bytes of the GPU are compared with the CPU's. Then quantize, dequantize, dequantize_sum
and requantize (8 rows) of every format run in turn with a copy of the same bfloat16 input, twice:
by the kernels of the package ("eager") and by those that Inductor generates ("compiled"). ``share``
is the operator's bandwidth (bytes in and out) over the copy's of the same run; ``modelled`` what
``rfcompile/emission/roofline.py`` says of the generated kernels of that size. Kernels are timed,
not the host: a CUDA graph of many calls between two events. The L2 cache is warm; what is larger
than it is measured from 128 MB on.

Then what else quantizes: other libraries, where they are installed, and a chain of torch operators.
Last a block of a tensor-parallel Llama with simulated collectives, exact and quantized.

Runs on torch 2.11 (Triton 3.6) and later, needs no download. What there was no time or no package
for is printed and has a row. Results: ``benchmarks/results/gpu.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import gpu_block
import torch
from common import RESULTS, machine, store
from gpu_model import ROWS, calls_of, modelled_shares
from gpu_peers import peers
from gpu_timing import medians
from torch import Tensor

from rfcompile.codec import operators

FORMATS = (
    *("4b", "8b", "3b", "2b", "6b", "5b"),
    *("4b:stoch", "4b:g32", "4b:h32", "8b:h128", "4b:tensor"),
)
OF_ALL_SIZES = ("4b",)
MEGABYTES = (1, 16, 128, 1024)
USUAL = 128
"""Megabytes of the input where only one size is measured."""
LIMIT_S = 360
"""After so long no further format is started: the block takes a minute or two."""

Row = dict[str, object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, few formats")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured (dry run: --device cpu --tiny)")
        return 1
    out = args.out or RESULTS / f"{'gpu' if args.device == 'cuda' else 'gpu_dry_run'}.jsonl"
    facts, rows = machine(args.device), []
    for row in measured(args.device, args.tiny):
        rows.append(row | facts)
        print(_line(row), flush=True)
        store(out, rows)  # a run that is cut off has what it measured
    print(f"written: {out}")
    return 0


def measured(device: str, tiny: bool) -> Iterator[Row]:
    begin = time.monotonic()
    formats = ("3b", "4b:h32") if tiny else FORMATS
    usual = 2**12 if tiny else USUAL * 2**19  # of 2 bytes each
    modelled = modelled_shares(formats, usual, device)
    for fmt in formats:
        if time.monotonic() - begin > LIMIT_S:
            yield {"what": "left out", "format": fmt, "why": f"{LIMIT_S} s were over"}
            continue
        compare_with_cpu(fmt, device)
        others = MEGABYTES if fmt in OF_ALL_SIZES and not tiny else ()
        for numel in dict.fromkeys((usual, *(mb * 2**19 for mb in others))):
            shares = modelled.get(fmt, {}) if numel == usual else {}
            yield from measure(fmt, numel, device, tiny, shares)
    yield from of_peers(usual, device, tiny)
    yield from gpu_block.measure(device, tiny)


def compare_with_cpu(fmt: str, device: str) -> None:
    """Raise AssertionError unless the device's bytes are the CPU's, eager and compiled."""
    x = torch.randn(4, 5000) * torch.logspace(-6, 6, 5000)
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    x = x.to(torch.bfloat16)
    payload = operators.quantize(x, fmt)
    calls = calls_of(fmt)

    def every(x: Tensor, payload: Tensor) -> list[Tensor]:
        return [call(x if name == "quantize" else payload) for name, call in calls.items()]

    expected = every(x, payload)
    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True, dynamic=False)
    for how, run in (("eager", every), ("compiled", compiled)):
        got = run(x.to(device), payload.to(device))
        for name, mine, other in zip(calls, got, expected, strict=True):
            is_same = torch.equal(mine.cpu().nan_to_num(), other.nan_to_num())
            assert is_same, f"{fmt}: {how} {name} on {device} differs from the CPU's"


def measure(
    fmt: str, numel: int, device: str, tiny: bool, modelled: Mapping[str, float]
) -> Iterator[Row]:
    """Every operator of one format and size, eager and compiled, against a copy of its input."""
    torch.manual_seed(0)
    x = torch.randn(ROWS, numel // ROWS, dtype=torch.bfloat16, device=device)
    payload = operators.quantize(x, fmt)
    for name, call in calls_of(fmt).items():
        given = x if name == "quantize" else payload
        torch._dynamo.reset()
        begin = time.monotonic()
        compiled = torch.compile(call, fullgraph=True, dynamic=False)
        output = compiled(given)
        compile_s = time.monotonic() - begin
        tasks = {
            "copy": x.clone,
            "eager": partial(call, given),
            "compiled": partial(compiled, given),
        }
        times = medians(tasks, device, **_often(x.nbytes, tiny))
        copy_GBps = 2 * x.nbytes / times.pop("copy")["median_ms"] / 1e6
        for how, found in times.items():
            GBps = (given.nbytes + output.nbytes) / found["median_ms"] / 1e6
            yield {
                "what": "kernel",
                "format": fmt,
                "operator": name,
                "how": how,
                "megabytes": x.nbytes / 2**20,
                **found,
                "GBps": GBps,
                "copy_GBps": copy_GBps,
                "share": GBps / copy_GBps,
                "modelled": modelled.get(name) if how == "compiled" else None,
                "compile_s": compile_s if how == "compiled" else None,
            }


def of_peers(numel: int, device: str, tiny: bool) -> Iterator[Row]:
    """What else quantizes the same tensor, and ours at 4 and 8 bits, in one run."""
    x = torch.randn(numel, dtype=torch.bfloat16, device=device)
    found, missing = peers()
    for name, why in missing.items():
        yield {"what": "left out", "peer": name, "why": why}
    for bits in (8, 4):
        call = calls_of(f"{bits}b")["quantize"]
        found[f"rfcompile {bits}b:g128"] = partial(call, x.view(1, -1)), bits + 16 / 128
    tasks: dict[str, Callable[[], object]] = {"copy": x.clone}
    for name, (call, _) in found.items():
        task = call if isinstance(call, partial) else partial(call, x)
        try:
            task()
        except Exception as error:  # whatever a library may say of this device
            yield {"what": "left out", "peer": name, "why": f"{type(error).__name__}: {error}"}
        else:
            tasks[name] = task
    times = medians(tasks, device, **_often(x.nbytes, tiny))
    copy_GBps = 2 * x.nbytes / times.pop("copy")["median_ms"] / 1e6
    for name, taken in times.items():
        GBps = numel * (2 + found[name][1] / 8) / taken["median_ms"] / 1e6
        row = {"what": "peer", "peer": name, "megabytes": x.nbytes / 2**20, **taken}
        yield row | {"GBps": GBps, "copy_GBps": copy_GBps, "share": GBps / copy_GBps}


def _often(nbytes: int, tiny: bool) -> dict[str, int]:
    """Replays, and calls in one of them: some milliseconds."""
    return {"runs": 3 if tiny else 15, "calls": 2 if tiny else max(2, min(100, 2**31 // nbytes))}


def _line(row: Row) -> str:
    if row["what"] == "left out":
        return f"left out: {row.get('format') or row['peer']}: {row['why']}"
    if row["what"] == "block":
        added = f", the wire adds {row['added_ms']:.2f} ms" if "added_ms" in row else ""
        pays = row.get("pays_below_GBps")
        link = f" and pays below {pays:.1f} GB/s" if pays else ""
        return f"block {row['format']}: {row['median_ms']:.2f} ms a step{added}{link}"
    name = row.get("peer") or f"{row['format']} {row['operator']} {row['how']}"
    modelled = f", modelled {row['modelled']:.2f}" if row.get("modelled") else ""
    return (
        f"{name}: {row['megabytes']:.3f} MB in {row['median_ms']:.3f} ms, "
        f"share of copy {row['share']:.2f}{modelled}"
    )


if __name__ == "__main__":
    sys.exit(main())
