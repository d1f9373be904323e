"""accelerate: one line after ``prepare``, and one for checkpoints.

torchrun --nproc-per-node 2 examples/integrations/train_accelerate.py
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import rfcompile as rf

if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(512, 16)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0) + 2 * (x[:, 1] > 0).long()), 16, shuffle=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    handle = rf.quantize_traffic(model, 4, error_feedback=True)
    accelerator.register_for_checkpointing(handle)  # save_state and load_state: error feedback too

    for _ in range(4):
        for inputs, targets in data:
            loss = F.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state("out/accelerate")
    accelerator.print(f"loss {loss.item():.3f}\n{handle.report()}")
    accelerator.end_training()
