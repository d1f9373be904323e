"""What users call on whole models: transform and diff."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn

from rfcompile.errors import CaptureError, OptionError, RFCompileWarning
from rfcompile.graph.capture import capture
from rfcompile.graph.models import (
    NO_COLLECTIVES,
    check_module,
    copy_of,
    is_compiled_for_wire,
    uncompiled,
)
from rfcompile.report import journal
from rfcompile.report.diff import Graph, GraphDiff
from rfcompile.report.diff import diff as diff_graphs
from rfcompile.report.report import Report
from rfcompile.rewrites.protocol import Rewrite, is_rewrite, rewritten
from rfcompile.rewrites.residual.rewrite import Change as ResidualMode
from rfcompile.rewrites.residual.rewrite import ResidualFree
from rfcompile.rewrites.wires import FirstCall, Wire, rewrite_graph, with_fake_wire
from rfcompile.wire.policy import Policy, Policyish


def transform(
    model: nn.Module,
    *changes: Rewrite | Wire,
    bits: Policyish = None,
    residual: ResidualMode | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """A model like ``model``, its traffic quantized or its functions rewritten; ``model`` itself
    stays as it is.

    ::

        rf.transform(model, bits=4)
        rf.transform(model, rf.ResidualFree("anneal"), rf.LowRank(8), rf.Wire("4b:g64"))

    The new model has the same state_dict names, but for those that a rewrite adds, and trains,
    copies, compiles and exports like the old one. It shares every parameter and buffer with it,
    unless a rewrite makes some anew (``ResidualFree``, ``LowRank``).

    The wire:

    - A model with collectives gets them quantized when it is called: one with DTensor parameters,
      and, unless ``Wire(modules=...)`` is given, any in a process group of several ranks. It is
      compiled with backend "rfquant"; if its first call finds no collective, the model is exact,
      and a warning says so. (A copy of it is not compiled: torch drops what ``Module.compile``
      sets. Transform the copy.)
    - Any other gets a fake wire at its boundaries: what leaves a boundary is quantized and
      dequantized at once, and so is the gradient that comes back. It shows on one machine what the
      wire would do. It quantizes tensors of any size unless the policy names ``min_bytes``.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        changes: what to change, applied in this order: :class:`~rfcompile.ResidualFree`,
            :class:`~rfcompile.LowRank`, :class:`~rfcompile.Adapters`, those of
            :mod:`rfcompile.experimental`, and, as the last one, :class:`~rfcompile.Wire`. None, and
            no shorthand: ``Wire()``, the default policy.
        bits: short for ``Wire(bits)``, the last change.
        residual: short for ``ResidualFree(residual)``, the first change: "free" drops every skip,
            "mix" puts a trainable orthogonal matrix in its place, "anneal" gives each skip a gain
            that starts at 1.
        example_inputs: a tuple of arguments or an (args, kwargs) pair, real tensors; left out,
            ``model.dummy_inputs``. Used by every rewrite, and for an ``fx.GraphModule`` without
            shapes in its metadata.

    :func:`~rfcompile.rewrites_of` says what the rewrites did.

    Raises:
        OptionError: a change is none, the wire is not the last one, or a change is given twice.
        PolicyError, FormatError: the policy. BoundaryError: nowhere to put the wire. CaptureError:
        the model cannot be copied or captured, or the graph has no shapes. ResidualError: there is
        no residual connection, or one cannot be rewritten. AttentionError, GrayingError: likewise
        for these. And when the new model is called, DtypeError: what leaves a boundary is neither
        float32, bfloat16 nor float16.
    """
    check_module(model)
    rewrites, wire = _in_order(changes, bits, residual)
    twin = rewritten(model, rewrites, example_inputs) if rewrites else copy_of(model, share=True)
    return twin if wire is None else _with_wire(twin, wire, example_inputs)


def _in_order(
    changes: Sequence[Rewrite | Wire], bits: Policyish, residual: ResidualMode | None
) -> tuple[list[Rewrite], Wire | None]:
    """What to rewrite, in order, and the wire."""
    every: list[Any] = [] if residual is None else [ResidualFree(residual)]
    every += changes
    every += [] if bits is None else [Wire(bits)]
    every = every or [Wire()]
    for change in every:
        if isinstance(change, type) or not (isinstance(change, Wire) or is_rewrite(change)):
            rule = (
                "a change is rf.Wire(4), rf.ResidualFree('free'), rf.LowRank(8), rf.Adapters(8) or "
                "one of rf.experimental; bits=4 and residual='free' are short for two of them."
            )
            raise OptionError("changes", change, rule)
    kinds = [type(change) for change in every]
    for kind in (Wire, ResidualFree):
        if kinds.count(kind) > 1:
            short = "bits" if kind is Wire else "residual"
            rule = f"it is given twice: give one {kind.__name__}, or {short}= alone."
            raise OptionError(short, every[len(kinds) - 1 - kinds[::-1].index(kind)], rule)
    if Wire in kinds[:-1]:
        rule = "the wire carries what the rewritten model computes: give it as the last change."
        raise OptionError("changes", every[kinds.index(Wire)], rule)
    wire = every.pop() if kinds[-1] is Wire else None
    return every, wire


def _with_wire(twin: nn.Module, wire: Wire, example_inputs: Any) -> nn.Module:
    if isinstance(twin, fx.GraphModule):
        return rewrite_graph(twin, wire, example_inputs).gm
    inner = uncompiled(twin)
    if is_compiled_for_wire(inner, wire.modules):
        if wire.modules != "auto":
            warnings.warn(
                f"modules={wire.modules!r} has no effect on a model with collectives: these are "
                "its boundaries.",
                RFCompileWarning,
                stacklevel=2,
            )
        if inner is not twin:  # its names start with _orig_mod, and go on doing so
            compiled: Any = torch.compile(inner, **_compiler(wire.chosen))
            compiled.forward = _FirstCall(compiled.forward, inner)
            return cast(nn.Module, compiled)
        _compile_in_place(twin, wire.chosen)
        return twin
    twin = with_fake_wire(twin, wire)
    uncompiled(twin).register_forward_hook(FirstCall())
    return twin


def _compiler(policy: Policy) -> dict[str, Any]:
    return {"backend": "rfquant", "options": {"policy": policy}}


def _compile_in_place(module: nn.Module, policy: Policy) -> None:
    """``module.compile``, but in one graph also if the module is torch's own (a Sequential).

    Dynamo starts at no frame of torch.nn, only further in, at those of the user's modules.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Code of its own: what compiled for another model is not found again, so the first call tells.
    call.__code__ = call.__code__.replace()
    module._compiled_call_impl = _FirstCall(torch.compile(call, **_compiler(policy)), module)


