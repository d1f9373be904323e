"""Do residual-free models quantize better? The paper's comparison, with its controls.

    python benchmarks/residual_study.py                        # every arm, 3 seeds
    python benchmarks/residual_study.py --arms residual+muon free+muon --seeds 1 --steps 300

Byte-level GPTs on Shakespeare. Each run trains one arm with one seed, then measures it: validation
loss; excess kurtosis of what leaves each block (``stream``: what a pipeline stage sends) and each
attention and MLP (``branch``: what a tensor-parallel all-reduce sums); the increase of the
validation loss when those are quantized; kurtosis and quantization error of gradients and optimizer
states. A run is one line of ``--out``; runs that are there already are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, machine
from torch import Tensor, nn

import rfcompile as rf
from rfcompile.analysis import excess_kurtosis, sqnr_db
from rfcompile.training import Initialization, TemperatureRule, optimizers
from rfcompile.training.optimizers import Optimizers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from gpt import BYTES, GPT, GPTConfig  # noqa: E402

# ---- what is compared --------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to build and train: residual or not, which optimizer, which parts of the recipe."""

    residual: bool
    matrices: str
    initialization: bool = True
    temperature: bool = True
    rotary: bool = True


ARMS: dict[str, Arm] = {
    "residual+adamw": Arm(True, "adamw", initialization=False, temperature=False),
    "residual+muon": Arm(True, "muon", initialization=False, temperature=False),
    "residual+muon+orthogonal": Arm(True, "muon", temperature=False),
    "free+adamw": Arm(False, "adamw"),
    "free+muon": Arm(False, "muon"),
    "free+muon-orthogonal": Arm(False, "muon", initialization=False),
    "free+muon-temperature": Arm(False, "muon", temperature=False),
    "free+muon-rotary": Arm(False, "muon", rotary=False),
}

FORMATS: dict[str, rf.QuantFormat] = {
    f"{bits}b {size} {grid}{' rotated' if rotate else ''}": rf.QuantFormat(
        bits, group_size=group, grid=f"mid-{grid}", rotate=rotate
    )
    for bits in (8, 4, 3, 2)
    for size, group in (("tensor", None), ("g128", 128))
    for grid in ("tread", "rise")
    for rotate in (None, *([32] if grid == "rise" else []))
}
"""Symmetric (mid-tread) and mid-rise grids, one scale a tensor and one for 128 elements."""


class LearnedPositions(nn.Embedding):
    """Adds a learned position to each token, in place of rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(BYTES, config.width)
        self.position = nn.Parameter(torch.randn(config.context, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.position[: tokens.shape[1]]


def build(arm: Arm, config: GPTConfig, tokens: Tensor, self_mass: float) -> nn.Module:
    model: nn.Module = GPT(config)
    if not arm.rotary:
        model.embedding = LearnedPositions(config)
        model.rotation = torch.stack([torch.ones_like(model.rotation[0]), 0 * model.rotation[1]])
    start = Initialization(seed=torch.initial_seed()) if arm.initialization else None
    if not arm.initialization and not arm.residual:  # GPT's own start has branches of zeros
        for name, module in model.named_modules():
            if name.endswith((".out", ".down")):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    if arm.residual and start is None:
        return model
    how = rf.ResidualFree(
        initialization=start,
        temperature=TemperatureRule(self_mass) if arm.temperature else None,
    )
    rewritten = rf.transform(model, residual=how, example_inputs=(tokens,))
    if arm.residual:  # the same start, with skips: branches scaled so that the sum keeps its size
        for site in rf.residual_report(rewritten).sites:
            rewritten.get_submodule(site.path).become("keep")
        for name, module in rewritten.named_modules():
            if name.endswith((".out", ".down")):
                module.weight.data /= math.sqrt(2 * config.layers)
    return rewritten


# ---- data ------------------------------------------------------------------------------------


class Corpus:
    """Shakespeare as bytes; the last tenth is for validation."""

    def __init__(self, context: int, batch: int, seed: int) -> None:
        text = gzip.decompress((ROOT / "examples/data/shakespeare.txt.gz").read_bytes())
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.cut = len(self.text) * 9 // 10
        self.context, self.batch_size = context, batch
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        high = self.cut - self.context - 1
        return self._at(torch.randint(high, (self.batch_size,), generator=self.generator))

    def validation(self, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same windows on every call, for every arm and seed."""
        last = len(self.text) - self.context - 1
        starts = torch.linspace(self.cut, last, batches * self.batch_size).long()
        return map(self._at, starts.split(self.batch_size))

    def _at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        window = self.text[starts[:, None] + torch.arange(self.context + 1)].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


