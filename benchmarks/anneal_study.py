"""What becomes of a trained model whose residual connections are taken away?

    python benchmarks/residual_study.py --arms residual+muon --seeds 1 --checkpoints trained
    python benchmarks/anneal_study.py "trained/language residual+muon 0.pt"

Starting from the trained GPT of the residual study, with the same number of further steps each:

- ``kept``: it trains on with its skips: what the steps alone are worth.
- ``annealed``: ``rfcompile.transform(residual="anneal")``; the gain falls to 0 over the first
  ``--share`` of the steps, then ``finalize``.
- ``dropped``: the gain is 0 from the first step on: the plain removal, and training from there.
- ``fresh``: ``transform(residual="free")`` of an untrained model: what the trained weights are
  worth.

One JSON line an arm: the validation loss before, on the way and at the end, and the increase of the
loss when the streams are quantized.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pictures
import torch
from common import RESULTS, machine
from residual_study import rate
from study_measures import increases, kurtosis_by_site, validation_loss
from study_tasks import GPT, GPTConfig, Language
from torch import nn

import rfcompile as rf
from rfcompile.training import SkipAnnealer, finalize, optimizers

ARMS = ("kept", "annealed", "dropped", "fresh")

MEANINGS = {
    "kept": ("its skips stay", pictures.BLUE),
    "annealed": ("skips fade out", pictures.GREEN),
    "dropped": ("skips dropped at once", pictures.PURPLE),
    "fresh": ("a new residual-free model", pictures.VERMILLION),
}
"""In the picture."""


def run(arm: str, config: GPTConfig, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    task = Language(config, options.batch, options.seed + 1)
    example = next(task.validation(1))[0]
    model: nn.Module = GPT(config)
    if arm != "fresh":
        model.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    before = validation_loss(task, model, options.batches)
    if arm != "kept":
        how = "free" if arm == "fresh" else "anneal"
        model = rf.transform(model, residual=how, example_inputs=(example,))
    optimizer = optimizers(
        model, lr=options.lr, matrix_lr=options.matrix_lr, example_inputs=(example,)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    annealer = None
    if arm in ("annealed", "dropped"):
        falling = round(options.share * options.steps) if arm == "annealed" else 1
        annealer = SkipAnnealer(model, falling)
        if arm == "dropped":
            annealer.step()
    forward = torch.compile(model) if options.compile else model
    course = [[0, validation_loss(task, model, options.batches)]]
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        loss = task.loss(forward, task.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        if annealer is not None:
            annealer.step()
        if step % max(1, options.steps // 20) == 0:
            course.append([step, validation_loss(task, model, options.batches)])
            print(f"{arm} step {step}/{options.steps} loss {course[-1][1]:.3f}", flush=True)
    if annealer is not None:
        finalize(model)
    exact = validation_loss(task, model, options.batches)
    return {
        "arm": arm, "seed": options.seed, "steps": options.steps, "share": options.share,
        "lr": options.lr, "matrix_lr": options.matrix_lr, "loss_before": before, "course": course,
        "validation_loss": exact, "kurtosis": kurtosis_by_site(task, model),
        "increases": increases(task, model, exact, options.batches), **machine(),
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss against the further step; a model with fading skips is as in the study green."""
    figure, axes = pictures.panels(1, 1, 4.6)
    axis = axes[0][0]
    for row in rows:
        label, color = MEANINGS[row["arm"]]
        if row["arm"] == "annealed":
            label += f" within {round(row['share'] * row['steps'])} steps"
        axis.plot(*zip(*row["course"], strict=True), marker=".", label=label, color=color)
    axis.set(
        title="Taking the skips of a trained GPT away, one seed", xlabel="further training step"
    )
    axis.set(ylabel="validation loss, nats a byte")
    pictures.legend_below(figure, 2)
    pictures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of residual_study.py --checkpoints")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name, default in (
        ("steps", 1000), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 16), ("batches", 8), ("threads", 0), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in (("lr", 2e-3), ("matrix-lr", 0.01), ("share", 0.5)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS / "anneal_study.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = GPTConfig(options.width, options.layers, options.heads, options.context)
    rows = []
    for arm in options.arms:
        rows.append(run(arm, config, options))
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{'arm':10} {'before':>8} {'step 0':>8} {'end':>8} {'4b tensor':>10} {'4b g128':>8}")
    for row in rows:
        stream = row["increases"]["stream"]
        print(
            f"{row['arm']:10} {row['loss_before']:8.3f} {row['course'][0][1]:8.3f} "
            f"{row['validation_loss']:8.3f} {stream['4b tensor tread']:10.3f} "
            f"{stream['4b g128 rise']:8.3f}"
        )
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
