"""How long does scoring a batch take, in steps of training?

    python benchmarks/score_cost.py    # some minutes

A GPT of 24 layers (``examples/gpt.py``) on one thread: a step of training (forward, backward,
AdamW) and ``rf.score`` of some batches take turns in one process. The row has the median CPU time
of a step and of a batch that is scored, in seconds, and their ratio. ``rf.score`` has its default
formats; the sites are the ends of the blocks. What a score does once, the copy of the model, counts
too. Results: in ``benchmarks/results/score_cost.jsonl``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, machine, write
from study_tasks import BYTES, GPT, GPTConfig
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.planning.score import FORMATS


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (
        ("layers", 24), ("width", 256), ("heads", 4), ("context", 128), ("batch", 8),
        ("batches", 4), ("runs", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=RESULTS / "score_cost.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPTConfig(options.width, options.layers, options.heads, options.context)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(BYTES, (options.batch, options.context + 1))

    def step() -> None:
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()

    def score() -> None:
        rf.score(model, [tokens] * options.batches, loss=loss, modules="blocks")

    times: dict[str, list[float]] = {"step": [], "score": []}
    for turn in range(options.runs + 1):
        for name, task in (("step", step), ("score", score)):
            begin = time.process_time()
            task()
            if turn:  # the first warms up
                seconds = time.process_time() - begin
                times[name].append(seconds / (options.batches if name == "score" else 1))
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["score"] / medians["step"]
    facts = {"batch": options.batch, "batches": options.batches, "formats": len(FORMATS)}
    facts |= {**vars(config), **machine()}
    write(options.out, [{**medians, "ratio": ratio, "all": times, **facts}])
    print(f"step {medians['step']:.2f} s, scored batch {medians['score']:.2f} s: {ratio:.2f} steps")


if __name__ == "__main__":
    main()
