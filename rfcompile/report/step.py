"""measure_step and merge_reports: one report for a whole training step.

Private torch symbol used here, tried on torch 2.11 to 2.15: ``_dynamo.eval_frame._stance``, what
``torch.compiler.set_stance`` sets.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import torch

from rfcompile.errors import ReportError, RFCompileWarning
from rfcompile.report import journal, runs
from rfcompile.report.report import Report, idle_note


class HasReport(Protocol):
    """What :func:`~rfcompile.distributed.quantize_ddp` and its like return, and stages."""

    def report(self) -> Report: ...


Source = Report | HasReport | Iterable["Source"]


def merge_reports(*sources: Source) -> Report:
    """One report with the sites of several: of a whole training step, graphs and hooks alike.

    ``merge_reports(rfcompile.reports(), ddp_handle, stage, states_handle)``: reports, whatever has
    a ``report()``, or iterables of these. A pattern of ``sites`` that applies in one of them is
    not noted as idle.

    Raises:
        ReportError: a source is none of these.
    """
    reports = [report for source in sources for report in _reports_of(source)]
    patterns: dict[str, bool] = {}
    for report in reports:
        for pattern, is_used in report.patterns.items():
            patterns[pattern] = patterns.get(pattern, False) or is_used
    refuted = {idle_note(pattern) for pattern, is_used in patterns.items() if is_used}
    notes = dict.fromkeys(note for report in reports for note in report.notes)
    return Report(
        sites=tuple(site for report in reports for site in report.sites),
        policy="; ".join(dict.fromkeys(report.policy for report in reports if report.policy)),
        notes=tuple(note for note in notes if note not in refuted),
        graphs=tuple(graph for report in reports for graph in report.graphs),
        patterns=patterns,
        calls=tuple(dict.fromkeys(call for report in reports for call in report.calls)),
    )


def _reports_of(source: Source) -> Iterator[Report]:
    if isinstance(source, Report):
        yield source
    elif callable(report := getattr(source, "report", None)):
        yield report()
    elif isinstance(source, Iterable) and not isinstance(source, str):
        for item in source:
            yield from _reports_of(item)
    else:
        raise ReportError(source)


class MeasuredStep:
    """What :func:`measure_step` counts; ``report()`` and ``print`` give it at any time."""

    def __init__(self, sources: tuple[Source, ...]) -> None:
        self._sources = sources
        self._counts = runs.start_counting()
        self._stance = torch._dynamo.eval_frame._stance.stance

    def report(self) -> Report:
        """The sites of every graph that ran, :attr:`Site.runs <rfcompile.Site>` times each, and of
        the hooks; :func:`~rfcompile.merge_reports` joins it with others.
        """
        graphs = [
            Report.of(
                graph.policy,
                [replace(site, runs=count) for site in graph.sites],
                notes=[f"{graph.name} ran {runs.times(count)} in this step"] if graph.sites else [],
            )
            for graph, count in list(self._counts.items())
        ]
        merged = merge_reports(*graphs, *self._sources)
        return replace(merged, notes=(*merged.notes, *self._left_out()))

    def __str__(self) -> str:
        return str(self.report())

    def _left_out(self) -> Iterator[str]:
        yield from journal.notes()
        idle = [
            graph.name for graph in journal.graphs() if graph.sites and graph not in self._counts
        ]
        if idle:
            yield f"not run in this step, and not counted: {', '.join(dict.fromkeys(idle))}"
        if self._stance != "default":
            yield f"torch.compiler.set_stance({self._stance!r}): what does not compile runs exact"
        if not self._counts and (reason := _nothing_compiles()):
            yield reason

    def _check_patterns(self) -> None:
        report = self.report()
        if any(graph.strict for graph in self._counts):
            report.require_patterns()
        for pattern in report.idle_patterns:
            warnings.warn(idle_note(pattern), RFCompileWarning, stacklevel=4)

    def _stop(self) -> None:
        runs.stop_counting(self._counts)


@contextmanager
def measure_step(*sources: Source) -> Iterator[MeasuredStep]:
    """Count what this rank sends in the ``with`` block: one training step, or whatever runs there.

    ::

        with rf.measure_step(ddp_handle) as step:
            loss = model(x).mean()
            loss.backward()
            optimizer.step()
        print(step)

    A graph that one compiled block shares with other blocks counts once for each run; graphs that
    do not run (of evaluation, of other shapes) do not count. Hooks report one step already: give
    them here, or merge them with the step later.

    A pattern of ``sites`` that no graph and no source has a use for is an RFCompileWarning at the
    end of the block.

    Raises (at the end of the block):
        PolicyError: such a pattern, if a graph that ran was compiled with ``strict=True``.
        ReportError: a source has no report.
    """
    step = MeasuredStep(sources)
    try:
        yield step
    finally:
        step._stop()
    step._check_patterns()


def _nothing_compiles() -> str:
    """Why no graph ran, "" if nothing in torch's settings says so."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1" or torch._dynamo.config.disable:
        return "torch.compile is disabled (TORCHDYNAMO_DISABLE): what it would compile runs exact"
    return "no compiled graph ran in this step: collectives of models are exact, but for hooks"
