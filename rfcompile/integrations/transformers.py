"""QuantizeTraffic for transformers: ``Trainer(callbacks=[QuantizeTraffic(4)])``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from rfcompile.errors import HookError, RFCompileWarning
from rfcompile.integrations.callback import TrafficCallback
from rfcompile.wire.policy import Policyish

FILE = "rfcompile_traffic.pt"
"""Beside the other files of a checkpoint: the state of error feedback."""


class QuantizeTraffic(TrafficCallback):
    """A callback of transformers' Trainer that quantizes DDP and FSDP2 while ``train`` runs.

    Trainer does not show its DDP module to callbacks: the callback meets the module when it is
    first called, before that step sends anything. With ``error_feedback`` each checkpoint folder
    gets the file ``rfcompile_traffic.pt``, and a run that resumes reads it.

    Args:
        policy, error_feedback, weight_delta: as in :func:`~rfcompile.quantize_traffic`.
        resume_from: the checkpoint folder that ``train(resume_from_checkpoint=...)`` gets, where
            that is not in the ``output_dir`` of the run.

    Raises:
        MissingPackageError: transformers is not installed.
        PolicyError, FormatError: the policy is not understood, or there is none.
        HookError: when training starts: Trainer has wrapped the model in neither DDP nor FSDP2, in
            DDP although FSDP was asked for (accelerate does that on CPU), or in a DDP module that
            has a hook already.
    """

    _LIBRARY = ("transformers", "transformers", "TrainerCallback")

    def __init__(
        self,
        policy: Policyish = None,
        *,
        error_feedback: bool = False,
        weight_delta: bool = False,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(policy, error_feedback=error_feedback, weight_delta=weight_delta)
        self._resume_from = resume_from
        self._waiting: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if state.global_step and self._options["error_feedback"]:
            self._read(args, state)
        if any(isinstance(part, FSDPModule) for part in model.modules()):
            self._start(model)
            return

        def meet(module: nn.Module, _: Any) -> None:
            wrapper = next((m for m in module.modules() if _wraps(m, model)), None)
            if wrapper is None and not (module is model and model.training):
                return  # something else, or an evaluation, which sends no gradients
            self._stop_waiting()
            if wrapper is not None and _asked_for_fsdp(args):
                raise HookError(
                    type(wrapper).__name__,
                    "FSDP was asked for, but accelerate has wrapped the model in DDP, as it does "
                    "without an accelerator. Train on GPUs, or do not ask for FSDP.",
                )
            self._start(wrapper or model)

        self._waiting = register_module_forward_pre_hook(meet)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = self._current_state()
        if saved and args.should_save:
            torch.save(saved, _folder(args, state) / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_waiting()
        self._stop()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _read(self, args: Any, state: Any) -> None:
        file = Path(self._resume_from or _folder(args, state)) / FILE
        if file.exists():
            self._state = torch.load(file, map_location="cpu", weights_only=True)
        else:
            warnings.warn(
                f"the checkpoint has no state of error feedback ({file}): error feedback starts "
                "with nothing. If the checkpoint lies elsewhere, name its folder: resume_from=.",
                RFCompileWarning,
                stacklevel=2,
            )


def _wraps(module: nn.Module, model: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) and any(
        part is model for part in module.modules()
    )


def _asked_for_fsdp(args: Any) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _folder(args: Any, state: Any) -> Path:
    """Where Trainer keeps the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
