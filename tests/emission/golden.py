"""The golden table: what becomes of every operator in every format, on two GPUs that are absent.

``python -m tests.emission.golden`` brings the daily sample of ``golden.jsonl`` up to date,
``--all`` every row. A row that the file has is not made again, so that a run that was cut off goes
on; with ``--again`` it is. Tensors have 8 rows of 2^20 elements, as a large one for 8 ranks.

Requantize works in the rotated domain: its rows without a rotation are those with one. Each run
says how many rows are missing.

Fields of a row: launches; spilled bytes a thread, of the worst kernel; bits of each load and store
to and from global memory; bytes over the least; registers of the worst kernel; instructions an
element, of all kernels. Needs Triton.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rfcompile.emission.absent_gpu import install
from rfcompile.emission.child import in_children
from rfcompile.emission.gpus import gpu_of
from rfcompile.emission.report import GraphKernels
from tests.inductor.fake_gpu import Case, emitted

FILE = Path(__file__).with_name("golden.jsonl")
ROWS, NUMEL = 8, 2**20
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
TARGETS = ("sm_90", "gfx942")
OPERATORS = ("quantize", "dequantize", "dequantize_sum", "requantize")
BITS = (4, 8, 2, 3, 6, 5)
GROUPS = ("g128", "g32", "tensor")
ROTATIONS = ("", "h32", "h128")
ROUNDINGS = ("nearest", "stoch")
KEY = ("target", "operator", "format", "dtype")

SAMPLE = (
    ("sm_90", "quantize", "4b:g128", "bf16"),
    ("sm_90", "quantize", "3b:g32:stoch", "f32"),
    ("sm_90", "dequantize", "3b:g128", "bf16"),
    ("sm_90", "dequantize", "8b:tensor", "f32"),
    ("sm_90", "dequantize_sum", "4b:g32", "bf16"),
    ("sm_90", "requantize", "4b:g128", "bf16"),
    ("sm_90", "quantize", "4b:g128:h32", "bf16"),
    ("sm_90", "dequantize", "3b:g128:h128", "f32"),
    ("sm_90", "quantize", "4b:tensor", "bf16"),
    ("sm_90", "dequantize_sum", "4b:tensor:h32", "bf16"),
    ("gfx942", "quantize", "8b:g128", "bf16"),
    ("gfx942", "dequantize", "4b:g128", "bf16"),
    ("gfx942", "dequantize_sum", "8b:g128", "f32"),
    ("gfx942", "quantize", "4b:g128:h32", "bf16"),
    ("gfx942", "requantize", "2b:g128", "bf16"),
    ("gfx942", "requantize", "2b:tensor", "bf16"),
)
"""The daily sample."""

Row = dict[str, Any]


def all_keys() -> Iterator[tuple[str, ...]]:
    """Every row, the plain formats first. A block that is rotated is at most a group."""
    for rotation, rounding, group in itertools.product(ROTATIONS, ROUNDINGS, GROUPS):
        if (group, rotation) == ("g32", "h128"):
            continue
        words = [group, rotation, "stoch" if rounding == "stoch" else ""]
        for target, bits in itertools.product(TARGETS, BITS):
            spec = ":".join([f"{bits}b", *filter(None, words)])
            for operator, dtype in itertools.product(OPERATORS, DTYPES):
                if not (rotation and operator == "requantize"):
                    yield target, operator, spec, dtype


def made(key: Sequence[str]) -> Row:
    """The row of a key, in a process that ``install`` gave its GPU."""
    target, operator, spec, dtype = key
    found = emitted(Case(operator, spec, ROWS, NUMEL, DTYPES[dtype]))
    row: Row = dict(zip(KEY, key, strict=True))
    if found.emission is None:
        return row | {"error": found.error[-300:]}
    codes = {name: [code] for name, code in found.codes.items()}
    graph = GraphKernels.of("forward", "", found.emission, codes, gpu_of(target))
    return row | {
        "launches": graph.launches,
        "spilled": max(kernel.spilled for kernel in graph.kernels),
        "loads": sorted({bits for kernel in graph.kernels for bits in kernel.loads}),
        "stores": sorted({bits for kernel in graph.kernels for bits in kernel.stores}),
        "bytes_over_least": round(graph.moved / graph.least, 3),
        "registers": max(kernel.registers for kernel in graph.kernels),
        "instructions": round(sum(kernel.instructions for kernel in graph.kernels), 1),
    }


def rows_of(wanted: Sequence[tuple[str, ...]]) -> Iterator[Row]:
    """The rows of these keys as they are made; those of one target that follow one another share
    processes.
    """
    for target, mine in itertools.groupby(wanted, key=lambda key: key[0]):
        prepare = partial(install, gpu_of(target))
        yield from (row for _, row in in_children(prepare, made, list(mine), 2))


def table() -> dict[tuple[str, ...], Row]:
    """The rows of the file by their keys."""
    rows = map(json.loads, FILE.read_text().splitlines()) if FILE.exists() else ()
    return {tuple(row[name] for name in KEY): row for row in rows}


def write(rows: dict[tuple[str, ...], Row]) -> None:
    order = {key: number for number, key in enumerate(all_keys())}
    lines = [json.dumps(rows[key]) for key in sorted(rows, key=order.__getitem__)]
    FILE.write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every row, not only the sample")
    parser.add_argument("--again", action="store_true", help="also rows that the file has")
    parser.add_argument("--only", default="", help="only formats that hold this text")
    args = parser.parse_args()
    rows = table()
    wanted = [key for key in (all_keys() if args.all else SAMPLE) if args.only in key[2]]
    wanted = [key for key in wanted if args.again or key not in rows]
    for number, row in enumerate(rows_of(wanted), 1):
        rows[tuple(row[name] for name in KEY)] = row
        write(rows)
        print(f"{number} of {len(wanted)}: {json.dumps(row)}", file=sys.stderr, flush=True)
    missing = sum(key not in rows for key in all_keys())
    print(f"{FILE.name} has {len(rows)} rows, {missing} are missing", file=sys.stderr)


if __name__ == "__main__":
    main()
