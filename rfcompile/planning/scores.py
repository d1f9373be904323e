"""Scores as data: sums over batches, what follows from them, JSON, and how scores merge."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import ScoreError
from rfcompile.planning.pooled import pooled_costs
from rfcompile.report.table import TableReport, table
from rfcompile.wire.policy import KINDS

SCHEMA = "rfcompile.scores/3"
"""The first field of a file; the number grows when a reader of the old one would misread."""


@dataclass(frozen=True)
class FormatScore:
    """Sums over batches for one site and one format.

    Args:
        format: the text of the format.
        first, first_squared: sum of ``g . e`` and of its square, with ``e`` the quantization error
            of the site's output and ``g`` the gradient of the loss there.
        noise: sum of all ``e_i^2``.
        probes: how often this format was probed at this site
            (:mod:`rfcompile.planning.probes` has the formula).
        probed: sum of all ``e_i^2`` of the batches of these probes.
        second, second_squared: sum over probes of the second-order term ``s``, and of
            ``s^2 / sum_i e_i^2``.
    """

    format: str
    first: float
    first_squared: float
    noise: float
    probes: int
    probed: float
    second: float
    second_squared: float


@dataclass(frozen=True)
class SiteScore:
    """Sums over batches for one site, and one :class:`FormatScore` a format.

    Args:
        site: the path of the module whose output travels, or the name of the parameter that does.
        dtype: of what travels, such as "float32".
        calls: ``{its shape: how often}`` over all batches.
        powers: sums of ``y^0 .. y^4`` over all elements, in float64.
        peak: the largest ``|y|``.
        formats: the candidates.
    """

    site: str
    dtype: str
    itemsize: int
    calls: dict[tuple[int, ...], int]
    powers: tuple[float, ...]
    peak: float
    formats: tuple[FormatScore, ...]

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis over all elements, from the sums of powers.

        Relative rounding error about ``2**-53 (1 + mean / deviation)**4``; NaN for a constant.
        """
        n, s1, s2, s3, s4 = self.powers
        mean = s1 / n
        variance = s2 / n - mean**2
        fourth = s4 / n - 4 * mean * s3 / n + 6 * mean**2 * s2 / n - 3 * mean**4
        return fourth / variance**2 - 3 if variance > 0 else math.nan

    @property
    def peak_over_rms(self) -> float:
        """``max|y| / sqrt(mean y^2)``; NaN for zeros."""
        power = self.powers[2] / self.powers[0]
        return self.peak / math.sqrt(power) if power > 0 else math.nan

    def sqnr_db(self, score: FormatScore) -> float:
        """``10 log10(sum y^2 / sum e^2)``; infinite without an error."""
        power = self.powers[2]
        if score.noise == 0:
            return math.inf
        return 10 * math.log10(power / score.noise) if power > 0 else math.nan

    def gap_db(self, score: FormatScore) -> float:
        """How far the SQNR is below the rate-distortion limit of a Gaussian, in dB.

        ``20 log10(2) R - SQNR``, with ``R`` the bits of the payload an element, scales and padding
        included. No code of ``R`` bits does better on independent Gaussian values; on others of the
        same power one may.
        """
        fmt = QuantFormat.parse(score.format)
        calls = [(math.prod(shape), times) for shape, times in self.calls.items()]
        sent = sum(fmt.payload_bytes(n) * times for n, times in calls)
        rate = 8 * sent / sum(n * times for n, times in calls)
        return 20 * math.log10(2) * rate - self.sqnr_db(score)


