"""torchtitan's graph_trainer: collectives of the joint graph, weights at 8 and gradients at 4 bits.

torchrun --nproc-per-node 2 examples/integrations/train_graph_trainer.py TOKENIZER DATA

TOKENIZER and DATA are folders. They hold ``tokenizer.json`` and files of lines ``{"text": ...}``.
"""

import sys

import torch.distributed as dist
from torchtitan.experiments.graph_trainer.llama3 import config_registry
from torchtitan.experiments.graph_trainer.passes import construct_default_graph_passes
from torchtitan.experiments.graph_trainer.registry import register_pass_pipeline
from torchtitan.tools.logging import init_logger

import rfcompile as rf
from rfcompile.integrations.torchtitan import quantized_passes

policy = rf.Policy(weights=8, gradients=4)
register_pass_pipeline("quantized")(quantized_passes(construct_default_graph_passes, policy))


def config(tokenizer: str, data: str):
    config = config_registry.graph_trainer_llama3_debugmodel_sdpa()
    config.compile.pass_pipeline = "quantized"
    config.hf_assets_path, config.dataloader.dataset_path = tokenizer, data
    config.training.steps, config.training.local_batch_size, config.training.seq_len = 8, 4, 128
    config.training.mixed_precision_param = "float32"
    config.validator.enable = False
    return config


if __name__ == "__main__":
    init_logger()
    trainer = config(*sys.argv[1:]).build()
    trainer.train()
    if dist.get_rank() == 0:
        print(rf.reports()[-1])
    trainer.close()
