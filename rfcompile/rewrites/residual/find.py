"""The public function find_residuals: a list of the residual adds of a model."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn

from rfcompile.errors import CaptureError
from rfcompile.graph.capture import capture, inputs_of, layers_spelled_out
from rfcompile.graph.models import check_module, uncompiled, with_shapes
from rfcompile.graph.pipeline import run
from rfcompile.passes import residual_pipeline
from rfcompile.passes.find_residuals import ResidualAdd
from rfcompile.report.table import table


def find_residuals(model: nn.Module, *, example_inputs: Any = None) -> tuple[ResidualAdd, ...]:
    """Every residual add of a model, in the order in which they are computed.

    A residual add is a sum of a tensor, or a copy of it, and a branch in which that tensor is
    contracted with weights; see :class:`~rfcompile.passes.find_residuals.FindResiduals` for the
    whole rule. It looks at the flow of data, never at names. A model without any gives ``()``.

    Args:
        model: any module, which is captured and does not run; its mode, state and random numbers
            stay as they are. Or an ``fx.GraphModule``, which is read as it is; its shapes come from
            its metadata, else from the inputs, else they are not looked at.
        example_inputs: a tuple of arguments or an (args, kwargs) pair, of any shape; left out,
            ``model.dummy_inputs``.

    Raises:
        CaptureError: there are no inputs, or the model cannot be captured as one graph; the cause
        is chained. OptionError: not a module.

    Source: the rule is ours. Why skips matter to quantization: arXiv:2605.25880.
    """
    check_module(model)
    gm = _graph_of(uncompiled(model), example_inputs)
    facts = run(gm, residual_pipeline()).facts
    return tuple(fact for fact in facts if isinstance(fact, ResidualAdd))


def _graph_of(model: nn.Module, example_inputs: Any) -> fx.GraphModule:
    if isinstance(model, fx.GraphModule):
        return with_shapes(model, example_inputs)
    args, kwargs = inputs_of(model, example_inputs)
    with layers_spelled_out():
        try:
            return capture(model, (args, kwargs))
        except CaptureError as exported:
            # Dynamo also takes outputs that torch.export does not know, such as key-value caches.
            gm = _graph_of_dynamo(model, args, kwargs)
            if gm is None:
                raise CaptureError(
                    f"{type(model).__name__} cannot be captured as one graph: "
                    f"{exported.__cause__}. Put it in eval mode if training skips layers at "
                    "random, or find the residual adds of its submodules one by one."
                ) from exported.__cause__
            return gm


class _Captured(Exception):
    """Ends a capture before anything runs."""


def _graph_of_dynamo(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.GraphModule | None:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        graphs.append(fx.GraphModule(gm, copy.deepcopy(gm.graph)))  # torch 2.15 empties gm
        raise _Captured

    try:
        torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*args, **kwargs)
    except Exception:
        return graphs[0] if graphs else None
    return None


# ---- for people and programs -------------------------------------------------------------------


def summary(found: Sequence[ResidualAdd]) -> str:
    """One line: how many, of which kinds."""
    kinds = Counter(add.kind for add in found)
    listing = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{len(found)} residual adds" + (f": {listing}" if found else "")


def as_text(found: Sequence[ResidualAdd]) -> str:
    """The summary and a table with a line an add."""
    rows = [["", "kind", "module", "source", "sum", "branch through"]]
    for add in found:
        tensor = f"{add.dtype}[{', '.join(map(str, add.shape))}]" if add.dtype else ""
        row = [str(add.order), add.kind, add.module, add.source, tensor, _modules(add)]
        rows.append(row)
    return "\n".join([summary(found), *(table(rows) if found else [])])


def _modules(add: ResidualAdd) -> str:
    prefix = f"{add.module}." if add.module else ""
    names = [path.removeprefix(prefix) or "(itself)" for path in add.branch]
    shown = names if len(names) <= 4 else [*names[:2], f"({len(names) - 3} more)", names[-1]]
    return ", ".join(shown)


def as_json(found: Sequence[ResidualAdd]) -> str:
    """Every field of every add, and how many there are of each kind."""
    kinds = Counter(add.kind for add in found)
    plain = {"num_residuals": len(found), "kinds": kinds, "residuals": [asdict(a) for a in found]}
    return json.dumps(plain, indent=2)
