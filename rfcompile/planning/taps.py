"""Taps: stand at a model's boundaries, keep what crosses, and add a disturbance to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rfcompile.codec import operators
from rfcompile.errors import ScoreError
from rfcompile.graph.boundaries import find_boundaries
from rfcompile.graph.models import copy_of
from rfcompile.graph.modules import Modules
from rfcompile.rewrites.wires import place
from rfcompile.wire.fake import FakeWire
from rfcompile.wire.policy import Policy

Crossings = dict[str, list[Tensor]]
"""A tensor for each call of a site's module, in order, by site."""


class Tap(FakeWire):
    """A fake wire that quantizes nothing: it hands on ``x + disturbance``, and keeps both.

    The disturbance is a leaf that requires a gradient, so ``torch.autograd.grad`` gives the
    gradient of the loss with respect to what crosses.
    """

    def __init__(self, module: str) -> None:
        super().__init__(module, Policy())
        self.given: list[Tensor] | None = None
        self.values: list[Tensor] = []
        self.disturbances: list[Tensor] = []

    def start(self, given: list[Tensor] | None) -> None:
        """Forget the last pass; in the next one add these tensors, a call each. None: zeros."""
        self.given, self.values, self.disturbances = given, [], []

    def send(self, x: Tensor) -> Tensor:
        operators.check_codec_input(x, f"the output of module {self.module!r}")
        call = len(self.values)
        if self.given is not None:
            self._check(call < len(self.given) and self.given[call].shape == x.shape)
        added = torch.zeros_like(x) if self.given is None else self.given[call]
        added = added.detach().requires_grad_()
        self.values.append(x.detach())
        self.disturbances.append(added)
        return x + added

    def finish(self) -> None:
        """Check that a disturbed pass had all the calls of the exact one.

        Raises:
            ScoreError: it did not.
        """
        self._check(self.given is None or len(self.values) == len(self.given))

    def _check(self, is_same: bool) -> None:
        if not is_same:
            rule = (
                "a small disturbance changes how often the model calls it, or the shape of its "
                "output, so there is no derivative there: leave it out of modules=."
            )
            raise ScoreError("a site with another course", self.module, rule)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: the loss, and by site what crossed and its gradients."""

    value: Tensor
    values: Crossings
    gradients: Crossings


class Taps:
    """The boundaries of a model as sites: a copy on the same parameters, with a tap at each.

    Raises:
        BoundaryError: the model has no such place. CaptureError: the model cannot be copied.
    """

    def __init__(self, model: nn.Module, modules: Modules) -> None:
        self.model = copy_of(model, share=True)
        self.taps = {path: Tap(path) for path in find_boundaries(self.model, modules)}
        place(self.model, dict(self.taps))

    @property
    def names(self) -> list[str]:
        return list(self.taps)

    def run(self, loss: Callable[[], Tensor], given: Crossings | None, what: str) -> Pass:
        """One pass, with these disturbances; None: with none. ``what`` is being run, for errors.

        Raises:
            ScoreError: a site never ran, or another way than without disturbances; the loss depends
            on none.
        """
        for path, tap in self.taps.items():
            tap.start(None if given is None else given[path])
        value = loss()
        idle = [path for path, tap in self.taps.items() if not tap.values]
        if idle:
            rule = (
                f"nothing crossed there in {what}: the model did not call these modules, or they "
                "returned no floating-point tensor. Name the sites that run in modules=."
            )
            raise ScoreError("sites that never ran", idle, rule)
        for tap in self.taps.values():
            tap.finish()
        check_depends(value, what)
        leaves = [leaf for tap in self.taps.values() for leaf in tap.disturbances]
        found = iter(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
        gradients = {p: [next(found) for _ in tap.values] for p, tap in self.taps.items()}
        return Pass(value.detach(), {p: tap.values for p, tap in self.taps.items()}, gradients)


def check_depends(value: Tensor, what: str) -> None:
    """Raise a ScoreError if a loss has no gradient."""
    if not value.requires_grad:
        rule = "it depends on no site: compute it from the model's output, without no_grad."
        raise ScoreError(f"the loss of {what}", value.item(), rule)
