"""Checks a plan: the measured increase of the loss against the predicted one."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rfcompile.errors import OptionError, RFCompileWarning
from rfcompile.graph.models import check_module, copy_of, uncompiled
from rfcompile.planning.score import Loss, loss_of, quiet
from rfcompile.planning.site_policy import site_policy
from rfcompile.planning.weights import Weights
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.wires import Wire, with_fake_wire
from rfcompile.wire.fake import round_trip

ADDITIVE = (0.7, 1.4)
"""Measured over predicted: inside, the sum over sites is taken for true."""


@dataclass(frozen=True)
class SiteCheck:
    """One site alone: predicted and measured increase of the mean loss."""

    site: str
    format: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class PlanCheck(TableReport):
    """What ``plan.check`` measured: ``print`` it, or read its fields.

    Args:
        loss: mean over batches, without a wire.
        predicted, measured: increase of that mean by the whole plan.
        error: standard error of ``measured`` over the batches; NaN for one batch.
        largest: the sites with the largest predicted increases, each alone.
        together: measured increase of these sites at once.
    """

    loss: float
    predicted: float
    measured: float
    error: float
    largest: tuple[SiteCheck, ...]
    together: float

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 if both are zero, NaN if only ``predicted`` is."""
        if self.predicted:
            return self.measured / self.predicted
        return math.nan if self.measured else 1.0

    @property
    def interaction(self) -> float:
        """What the largest sites cost together, less the sum of each alone."""
        return self.together - sum(site.measured for site in self.largest)

    @property
    def is_additive(self) -> bool:
        """The ratio is within :data:`ADDITIVE`."""
        return ADDITIVE[0] <= self.ratio <= ADDITIVE[1]

    def lines(self) -> Iterator[str]:
        yield (
            f"loss {self.loss:.4f}; the plan adds {self.measured:.3g} +- {self.error:.2g} "
            f"measured, {self.predicted:.3g} predicted (ratio {self.ratio:.2f})"
        )
        if self.largest:
            rows = [["site", "format", "predicted", "measured"]]
            for s in self.largest:
                rows.append([s.site, s.format, f"{s.predicted:.3g}", f"{s.measured:.3g}"])
            yield from table(rows)
            yield f"together {self.together:.3g}, of which interaction {self.interaction:.3g}"


def check(
    model: nn.Module,
    batches: Any,
    loss: Loss,
    kind: str,
    formats: Mapping[str, str],
    increases: Mapping[str, float],
    largest: int,
) -> PlanCheck:
    """:meth:`Plan.check`: formats ("" for exact) and predicted increases by site."""
    check_module(model)
    if type(largest) is not int or largest < 0:
        raise OptionError("largest", largest, "give a number of sites, 0 or more.")
    kept = list(batches)
    if not kept:
        raise OptionError("batches", batches, "give one batch or more; an iterator is read once.")
    model = uncompiled(model)
    coded = {site: fmt for site, fmt in formats.items() if fmt}
    worst = sorted(coded, key=lambda site: -increases[site])[:largest]
    before = _losses(model, kept, loss, kind, {}, list(formats))

    def added(sites: list[str]) -> list[float]:
        after = _losses(model, kept, loss, kind, {s: coded[s] for s in sites}, list(formats))
        return [b - a for a, b in zip(before, after, strict=True)]

    whole = added(list(coded))
    alone = {site: statistics.fmean(added([site])) for site in worst}
    spread = statistics.stdev(whole) / math.sqrt(len(whole)) if len(whole) > 1 else math.nan
    found = PlanCheck(
        statistics.fmean(before),
        sum(increases.values()),
        statistics.fmean(whole),
        spread,
        tuple(SiteCheck(s, coded[s], increases[s], alone[s]) for s in worst),
        statistics.fmean(added(worst)),
    )
    if not found.is_additive:
        warnings.warn(
            f"the plan adds {found.measured:.3g} to the loss and not {found.predicted:.3g}: the "
            f"ratio {found.ratio:.2f} is outside {list(ADDITIVE)}. Score more batches, batches "
            "like these, or keep to formats of more bits, whose errors add up.",
            RFCompileWarning,
            stacklevel=3,
        )
    return found


def _losses(
    model: nn.Module,
    batches: list[Any],
    loss: Loss,
    kind: str,
    formats: dict[str, str],
    sites: list[str],
) -> list[float]:
    """The loss of each batch with these sites in their formats; a site without one is exact."""
    if kind == "weights":
        weights = Weights(model, sites)
        twin = weights.model
        weights.set({name: round_trip(weights.exact[name], fmt) for name, fmt in formats.items()})
    else:
        policy = site_policy({site: formats.get(site, "") for site in sites})
        twin = with_fake_wire(copy_of(model, share=True), Wire(policy, modules=sites))
    with quiet(twin), torch.no_grad():
        return [loss_of(loss, twin, batch, i).item() for i, batch in enumerate(batches, 1)]
