"""Train a small GPT cut into two pipeline stages that send 4 bits in both directions.

    torchrun --standalone --nproc-per-node 2 examples/train_pipeline.py --bits 4

The schedule is torch's 1F1B; its stages are quantized ones. CPUs use gloo, GPUs nccl.
"""

import argparse
import gzip
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from torch.distributed.pipelining import Schedule1F1B

from rfcompile.distributed import QuantizedPipelineStage, split_at_boundaries

CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.gz"
CONTEXT, ROWS, CHUNKS = 64, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same model, and the same windows of text, on every rank
    model = GPT(GPTConfig(width=64, layers=4, heads=2, context=CONTEXT)).to(device)
    example = torch.zeros(ROWS // CHUNKS, CONTEXT, dtype=torch.long, device=device)
    module = split_at_boundaries(model, ranks, (example,))[rank]
    stage = QuantizedPipelineStage(module, rank, ranks, device, policy=args.bits)
    schedule = Schedule1F1B(
        stage, CHUNKS, loss_fn=lambda y, target: F.cross_entropy(y.flatten(0, 1), target.flatten())
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    text = torch.frombuffer(bytearray(gzip.decompress(CORPUS.read_bytes())), dtype=torch.uint8)
    for step in range(1, args.steps + 1):
        start = torch.randint(len(text) - CONTEXT, (ROWS, 1))
        window = text[start + torch.arange(CONTEXT + 1)].long().to(device)
        losses, inputs = [], (window[:, :-1].contiguous(),) if stage.is_first else ()
        optimizer.zero_grad()
        schedule.step(*inputs, target=window[:, 1:] if stage.is_last else None, losses=losses)
        optimizer.step()
        if stage.is_last and step % 10 == 0:
            print(f"step {step}: loss {torch.stack(losses).mean().item():.3f}")
    print(stage.report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
