"""Runs an example with torchtitan on CPU: every patch that torchtitan 0.3 needs.

It also makes a tokenizer and a data set of the examples' text, and prints the losses of each step
and a digest of each rank's parameters. ``torchrun ... torchtitan_on_cpu.py FOLDER EXAMPLE``.
"""

import gzip
import hashlib
import json
import os
import runpy
import sys
import types
from pathlib import Path

import torch
import torch._utils
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
folder = Path(sys.argv[1])

# 1. It would look for a GPU. 2. torch.cpu has no statistics of memory.
torch._utils._get_available_device_type = lambda: "cpu"
for name, value in {
    "get_device_name": lambda *_: "cpu",
    "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=2**33),
    "reset_peak_memory_stats": lambda *_: None,
    "empty_cache": lambda: None,
    "memory_stats": lambda *_: {},
    "manual_seed_all": torch.manual_seed,
    "current_device": lambda: 0,
}.items():
    setattr(torch.cpu, name, value)
if not hasattr(dist, "set_timeout"):  # 3. torch 2.13 has no such function
    dist.set_timeout = lambda timeout, group=None: None


def tokenizer_and_data() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = gzip.decompress((EXAMPLES / "data" / "shakespeare.txt.gz").read_bytes()).decode()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text[:200_000]],
        trainers.BpeTrainer(
            vocab_size=512, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet
        ),
    )
    for name in ("tokenizer", "data"):
        (folder / name).mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(names))
    lines = [json.dumps({"text": text[i : i + 4000]}) for i in range(0, 400_000, 4000)]
    (folder / "data" / "data.jsonl").write_text("\n".join(lines))


if os.environ["RANK"] == "0":
    tokenizer_and_data()
    (folder / "ready").touch()

import torchtitan.trainer  # noqa: E402  (after the patches)
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import config_registry  # noqa: E402

debug_model = config_registry.llama3_debugmodel


def llama3_debugmodel():  # type: ignore[no-untyped-def]
    config = debug_model()
    for layer in config.model_spec.model.layers:  # 4. flex attention does not train on CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.dump_folder = str(folder / "dump")
    config.training.disable_cuda_graphs = True
    config.activation_checkpoint = None
    config.parallelism.spmd_backend = (
        "partial_dtensor"  # torch 2.13's FSDP2 refuses the other's tensors
    )
    config.comm.trace_buf_size = 0
    config.debug.seed = 1
    return config


def say(text: str) -> None:
    """At once: two ranks write into one pipe."""
    os.write(1, f"RANK {dist.get_rank()} {text}\n".encode())


config_registry.llama3_debugmodel = llama3_debugmodel

from torchtitan.experiments.graph_trainer.llama3 import (  # noqa: E402  (after llama3_debugmodel)
    config_registry as graphs,
)

joint_model = graphs.graph_trainer_llama3_debugmodel_sdpa


def graph_trainer_llama3_debugmodel_sdpa():  # type: ignore[no-untyped-def]
    config = joint_model()
    # 6. It takes attention on CPU for random. 7. There are no CUDA graphs.
    config.compile.disable_passes = ["selective_activation_remat_pass", "cudagraph_pass"]
    return config


# 8. Passes that order collectives ask how fast the GPU is.
import torch.utils._runtime_estimation  # noqa: E402

for name in ("get_gpu_dram_gbps", "get_device_tflops"):
    setattr(torch.utils._runtime_estimation, name, lambda *_: 1.0)
graphs.graph_trainer_llama3_debugmodel_sdpa = graph_trainer_llama3_debugmodel_sdpa
Trainer = torchtitan.trainer.Trainer
train, close = Trainer.train, Trainer.close


def train_on_gloo(self) -> None:  # type: ignore[no-untyped-def]
    for part in self.model_parts:  # 5. gloo has no reduction that divides as it goes
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    log = self.metrics_processor.log

    def keep(step, loss, *rest, **more):  # type: ignore[no-untyped-def]
        say(f"LOSS {loss:.4f}")
        return log(step, loss, *rest, **more)

    self.metrics_processor.log = keep
    train(self)


def close_with_digest(self) -> None:  # type: ignore[no-untyped-def]
    digest = hashlib.sha256()
    for part in self.model_parts:
        for parameter in part.parameters():
            digest.update(parameter.full_tensor().detach().numpy().tobytes())
    say(f"DIGEST {digest.hexdigest()}")
    close(self)


Trainer.train, Trainer.close = train_on_gloo, close_with_digest
while not (folder / "ready").exists():
    pass
script = str(EXAMPLES / "integrations" / sys.argv[2])
sys.argv = [script, str(folder / "tokenizer"), str(folder / "data")]
runpy.run_path(script, run_name="__main__")
