"""Train a tensor-parallel model with exact, 8, 4, 3 and 2 bit collectives: what ``make demo`` runs.

    python examples/train_tensor_parallel.py            # 2 processes of this machine, 5 runs
    python examples/train_tensor_parallel.py --quick    # a tiny model, 2 runs, for CI

The script starts its processes itself, through torchrun. On several machines run torchrun by hand,
the same command on each (here two machines with one process each; HOST is the first of them):

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        --rdzv-id demo examples/train_tensor_parallel.py

Model: byte-level GPT of ``gpt.py``, 4 blocks, width 128, 4 heads, context 128 (0.85 million
parameters); 200 AdamW steps on 16 x 128 bytes of Shakespeare a run, same seed and batches in every
run. ``--quick``: 2 blocks, width 64, context 64, 20 steps on 8 x 64 bytes.

The model knows nothing about quantization: torch.compile with ``backend="rfquant"`` finds the
all-reduces that DTensor put into the forward and backward graphs. The exact run takes the same way
with ``bits=None``, so its bytes are counted alike. Processes use gloo on the CPU, or nccl where
each has a GPU. Results go to ``--out``: ``results.jsonl`` (one line a run) and ``loss.png``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, GPTConfig, parallelize
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import rfcompile as rf

CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.gz"
VALIDATION_SHARE = 0.05
"""The last works of the corpus are for validation."""


@dataclass(frozen=True)
class Settings:
    """Sizes of a run."""

    model: GPTConfig
    batch: int
    steps: int
    validation_batches: int = 16
    learning_rate: float = 6e-3


FULL = Settings(GPTConfig(width=128, layers=4, heads=4, context=128), batch=16, steps=200)
QUICK = Settings(GPTConfig(width=64, layers=2, heads=2, context=64), batch=8, steps=20)


@dataclass(frozen=True)
class Result:
    """What one run gives; bytes are sent by one rank in one step, forward and backward."""

    bits: int | None
    train_loss: float
    validation_loss: float
    wire_bytes: int
    exact_bytes: int
    num_quantized: int
    num_sites: int
    step_ms: float
    seconds: float
    losses: list[float]

    @property
    def label(self) -> str:
        return "exact" if self.bits is None else f"{self.bits} bit"

    @property
    def ratio(self) -> float:
        return self.exact_bytes / self.wire_bytes


class Corpus:
    """Random windows of a text of bytes, the same ones for the same seed."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        text = gzip.decompress(CORPUS.read_bytes())
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.cut = int(len(self.text) * (1 - VALIDATION_SHARE))
        self.settings, self.device = settings, device
        self.generator = torch.Generator().manual_seed(0)

    def batch(self, part: str = "train") -> tuple[Tensor, Tensor]:
        """Tokens and the bytes that follow them, both ``[batch, context]`` int64."""
        length = self.settings.model.context + 1
        low, high = (0, self.cut) if part == "train" else (self.cut, len(self.text))
        start = torch.randint(
            low, high - length, (self.settings.batch, 1), generator=self.generator
        )
        window = self.text[start + torch.arange(length)].long().to(self.device)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def train(bits: int | None, settings: Settings, device: torch.device) -> Result:
    """Train a fresh model with ``bits`` bit collectives (None: exact ones)."""
    started = time.perf_counter()
    torch._dynamo.reset()  # each run compiles from scratch and keeps no graph of the run before
    torch.manual_seed(0)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = parallelize(GPT(settings.model).to(device), mesh)
    # All the collectives are in the blocks, and these are alike: compiled one by one they share a
    # graph, which takes a quarter of the time. torch.compile(model, ...) would do it in one piece.
    for block in model.blocks:
        block.compile(backend="rfquant", options={"bits": bits}, dynamic=False)
    optimizer, schedule = adamw(model, settings)
    corpus = Corpus(settings, device)

    def loss_of(part: str) -> Tensor:
        tokens, following = corpus.batch(part)
        return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())

    losses, times = [], [time.perf_counter()]
    progress = Progress("exact" if bits is None else f"{bits} bit", settings.steps)
    for _ in range(settings.steps):
        loss = loss_of("train")
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        times.append(time.perf_counter())
        progress.show(len(losses), losses[-1])
    report = rf.merge_reports(rf.reports(clear=True))  # a graph that blocks share counts for each
    # Not under no_grad: with it the forward would be compiled once more, as an inference graph.
    validation = torch.stack(
        [loss_of("validation").detach() for _ in range(settings.validation_batches)]
    )
    check_ranks_agree(model, validation)
    return Result(
        bits=bits,
        train_loss=sum(losses[-10:]) / len(losses[-10:]),
        validation_loss=validation.mean().item(),
        wire_bytes=report.bytes_after,
        exact_bytes=report.bytes_before,
        num_quantized=sum(site.runs for site in report.sites if site.format is not None),
        num_sites=sum(site.runs for site in report.sites if not site.merged),
        step_ms=1e3 * sorted(b - a for a, b in pairwise(times))[settings.steps // 2],
        seconds=time.perf_counter() - started,
        losses=losses,
    )


def adamw(
    model: GPT, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, 20 steps of warm-up, then a cosine down to a tenth."""
    parameters = list(model.parameters())
    # A fused step takes sharded or replicated parameters, not both in one group.
    groups = [
        {"params": [p for p in parameters if isinstance(p, DTensor)]},
        {"params": [p for p in parameters if not isinstance(p, DTensor)]},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def share(step: int) -> float:
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / settings.steps)
        return min(1.0, (step + 1) / 20) * cosine

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def check_ranks_agree(model: GPT, losses: Tensor) -> None:
    """Compare losses and replicated parameters bit for bit over all ranks.

    Raises:
        RuntimeError: a rank holds something else.
    """
    replicated = [p.detach().flatten() for p in model.parameters() if not isinstance(p, DTensor)]
    mine = torch.cat([losses.flatten(), *replicated]).view(torch.int32)  # bits: NaN equals itself
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    different = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, mine)]
    if different:
        raise RuntimeError(
            f"rank {dist.get_rank()} differs from ranks {different} in the loss or in a replicated "
            "parameter; quantized collectives must give the same bits everywhere. Please report it."
        )


class Progress:
    """One line of progress on rank 0's stderr: redrawn on a terminal, else a line every fifth."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps, self.started = label, steps, time.perf_counter()
        self.redraw = sys.stderr.isatty()

    def show(self, step: int, loss: float) -> None:
        if dist.get_rank() != 0:
            return
        last = step == self.steps
        seconds = time.perf_counter() - self.started
        text = f"{self.label:>6}  step {step}/{self.steps}  loss {loss:.3f}  {seconds:.0f} s"
        if self.redraw:
            bar = ("#" * (30 * step // self.steps)).ljust(30, ".")
            print(f"\r[{bar}] {text}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or step == 1 or step % max(1, self.steps // 5) == 0:
            print(text, file=sys.stderr, flush=True)


def table(results: list[Result]) -> str:
    """The results as text, one run a line."""
    lines = [
        "collectives   train loss   validation loss   sent a step and rank   ratio   "
        "quantized sites   step"
    ]
    lines += [
        f"{r.label:11}   {r.train_loss:10.4f}   {r.validation_loss:15.4f}"
        f"   {r.wire_bytes / 1e6:17.3f} MB   {r.ratio:4.1f}x"
        f"   {f'{r.num_quantized} of {r.num_sites}':>15}   {r.step_ms:.0f} ms"
        for r in results
    ]
    return "\n".join(lines)


COLORS = {None: "#000000", 8: "#0072B2", 4: "#009E73", 3: "#E69F00", 2: "#D55E00"}
"""By bits; colour-blind people can tell them apart."""


def plot(results: list[Result], path: Path, ranks: int) -> None:
    """Draw the training loss of every run, and its distance to the exact run, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 4), layout="constrained")
    exact = next((r for r in results if r.bits is None), None)
    for result in results:
        label = f"{result.bits} bits ({result.ratio:.1f}x)" if result.bits else "float32"
        color = COLORS.get(result.bits, "#CC79A7")
        left.plot(range(1, len(result.losses) + 1), result.losses, color=color, lw=1.2, label=label)
        if exact and result is not exact:
            gap = torch.tensor(result.losses) - torch.tensor(exact.losses)
            width = min(10, len(gap))
            mean = gap.unfold(0, width, 1).mean(-1)
            right.plot(range(width, len(gap) + 1), mean, color=color)
    left.set(title="Training loss", xscale="log", yscale="log", ylabel="loss, nats a byte")
    left.xaxis.set_major_formatter("{x:.0f}")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.set(title="Above float32 (mean of 10 steps)")
    right.set(ylabel="loss above float32, nats a byte")
    right.axhline(0, color="black", lw=1.2)
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3, which="both")
    title = "on the wire (how many times fewer bytes than float32)"
    figure.legend(loc="outside lower center", ncols=5, frameon=False, title=title)
    figure.suptitle(f"Tensor-parallel GPT on {ranks} ranks, quantized all-reduces")
    figure.savefig(path, dpi=125)
    pyplot.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, exact and 4 bit")
    parser.add_argument("--bits", help="comma-separated: exact, 8, 6, 5, 4, 3, 2")
    parser.add_argument("--steps", type=int, help="training steps of a run")
    parser.add_argument("--world-size", type=int, default=2, help="processes to start (default 2)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the results")
    args = parser.parse_args(argv)
    words = (args.bits or ("exact,4" if args.quick else "exact,8,4,3,2")).split(",")
    args.bits = [None if word == "exact" else int(word) for word in words]
    return args


def launch(world_size: int) -> int:
    """Start this script again on ``world_size`` processes; returns their exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={world_size}", __file__, *sys.argv[1:]]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


def main() -> int:
    args = parse()
    if "RANK" not in os.environ:
        return launch(args.world_size)
    settings = QUICK if args.quick else FULL
    if args.steps:
        settings = replace(settings, steps=args.steps)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    # Each rank computes the gradients of the replicated parameters by itself. Kernels that sum in
    # whatever order their threads come would let the ranks drift apart.
    torch.use_deterministic_algorithms(True)
    try:
        results = [train(bits, settings, device) for bits in args.bits]
        if dist.get_rank() == 0:
            write(results, args.out)
    finally:
        dist.destroy_process_group()
    return 0


def write(results: list[Result], out: Path) -> None:
    """Print the table; leave the numbers and the picture in ``out``."""
    print(table(results))
    print("step times have no slow link in them; benchmarks/slow_link.py measures those")
    print("checked: losses and replicated parameters are bit-identical on all ranks, in every run")
    out.mkdir(parents=True, exist_ok=True)
    rows = [{**vars(result), "torch": torch.__version__} for result in results]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot(results, out / "loss.png", dist.get_world_size())
    print(f"written: {out / 'results.jsonl'}, {out / 'loss.png'}")


if __name__ == "__main__":
    sys.exit(main())
