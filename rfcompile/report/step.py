"""One report of several: graphs, hooks, stages and optimizer states of a training step together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from rfcompile.errors import ReportError
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
