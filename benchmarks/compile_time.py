"""How much longer does compiling take when the wire is quantized?

    python benchmarks/compile_time.py              # some minutes; transformers

A tensor-parallel Llama of a few layers is compiled for 8 simulated ranks on a CPU, forward and
backward, and runs one step: with all collectives exact, at 4 bits, and at 4 bits rotated. Each
compile has a process and an Inductor cache of its own; the codec's C++ library, which is built once
a machine, is built before. The formats take turns. A line of the result: seconds of every turn, and
the median of the ratios to the exact compile of the same turn.
Results: ``benchmarks/results/compile_time.jsonl``.

With ``--format`` this file is also one compile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, machine, write

FORMATS = ("exact", "4b", "4b:h32")
WORLD = 8
GOALS = {"4b": 1.10, "4b:h32": 1.25}


def seconds_of_compile(format: str, layers: int) -> float:
    """Of the first step, forward and backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    import rfcompile as rf
    from rfcompile.wire.process_groups import simulated

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=WORLD,
        num_key_value_heads=WORLD,
        vocab_size=512,
        max_position_embeddings=256,
    )
    with simulated(WORLD):
        model = LlamaForCausalLM(config)
        mesh = init_device_mesh("cpu", (WORLD,))
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        columns += ("mlp.gate_proj", "mlp.up_proj")
        plan = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        options = {"bits": None if format == "exact" else format, "min_bytes": 0}
        compiled = torch.compile(model, backend="rfquant", options=options)
        tokens = torch.randint(512, (2, 128))
        start = time.perf_counter()
        compiled(input_ids=tokens, use_cache=False).logits.float().mean().backward()
        seconds = time.perf_counter() - start
        report = rf.merge_reports(rf.reports())
        expected = 0 if format == "exact" else 4 * layers
        assert report.num_quantized == expected, report.summary()
    return seconds


def compiled_apart(format: str, layers: int) -> float:
    """:func:`seconds_of_compile` in a process with an empty cache, but for the codec's library."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        load = "from rfcompile.codec import cpu_codec; assert not cpu_codec.load_kernels()"
        subprocess.run([sys.executable, "-c", load], env=environment, check=True)
        command = [sys.executable, __file__, "--format", format, "--layers", str(layers)]
        done = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "compile_time.jsonl")
    parser.add_argument("--format", choices=FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.format:
        print(seconds_of_compile(args.format, args.layers))
        return
    seconds: dict[str, list[float]] = {format: [] for format in FORMATS}
    for turn in range(args.turns):
        for format in FORMATS:
            seconds[format].append(compiled_apart(format, args.layers))
            print(f"turn {turn}: {format} {seconds[format][-1]:.1f} s", flush=True)
    ratios = {
        format: [a / b for a, b in zip(seconds[format], seconds["exact"], strict=True)]
        for format in FORMATS
    }
    for format, goal in GOALS.items():
        print(f"{format}: {statistics.median(ratios[format]):.2f} of exact (goal {goal})")
    row = {"layers": args.layers, "world_size": WORLD, "seconds": seconds, "ratios": ratios}
    write(args.out, [machine() | row])


if __name__ == "__main__":
    main()
