"""Counts how often each compiled graph runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rfcompile.report.report import Site
from rfcompile.wire.policy import Policy

_LOCK = threading.Lock()  # backward passes run on threads of autograd
_LISTENERS: list[dict[Runs, int]] = []
TOLD_BY = 8
"""So many parameters tell one module from another that runs the same graph."""


class Runs:
    """The runs of one compiled graph.

    Args:
        direction: "forward" or "backward".
        sites: what crosses the wire in one run.
        place: where the code of the graph begins.
        when_shared: called when the graph runs for a second module, until it returns.
    """

    def __init__(
        self,
        direction: str,
        sites: tuple[Site, ...],
        policy: Policy,
        place: str,
        *,
        strict: bool = False,
        when_shared: Callable[[], None] | None = None,
    ) -> None:
        self.direction, self.sites, self.policy, self.place = direction, sites, policy, place
        self.strict, self.when_shared = strict, when_shared
        self.total = 0
        self._modules: set[tuple[int, ...]] = set()

    @property
    def num_modules(self) -> int:
        """How many modules share the graph, by the parameters that it ran with; at least 1."""
        return max(1, len(self._modules))

    @property
    def name(self) -> str:
        return f"{self.direction} graph" + (f" of {self.place}" if self.place else "")

    def note(self) -> str:
        """One line on how often it ran."""
        shared = f", for {self.num_modules} modules" if self.num_modules > 1 else ""
        return f"{self.name} ran {times(self.total)}{shared}"

    def count(self, module: tuple[int, ...]) -> None:
        """It runs now, for the module with these parameters."""
        with _LOCK:
            self.total += 1
            for counts in _LISTENERS:
                counts[self] = counts.get(self, 0) + 1
        if module and module not in self._modules:
            self._modules.add(module)
        if self.when_shared is not None and len(self._modules) > 1:
            self.when_shared()
            self.when_shared = None


def times(count: int) -> str:
    """ "once", "6 times" and so on."""
    return {0: "not yet", 1: "once"}.get(count, f"{count} times")


def counted(compiled: Any, runs: Runs, parameters: Sequence[int] = ()) -> Callable[[Any], Any]:
    """A compiled graph that counts its runs; in all else it is the graph that Inductor made.

    Args:
        compiled: takes the list of its inputs, and may empty it; torch reads its attributes.
        parameters: places of the parameters among the inputs, which tell modules apart.
    """
    told_by = tuple(parameters[:TOLD_BY])

    @functools.wraps(compiled)
    def run(inputs: Any) -> Any:
        runs.count(tuple([id(inputs[i]) for i in told_by]))
        return compiled(inputs)

    return run


def start_counting() -> dict[Runs, int]:
    """Counts of what runs from now on, until :func:`stop_counting` has them."""
    counts: dict[Runs, int] = {}
    with _LOCK:
        _LISTENERS.append(counts)
    return counts


def stop_counting(counts: dict[Runs, int]) -> None:
    with _LOCK:
        _LISTENERS[:] = [other for other in _LISTENERS if other is not counts]
