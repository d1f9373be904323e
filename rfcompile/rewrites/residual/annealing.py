"""SkipAnnealer: removes the residual connections of a trained model step by step."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rfcompile.errors import ResidualError
from rfcompile.nn.residual_site import ResidualSite


class SkipAnnealer:
    """Drives the gain of every residual site of a model from 1 to 0 over ``steps`` calls of step.

    After ``n`` of ``N`` steps the gain is ``1 - n / N`` ("linear") or ``(1 + cos(pi n / N)) / 2``
    ("cosine"); before ``warmup`` steps it stays 1, and they do not count. The gains get no
    gradient: the schedule owns them. Call :meth:`step` after each optimizer step, keep
    ``state_dict()`` in the checkpoint, and :func:`finalize` the model at the end.

    Dropping the skips of a trained model at once destroys it; annealing lets it adapt.

    Args:
        model: from ``rfcompile.transform(model, residual="anneal")``; also one that was compiled,
            sharded or parallelized since.

    Raises:
        ResidualError: the model has no site with a gain, or a number is out of range.

    Source: the gain is that of arXiv:2311.01906; the schedule is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        warmup: int = 0,
        shape: Literal["linear", "cosine"] = "cosine",
    ) -> None:
        if steps < 1 or warmup < 0 or shape not in ("linear", "cosine"):
            raise ResidualError(
                f"steps={steps}, warmup={warmup}, shape={shape!r} is no schedule: steps is at "
                "least 1, warmup at least 0, shape 'linear' or 'cosine'."
            )
        self.sites = [module for module in model.modules() if is_annealed(module)]
        if not self.sites:
            raise ResidualError(
                f"{type(model).__name__} has no residual site with a gain: pass what "
                "rfcompile.transform(model, residual='anneal') returned."
            )
        self.steps, self.warmup, self.shape = steps, warmup, shape
        self.taken = 0
        for site in self.sites:
            site.gain.requires_grad_(False)
        self._set()

    @property
    def gain(self) -> float:
        """The gain that every skip has now; exactly 0 at the end."""
        share = min(1.0, max(0, self.taken - self.warmup) / self.steps)
        if share == 1.0:
            return 0.0
        return 1.0 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2

    @property
    def is_done(self) -> bool:
        return self.taken >= self.warmup + self.steps

    def step(self) -> None:
        """Count a training step, and set the gains."""
        self.taken += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps, "warmup": self.warmup, "shape": self.shape, "taken": self.taken
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped; its schedule replaces this one's."""
        self.steps, self.warmup = state["steps"], state["warmup"]
        self.shape, self.taken = state["shape"], state["taken"]
        self._set()

    def _set(self) -> None:
        with torch.no_grad():
            for site in self.sites:
                site.gain.fill_(self.gain)


def is_annealed(module: nn.Module) -> TypeGuard[ResidualSite]:
    return isinstance(module, ResidualSite) and module.mode == "gain"


def finalize(model: nn.Module) -> nn.Module:
    """Remove the skips whose gain is 0, in place: their sites hand on the branch from now on.

    The parameters ``gain`` are gone from the state_dict, and the skip is no longer computed.

    Raises:
        ResidualError: a gain is not 0 (named, with its value), or there is none.
    """
    sites = {name: module for name, module in model.named_modules() if is_annealed(module)}
    if not sites:
        raise ResidualError(f"{type(model).__name__} has no residual site with a gain to finalize.")
    gains = {name: _value(site.gain) for name, site in sites.items()}
    left = {name: gain for name, gain in gains.items() if gain != 0}
    if left:
        listing = ", ".join(f"{name}: {gain:.4g}" for name, gain in left.items())
        raise ResidualError(
            f"{len(left)} of {len(sites)} gains are not 0 ({listing}): step the SkipAnnealer to "
            "its end first.",
            tuple(left),
        )
    for site in sites.values():
        site.become("free")
    return model


def _value(gain: Tensor) -> float:
    return float(gain.full_tensor() if isinstance(gain, DTensor) else gain)
