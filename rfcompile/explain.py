"""The public function explain: a report on what the wire would quantize in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from rfcompile.graph.capture import inputs_of
from rfcompile.graph.models import (
    NO_COLLECTIVES,
    check_module,
    copy_of,
    is_compiled_for_wire,
    uncompiled,
)
from rfcompile.graph.one_step import run_backward, state_kept
from rfcompile.graph.outline import outlined
from rfcompile.graph.pipeline import Record
from rfcompile.report import journal
from rfcompile.report.measures import excess_kurtosis, sqnr_db
from rfcompile.report.report import GraphChange, Report, Site
from rfcompile.report.step import merge_reports
from rfcompile.rewrites.protocol import rewrites_of
from rfcompile.rewrites.wires import Wire, rewrite_graph, wire_of, wires_of, with_fake_wire
from rfcompile.wire.fake import Crossing, round_trip, watch
from rfcompile.wire.policy import Policy, Policyish


def explain(
    model: nn.Module,
    wire: Wire | None = None,
    *,
    bits: Policyish = None,
    example_inputs: Any = None,
) -> Report:
    """Report what the wire would quantize in a model, why not the rest, and what that saves.

    ``print`` the report. The model runs once on the given inputs: forward and, if it has trainable
    parameters, backward. Gradients, buffers, random state and the model itself stay as they are.

    A model with collectives (see :func:`transform`) is compiled with backend "rfquant", and the
    report lists its collectives. For any other model the report lists the boundaries where
    :func:`transform` would put a fake wire. For each boundary the report has the signal-to-noise
    ratio of the quantized values (SQNR, in dB) and the excess kurtosis. An ``fx.GraphModule`` does
    not run, so its report has no SQNR and no kurtosis.

    Args:
        wire: a :class:`~rfcompile.Wire`, as in :func:`transform`. If left out, ``Wire()``.
        bits: short for ``Wire(bits)``.
        example_inputs: a tuple of arguments or an (args, kwargs) pair. If left out,
            ``model.dummy_inputs``.

    Raises:
        OptionError: ``wire`` is no Wire, or ``wire`` and ``bits`` are both given.
        CaptureError: there are no inputs. And every error that :func:`transform` raises.
    """
    wire = wire_of(wire, bits)
    wanted = wire.chosen
    check_module(model)
    model = uncompiled(model)
    if isinstance(model, fx.GraphModule):
        return _explain_graph(rewrite_graph(model, wire, example_inputs), wanted)
    args, kwargs = inputs_of(model, example_inputs)
    with state_kept(model):
        if is_compiled_for_wire(model, wire.modules):
            report = _explain_compiled(model, args, kwargs, wanted)
            exact = () if report.sites else (NO_COLLECTIVES.format(type(model).__name__),)
            if old := wires_of(model):
                exact = (f"{len(old)} fake wires of an earlier transform stand in the model",)
            return replace(report, notes=(*_first_lines(model), *exact, *report.notes))
        wanted = wanted.for_fake_wire()
        twin = with_fake_wire(copy_of(model, share=True), replace(wire, policy=wanted))
        with torch.compiler.set_stance("force_eager"):  # compiled code has nothing to watch
            with watch() as crossings, outlined(twin) as outline:
                outputs = twin(*args, **kwargs)
            run_backward(twin, outputs)
    sites = [site for crossing in crossings for site in _boundary_sites(crossing, wanted)]
    notes = (*_first_lines(model), *_idle_boundaries(twin, crossings))
    return Report.of(wanted, sites, notes=notes, calls=outline.calls)


def _first_lines(model: nn.Module) -> Iterator[str]:
    """Of the reports on how the model was rewritten."""
    for report in rewrites_of(model):
        yield str(report).partition("\n")[0]


def _explain_graph(record: Record, policy: Policy) -> Report:
    sites = [fact for fact in record.facts if isinstance(fact, Site)]
    is_fake = any(site.collective == "boundary" for site in sites)
    return Report.of(
        policy.for_fake_wire() if is_fake else policy,
        sites,
        graphs=(GraphChange.of("forward", record),),
    )


def _explain_compiled(
    model: nn.Module, args: Any, kwargs: dict[str, Any], policy: Policy
) -> Report:
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Code of its own: a graph that is compiled already would not be reported again.
    call.__code__ = call.__code__.replace()
    options: dict[str, Any] = {"policy": policy}
    compiled = torch.compile(call, backend="rfquant", options=options, dynamic=False)
    with journal.aside() as reports:
        run_backward(model, compiled(*args, **kwargs))
    return merge_reports(reports)


def _idle_boundaries(model: nn.Module, crossings: Sequence[Crossing]) -> Iterator[str]:
    seen = {crossing.module: crossing for crossing in crossings}
    for wire in wires_of(model):
        if wire.module not in seen:
            yield f"nothing travels at {wire.module}: the model did not call it"
        elif seen[wire.module].tensor is None:
            yield (
                f"nothing travels at {wire.module}: its output is or directly holds no "
                "floating-point tensor"
            )


def _boundary_sites(crossing: Crossing, policy: Policy) -> list[Site]:
    x = crossing.tensor
    if x is None:
        return []
    sites = []
    for direction, kind in (("forward", "activations"), ("backward", "gradients")):
        if direction == "backward" and not crossing.has_gradient:
            continue
        decision = policy.decide(kind, crossing.module, x.nbytes, dtype=x.dtype)
        fmt = decision.format
        measured = direction == "forward" and not x.is_complex()
        decoded = round_trip(x, fmt.spec if fmt else "") if measured else None
        sites.append(
            Site.of(
                decision,
                x.shape,
                x.dtype,
                (x.nbytes, fmt.payload_bytes(x.numel()) if fmt else x.nbytes),
                collective="boundary",
                direction=direction,
                kind=kind,
                module=crossing.module,
                sqnr_db=sqnr_db(x, decoded) if decoded is not None else None,
                kurtosis=excess_kurtosis(x) if measured else None,
            )
        )
    return sites
