"""Do residual-free models quantize better? The paper's comparison, with its controls.

    python benchmarks/residual_study.py                           # GPTs on Shakespeare, 3 seeds
    python benchmarks/residual_study.py --task digits             # ViTs on handwritten digits
    python benchmarks/residual_study.py --arms residual+muon free+muon --seeds 1 --steps 300

Each run trains one arm with one seed, then measures it: validation loss; excess kurtosis of what
leaves each block, attention and MLP, over training; the increase of the validation loss when those
are quantized; kurtosis and quantization error of gradients and optimizer states. A run is one line
of ``--out``; runs that are there already are not repeated. The recipes of the arms were searched
with ``--search``: see SEARCH.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from common import RESULTS, machine
from study_measures import increases, kurtosis_by_site, traffic, validation_loss
from study_plots import plot, table
from study_tasks import TASKS, GPTConfig, Task
from torch import nn

import rfcompile as rf
from rfcompile.training import Initialization, SkipAnnealer, TemperatureRule, finalize, optimizers


@dataclass(frozen=True)
class Arm:
    """One way to build and train: what becomes of the skips, the optimizer, the recipe."""

    skips: Literal["kept", "dropped", "annealed"]
    """Annealed: their gain falls from 1 to 0 over the first half of the training."""
    matrices: Literal["muon", "adamw", "soap"] = "muon"
    lr: float = 2e-3
    matrix_lr: float = 0.01
    weight_decay: float = 0.01
    initialization: Initialization | None = None
    temperature: TemperatureRule | None = None
    rotary: bool = True


KEPT = Arm("kept", matrix_lr=0.02)
FREE = Arm("dropped", initialization=Initialization(), temperature=TemperatureRule())

ARMS: dict[str, Arm] = {
    "residual+adamw": replace(KEPT, matrices="adamw"),
    "residual+muon": KEPT,
    "free+muon": FREE,
    "free+muon+annealed": replace(FREE, skips="annealed", matrix_lr=0.02),
    "residual+muon+orthogonal": replace(KEPT, initialization=Initialization()),
    "free+adamw": replace(FREE, matrices="adamw", lr=3e-4),
    "free+muon-orthogonal": replace(FREE, initialization=None),
    "free+muon-temperature": replace(FREE, temperature=None),
    "free+muon-rotary": replace(FREE, rotary=False),
    "free+muon+annealed-temperature": replace(
        FREE, skips="annealed", matrix_lr=0.02, temperature=None
    ),
}
"""The comparison: ``+`` adds to, ``-`` takes from the recipe."""

SEARCH: dict[str, Arm] = {
    **{f"residual+muon {lr}": replace(KEPT, matrix_lr=lr) for lr in (0.005, 0.01, 0.02, 0.04)},
    **{f"free+muon {lr}": replace(FREE, matrix_lr=lr) for lr in (0.005, 0.01, 0.02)},
    **{
        f"free+muon+annealed {lr}": replace(FREE, skips="annealed", matrix_lr=lr)
        for lr in (0.01, 0.02)
    },
    **{f"free+adamw {lr}": replace(FREE, matrices="adamw", lr=lr) for lr in (1e-4, 3e-4, 1e-3)},
    "free+muon, soap 0.003": replace(FREE, matrices="soap", matrix_lr=0.003),
    **{
        f"free+muon, self mass {mass}": replace(FREE, temperature=TemperatureRule(mass))
        for mass in (0.001, 0.1)
    },
    **{
        f"free+muon, alpha {alpha} beta {beta}": replace(
            FREE, initialization=Initialization(alpha=alpha, beta=beta)
        )
        for alpha, beta in ((0.9, 0.5), (0.6, 0.33))
    },
    "free+muon, gain 3": replace(FREE, initialization=Initialization(gain=3.0)),
    "free+muon, decay 0.1": replace(FREE, weight_decay=0.1),
}
"""How the recipe was found: short runs (``--search --steps 300 --seeds 1``), see README.md."""


def build(task: Task, arm: Arm) -> nn.Module:
    model = task.model(rotary=arm.rotary)
    ends = [m for n, m in model.named_modules() if n.endswith((".out", ".down"))]
    if arm.initialization is None and arm.skips != "kept":  # GPT's own start has branches of zeros
        for linear in ends:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    if arm.skips == "kept" and arm.initialization is None:
        return model
    start = arm.initialization and replace(arm.initialization, seed=torch.initial_seed())
    how = rf.ResidualFree(
        "anneal" if arm.skips == "annealed" else "free",
        initialization=start,
        temperature=arm.temperature,
    )
    example = next(iter(task.validation(1)))[0]
    rewritten = rf.transform(model, how, example_inputs=(example,))
    if arm.skips == "kept":  # the same start with skips: their sum is to keep its size
        sites = rf.training.residual_report(rewritten).sites
        for site in sites:
            rewritten.get_submodule(site.path).become("keep")
        for name, module in rewritten.named_modules():
            if name.endswith((".out", ".down")):
                module.weight.data /= math.sqrt(len(sites))
    return rewritten


def rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def run(name: str, arm: Arm, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    config = GPTConfig(options.width, options.layers, options.heads, options.context)
    task = TASKS[options.task](config, options.batch, seed)
    model = build(task, arm)
    optimizer = optimizers(
        model, lr=arm.lr, matrix_lr=arm.matrix_lr, weight_decay=arm.weight_decay,
        matrices=arm.matrices, example_inputs=(next(iter(task.validation(1)))[0],),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    annealer = SkipAnnealer(model, options.steps // 2) if arm.skips == "annealed" else None
    forward = torch.compile(model) if options.compile else model
    losses: list[float] = []
    kurtosis = {0: kurtosis_by_site(task, model)}
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        loss = task.loss(forward, task.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        if annealer is not None:
            annealer.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0:
            kurtosis[step] = kurtosis_by_site(task, model)
            mean = sum(losses[-20:]) / len(losses[-20:])
            seconds = time.perf_counter() - begin
            print(
                f"{name} seed {seed} step {step}/{options.steps} loss {mean:.3f} {seconds:.0f} s",
                flush=True,
            )
    if annealer is not None:
        finalize(model)
    exact = validation_loss(task, model, options.batches)
    if options.checkpoints:
        options.checkpoints.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), options.checkpoints / f"{options.task} {name} {seed}.pt")
    return {
        "arm": name, "seed": seed, "task": options.task, **asdict(config), "steps": options.steps,
        "batch": options.batch, "recipe": asdict(arm), "seconds": time.perf_counter() - begin,
        "validation_loss": exact, "increases": increases(task, model, exact, options.batches),
        "kurtosis": kurtosis, "traffic": traffic(task, model, optimizer), "losses": losses,
        **machine(),
    }  # fmt: skip


def key_of(row: dict[str, Any]) -> str:
    names = ("arm", "seed", "task", "width", "layers", "heads", "context", "steps", "batch")
    return json.dumps([row[name] for name in (*names, "recipe")], sort_keys=True)


def runs(options: argparse.Namespace) -> Iterator[tuple[str, Arm, int]]:
    names = options.arms or (SEARCH if options.search else ARMS)
    for seed in range(options.seeds):
        for name in names:
            yield name, {**ARMS, **SEARCH}[name], seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="language")
    parser.add_argument("--arms", nargs="+", choices={**ARMS, **SEARCH}, help="default: all")
    parser.add_argument("--search", action="store_true", help="the arms of SEARCH")
    parser.add_argument("--seeds", type=int, default=3)
    for name, default in (
        ("steps", 1000), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 16), ("batches", 8), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--checkpoints", type=Path, help="a folder for the trained models")
    parser.add_argument("--out", type=Path, default=RESULTS / "residual_study.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = {key_of(row) for row in rows}
    sizes = {**vars(options)}
    for name, arm, seed in runs(options):
        if key_of({**sizes, "arm": name, "seed": seed, "recipe": asdict(arm)}) in done:
            print(f"{name} seed {seed}: there already")
            continue
        row = run(name, arm, seed, options)
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(rows))
    plot(rows, options.out.with_suffix(".png"))
    print(f"written: {options.out} and its .png")


if __name__ == "__main__":
    main()
