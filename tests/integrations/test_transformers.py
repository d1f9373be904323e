"""transformers, the real one, on two CPU ranks: Trainer, and CompileConfig."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import rfcompile as rf
from rfcompile.errors import HookError, RFCompileWarning
from tests.inductor.test_backend import graphs_run_as_they_are
from tests.integrations.helpers import as_torchrun, assert_same_state, values, wire_bytes
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.clients


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
    options = {"use_cache": False, "pad_token_id": 0, "eos_token_id": None} | options
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options))


def sentences() -> list[dict[str, Any]]:
    """Counting up, from anywhere."""
    start = torch.randint(64, (256, 1), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": x} for x in (start + torch.arange(16)) % 64]


FSDP2: dict[str, Any] = {
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    "save_strategy": "no",
}


def train(
    folder: str,
    callback: Any,
    steps: int,
    *,
    resume: bool = False,
    as_on_gpus: bool = False,
    **options: Any,
) -> Any:
    from accelerate.state import AcceleratorState, PartialState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)  # that of another process group
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=4,
        save_steps=8,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
        dataloader_pin_memory=False,
        **options,
    )
    if as_on_gpus:  # on CPU accelerate makes DDP of FSDP
        from accelerate.utils import DistributedType

        assert arguments.device.type == "cpu"
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = Trainer(
        model=llama(), args=arguments, train_dataset=sentences(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume or None)
    dist.barrier()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_ddp(rank: Rank, folder: str) -> None:
    from transformers import TrainerCallback

    from rfcompile.integrations.transformers import FILE, QuantizeTraffic

    with as_torchrun(rank):
        callback = QuantizeTraffic(4, error_feedback=True)
        assert isinstance(callback, TrainerCallback)
        trainer = train(folder, callback, 16)
        first, *_, last = losses(trainer)
        assert last < 0.8 * first
        rank.assert_same(values(trainer.model))
        assert callback.report().bytes_after == wire_bytes(trainer.model, 4, rank.world)
        assert callback.handle is None
        saved = torch.load(Path(folder) / "checkpoint-16" / FILE)
        assert_same_state(saved, dict(callback._current_state()))

        resumed: dict[str, Any] = {}

        class KeepsResumed(QuantizeTraffic):
            def _start(self, thing: Any) -> None:
                super()._start(thing)
                resumed.update(self.handle.state_dict())

        trainer = train(folder, KeepsResumed(4, error_feedback=True), 20, resume=True)
        assert_same_state(resumed, saved)
        assert trainer.state.global_step == 20
        assert losses(trainer)[-1] < first
        rank.assert_same(values(trainer.model))
        (Path(folder) / "checkpoint-20" / FILE).unlink(missing_ok=True)
        dist.barrier()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", RFCompileWarning)
            train(folder, QuantizeTraffic(4, error_feedback=True), 21, resume=True)
        ours = [str(w.message) for w in seen if w.category is RFCompileWarning]
        assert len(ours) == 1
        assert "no state of error feedback" in ours[0]


def check_fsdp2(rank: Rank, folder: str) -> None:
    from rfcompile.integrations.transformers import QuantizeTraffic

    with as_torchrun(rank):
        callback = QuantizeTraffic(rf.Policy(weights=8, gradients=4, min_bytes=0))
        trainer = train(folder, callback, 16, as_on_gpus=True, **FSDP2)
        first, *_, last = losses(trainer)
        assert last < 0.8 * first
        rank.assert_same(values(trainer.model))
        report = callback.report()
        assert report.num_quantized == report.num_sites
        assert {site.collective for site in report.sites} == {"all_gather", "reduce_scatter"}
        assert report.ratio > 4


def check_compiled_and_again(rank: Rank, folder: str) -> None:
    """DDP inside of a compiled module, with a default policy; then another ``train``."""
    from rfcompile.integrations.transformers import QuantizeTraffic

    rf.set_default_policy(8)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with as_torchrun(rank):
        callback = QuantizeTraffic()
        trainer = train(folder, callback, 4, save_strategy="no", **compiled)
        assert callback.report().bytes_after == wire_bytes(trainer.model, 8, rank.world)
        trainer.train()
        assert callback.report().num_quantized == 1
        rank.assert_same(values(trainer.model))
    rf.set_default_policy(None)


def check_fsdp_that_became_ddp(rank: Rank, folder: str) -> None:
    from rfcompile.integrations.transformers import QuantizeTraffic

    with as_torchrun(rank):
        error = error_of(lambda: train(folder, QuantizeTraffic(4), 2, **FSDP2))
    assert isinstance(error, HookError)
    assert "FSDP was asked for, but accelerate has wrapped the model in DDP" in str(error)


def check_tensor_parallel(rank: Rank, folder: str) -> None:
    """By the backend's name and the default policy alone, in the mode of CompileConfig."""
    from transformers import AutoModelForCausalLM, CompileConfig

    if rank.index == 0:
        llama(use_cache=True).save_pretrained(folder)
    dist.barrier()
    rf.set_default_policy(rf.Policy(activations=8, gradients=8, min_bytes=0))
    rf.reports(clear=True)
    ids = torch.stack([sentence["input_ids"] for sentence in sentences()[:8]])
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with as_torchrun(rank), graphs_run_as_they_are():
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
        compiled: Any = torch.compile(model.train(), backend="rfquant", mode="max-autotune")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        found = []
        for _ in range(8):
            loss: Any = compiled(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        assert found[-1] < 0.8 * found[0]
        rank.assert_same(torch.stack(found))
        report = rf.merge_reports(rf.reports(clear=True))
        assert {"forward", "backward"} == {site.direction for site in report.sites if site.format}

        config: Any = CompileConfig(backend="rfquant")
        assert config.mode == "reduce-overhead"
        config._compile_all_devices = True  # else it compiles on GPUs only
        tokens = model.eval().generate(ids[:, :8], **options, compile_config=config)
    rank.assert_same(tokens)
    assert rf.merge_reports(rf.reports(clear=True)).num_quantized > 0
    rf.set_default_policy(None)


def test_ddp_with_error_feedback_in_checkpoints(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_ddp, str(tmp_path))


def test_fsdp2(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_fsdp2, str(tmp_path))


def test_a_compiled_model_and_another_run(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_compiled_and_again, str(tmp_path))


def test_fsdp_that_became_ddp_is_an_error(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_fsdp_that_became_ddp, str(tmp_path))


def test_tensor_parallel_by_the_name_of_the_backend(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_tensor_parallel, str(tmp_path))
