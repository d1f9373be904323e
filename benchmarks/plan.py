"""Does a plan lose less than the best uniform policy of the same bytes, and as much as predicted?

    python benchmarks/plan.py                                # trains the study's GPT, then plans
    python benchmarks/plan.py --checkpoint "language residual+adamw 0.pt"

The model is the GPT of the residual study. For each seed of batches, each kind of boundary (what
leaves a block; what leaves attention and MLP) and each average of bits: the sites are scored on
``--batches`` batches of the training text, and a plan is made whose bytes are at most those of the
uniform policy of that many bits in groups of 128. The plan, and every uniform policy of the same
formats that fits the bytes, are then measured on as many other batches, from the text that is held
out. The best uniform policy is the one that these measured losses show, which favours it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, write
from residual_study import ARMS, build, rate
from study_tasks import Batch, GPTConfig, Language, boundaries_of
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.training import optimizers

ARM = "residual+adamw"
FORMATS = [
    *(f"{bits}b:g{group}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)),
    *(f"{bits}b:h128" for bits in (2, 3, 4)),
]


def trained(task: Language, options: argparse.Namespace) -> nn.Module:
    """The model of the checkpoint, which ``--steps`` describes; where there is none, a new one."""
    torch.manual_seed(0)
    arm = ARMS[ARM]
    model = build(task, arm)
    if options.checkpoint and options.checkpoint.exists():
        model.load_state_dict(torch.load(options.checkpoint, weights_only=True))
        return model
    optimizer = optimizers(
        model, lr=arm.lr, matrix_lr=arm.matrix_lr, weight_decay=arm.weight_decay,
        matrices=arm.matrices, example_inputs=(next(task.validation(1))[0],),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        loss = task.loss(model, task.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, options.steps // 10) == 0:
            print(f"step {step}/{options.steps} loss {loss.item():.3f}", flush=True)
    if options.checkpoint:
        torch.save(model.state_dict(), options.checkpoint)
    return model


def held_out(task: Language, count: int, seed: int) -> list[Batch]:
    """Random windows of the text that training never sees."""
    generator = torch.Generator().manual_seed(seed)
    high = len(task.text) - task.config.context - 1
    sizes = [(task.batch_size,)] * count
    return [task._at(torch.randint(task.cut, high, s, generator=generator)) for s in sizes]


def measured(task: Language, model: nn.Module, batches: list[Batch]) -> list[float]:
    with torch.no_grad():
        return [task.loss(model, batch).item() for batch in batches]


def rows_of(
    task: Language, model: nn.Module, seed: int, boundary: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    sites = boundaries_of(task, model)[boundary]
    task.generator.manual_seed(1000 + seed)
    calibration = [task.batch() for _ in range(options.batches)]
    evaluation = held_out(task, options.batches, seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return task.loss(model, batch)

    begin = time.perf_counter()
    scores = rf.score(model, calibration, loss=loss, formats=FORMATS, modules=sites)
    seconds = time.perf_counter() - begin
    exact = measured(task, model, evaluation)
    elements = sum(n * times for s in scores.sites for n, times in s.calls.items())
    elements //= options.batches
    every = [score.format for score in scores.sites[0].formats]
    uniform: dict[str, float] = {}
    predicted = {
        fmt: sum(scores.increase(site.formats[i]) for site in scores.sites)
        for i, fmt in enumerate(every)
    }

    def increase(policy: rf.Policy) -> float:
        losses = measured(task, rf.transform(model, rf.Wire(policy, modules=sites)), evaluation)
        return statistics.fmean(losses) - statistics.fmean(exact)

    for bits in options.bits:
        budget = rf.QuantFormat(bits).payload_bytes(elements // len(sites)) * len(sites)
        sizes = {f: rf.QuantFormat.parse(f).payload_bytes(elements // len(sites)) for f in every}
        fitting = [f for f in every if 0.75 * budget <= sizes[f] * len(sites) <= budget]
        for fmt in fitting:
            if fmt not in uniform:
                uniform[fmt] = increase(rf.Policy(activations=fmt))
        best = min(fitting, key=uniform.__getitem__)
        plan = rf.plan(scores, bytes=budget)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rf.errors.RFCompileWarning)  # the ratio is in the row
            checked = plan.check(model, evaluation, loss=loss, largest=options.largest)
        yield {
            "seed": seed, "boundary": boundary, "bits": bits, "sites": len(sites),
            "budget": budget, "planned_bytes": plan.bytes, "exact_loss": statistics.fmean(exact),
            "uniform": {fmt: uniform[fmt] for fmt in fitting}, "best_uniform": best,
            "predicted_uniform": {fmt: predicted[fmt] for fmt in fitting},
            "best_uniform_increase": uniform[best], "planned_increase": checked.measured,
            "standard_error": checked.error,
            "predicted_increase": plan.increase, "ratio": checked.ratio,
            "interaction": checked.interaction, "largest": options.largest,
            "less_loss": 1 - checked.measured / uniform[best],
            "formats": {c.site: c.format or "exact" for c in plan.choices},
            "score_seconds": seconds, "calibration_batches": options.batches,
            "batch": task.batch_size, **machine(),
        }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    print(
        f"seed {row['seed']} {row['boundary']:6} {row['bits']} bits: best uniform "
        f"{row['best_uniform']} +{row['best_uniform_increase']:.5f}, plan "
        f"+{row['planned_increase']:.5f} ({100 * row['less_loss']:.0f} % less), predicted "
        f"+{row['predicted_increase']:.5f}, ratio {row['ratio']:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("steps", 1000), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 16), ("batches", 8), ("largest", 3), ("seeds", 3), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--boundaries", nargs="+", default=["stream", "branch"])
    parser.add_argument("--checkpoint", type=Path, help="read if it is there, else written")
    parser.add_argument("--out", type=Path, default=RESULTS / "plan.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = GPTConfig(options.width, options.layers, options.heads, options.context)
    task = Language(config, options.batch, 0)
    model = trained(task, options).eval()
    rows = []
    for seed in range(options.seeds):
        for boundary in options.boundaries:
            for row in rows_of(task, model, seed, boundary, options):
                sizes = {"width": options.width, "layers": options.layers, "steps": options.steps}
                rows.append(row | sizes | {"context": options.context, "arm": ARM})
                show(rows[-1])
                write(options.out, rows)


if __name__ == "__main__":
    main()
