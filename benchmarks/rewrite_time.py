"""How long do finding and rewriting residual adds take, in captures of the same model?

    python benchmarks/rewrite_time.py    # some minutes; transformers

A Llama (transformers) and a GPT (``examples/gpt.py``) of 48 narrow layers, on one thread. In turn
and in one process: ``torch.export.export``; ``rf.find_residuals``; ``rf.transform`` with
``residual="anneal"``, with ``residual="free"``, and with a wire alone; ``rf.explain``. A row has
the median CPU time of each in seconds, the median of the ratios to the export of the same turn, and
how often each captured the model and ran it. Results: ``benchmarks/results/rewrite_time.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, write
from study_tasks import BYTES, GPT, GPTConfig
from torch import nn

import rfcompile as rf

GOALS = {"find": 1.5, "anneal": 2.0, "free": 4.0}


def gpt(layers: int, width: int) -> nn.Module:
    return GPT(GPTConfig(width, layers, heads=4, context=32))


def llama(layers: int, width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Calls:
    """How often a model, and each copy of it, was called: to be captured, and to run."""

    def __init__(self, model: nn.Module) -> None:
        self.captures = self.runs = 0

        def count(*_: object) -> None:  # a copied model has the same function
            self.captures += torch.compiler.is_compiling()
            self.runs += not torch.compiler.is_compiling()

        model.register_forward_pre_hook(count)

    def of(self, task: Callable[[], object]) -> dict[str, int]:
        self.captures = self.runs = 0
        task()
        return {"captures": self.captures, "runs": self.runs}


def measured(model: nn.Module, runs: int) -> dict[str, Any]:
    inputs = (torch.randint(BYTES, (2, 16)),)
    tasks: dict[str, Callable[[], object]] = {
        "export": lambda: torch.export.export(model, inputs, strict=False),
        "find": lambda: rf.find_residuals(model, example_inputs=inputs),
        "anneal": lambda: rf.transform(model, residual="anneal", example_inputs=inputs),
        "free": lambda: rf.transform(model, residual="free", example_inputs=inputs),
        "wire": lambda: rf.transform(model, bits=4, example_inputs=inputs),
        "explain": lambda: rf.explain(model, bits=4, example_inputs=inputs),
    }
    calls = Calls(model)
    counts = {name: calls.of(task) for name, task in tasks.items()}  # this also warms up
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            begin = time.process_time()
            task()
            times[name].append(time.process_time() - begin)
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, times["export"], strict=True))
        for name, found in times.items()
    }
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {"seconds": seconds, "ratios": ratios, "calls": counts, "all": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "rewrite_time.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for make in (llama, gpt):
        torch.manual_seed(0)
        row = measured(make(options.layers, options.width).eval(), options.runs)
        for name, ratio in row["ratios"].items():
            goal = f" (goal {GOALS[name]})" if name in GOALS else ""
            calls = ", ".join(f"{count} {what}" for what, count in row["calls"][name].items())
            seconds = row["seconds"][name]
            print(f"{make.__name__} {name}: {seconds:.2f} s, {ratio:.2f} exports{goal}; {calls}")
        facts = {"model": make.__name__, "layers": options.layers, "width": options.width}
        load = {"load": os.getloadavg()[0]}
        rows.append(facts | row | load | machine())
    write(options.out, rows)


if __name__ == "__main__":
    main()
