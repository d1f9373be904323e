"""What transform may change in a model's function: the protocol of a rewrite, and its reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import fx, nn

from rfcompile.capture import Inputs

REPORTS = "_rfcompile_rewrites"


class Rewrite(Protocol):
    """One way to change what a model computes: a frozen dataclass whose fields are its options.

    ``keeps_parameters``: the new model computes with the old one's parameters and may share them;
    otherwise some start anew. Both methods work in place, on a copy, and return a report: a frozen
    dataclass with a table as its text.
    """

    @property
    def keeps_parameters(self) -> bool: ...

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> object:
        """``inputs()`` are example inputs, which the rewrite may change, anew at each call; it
        raises CaptureError if the user gave none.
        """
        ...

    def on_graph(self, gm: fx.GraphModule) -> object: ...


def add_report(model: nn.Module, report: object) -> None:
    """Keep a rewrite's report with the model: it is copied and pickled with it."""
    setattr(model, REPORTS, (*rewrites(model), report))


def rewrites(model: nn.Module) -> tuple[object, ...]:
    """The reports on what :func:`~rfcompile.transform` changed in ``model``, in order; ``print``
    them. The wire is no rewrite: :func:`~rfcompile.explain` reports on that.
    """
    reports: tuple[object, ...] = getattr(model, REPORTS, ())
    return reports
