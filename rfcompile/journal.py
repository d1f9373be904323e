"""What this process compiled: the backend writes here, ``rfcompile.reports()`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rfcompile.pipeline import Record
from rfcompile.policy import Policy
from rfcompile.report import GraphChange, Report, Site


class Entry:
    """One compiled model or piece of one; its backward graph may be added later."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.sites: list[Site] = []
        self.graphs: list[GraphChange] = []

    def add(self, direction: str, record: Record) -> None:
        self.sites += [fact for fact in record.facts if isinstance(fact, Site)]
        if record.steps:
            before, after = record.steps[0].before, record.steps[-1].after
            self.graphs.append(GraphChange(direction, before, after))

    def report(self) -> Report:
        return Report.of(self.policy, self.sites, graphs=self.graphs)


KEPT = 256
"""How many entries are kept, the newest: they hold the texts of their graphs."""

_ENTRIES: list[Entry] = []


def new_entry(policy: Policy) -> Entry:
    entry = Entry(policy)
    _ENTRIES.append(entry)
    del _ENTRIES[:-KEPT]
    return entry


@contextmanager
def watch() -> Iterator[list[Report]]:
    """Reports of what compiles in the ``with`` block, afterwards."""
    earlier = _ENTRIES[:]
    found: list[Report] = []
    yield found
    found += [entry.report() for entry in _ENTRIES if entry not in earlier]


@contextmanager
def aside() -> Iterator[list[Report]]:
    """Reports of what compiles in the ``with`` block; :func:`reports` never has them."""
    earlier = _ENTRIES[:]
    found: list[Report] = []
    try:
        yield found
    finally:
        found += [entry.report() for entry in _ENTRIES if entry not in earlier]
        _ENTRIES[:] = earlier


def reports(*, clear: bool = False) -> list[Report]:
    """A report for each graph that backend "rfquant" compiled in this process, oldest first.

    The newest :data:`KEPT` are kept.

    ``clear=True`` forgets them afterwards. A function that Dynamo split or compiled again for
    another shape has several; :func:`~rfcompile.merge_reports` joins them.
    """
    result = [entry.report() for entry in _ENTRIES]
    if clear:
        _ENTRIES.clear()
    return result