@torch.no_grad()
def validation_loss(model: nn.Module, corpus: Corpus, batches: int) -> float:
    losses = [loss_of(model, batch).item() for batch in corpus.validation(batches)]
    return sum(losses) / len(losses)


# ---- measures ----------------------------------------------------------------------------------


def boundaries_of(model: nn.Module) -> dict[str, list[str]]:
    names = [name for name, _ in model.named_modules()]
    streams = [n for n in names if n.startswith("blocks.") and n.count(".") == 1]
    branches = [n for n in names if n.endswith((".attention", ".mlp"))]
    return {"stream": streams, "branch": branches}


@torch.no_grad()
def kurtosis_by_site(model: nn.Module, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Excess kurtosis of each site's output over all elements, and the mean over its channels."""
    found: dict[str, dict[str, float]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            channels = output.flatten(0, -2).unbind(-1)
            by_channel = sum(map(excess_kurtosis, channels)) / len(channels)
            found[name] = {"elements": excess_kurtosis(output), "channels": by_channel}

        return hook

    hooks = [
        model.get_submodule(name).register_forward_hook(keep(name))
        for names in boundaries_of(model).values()
        for name in names
    ]
    model(next(corpus.validation(1))[0])
    for hook in hooks:
        hook.remove()
    return found


def increases(
    model: nn.Module, corpus: Corpus, exact: float, batches: int
) -> dict[str, dict[str, float]]:
    """How much the validation loss grows, by boundary and format."""
    result: dict[str, dict[str, float]] = {}
    for boundary, names in boundaries_of(model).items():
        result[boundary] = {}
        for name, fmt in FORMATS.items():
            policy = rf.Policy(activations=fmt, min_bytes=0)
            quantized = rf.transform(model, policy=policy, boundaries=names)
            result[boundary][name] = validation_loss(quantized, corpus, batches) - exact
    return result


def of_tensors(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Kurtosis (mean, max) and SQNR in dB of tensors, quantized to 4 bits in groups of 128."""
    kurtoses = [excess_kurtosis(x) for x in tensors.values()]
    decibels = []
    for x in tensors.values():
        decoded = rf.dequantize(rf.quantize(x, 4), 4, x.shape, x.dtype)
        decibels.append(sqnr_db(x, decoded))
    return {
        "mean kurtosis": sum(kurtoses) / len(kurtoses),
        "max kurtosis": max(kurtoses),
        "mean SQNR 4b g128": sum(decibels) / len(decibels),
    }


def traffic(model: nn.Module, optimizer: Optimizers) -> dict[str, dict[str, float]]:
    """Gradients and optimizer states of the blocks' matrices."""
    matrices = {
        name: p for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2
    }
    result = {"gradients": of_tensors({n: p.grad for n, p in matrices.items()})}
    states = [inner.state for inner in optimizer.optimizers]
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        held = {
            name: state[p][key]
            for name, p in matrices.items()
            for state in states
            if p in state and key in state[p]
        }
        if held:
            result[key] = of_tensors(held)
    return result


# ---- a run -------------------------------------------------------------------------------------


def rate(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    share = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * share))


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    config = GPTConfig(options.width, options.layers, options.heads, options.context)
    corpus = Corpus(options.context, options.batch, seed)
    example = next(corpus.validation(1))[0]
    model = build(ARMS[name], config, example, options.self_mass)
    optimizer = optimizers(
        model, lr=options.lr, matrix_lr=options.matrix_lr, weight_decay=options.weight_decay,
        matrices=ARMS[name].matrices, example_inputs=(example,),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: rate(s, options.steps))
    forward = torch.compile(model) if options.compile else model
    losses: list[float] = []
    kurtosis = {0: kurtosis_by_site(model, corpus)}
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        loss = loss_of(forward, corpus.batch())
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, options.steps // 10) == 0:
            kurtosis[step] = kurtosis_by_site(model, corpus)
            mean = sum(losses[-20:]) / len(losses[-20:])
            seconds = time.perf_counter() - begin
            print(f"{name} seed {seed} step {step}/{options.steps} loss {mean:.3f} {seconds:.0f} s")
    exact = validation_loss(model, corpus, options.batches)
    return {
        "arm": name, "seed": seed, **asdict(config),
        "steps": options.steps, "batch": options.batch, "self_mass": options.self_mass,
        "lr": options.lr, "matrix_lr": options.matrix_lr, "weight_decay": options.weight_decay,
        "seconds": time.perf_counter() - begin, "validation_loss": exact,
        "increases": increases(model, corpus, exact, options.batches), "kurtosis": kurtosis,
        "traffic": traffic(model, optimizer), "losses": losses, **machine(),
    }  # fmt: skip


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("arm", "seed", "width", "layers", "heads", "context", "steps", "batch")
    return tuple(row[name] for name in (*names, "self_mass", "lr", "matrix_lr", "weight_decay"))


def by_label(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each arm; those of another temperature than the default by themselves."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        is_tempered = ARMS[row["arm"]].temperature and not ARMS[row["arm"]].residual
        is_default = row["self_mass"] == TemperatureRule().self_mass
        suffix = "" if is_default or not is_tempered else f", mass {row['self_mass']:g}"
        found.setdefault(row["arm"] + suffix, []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """A line an arm: mean and spread over seeds."""
    shown = ("4b tensor tread", "4b g128 rise", "3b g128 rise", "2b g128 rise")
    lines = [f"{'arm':26} {'loss':>14} {'kurtosis max':>13} " + "".join(f"{s:>18}" for s in shown)]
    for arm, mine in by_label(rows).items():
        losses = [row["validation_loss"] for row in mine]
        last = [list(row["kurtosis"].values())[-1] for row in mine]
        peak = max(v["elements"] for sites in last for k, v in sites.items() if k.count(".") == 1)
        mean = sum(losses) / len(losses)
        spread = (max(losses) - min(losses)) / 2
        means = [sum(r["increases"]["stream"][s] for r in mine) / len(mine) for s in shown]
        cells = "".join(f"{increase:18.3f}" for increase in means)
        lines.append(f"{arm:26} {mean:8.3f} ±{spread:.3f} {peak:13.2f} {cells}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Kurtosis of the streams against the step, and the loss increase against bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for number, (arm, mine) in enumerate(by_label(rows).items()):
        color = f"C{number}"
        for row in mine:
            steps = [int(step) for step in row["kurtosis"]]
            peaks = [
                max(v["elements"] for name, v in sites.items() if name.count(".") == 1)
                for sites in row["kurtosis"].values()
            ]
            label = arm if row is mine[0] else None
            left.plot(steps, peaks, color=color, label=label)
        for size, grid, style in (("tensor", "tread", "--"), ("g128", "rise", "-")):
            bits = (8, 4, 3, 2)
            names = [f"{b}b {size} {grid}" for b in bits]
            means = [sum(r["increases"]["stream"][n] for r in mine) / len(mine) for n in names]
            label = f"{arm}, {size} {grid}"
            right.plot(bits, means, style, marker="o", color=color, label=label)
    left.set(title="Largest excess kurtosis of a stream", xlabel="step")
    left.set_yscale("symlog", linthresh=1)
    right.set(title="Validation loss gained by quantizing the streams", xlabel="bits")
    right.set(ylabel="nats a byte")
    right.set_yscale("symlog", linthresh=0.01)
    right.invert_xaxis()
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    for name, default in (
        ("steps", 1000), ("width", 128), ("layers", 8), ("heads", 4), ("context", 128),
        ("batch", 16), ("batches", 8), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, value in (("lr", 2e-3), ("matrix-lr", 5e-3), ("weight-decay", 0.01)):
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--self-mass", type=float, default=TemperatureRule().self_mass)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS / "residual_study.jsonl")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    done = {key_of(row) for row in rows}
    for seed in range(options.seeds):
        for name in options.arms:
            key = key_of({**vars(options), "arm": name, "seed": seed})
            if key in done:
                print(f"{name} seed {seed}: there already")
                continue
            row = run(name, seed, options)
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows))
    plot(rows, options.out.with_suffix(".png"))
    print(f"written: {options.out} and its .png")


if __name__ == "__main__":
    main()
