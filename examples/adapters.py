"""Teach a trained model something new with adapters that take a few kilobytes.

    python examples/adapters.py --bits 4

A model of Shakespeare learns this file by sine-activated adapters of rank 4, which are quantized,
saved, and loaded into the base model again.
"""

import argparse
import gzip
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from gpt import GPT, GPTConfig
from torch import nn

import rfcompile as rf

CORPUS = Path(__file__).parent / "data" / "shakespeare.txt.gz"
CONTEXT = 32


def train(model: nn.Module, text: bytes, steps: int) -> float:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        start = torch.randint(len(data) - CONTEXT, (16, 1), generator=generator)
        window = data[start + torch.arange(CONTEXT + 1)].long()
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = GPT(GPTConfig(width=64, layers=2, heads=2, context=CONTEXT))
    train(base, gzip.decompress(CORPUS.read_bytes()), args.steps)
    model = rf.transform(base, rf.Adapters(4, sine=True))
    print(f"loss: {train(model, Path(__file__).read_bytes(), args.steps):.3f}")
    print(rf.rewrites_of(packed := rf.adapters.quantize(model, args.bits))[-1])
    with tempfile.TemporaryDirectory() as folder:
        file = rf.adapters.save(packed, folder) / "adapter_model.safetensors"
        print(f"{file.stat().st_size} bytes on disk")
        again = rf.adapters.load(base, folder)
    tokens = torch.arange(CONTEXT)[None]
    assert torch.equal(again(tokens), packed(tokens)), "the loaded adapters differ"


if __name__ == "__main__":
    main()