class _FirstCall:
    """A compiled module's call that warns when its first run found no collective.

    Whether a model has some is known when it compiles: any module or function may call them.
    """

    def __init__(self, call: Callable[..., Any], model: nn.Module) -> None:
        self._call, self._name, self._is_first = call, type(model).__name__, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_first or torch.compiler.is_compiling():
            return self._call(*args, **kwargs)
        with journal.watch() as reports:
            result = self._call(*args, **kwargs)
        self._is_first = False
        if not any(report.sites for report in reports):
            warnings.warn(NO_COLLECTIVES.format(self._name), RFCompileWarning, stacklevel=2)
        return result


# ---- diff --------------------------------------------------------------------------------------


def diff(
    before: Graph | nn.Module | Report,
    after: Graph | nn.Module | None = None,
    *,
    example_inputs: Any = None,
) -> GraphDiff:
    """What changed between two graphs; ``print`` it, or take ``.html()`` or ``.json()``.

    Args:
        before, after: modules (captured with ``torch.export``), graphs, graph texts; or one
            :class:`~rfcompile.Report` of a compiled model, which holds both sides.
        example_inputs: for modules, as in :func:`~rfcompile.graph.capture.inputs_of`.

    Raises:
        CaptureError: a module cannot be captured.
    """
    if isinstance(before, Report):
        if after is not None or not before.graphs:
            raise CaptureError(
                "a report is compared with itself and must hold graphs: pass one report of a "
                "compiled model, such as rfcompile.reports()[-1]."
            )
        return diff_graphs(
            "\n\n".join(graph.before for graph in before.graphs),
            "\n\n".join(graph.after for graph in before.graphs),
        )
    if after is None:
        raise CaptureError("diff needs two graphs: diff(before, after), or one report.")
    return diff_graphs(_graph(before, example_inputs), _graph(after, example_inputs))


def _graph(value: Graph | nn.Module, example_inputs: Any) -> Graph:
    return capture(value, example_inputs) if isinstance(value, nn.Module) else value
