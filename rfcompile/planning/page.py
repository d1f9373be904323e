"""The page of a plan: which bits where, what that costs, and what other budgets would give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from rfcompile.graph.models import uncompiled
from rfcompile.graph.outline import outline_of
from rfcompile.planning.scores import FormatScore, Scores, SiteScore
from rfcompile.report.page.document import Page
from rfcompile.report.page.of_report import report_page
from rfcompile.report.page.plots import Points, linear, logarithmic, plot
from rfcompile.report.page.sites import (
    LIMIT_DB,
    ShownSite,
    bytes_plot,
    kurtosis_plot,
    sqnr_plot,
)
from rfcompile.report.page.texts import number, short_bytes
from rfcompile.wire.policy import KINDS

Named = tuple[str, tuple[float, float]]
"""What a plan is called, its bytes and its predicted increase."""


def shown_site(
    kind: str,
    path: str,
    fmt: str,
    sent: tuple[float, float],
    seconds: float | None,
    increase: float,
    scores: Scores | None,
) -> ShownSite:
    """A site of a plan as a page shows it; ``sent``: bytes exact and in the format."""
    site = next((s for s in scores.sites if s.site == path), None) if scores else None
    score = next((s for s in site.formats if s.format == fmt), None) if site else None
    return ShownSite(
        what="forward" if kind == "activations" else kind,
        kind=kind,
        module=path,
        tensor=_tensor(site, scores) if site and scores else "",
        format=fmt,
        bits=_bits(site, score) if site and score else None,
        bytes_before=sent[0],
        bytes_after=sent[1],
        sqnr_db=site.sqnr_db(score) if site and score else None,
        kurtosis=site.kurtosis if site else None,
        increase=increase,
        seconds=seconds,
    )


def plan_page(
    tiles: Sequence[tuple[str, str]],
    sites: Sequence[ShownSite],
    scores: Scores | None,
    model: nn.Module | None,
    kind: str,
    best: Sequence[Named],
    uniform: Sequence[Named],
) -> Page:
    """The page of :meth:`Plan.page <rfcompile.planning.plan.Plan.page>`.

    ``best`` and ``uniform`` are other plans of the same scores.
    """
    plots = [*bytes_plot(sites), *kurtosis_plot(sites)]
    notes = [f"not planned: {', '.join(other for other in KINDS if other != kind)}"]
    if scores is None:
        notes.append("kurtosis, SQNR and the frontier need the scores: plan.page(path, scores=...)")
    else:
        plots += sqnr_plot([*_measured(scores)])
        frontier = [*_frontier(sites, best, uniform)]
        plots += frontier
        if not frontier:
            notes.append("no frontier: no plan increases the predicted loss")
    calls = outline_of(uncompiled(model)) if model is not None else ()
    return report_page("Plan of bits", [], tiles, notes, sites, calls=calls, plots=plots)


def _tensor(site: SiteScore, scores: Scores) -> str:
    return f"{site.dtype}, {site.powers[0] / scores.batches:,.0f} elements a batch"


def _bits(site: SiteScore, score: FormatScore) -> float:
    """Of the payload an element: the limit is a line through them."""
    return (site.gap_db(score) + site.sqnr_db(score)) / LIMIT_DB


def _measured(scores: Scores) -> Iterator[tuple[float, float, str]]:
    for site in scores.sites:
        for score in site.formats:
            decibels = site.sqnr_db(score)
            if math.isfinite(decibels):
                text = f"{site.site}: {score.format}, {decibels:.1f} dB"
                yield _bits(site, score), decibels, text


# ---- the frontier ------------------------------------------------------------------------------


def _frontier(
    sites: Sequence[ShownSite], best: Sequence[Named], uniform: Sequence[Named]
) -> Iterator[str]:
    """The least predicted increase of the loss by bytes, uniform policies, and this plan."""
    this = (sum(site.bytes_after or 0.0 for site in sites), sum(s.increase or 0.0 for s in sites))
    series = [
        _series("best plans", "c0", best, is_line=True),
        _series("uniform policies", "c1", uniform),
        _series("this plan", "c4", [("this plan", this)]),
    ]
    values = [value for points in series for value in points.y]
    if values:
        bytes_ = [value for points in series for value in points.x]
        x = linear("bytes a batch", bytes_, write=short_bytes)
        y = logarithmic("predicted increase of the loss", values)
        yield plot("Loss by bytes", x, y, series)


def _series(name: str, style: str, plans: Iterable[Named], *, is_line: bool = False) -> Points:
    """The plans that increase the loss: a logarithmic axis has no place for the others."""
    found = sorted((sent, more, text) for text, (sent, more) in plans if more > 0)
    return Points(
        name,
        style,
        tuple(sent for sent, _, _ in found),
        tuple(more for _, more, _ in found),
        tuple(f"{text}: {sent:,.0f} bytes, {number(more)} more loss" for sent, more, text in found),
        is_line=is_line,
        is_step=is_line,
    )
