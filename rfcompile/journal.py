"""What this process compiled: the backend writes here, ``rfcompile.reports()`` reads."""

from __future__ import annotations

from collections.abc import Iterable

from rfcompile.pipeline import Record
from rfcompile.report import GraphChange, Report, Site


class Entry:
    """One compiled model or piece of one; its backward graph may be added later."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.sites: list[Site] = []
        self.graphs: list[GraphChange] = []

    def add(self, direction: str, record: Record) -> None:
        self.sites += [fact for fact in record.facts if isinstance(fact, Site)]
        if record.steps:
            before, after = record.steps[0].before, record.steps[-1].after
            self.graphs.append(GraphChange(direction, before, after))

    def report(self) -> Report:
        return Report(tuple(self.sites), self.policy, graphs=tuple(self.graphs))


_ENTRIES: list[Entry] = []


def new_entry(policy: str) -> Entry:
    entry = Entry(policy)
    _ENTRIES.append(entry)
    return entry


def reports(*, clear: bool = False) -> list[Report]:
    """A report for each graph that backend "rfquant" compiled in this process, oldest first.

    ``clear=True`` forgets them afterwards. A function that Dynamo split or compiled again for
    another shape has several; :func:`~rfcompile.report.merge_reports` joins them.
    """
    result = [entry.report() for entry in _ENTRIES]
    if clear:
        forget(_ENTRIES[:])
    return result


def forget(entries: Iterable[Entry]) -> None:
    for entry in entries:
        _ENTRIES.remove(entry)
