"""The public functions transform and diff, which take whole models."""

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
from rfcompile.report.diff import Graph, GraphDiff, diff_of_changes
from rfcompile.report.diff import diff as diff_graphs
from rfcompile.report.report import Report
from rfcompile.rewrites.protocol import Rewrite, is_rewrite, rewritten
from rfcompile.rewrites.residual.rewrite import Change as ResidualMode
from rfcompile.rewrites.residual.rewrite import ResidualFree
from rfcompile.rewrites.wires import FirstCall, Wire, place, rewrite_graph, with_fake_wire
from rfcompile.wire.policy import Policy, Policyish


def transform(
    model: nn.Module,
    *changes: Rewrite | Wire,
    bits: Policyish = None,
    residual: ResidualMode | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """Return a new model with quantized traffic, rewritten modules, or both.

    ::

        rf.transform(model, bits=4)
        rf.transform(model, rf.ResidualFree("anneal"), rf.LowRank(8), rf.Wire("4b:g64"))

    ``model`` itself stays as it is. The new model trains, copies, compiles and exports like
    ``model``. The new state_dict has the names of ``model`` and the names that a rewrite adds. The
    new model shares every parameter and buffer with ``model``, unless a rewrite makes new ones
    (``ResidualFree``, except "anneal", and ``LowRank``).

    The wire has three cases:

    - A model with collectives is compiled with backend "rfquant". Its collectives are quantized
      when the new model is called. A model counts as one with collectives if it has DTensor
      parameters. In a process group of several ranks every model counts, unless
      ``Wire(modules=...)`` is given. If the first call finds no collective, the model is exact, and
      a warning says so. (A copy of the new model is not compiled, because torch drops what
      ``Module.compile`` sets: transform the copy.)
    - Any other model gets a fake wire at its boundaries. A fake wire quantizes the output of a
      module and dequantizes it at once, and does the same with the gradient that comes back. So one
      machine shows what the wire would do. A fake wire quantizes tensors of any size, unless the
      policy names ``min_bytes``.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        changes: rewrites and the wire, applied in the order in which they are given. A rewrite is
            :class:`~rfcompile.ResidualFree`, :class:`~rfcompile.LowRank`,
            :class:`~rfcompile.Adapters`, or a class of :mod:`rfcompile.experimental`. The last
            change may be a :class:`~rfcompile.Wire`. Without a ``Wire`` and without ``bits`` the
            rewritten model has no wire. Without any change, ``bits`` or ``residual``, the change is
            ``Wire()``, which takes the default policy.
        bits: short for ``Wire(bits)`` as the last change.
        residual: short for ``ResidualFree(residual)`` as the first change: "free" drops every skip,
            "mix" puts a trainable orthogonal matrix in its place, "anneal" gives each skip a gain
            that starts at 1.
        example_inputs: a tuple of arguments or an (args, kwargs) pair, with real tensors. If left
            out, ``model.dummy_inputs``. Every rewrite uses these inputs. The wire uses them only
            for an ``fx.GraphModule`` without shapes in its metadata.

    Returns:
        A new module. :func:`~rfcompile.rewrites_of` returns the reports of the rewrites.

    Raises:
        OptionError: an argument is no change, the wire is not the last change, or a ``Wire`` or a
            ``ResidualFree`` is given twice.
        PolicyError, FormatError: the policy is not understood.
        BoundaryError: the model has no place for the wire.
        CaptureError: the model cannot be copied or captured, or the graph has no shapes.
        ResidualError: there is no residual connection, or one cannot be rewritten.
        AttentionError, GrayingError: the same for attentions and for Token Graying.
        DtypeError: when the new model is called: the output at a boundary is neither float32,
            bfloat16 nor float16.
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
                "one of rf.experimental; bits=4 and residual='free' are short for two of them. "
                "Inputs go to example_inputs=(x,)."
            )
            raise OptionError("changes", change, rule)
    kinds = [type(change) for change in every]
    for kind in (Wire, ResidualFree):
        if kinds.count(kind) > 1:
            short = "bits" if kind is Wire else "residual"
            rule = f"a {kind.__name__} is given twice: give one, or {short}= alone."
            raise OptionError("changes", [kind.__name__ for kind in kinds], rule)
    if Wire in kinds[:-1]:
        rule = "the wire carries what the rewritten model computes: give it as the last change."
        raise OptionError("changes", [kind.__name__ for kind in kinds], rule)
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
        place(inner, {})  # of an earlier transform: the collectives carry the traffic now
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
    """Compare two graphs; ``print`` the result, or call its ``.page(path)`` or
    ``.json()``.

    Args:
        before, after: two modules (captured with ``torch.export``), graphs or graph texts. Or
            ``before`` alone: a :class:`~rfcompile.Report` of a compiled model, which holds the
            graphs from before and after the rewrite.
        example_inputs: inputs for modules, as in :func:`~rfcompile.graph.capture.inputs_of`.

    Raises:
        CaptureError: a module cannot be captured, a second graph is missing, or the report holds no
            graphs.
    """
    if isinstance(before, Report):
        if after is not None or not before.graphs:
            raise CaptureError(
                "a report is compared with itself and must hold graphs: pass one report of a "
                "compiled model, such as rfcompile.reports()[-1]."
            )
        return diff_of_changes(before.graphs)
    if after is None:
        raise CaptureError("diff needs two graphs: diff(before, after), or one report.")
    return diff_graphs(_graph(before, example_inputs), _graph(after, example_inputs))


def _graph(value: Graph | nn.Module, example_inputs: Any) -> Graph:
    return capture(value, example_inputs) if isinstance(value, nn.Module) else value
