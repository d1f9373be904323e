"""transformers' Trainer: the gradients of a small Llama at 4 bits, by one callback.

torchrun --nproc-per-node 2 examples/integrations/train_trainer.py
"""

import gzip
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from rfcompile.integrations.transformers import QuantizeTraffic

CORPUS = Path(__file__).parents[1] / "data" / "shakespeare.txt.gz"


if __name__ == "__main__":
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, use_cache=False,
        )
    )  # fmt: skip
    text = torch.frombuffer(bytearray(gzip.decompress(CORPUS.read_bytes())), dtype=torch.uint8)
    data = [{"input_ids": x, "labels": x} for x in text[: 64 * 400].long().view(-1, 64)]
    arguments = TrainingArguments(
        output_dir="out/trainer", use_cpu=True, max_steps=24, learning_rate=1e-2, logging_steps=6,
        ddp_find_unused_parameters=False, disable_tqdm=True, save_strategy="no", report_to=[],
    )  # fmt: skip
    quantize = QuantizeTraffic(4)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[quantize])
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"losses {losses}\n{quantize.report()}")
