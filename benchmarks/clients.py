"""Does quantizing inside training libraries cost loss, and do the reports tell the bytes truly?

    python benchmarks/clients.py           # some minutes; root, ip and tc (iproute2), Lightning

Lightning, transformers' Trainer and accelerate train the same classifier on two ranks, each a
network namespace (``network.py``) without a limit, first exact, then with gradients at 4 and
weights at 8 bits, by what docs/guide/integrations.md says to write. A line of the result: the
library, the losses of the last steps, whether all ranks have the same parameters, bytes a step and
rank that left the interface (TCP and IP headers included) and bytes that the report says. A report
that is off by more than 2 % is an error; for exact collectives it says what the best algorithm
sends, and gloo's reduce-scatter sends twice that. Results: ``benchmarks/results/clients.jsonl``.

With ``--case`` this file is also what the ranks run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, write
from network import Network, sent_bytes
from torch import Tensor, nn

CASES = (
    "lightning ddp",
    "lightning fsdp2",
    "transformers ddp",
    "transformers fsdp2",
    "accelerate ddp",
    "accelerate fsdp2",
)
WARM_UP = 4
"""Steps before bytes count: DDP cuts its buckets anew after the first."""
KEPT = 8
"""Losses of so many last steps are averaged."""
TOLERANCE = 0.02


# ---- on a rank -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Net(nn.Module):
    """Some blocks and a head for four classes; it notes the loss and the bytes sent so far."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 4)
        self.losses: list[float] = []
        self.sent: list[int] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.sent.append(sent_bytes(Path("/proc/net/dev").read_text()))
        for block in self.blocks:
            x = block(x)
        loss = nn.functional.cross_entropy(self.head(x), labels)
        self.losses.append(loss.item())
        return {"loss": loss}


class Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The signs of two numbers among many."""

    def __init__(self, rows: int, width: int) -> None:
        self.x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        x = self.x[row]
        return {"x": x, "labels": (x[0] > 0).long() + 2 * (x[1] > 0).long()}


def train_lightning(kind: str, policy: Any, net: Net, data: Data, steps: int) -> Any:
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from rfcompile.integrations.lightning import QuantizeTraffic

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def configure_model(self) -> None:
            if kind == "fsdp2":
                mesh = self.device_mesh["data_parallel"]
                for block in net.blocks:
                    fully_shard(block, mesh=mesh)
                fully_shard(net, mesh=mesh)

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(net.parameters(), 1e-3)

    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    callbacks = [] if policy is None else [QuantizeTraffic(policy)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=strategy,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=16))
    return callbacks[0].report() if callbacks else None


def train_transformers(kind: str, policy: Any, net: Net, data: Data, steps: int) -> Any:
    from transformers import Trainer, TrainingArguments

    from rfcompile.integrations.transformers import QuantizeTraffic

    options: dict[str, Any] = {}
    if kind == "fsdp2":
        settings = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}
        options = {"fsdp": "full_shard auto_wrap", "fsdp_config": settings}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=16,
            max_steps=steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.01,
            logging_strategy="no",
            save_strategy="no",
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            report_to=[],
            **options,
        )
        if kind == "fsdp2":
            assert arguments.device.type == "cpu"
            as_on_gpus()
        callbacks = [] if policy is None else [QuantizeTraffic(policy)]
        Trainer(model=net, args=arguments, train_dataset=data, callbacks=callbacks).train()
    return callbacks[0].report() if callbacks else None


def train_accelerate(kind: str, policy: Any, net: Net, data: Data, steps: int) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import rfcompile as rf

    options: dict[str, Any] = {}
    if kind == "fsdp2":
        as_on_gpus()
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
        )
    accelerator = Accelerator(cpu=True, **options)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    handle = None if policy is None else rf.quantize_traffic(model, policy)
    while len(net.losses) < steps:
        for batch in loader:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            if len(net.losses) == steps:
                break
    return None if handle is None else handle.report()


def as_on_gpus() -> None:
    """On CPU accelerate makes DDP of FSDP."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def run_case(case: str, quantized: bool, width: int, steps: int) -> dict[str, Any]:
    """What this rank found."""
    import rfcompile as rf

    library, kind = case.split()
    net, data = Net(width), Data(steps * 32, width)
    policy = rf.Policy(gradients=4, weights=8) if quantized else None
    report = globals()[f"train_{library}"](kind, policy, net, data, steps)
    digest = hashlib.sha256()
    for parameter in net.parameters():
        whole = getattr(parameter, "full_tensor", lambda p=parameter: p)()
        digest.update(whole.detach().numpy().tobytes())
    counted = net.sent[WARM_UP:]
    return {
        "losses": net.losses,
        "digest": digest.hexdigest(),
        "interface_bytes": (counted[-1] - counted[0]) / (len(counted) - 1),
        "report_bytes": None if report is None else [report.bytes_before, report.bytes_after],
    }


# ---- the measurement -----------------------------------------------------------------------------


def measured(case: str, quantized: bool, width: int, steps: int) -> list[dict[str, Any]]:
    """What both ranks found."""
    command = [sys.executable, __file__, "--case", case, "--width", str(width)]
    command += ["--steps", str(steps), *(["--quantized"] if quantized else [])]
    with Network(2) as network, tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{rank}.json" for rank in range(2)]
        ranks = []
        for rank, out in enumerate(outs):
            more = {"GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "1"}
            log = (Path(folder) / f"{rank}.log").open("w")
            ranks.append(network.run(rank, [*command, "--out", str(out)], more, stderr=log))
        for rank, process in enumerate(ranks):
            if process.wait(timeout=300):
                raise SystemExit(f"{case}: {(Path(folder) / f'{rank}.log').read_text()}")
        return [json.loads(out.read_text()) for out in outs]


def row_of(case: str, width: int, steps: int) -> dict[str, Any]:
    exact, quantized = (measured(case, on, width, steps) for on in (False, True))
    library, kind = case.split()
    before, after = quantized[0]["report_bytes"]
    sent, sent_exactly = (mean([r["interface_bytes"] for r in x]) for x in (quantized, exact))
    row = {
        "library": f"{library} {metadata.version(library)}",
        "kind": kind,
        "loss_exact": mean([mean(rank["losses"][-KEPT:]) for rank in exact]),
        "loss_quantized": mean([mean(rank["losses"][-KEPT:]) for rank in quantized]),
        "first_loss": mean([rank["losses"][0] for rank in exact]),
        "ranks_identical": len({rank["digest"] for rank in quantized}) == 1,
        "interface_exact": sent_exactly,
        "interface_quantized": sent,
        "report_exact": before,
        "report_quantized": after,
    }
    if abs(sent / after - 1) > TOLERANCE:
        raise SystemExit(f"{case}: {sent:.0f} bytes were sent, not {after}: {row}")
    return row


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--only", nargs="*", choices=CASES, default=CASES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS / "clients.jsonl")
    args = parser.parse_args()
    if args.case:
        torch.set_num_threads(1)
        found = run_case(args.case, args.quantized, args.width, args.steps)
        args.out.write_text(json.dumps(found))
        return
    rows = []
    for case in args.only:
        rows.append(row_of(case, args.width, args.steps) | machine())
        print(rows[-1], flush=True)
    write(args.out, rows)


if __name__ == "__main__":
    main()