@dataclass(frozen=True)
class Scores(TableReport):
    """What :func:`score` measured: ``print`` it, :meth:`save` it, :meth:`merge` it, plan with it.

    Args:
        model: a digest of the names, shapes and dtypes of the model's parameters.
        kind: of traffic: "activations" or "weights".
        batches: how many were scored.
        loss: the sum of their exact losses.
        sites: one entry a site, in order of the model.
    """

    model: str
    kind: str
    batches: int
    loss: float
    sites: tuple[SiteScore, ...]

    @classmethod
    def schema(cls) -> str:
        return SCHEMA

    def increase(self, site: SiteScore, score: FormatScore) -> float:
        """The predicted increase of the mean loss if this site alone travels in this format.

        The mean over batches of ``g . e`` (:meth:`first`) and of the second-order term
        (:meth:`second`). The first term counts only where it is no chance, see
        :meth:`first_counts`.
        """
        first = self.first(score) if self.first_counts(score) else 0.0
        return self.second(site, score) + first

    def first(self, score: FormatScore) -> float:
        """The mean of ``g . e`` over batches."""
        return score.first / self.batches

    def second(self, site: SiteScore, score: FormatScore) -> float:
        """The second-order term: what a unit of squared error costs, times the mean over batches.

        The cost is that of all probes together (:func:`~rfcompile.planning.pooled.pooled_costs`).
        Its magnitude counts: at a minimum of the loss it is not negative, and where an estimate is,
        a plan would send the site with the largest error there is.
        """
        return self._costs[site.site, score.format] * score.noise / self.batches

    @cached_property
    def _costs(self) -> dict[tuple[str, str], float]:
        names = "probes", "probed", "second", "second_squared"
        sums = [[[getattr(f, n) for f in site.formats] for site in self.sites] for n in names]
        costs = pooled_costs(*np.array(sums, dtype=np.float64))
        return {
            (site.site, score.format): float(cost)
            for site, row in zip(self.sites, costs, strict=True)
            for score, cost in zip(site.formats, row, strict=True)
        }

    def first_counts(self, score: FormatScore) -> bool:
        """The mean of ``g . e`` differs from zero by more than chance explains.

        Rounding errors do not know the gradient, so ``g . e`` has either sign, and a plan would
        choose those that are negative by chance. If the sign in each batch is a coin's,
        ``|sum x| > u sqrt(sum x^2)`` has at most the probability ``2 exp(-u^2 / 2)`` (Efron 1969).
        ``u`` is where that is 5 % for all sites and formats together: of 240, it takes 19 batches.
        """
        tests = sum(len(site.formats) for site in self.sites)
        return score.first**2 > 2 * math.log(2 * tests / 0.05) * score.first_squared

    def lines(self) -> Iterator[str]:
        mean = self.loss / self.batches
        yield f"{len(self.sites)} sites of {self.kind}, {self.batches} batches, loss {mean:.4f}"
        head = ["site", "kurtosis", "max/RMS", "format", "loss increase", "SQNR dB", "to limit dB"]
        rows = [head]
        for site in self.sites:
            facts = [site.site, f"{site.kurtosis:.3g}", f"{site.peak_over_rms:.3g}"]
            for score in site.formats:
                numbers = [f"{self.increase(site, score):.3g}", f"{site.sqnr_db(score):.1f}"]
                rows.append([*facts, score.format, *numbers, f"{site.gap_db(score):.1f}"])
                facts = ["", "", ""]
        yield from table(rows)
        left = [kind for kind in KINDS if kind != self.kind]
        yield f"not scored: {', '.join(left)} (this plans nothing for them)"

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file that :meth:`load` reads; a number keeps all its digits."""
        data = {"schema": SCHEMA, **asdict(self)}
        for site in data["sites"]:
            site["calls"] = {"x".join(map(str, s)): times for s, times in site["calls"].items()}
        Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read what :meth:`save` wrote.

        Raises:
            ScoreError: the file cannot be read, or it is of another schema.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = data.pop("schema")
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            rule = f"give a file that Scores.save wrote: {type(error).__name__}: {error}."
            raise ScoreError("the file of scores", str(path), rule) from error
        if schema != SCHEMA:
            rule = f"this version reads {SCHEMA!r}: score the model again."
            raise ScoreError("the schema of the scores", schema, rule)
        try:
            data["sites"] = tuple(_site(site) for site in data["sites"])
            return cls(**data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rule = f"a field is missing or unknown: {error}. Save the scores again."
            raise ScoreError("the file of scores", str(path), rule) from error

    def merge(self, *others: Scores) -> Scores:
        """The scores of all batches together: of other ranks, of other parts of the data.

        Sums add up, so the result is that of one call with all batches, but for rounding and the
        random probes.

        Raises:
            ScoreError: they are of another model, or of other sites or formats.
        """
        merged = self
        for other in others:
            merged = _merged(merged, other)
        return merged


def _site(data: dict[str, Any]) -> SiteScore:
    formats = tuple(FormatScore(**score) for score in data.pop("formats"))
    calls = {
        tuple(map(int, filter(None, shape.split("x")))): times
        for shape, times in data.pop("calls").items()
    }
    return SiteScore(**data | {"powers": tuple(data["powers"])}, calls=calls, formats=formats)


def _merged(a: Scores, b: Scores) -> Scores:
    for what, mine, theirs in (
        ("model", a.model, b.model),
        ("kind", a.kind, b.kind),
        ("sites", _layout(a), _layout(b)),
    ):
        if mine != theirs:
            rule = f"they are of another model: the {what} must be {mine!r}."
            raise ScoreError(f"the {what} of the scores to merge", theirs, rule)
    sites = tuple(_merged_site(x, y) for x, y in zip(a.sites, b.sites, strict=True))
    return Scores(a.model, a.kind, a.batches + b.batches, a.loss + b.loss, sites)


def _layout(scores: Scores) -> list[tuple[Any, ...]]:
    return [(s.site, s.dtype, *(score.format for score in s.formats)) for s in scores.sites]


def _merged_site(a: SiteScore, b: SiteScore) -> SiteScore:
    calls = {s: a.calls.get(s, 0) + b.calls.get(s, 0) for s in {**a.calls, **b.calls}}
    powers = tuple(x + y for x, y in zip(a.powers, b.powers, strict=True))
    formats = tuple(_merged_format(x, y) for x, y in zip(a.formats, b.formats, strict=True))
    return SiteScore(a.site, a.dtype, a.itemsize, calls, powers, max(a.peak, b.peak), formats)


def _merged_format(a: FormatScore, b: FormatScore) -> FormatScore:
    sums = [f.name for f in fields(FormatScore) if f.name != "format"]
    return FormatScore(a.format, *(getattr(a, name) + getattr(b, name) for name in sums))
