"""Train a small GPT whose weights are sharded over processes: 8-bit weights, 4-bit gradients.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py --bits 4

Plain FSDP2; one line, ``quantize_fsdp``, is new. CPUs use gloo, GPUs nccl.
"""

import argparse
import gzip
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from torch.distributed.fsdp import fully_shard

import rfcompile as rf
from rfcompile.distributed import quantize_fsdp

CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.gz"
CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4, help="of gradients, and of differences")
    parser.add_argument("--weight-delta", action="store_true", help="send differences of weights")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=64, layers=2, heads=2, context=CONTEXT)).to(device)
    for module in (*model.blocks, model):
        fully_shard(module)
    policy = rf.Policy(weights=args.bits if args.weight_delta else 8, gradients=args.bits)
    handle = quantize_fsdp(model, policy, weight_delta=args.weight_delta)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.frombuffer(bytearray(gzip.decompress(CORPUS.read_bytes())), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(dist.get_rank())  # each rank reads other windows
    for step in range(1, args.steps + 1):
        start = torch.randint(len(text) - CONTEXT, (8, 1), generator=generator)
        window = text[start + torch.arange(CONTEXT + 1)].long().to(device)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        print(handle.report())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
