"""The protocol of a rewrite of modules, how rewrites run, and where their reports are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.distributed.fsdp import FSDPModule

from rfcompile.errors import OptionError
from rfcompile.graph.capture import Inputs, copied, inputs_of
from rfcompile.graph.models import check_module, copy_of, uncompiled, with_shapes
from rfcompile.report.table import TableReport

REPORTS = "_rfcompile_rewrites"


class Rewrite(Protocol):
    """One way to change what a model computes: a frozen dataclass whose fields are its options.

    ``keeps_parameters``: the new model computes with the old one's parameters and may share them;
    otherwise some start anew. Both methods work in place, on a copy, and return a report.
    """

    @property
    def keeps_parameters(self) -> bool: ...

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> TableReport:
        """``inputs()`` are example inputs, which the rewrite may change, anew at each call; it
        raises CaptureError if the user gave none.
        """
        ...

    def on_graph(self, gm: fx.GraphModule) -> TableReport: ...


def is_rewrite(change: object) -> bool:
    """It has the parts of a :class:`Rewrite`."""
    return all(hasattr(change, name) for name in ("keeps_parameters", "on_module", "on_graph"))


def add_report(model: nn.Module, report: TableReport) -> None:
    """Keep a rewrite's report with the model: it is copied and pickled with it."""
    reports = (*rewrites_of(model), report)
    if isinstance(model, fx.GraphModule):  # a copy of a graph keeps its meta, and no attributes
        model.meta[REPORTS] = reports
    else:
        setattr(model, REPORTS, reports)


def rewrites_of(model: nn.Module) -> tuple[TableReport, ...]:
    """The reports on what :func:`~rfcompile.transform` changed in ``model``, in order; ``print``
    them. The wire is no rewrite: :func:`~rfcompile.explain` reports on that.
    """
    kept = model.meta if isinstance(model, fx.GraphModule) else vars(model)
    reports: tuple[TableReport, ...] = kept.get(REPORTS, ())
    return reports


def rewritten(
    model: nn.Module, changes: Sequence[Rewrite], example_inputs: Any = None
) -> nn.Module:
    """A copy of the model, changed in the given order; each change leaves its report there.

    Raises:
        OptionError: it is no module, or sharded by FSDP2. CaptureError: it cannot be copied. And
        what the changes raise.
    """
    check_module(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        rule = "its parameters are DTensors of FSDP: rewrite the model first, then shard it."
        raise OptionError("model", type(model).__name__, rule)
    with torch.inference_mode(False):
        twin = copy_of(model, share=all(change.keeps_parameters for change in changes))
        if isinstance(twin, fx.GraphModule):
            twin = with_shapes(twin, example_inputs)
        inner = uncompiled(twin)

        def inputs() -> Inputs:
            return copied(inputs_of(inner, example_inputs))

        for change in changes:
            if isinstance(inner, fx.GraphModule):
                add_report(inner, change.on_graph(inner))
            else:
                add_report(inner, change.on_module(inner, inputs))
    return twin
