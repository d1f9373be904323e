"""Lightning: DDP gradients at 4 bits with error feedback, by one callback.

torchrun --nproc-per-node 2 examples/integrations/train_lightning.py
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from rfcompile.integrations.lightning import QuantizeTraffic


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(16, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4)
        )

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self.layers(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


if __name__ == "__main__":
    L.seed_everything(0)
    x = torch.randn(512, 16)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0) + 2 * (x[:, 1] > 0).long()), 16, shuffle=True)
    quantize = QuantizeTraffic(4, error_feedback=True)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False,
                        callbacks=[quantize], enable_progress_bar=False)  # fmt: skip
    trainer.fit(Classifier(), data)
    if trainer.is_global_zero:
        print(f"loss {trainer.callback_metrics['loss']:.3f}\n{quantize.report()}")
