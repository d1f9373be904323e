"""measure_step: what one training step really sends, graphs counted as often as they run.

Private torch symbol used here, tried on torch 2.11 to 2.15: ``_dynamo.eval_frame._stance``, what
``torch.compiler.set_stance`` sets.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from rfcompile.errors import RFCompileWarning
from rfcompile.report import journal, runs
from rfcompile.report.report import Report, idle_note
from rfcompile.report.step import Source, merge_reports


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
