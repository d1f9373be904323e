"""Train a small GPT on several processes that average their gradients at 4 bits.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --bits 4

Plain DistributedDataParallel; one line, ``quantize_ddp``, is new. CPUs use gloo, GPUs nccl.
"""

import argparse
import gzip
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from torch.nn.parallel import DistributedDataParallel

from rfcompile.distributed import quantize_ddp

CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.gz"
CONTEXT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--error-feedback", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    torch.manual_seed(0)
    model = GPT(GPTConfig(width=64, layers=2, heads=2, context=CONTEXT)).to(device)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.2)
    handle = quantize_ddp(ddp, args.bits, error_feedback=args.error_feedback)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    text = torch.frombuffer(bytearray(gzip.decompress(CORPUS.read_bytes())), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(dist.get_rank())  # each rank reads other windows
    for step in range(1, args.steps + 1):
        start = torch.randint(len(text) - CONTEXT, (8, 1), generator=generator)
        window = text[start + torch.arange(CONTEXT + 1)].long().to(device)
        loss = F.cross_entropy(ddp(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if dist.get_rank() == 0:
        print(handle.report())
    for parameter in model.parameters():
        dist.broadcast(first := parameter.detach().clone(), 0)
        assert torch.equal(parameter, first), "the ranks' parameters differ"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
