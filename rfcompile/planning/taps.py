"""Taps: stand at a model's boundaries, keep what crosses, and add a disturbance to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def with_taps(model: nn.Module, modules: Modules) -> tuple[nn.Module, dict[str, Tap]]:
    """A copy of the model on the same parameters with a tap at each boundary, and the taps by site.

    Raises:
        BoundaryError: the model has no such place. CaptureError: the model cannot be copied.
    """
    twin = copy_of(model, share=True)
    taps = {path: Tap(path) for path in find_boundaries(twin, modules)}
    place(twin, dict(taps))
    return twin, taps


def start(taps: Mapping[str, Tap], given: Crossings | None) -> None:
    """Prepare all taps for one pass; see :meth:`Tap.start`."""
    for path, tap in taps.items():
        tap.start(None if given is None else given[path])


def gradients(loss: Tensor, taps: Iterable[Tap]) -> list[list[Tensor]]:
    """Of the loss, with respect to what crossed each tap; zeros where nothing reaches the loss."""
    taps = list(taps)
    leaves = [leaf for tap in taps for leaf in tap.disturbances]
    found = iter(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    return [[next(found) for _ in tap.disturbances] for tap in taps]
