"""What users call on whole models: transform and diff."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import fx, nn

from rfcompile.boundaries import Boundaries, find_boundaries
from rfcompile.capture import capture
from rfcompile.companions import Adapters, PolynomialAttention, Rank, TokenGraying
from rfcompile.companions.options import attention_of, graying_of, linears_of
from rfcompile.companions.targets import Modules
from rfcompile.diff import Graph, GraphDiff
from rfcompile.diff import diff as diff_graphs
from rfcompile.errors import CaptureError, PolicyError, RFCompileWarning
from rfcompile.fake_wire import FakeWire
from rfcompile.models import (
    check_module,
    copy_of,
    has_collectives,
    has_shapes,
    is_in_process_group,
    uncompiled,
    with_shapes,
)
from rfcompile.passes import boundary_pipeline, wire_pipeline
from rfcompile.passes.find_collectives import find_collectives
from rfcompile.pipeline import Record, run
from rfcompile.policy import Policy
from rfcompile.report import Report
from rfcompile.residual_free import ResidualFree
from rfcompile.rewrites import Rewrite, rewritten


def transform(
    model: nn.Module,
    bits: int | None = None,
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
    policy: Policy | None = None,
) -> nn.Module:
    """A model like ``model``, its traffic quantized, its residual connections or attentions
    rewritten; ``model`` itself stays as it is.

    The new model has the same state_dict names, and trains, copies, compiles and exports like the
    old one. It shares every parameter and buffer with it, unless ``residual`` or ``low_rank`` makes
    some anew.

    With ``bits`` or a ``policy``:

    - A model with collectives gets them quantized when it is called: one with DTensor parameters,
      and, unless ``boundaries`` are given, any in a process group of several ranks. It is
      compiled with backend "rfquant". (A copy of it is not: torch drops what ``Module.compile``
      sets. Transform the copy.)
    - Any other gets a fake wire at its boundaries: what leaves a boundary is quantized and
      dequantized at once, and so is the gradient that comes back. It shows on one machine what the
      wire would do.
    - An ``fx.GraphModule`` is rewritten as a graph, in the same two ways.

    Args:
        bits: bits an element for all traffic; or give a ``policy``. Neither: nothing is quantized.
        example_inputs: a tuple of arguments or an (args, kwargs) pair, real tensors; left out,
            ``model.dummy_inputs``. Used by every rewrite, and for an ``fx.GraphModule`` without
            shapes in its metadata.
        residual: "keep"; "free" drops every skip, "mix" puts a trainable orthogonal matrix in its
            place, and both start the blocks' parameters anew, with a temperature in each
            attention; "anneal" gives each skip a gain that starts at 1. Or a
            :class:`~rfcompile.residual_free.ResidualFree` with all choices. New names in the
            state_dict: ``residual_N.gain``, ``residual_N.weight``, ``temperature``.
            :func:`~rfcompile.rewrites` says what was done.
        low_rank: a rank, or a :class:`~rfcompile.companions.low_rank.Rank` with all choices; the
            weight of linears is computed as ``sin(omega U V) / g``. New names in the state_dict:
            ``left`` and ``right`` for ``weight``.
        adapters: a rank, or :class:`~rfcompile.companions.adapters.Adapters` with all choices; see
            :func:`~rfcompile.add_adapters`.
        modules: which linears get a low rank or adapters: paths, shell patterns, or a function of
            (path, module); left out, those of the repeated blocks.
        attention: "softmax"; "polynomial": a ``power`` (3) of the scores in its place, the rows
            scaled by ``scale``, "row", "sequence" or "learned" (``attention_gain`` in the
            state_dict). Or a :class:`~rfcompile.companions.PolynomialAttention`.
        token_graying: "dct" or "svd": the tokens' spectrum is raised to ``epsilon`` before the
            first block. Or a :class:`~rfcompile.companions.TokenGraying`.
        boundaries: see :func:`~rfcompile.boundaries.find_boundaries`.

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
    if has_collectives(inner) or (is_in_process_group() and boundaries == "auto"):
        if boundaries != "auto":
            warnings.warn(
                f"boundaries={boundaries!r} has no effect on a model with collectives: these are "
                "its boundaries.",
                RFCompileWarning,
                stacklevel=2,
            )
        if inner is not twin:  # its names start with _orig_mod, and go on doing so
            return cast(nn.Module, torch.compile(inner, **_compiler(wanted)))
        _compile_in_place(twin, wanted)
        return twin
    return with_fake_wire(twin, wanted, boundaries)


def with_fake_wire(twin: nn.Module, wanted: Policy, boundaries: Boundaries) -> nn.Module:
    """The module, with a fake wire at its boundaries in place of those that it may have."""
    inner = uncompiled(twin)
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, FakeWire):
                del module._forward_hooks[key]
    for path, module in find_boundaries(inner, boundaries).items():
        module.register_forward_hook(FakeWire(path, wanted))
    return twin


def _compiler(policy: Policy) -> dict[str, Any]:
    return {"backend": "rfquant", "options": {"policy": policy}}


def _compile_in_place(module: nn.Module, policy: Policy) -> None:
    """``module.compile``, but in one graph also if the module is torch's own (a Sequential).

    Dynamo starts at no frame of torch.nn, only further in, at those of the user's modules.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call, **_compiler(policy))


def policy_of(bits: int | None, policy: Policy | None) -> Policy:
    """The policy that ``bits`` or ``policy`` stands for."""
    if policy is not None and bits is not None:
        raise PolicyError("bits", bits, "give bits or a policy, not both.")
    if policy is None and bits is None:
        raise PolicyError("bits", None, "give bits (2, 3, 4, 5, 6 or 8) or a policy.")
    return policy if policy is not None else Policy.of(bits=bits, min_bytes=0)


def rewrite_graph(
    gm: fx.GraphModule, policy: Policy, boundaries: Boundaries, example_inputs: Any
) -> Record:
    """:func:`transform` for a graph, with the record of what was done."""
    gm = with_shapes(gm, example_inputs)
    if has_shapes(gm) and find_collectives(gm):
        return run(gm, wire_pipeline(policy, "forward"))
    if callable(boundaries) or (isinstance(boundaries, str) and boundaries != "auto"):
        rule = "a graph has no modules to ask: use 'auto' or give the paths of the modules."
        raise PolicyError("boundaries", boundaries, rule)
    if isinstance(boundaries, str):
        return run(gm, boundary_pipeline(policy))
    return run(gm, boundary_pipeline(policy, tuple(boundaries)))


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
        example_inputs: for modules, as in :func:`~rfcompile.capture.inputs_of`.

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
