"""torchtitan: FSDP2 with weights at 8 and gradients at 4 bits, by one wrapper of the ModelSpec.

torchrun --nproc-per-node 2 examples/integrations/train_torchtitan.py TOKENIZER_FOLDER DATA_FOLDER

The folders hold ``tokenizer.json`` and files of lines ``{"text": ...}``.
"""

import sys

import torch.distributed as dist
from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.tools.logging import init_logger

import rfcompile as rf
from rfcompile.integrations.torchtitan import quantized


def config(tokenizer: str, data: str, handles: list):
    config = llama3_debugmodel()
    policy = rf.Policy(weights=8, gradients=4)
    config.model_spec = quantized(config.model_spec, policy, on_start=handles.append)
    config.hf_assets_path, config.dataloader.dataset_path = tokenizer, data
    config.training.steps, config.training.local_batch_size, config.training.seq_len = 8, 4, 128
    config.training.mixed_precision_param = "float32"
    config.validator.enable = False
    return config


if __name__ == "__main__":
    init_logger()
    handles = []
    trainer = config(*sys.argv[1:], handles).build()
    trainer.train()
    if dist.get_rank() == 0:
        print(handles[0].report())
    trainer.close()
