"""What users call on whole models: transform and diff."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx, nn

from rfcompile.companions import Adapters, PolynomialAttention, Rank, TokenGraying
from rfcompile.errors import CaptureError, RFCompileWarning
from rfcompile.graph.boundaries import Boundaries
from rfcompile.graph.capture import capture
from rfcompile.graph.diff import Graph, GraphDiff
from rfcompile.graph.diff import diff as diff_graphs
from rfcompile.graph.models import (
    NO_COLLECTIVES,
    check_module,
    copy_of,
    is_compiled_for_wire,
    uncompiled,
)
from rfcompile.report import journal
from rfcompile.report.report import Report
from rfcompile.rewrites.low_rank.targets import Modules
from rfcompile.rewrites.options import attention_of, graying_of, linears_of
from rfcompile.rewrites.protocol import Rewrite, rewritten
from rfcompile.rewrites.residual.rewrite import ResidualFree
from rfcompile.rewrites.wires import FirstCall, rewrite_graph, with_fake_wire
from rfcompile.wire.default_policy import policy_of
from rfcompile.wire.policy import Formatish, Policy, Policyish


def transform(
    model: nn.Module,
    bits: Formatish = None,
    *,
    example_inputs: Any = None,
    residual: str | ResidualFree = "keep",
    low_rank: int | Rank | None = None,
    adapters: int | Adapters | None = None,
    modules: Modules | None = None,
    attention: str | PolynomialAttention = "softmax",
    power: int | None = None,
    scale: str | None = None,
    token_graying: str | TokenGraying | None = None,
    epsilon: float | None = None,
    boundaries: Boundaries = "auto",
    policy: Policyish = None,
) -> nn.Module:
    """A model like ``model``, its traffic quantized, its residual connections or attentions
    rewritten; ``model`` itself stays as it is.

    The new model has the same state_dict names, and trains, copies, compiles and exports like the
    old one. It shares every parameter and buffer with it, unless ``residual`` or ``low_rank`` makes
    some anew.

    With ``bits`` or a ``policy``:

    - A model with collectives gets them quantized when it is called: one with DTensor parameters,
      and, unless ``boundaries`` are given, any in a process group of several ranks. It is
      compiled with backend "rfquant"; if its first call finds no collective, the model is exact,
      and a warning says so. (A copy of it is not compiled: torch drops what ``Module.compile``
      sets. Transform the copy.)
    - Any other gets a fake wire at its boundaries: what leaves a boundary is quantized and
      dequantized at once, and so is the gradient that comes back. It shows on one machine what the
      wire would do.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        bits: bits an element for all traffic, or a format. Or give a ``policy``, in any spelling
            (:func:`~rfcompile.wire.policy.as_policy`). Neither: the default policy
            (:func:`~rfcompile.set_default_policy`), but with another rewrite nothing is quantized.
            A fake wire quantizes tensors of any size unless ``min_bytes`` is named.
        example_inputs: a tuple of arguments or an (args, kwargs) pair, real tensors; left out,
            ``model.dummy_inputs``. Used by every rewrite, and for an ``fx.GraphModule`` without
            shapes in its metadata.
        residual: "keep"; "free" drops every skip, "mix" puts a trainable orthogonal matrix in its
            place, and both start the blocks' parameters anew, with a temperature in each
            attention; "anneal" gives each skip a gain that starts at 1. Or a
            :class:`~rfcompile.ResidualFree` with all choices. New names in the
            state_dict: ``residual_N.gain``, ``residual_N.weight``, ``temperature``.
            :func:`~rfcompile.rewrites_of` says what was done.
        low_rank: a rank, or a :class:`~rfcompile.Rank` with all choices; the
            weight of linears is computed as ``sin(omega U V) / g``. New names in the state_dict:
            ``left`` and ``right`` for ``weight``.
        adapters: a rank, or :class:`~rfcompile.Adapters` with all choices; see
            :func:`~rfcompile.add_adapters`.
        modules: which linears get a low rank or adapters: paths, shell patterns, or a function of
            (path, module); left out, those of the repeated blocks.
        attention: "softmax"; "polynomial": a ``power`` (3) of the scores in its place, the rows
            scaled by ``scale``, "row", "sequence" or "learned" (``attention_gain`` in the
            state_dict). Or a :class:`~rfcompile.companions.PolynomialAttention`.
        token_graying: "dct" or "svd": the tokens' spectrum is raised to ``epsilon`` before the
            first block. Or a :class:`~rfcompile.companions.TokenGraying`.
        boundaries: see :func:`~rfcompile.graph.boundaries.find_boundaries`.

    Raises:
        PolicyError, FormatError: options. BoundaryError: nowhere to put the wire. CaptureError: the
        model cannot be copied or captured, or the graph has no shapes. ResidualError: there is no
        residual connection, or one cannot be rewritten. AttentionError, GrayingError: likewise for
        these. And when the new model is called,
        DtypeError: what leaves a boundary is neither float32, bfloat16 nor float16.
    """
    check_module(model)
    changes: list[Rewrite] = []
    if residual != "keep":
        how = residual if isinstance(residual, ResidualFree) else ResidualFree(cast(Any, residual))
        changes.append(how)
    changes += linears_of(low_rank, adapters, modules)
    changes += attention_of(attention, power, scale)
    changes += graying_of(token_graying, epsilon)
    is_exact = bits is None and policy is None and changes
    wanted = None if is_exact else policy_of(bits, policy)
    twin = rewritten(model, changes, example_inputs) if changes else copy_of(model, share=True)
    return twin if wanted is None else _with_wire(twin, wanted, boundaries, example_inputs)


def _with_wire(
    twin: nn.Module, wanted: Policy, boundaries: Boundaries, example_inputs: Any
) -> nn.Module:
    if isinstance(twin, fx.GraphModule):
        return rewrite_graph(twin, wanted, boundaries, example_inputs).gm
    inner = uncompiled(twin)
    if is_compiled_for_wire(inner, boundaries):
        if boundaries != "auto":
            warnings.warn(
                f"boundaries={boundaries!r} has no effect on a model with collectives: these are "
                "its boundaries.",
                RFCompileWarning,
                stacklevel=2,
            )
        if inner is not twin:  # its names start with _orig_mod, and go on doing so
            compiled: Any = torch.compile(inner, **_compiler(wanted))
            compiled.forward = _FirstCall(compiled.forward, inner)
            return cast(nn.Module, compiled)
        _compile_in_place(twin, wanted)
        return twin
    twin = with_fake_wire(twin, wanted, boundaries)
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
