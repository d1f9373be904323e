"""Lightning, the real one, on two CPU ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import rfcompile as rf
from rfcompile.errors import HookError, PolicyError, StateError
from rfcompile.integrations.callback import TrafficCallback
from tests.inductor.test_backend import graphs_run_as_they_are
from tests.integrations.helpers import (
    Net,
    as_torchrun,
    assert_same_state,
    dataset,
    values,
    wire_bytes,
)
from tests.ranks import error_of

if TYPE_CHECKING:
    from tests.ranks import Rank, RunRanks

pytestmark = pytest.mark.clients


def lit(kind: str) -> Any:
    import lightning as L

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = Net(), list[float]()

        def configure_model(self) -> None:
            if kind == "fsdp2":
                from torch.distributed.fsdp import fully_shard

                mesh = self.device_mesh["data_parallel"]
                for layer in self.net.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.net, mesh=mesh)
            if kind == "tp":
                from torch.distributed.tensor.parallel import (
                    ColwiseParallel,
                    RowwiseParallel,
                    parallelize_module,
                )

                plan = {"a": ColwiseParallel(), "b": RowwiseParallel()}
                for layer in self.net.layers:
                    parallelize_module(layer, self.device_mesh["tensor_parallel"], plan)
                    layer.compile(backend="rfquant")

        def training_step(self, batch: Any, _: int) -> Any:
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 3e-3)

    return Lit()


def fit(kind: str, callbacks: list[Any], epochs: int = 3, **options: Any) -> tuple[Any, Any]:
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    strategy: Any = DDPStrategy(process_group_backend="gloo")
    if kind != "ddp":
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        if kind == "tp":
            sizes = {"data_parallel_size": 1, "tensor_parallel_size": 2}
        strategy = ModelParallelStrategy(**sizes)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    model = lit(kind)
    data = torch.utils.data.DataLoader(dataset(), batch_size=16)
    trainer.fit(model, data, **options)
    return trainer, model


def check_ddp(rank: Rank, folder: str) -> None:
    import lightning as L

    from rfcompile.integrations.lightning import QuantizeTraffic

    states: list[Any] = []

    class KeepsResumed(QuantizeTraffic):
        """Which state training goes on from."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            states.append(self.handle.state_dict())

    path = str(Path(folder) / "last.ckpt")
    with as_torchrun(rank):
        callback = QuantizeTraffic(4, error_feedback=True)
        assert isinstance(callback, L.Callback)
        assert isinstance(callback, TrafficCallback)
        assert callback.report().notes == ("training has not begun",)
        trainer, model = fit("ddp", [callback])
        assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
        rank.assert_same(values(model))
        report = callback.report()
        assert report.bytes_after == wire_bytes(model, 4, rank.world)
        assert report.num_quantized == report.num_sites == 1
        assert callback.handle is None  # exact again
        trainer.save_checkpoint(path)

        resumed = KeepsResumed(4, error_feedback=True)
        assert resumed.state_key == "check_ddp.<locals>.KeepsResumed"
        resumed.__class__.__qualname__ = callback.__class__.__qualname__  # as of the checkpoint
        _, more = fit("ddp", [resumed], epochs=4, ckpt_path=path)
        assert len(more.losses) == len(model.losses) // 3
        assert sum(more.losses) < sum(model.losses[-8:])
        rank.assert_same(values(more))
    assert_same_state(states[0], torch.load(path)["callbacks"]["QuantizeTraffic"])
    assert_same_state(states[0], callback.state_dict())


def check_fsdp2(rank: Rank) -> None:
    from rfcompile.integrations.lightning import QuantizeTraffic

    with as_torchrun(rank):
        callback = QuantizeTraffic(rf.Policy(weights=8, gradients=4, min_bytes=0))
        _, model = fit("fsdp2", [callback])
        assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
        rank.assert_same(values(model))
        report = callback.report()
        assert report.num_quantized == report.num_sites == 8  # 3 units; the root stays gathered
        weights, gradients = report.kinds
        assert weights.ratio > 3.8
        assert gradients.ratio > 7
        fit("fsdp2", [callback], epochs=1)  # another run with the same callback
        assert callback.report().bytes_after == report.bytes_after


def check_tp(rank: Rank) -> None:
    """No callback: by the backend's name and the default policy alone."""
    from rfcompile.integrations.lightning import QuantizeTraffic

    rf.set_default_policy(rf.Policy(activations=4, gradients=8, min_bytes=0))
    rf.reports(clear=True)
    with as_torchrun(rank), graphs_run_as_they_are():
        _, model = fit("tp", [])
        assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
        rank.assert_same(torch.tensor(model.losses))
        assert rf.merge_reports(rf.reports()).num_quantized > 0
        error = error_of(lambda: fit("tp", [QuantizeTraffic(4)]))
    assert isinstance(error, HookError)
    assert "torch.compile(model, backend='rfquant') quantizes them" in str(error)
    rf.set_default_policy(None)


def check_errors(rank: Rank, folder: str) -> None:
    from lightning.pytorch.callbacks import Callback
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    from rfcompile.integrations.lightning import QuantizeTraffic

    class Hook(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.model.register_comm_hook(None, fp16_compress_hook)

    with as_torchrun(rank):
        error = error_of(lambda: fit("ddp", [Hook(), QuantizeTraffic(4)], 1))
        assert isinstance(error, HookError)
        assert "it has the communication hook 'fp16_compress_hook'" in str(error)
        with_state = QuantizeTraffic(4, error_feedback=True)
        trainer, _ = fit("ddp", [with_state], 1)
        trainer.save_checkpoint(path := str(Path(folder) / "state.ckpt"))
        error = error_of(lambda: fit("ddp", [QuantizeTraffic(4)], 2, ckpt_path=path))
    assert isinstance(error, StateError)
    assert "error feedback is off" in str(error)


def test_ddp_with_error_feedback_in_checkpoints(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_ddp, str(tmp_path))


def test_fsdp2(ranks: RunRanks) -> None:
    ranks(2, check_fsdp2)


def test_tensor_parallel_by_the_name_of_the_backend(ranks: RunRanks) -> None:
    ranks(2, check_tp)


def test_errors(ranks: RunRanks, tmp_path: Path) -> None:
    ranks(2, check_errors, str(tmp_path))


def test_a_callback_is_refused_before_training() -> None:
    import copy
    import pickle

    from rfcompile.integrations.lightning import QuantizeTraffic

    with pytest.raises(PolicyError, match="bitz"):
        QuantizeTraffic({"bitz": 4})
    callback = QuantizeTraffic(4)
    assert type(copy.deepcopy(callback)) is type(callback) is type(QuantizeTraffic(8))
    assert type(pickle.loads(pickle.dumps(callback))) is type(callback)
