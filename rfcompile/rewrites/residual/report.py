"""The report on what transform did to the residual connections of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from rfcompile.errors import ResidualError
from rfcompile.passes.find_residuals import ResidualAdd
from rfcompile.passes.open_residuals import OpenedSite
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.protocol import rewrites_of


@dataclass(frozen=True)
class Initialized:
    """A parameter and what it got: "query", "key", "value", "output", "mlp", "zero" or "one"."""

    parameter: str
    rule: str


@dataclass(frozen=True)
class Temperature:
    """One attention's temperature ``name``, and a token's weight on itself without and with it."""

    name: str
    attention: str
    value: float
    mass_before: float
    mass_after: float


@dataclass(frozen=True)
class ResidualReport(TableReport):
    """What became of a model's residual adds, parameters and attentions; ``print`` it."""

    mode: str
    sites: tuple[OpenedSite, ...]
    left: tuple[ResidualAdd, ...] = ()
    initialized: tuple[Initialized, ...] = ()
    temperatures: tuple[Temperature, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> Iterator[str]:
        found = len(self.sites) + len(self.left)
        yield f"{len(self.sites)} of {found} residual adds rewritten: {self.mode}"
        rows = [["site", "was", "at"]]
        rows += [[s.path, s.add.spelling, s.add.source] for s in self.sites]
        rows += [[f"(left, {a.kind})", a.spelling, a.place] for a in self.left]
        yield from table(rows)
        if self.initialized:
            counts = Counter(item.rule.replace(", ", "+") for item in self.initialized)
            listing = ", ".join(f"{count} {rule}" for rule, count in counts.items())
            yield f"{len(self.initialized)} parameters initialized anew: {listing}"
        if self.temperatures:
            yield "temperature, and a token's weight on itself without and with it:"
            yield from table(
                [["parameter", "value", "without", "with"]]
                + [
                    [t.name, f"{t.value:.3f}", f"{t.mass_before:.3f}", f"{t.mass_after:.3f}"]
                    for t in self.temperatures
                ]
            )
        yield from self.notes


def residual_report(model: nn.Module) -> ResidualReport:
    """What :func:`~rfcompile.transform` did to the residual connections of ``model``.

    Raises:
        ResidualError: nothing; it was not transformed so.
    """
    reports = [report for report in rewrites_of(model) if isinstance(report, ResidualReport)]
    if not reports:
        raise ResidualError(
            f"{type(model).__name__} has no residual report: pass what "
            "rfcompile.transform(model, residual='free') returned."
        )
    return reports[-1]
