"""The list of graphs that this process compiled; ``rfcompile.reports()`` reads it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from rfcompile.errors import PolicyError, RFCompileWarning
from rfcompile.graph.pipeline import Record
from rfcompile.report.report import GraphChange, Report, Site
from rfcompile.report.runs import Runs
from rfcompile.wire.policy import Policy

_USED: set[tuple[str, str]] = set()
"""Patterns of ``sites``, each with the text of its policy, that some graph had a use for."""


class Entry:
    """One compiled model or piece of one; its backward graph may be added later.

    ``place``: the class of the module and the line where its code begins; ``frame``: Dynamo's
    number of the function, None where Dynamo is not known to have one; ``is_counted``: its runs
    are.
    """

    def __init__(
        self,
        policy: Policy,
        place: str = "",
        frame: int | None = None,
        *,
        strict: bool = False,
        is_counted: bool = True,
    ) -> None:
        self.policy, self.place, self.frame, self.strict = policy, place, frame, strict
        self.is_counted = is_counted
        self.graphs: list[tuple[Runs, GraphChange | None]] = []
        self.notes: list[str] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for runs, _ in self.graphs for site in runs.sites)

    def add(self, direction: str, record: Record) -> Runs:
        """A graph of it; the caller counts its runs in what this returns."""
        sites = tuple(fact for fact in record.facts if isinstance(fact, Site))
        change = GraphChange.of(direction, record) if record.steps else None
        shared = self._check_patterns if self.policy.sites else None
        runs = Runs(
            direction, sites, self.policy, self.place, strict=self.strict, when_shared=shared
        )
        self.graphs.append((runs, change))
        in_use = self.policy.patterns_in_use(site.module for site in sites)
        text = self.policy.describe()
        _USED.update((text, pattern) for pattern, is_used in in_use.items() if is_used)
        return runs

    def report(self) -> Report:
        modules = max((runs.num_modules for runs, _ in self.graphs), default=1)
        indexed = self.lost_patterns() if modules > 1 else []
        return Report.of(
            self.policy,
            [replace(site, runs=modules) for site in self.sites],
            notes=[
                *self.notes,
                *(self._note(runs) for runs, _ in self.graphs if runs.sites),
                *(one_for_several(pattern, self.place) for pattern in indexed),
            ],
            graphs=[change for _, change in self.graphs if change],
        )

    def _note(self, runs: Runs) -> str:
        return runs.note() if self.is_counted else f"{runs.name}: nobody counts how often it runs"

    def _check_patterns(self) -> None:
        """The graph turns out to serve several modules."""
        for pattern in self.lost_patterns():
            text = one_for_several(pattern, self.place)
            if self.strict:
                raise PolicyError("sites", pattern, text)
            warnings.warn(text, RFCompileWarning, stacklevel=2)

    def lost_patterns(self) -> list[str]:
        """Patterns that no graph has a use for and that name a module by its number, as
        ``layers.0.*`` does: one graph for several modules cannot tell them apart.
        """
        text = self.policy.describe()
        return [p for p in self.policy.sites if _has_number(p) and (text, p) not in _USED]


_NUMBER = re.compile(r"[\d\[\]!?*-]*\d[\d\[\]!?*-]*")


def _has_number(pattern: str) -> bool:
    return any(_NUMBER.fullmatch(part) for part in pattern.split("."))


def one_for_several(pattern: str, place: str) -> str:
    """What is said of a pattern that a graph for several modules cannot follow."""
    return (
        f"sites[{pattern!r}] cannot tell apart the modules that share one graph"
        f"{f' ({place})' if place else ''}: compile the model as a whole, or give the module that "
        'it is about options of its own: module.compile(backend="rfquant", options={...})'
    )


KEPT = 256
"""How many entries are kept, the newest: they hold the texts of their graphs."""

_ENTRIES: list[Entry] = []


def new_entry(
    policy: Policy,
    place: str = "",
    frame: int | None = None,
    *,
    strict: bool = False,
    is_counted: bool = True,
) -> Entry:
    entry = Entry(policy, place, frame, strict=strict, is_counted=is_counted)
    _ENTRIES.append(entry)
    del _ENTRIES[:-KEPT]
    return entry


def entries_of(frame: int) -> list[Entry]:
    """The entries of one function of Dynamo's, since its last reset."""
    return [entry for entry in _ENTRIES if entry.frame == frame]


def forget_frames() -> None:
    """Dynamo was reset: it numbers functions anew, and compiles all of them again."""
    for entry in _ENTRIES:
        entry.frame = None
    _USED.clear()


def graphs() -> list[Runs]:
    """The graphs of the entries that are kept."""
    return [runs for entry in _ENTRIES for runs, _ in entry.graphs]


def notes() -> list[str]:
    """What the entries say besides their sites, each once."""
    return list(dict.fromkeys(note for entry in _ENTRIES for note in entry.notes))


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

    The newest :data:`KEPT` are kept. Bytes are those of one run for each module that shares the
    graph; :func:`~rfcompile.measure_step` counts what a step really sends.

    ``clear=True`` forgets them afterwards. A function that Dynamo split or compiled again for
    another shape has several; :func:`~rfcompile.merge_reports` joins them.
    """
    result = [entry.report() for entry in _ENTRIES]
    if clear:
        _ENTRIES.clear()
    return result
