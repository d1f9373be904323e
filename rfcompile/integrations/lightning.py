"""QuantizeTraffic for Lightning: ``Trainer(callbacks=[QuantizeTraffic(4)])``."""

from __future__ import annotations

from typing import Any

from rfcompile.integrations.callback import TrafficCallback


class QuantizeTraffic(TrafficCallback):
    """A callback of Lightning's Trainer that quantizes DDP and FSDP2 while ``fit`` trains.

    It takes the model of the strategy: DDPStrategy, or ModelParallelStrategy with ``fully_shard``
    in ``configure_model``. A checkpoint of Lightning holds the state of error feedback, and
    ``fit(ckpt_path=...)`` goes on from it.

    Args:
        policy, error_feedback, weight_delta: as in :func:`~rfcompile.quantize_traffic`.

    Raises:
        MissingPackageError: Lightning is not installed (the package ``lightning``).
        PolicyError, FormatError: the policy is not understood, or there is none.
        HookError: when training starts: the strategy has no traffic that a hook reaches (FSDP1,
            DeepSpeed, one device, tensor parallelism alone), or DDP has a hook already.
        StateError: a checkpoint has a state of error feedback, and ``error_feedback`` is off.
    """

    _LIBRARY = ("lightning", "lightning.pytorch", "Callback")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start(trainer.strategy.model)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning puts into its checkpoints; every rank calls this."""
        return dict(self._current_state())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` when training starts."""
        self._state = state_dict
