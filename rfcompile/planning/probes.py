"""Probes: errors of a format at all sites at once, and what they do to the gradients of the loss.

``H`` is the Hessian of the loss with respect to disturbances at all sites, ``e`` the quantization
error of a site in a format. To second order the loss grows by ``g . e + 1/2 e . H e`` if this site
alone has the error. A probe disturbs every site by ``v = s a e``, with ``s`` a random sign and
``0 < a <= 1`` a factor of the site, and sees ``H v`` as the change of the gradients. So
``1/2 v . H v / v . v``, what a unit of squared error costs, has the mean that the site has alone:
the signs of two sites are independent. Rounding the same value gives the same error, so errors of
tokens and channels are no independent numbers; this is why a probe takes the errors themselves.

``a`` lets no site add much more to the loss than the others, which its errors would else drown, and
keeps all together where the second order describes the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import ScoreError
from rfcompile.planning.scores import FormatScore, SiteScore
from rfcompile.planning.taps import Crossings, Pass
from rfcompile.wire.fake import round_trip

PROBES = 4
"""Formats that are probed on a batch, in turn; on the last one also those that never were."""
SHARE = 0.25
"""The most that a disturbed site adds to the loss, of the median over sites and formats."""


class Sites(Protocol):
    """What is scored: places of a model that one pass may disturb."""

    model: nn.Module

    @property
    def names(self) -> list[str]: ...

    def run(self, loss: Callable[[], Tensor], given: Crossings | None, what: str) -> Pass: ...


class Probes:
    """The sums of all sites and formats, batch by batch."""

    def __init__(self, sites: Sites, formats: Sequence[QuantFormat], seed: int) -> None:
        self.sites, self.seed = sites, seed
        self.formats = [fmt.spec for fmt in formats]
        self.sums = [SiteSums(name, self.formats) for name in sites.names]
        self._turn = 0
        self._order: list[int] = []

    def add(self, loss: Callable[[], Tensor], index: int, is_last: bool) -> float:
        """Batch number ``index``, whose loss this returns.

        Raises:
            ScoreError: what :meth:`Sites.run` raises, or a gradient is no finite number.
        """
        what = f"batch {index}"
        exact = self.sites.run(loss, None, what)
        noise = np.array(
            [sums.add(exact.values[sums.site], exact.gradients[sums.site]) for sums in self.sums]
        )
        signs = torch.Generator().manual_seed(self.seed + index)
        for place in self._places(noise, is_last):
            coins = 2 * torch.randint(0, 2, (len(self.sums),), generator=signs) - 1
            factors = coins.numpy() * self._factors(noise)[:, place]
            given = self._disturbances(exact, place, factors.tolist())
            bent = self.sites.run(loss, given, what)
            self._count(place, given, (exact, bent), noise[:, place].tolist())
        return float(exact.value)

    def result(self) -> tuple[SiteScore, ...]:
        return tuple(sums.result() for sums in self.sums)

    def _places(self, noise: np.ndarray, is_last: bool) -> list[int]:
        """The formats of this batch: in turn, so that any four in a row are fine and coarse ones.

        The first is the finest: its errors need no factors, which are not known before it.
        """
        count = len(self.formats)
        if not self._order:
            by_noise = np.argsort(noise.sum(0), kind="stable").tolist()
            stride = max(1, count // PROBES)
            self._order = [place for start in range(stride) for place in by_noise[start::stride]]
        turns = range(self._turn, self._turn + min(PROBES, count))
        self._turn += len(turns)
        left = range(self._turn, count) if is_last else ()
        return [self._order[turn % count] for turn in (*turns, *left)]

    def _factors(self, noise: np.ndarray) -> np.ndarray:
        """``a`` of each site and format, from the probes so far."""
        known = abs(np.array([sums.costs() for sums in self.sums]))
        added = np.array([_nearest(*row) for row in zip(known, noise, strict=True)]) * noise
        added[~np.isfinite(added)] = 0
        if not added.any():
            return np.ones_like(noise)
        limit = SHARE * np.median(added[added > 0])
        factors: np.ndarray = np.sqrt(limit / np.maximum(added, limit))
        return factors

    def _disturbances(self, exact: Pass, place: int, factors: Sequence[float]) -> Crossings:
        """The factor of each site times its error in the format."""
        spec = self.formats[place]
        return {
            sums.site: [(factor * error_of(y, spec)).to(y.dtype) for y in exact.values[sums.site]]
            for sums, factor in zip(self.sums, factors, strict=True)
        }

    def _count(
        self, place: int, given: Crossings, passes: tuple[Pass, Pass], noise: Sequence[float]
    ) -> None:
        """What the gradients of two passes, without and with the disturbances, say of a format."""
        spec = self.formats[place]
        for sums, whole in zip(self.sums, noise, strict=True):
            site = sums.site
            parts = [*zip(given[site], *(p.gradients[site] for p in passes), strict=True)]
            size = sum(dot(v.float(), v.float()) for v, _, _ in parts)
            second = sum(dot(v.float(), new.float() - old.float()) for v, old, new in parts) / 2
            if not math.isfinite(second):
                rule = "it must be finite: score in float32 or bfloat16, or leave this format out."
                raise ScoreError(f"the gradient at {site!r} in {spec}", second, rule)
            if size:
                sums.probed(spec, second / size, whole)


def _nearest(known: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """For each format of a site what a unit costs in the one of the most similar squared error.

    ``known`` has it for formats that were probed, NaN for others. Squared errors are compared as
    ratios.
    """
    places = np.flatnonzero((known > 0) & (noise > 0))
    if not len(places):
        return np.zeros_like(noise)
    size = np.log(np.where(noise > 0, noise, 1))
    apart = np.abs(size[:, None] - size[places])
    found: np.ndarray = known[places[np.argmin(apart, axis=1)]]
    return found


class SiteSums:
    """The sums of one site over batches; each is one float64 number."""

    def __init__(self, site: str, formats: Sequence[str]) -> None:
        self.site = site
        self.first = {spec: [0.0, 0.0, 0.0] for spec in formats}
        self.second = {spec: [0, 0.0, 0.0, 0.0] for spec in formats}
        self.powers = [0.0] * 5
        self.peak, self.dtype, self.itemsize = 0.0, "", 0
        self.calls: dict[tuple[int, ...], int] = {}

    def add(self, values: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[float]:
        """What crossed in a batch; its squared error by format."""
        for y in values:
            self._add_values(y)
        noises = []
        for spec, sums in self.first.items():
            errors = [error_of(y, spec) for y in values]
            pairs = zip(gradients, errors, strict=True)
            first = sum(dot(g.float(), e) for g, e in pairs)
            noise = sum(dot(e, e) for e in errors)
            added = first, first**2, noise
            sums[:] = [a + b for a, b in zip(sums, added, strict=True)]
            noises.append(noise)
        return noises

    def probed(self, spec: str, cost: float, noise: float) -> None:
        """What a unit of squared error cost in a probe; ``noise`` is the whole of the batch."""
        sums = self.second[spec]
        added = 1, noise, cost * noise, cost**2 * noise
        sums[:] = [a + b for a, b in zip(sums, added, strict=True)]

    def costs(self) -> list[float]:
        """What a unit of squared error costs in each format; NaN before there is a probe."""
        return [
            second / noise if noise else math.nan for _, noise, second, _ in self.second.values()
        ]

    def _add_values(self, y: Tensor) -> None:
        self.dtype, self.itemsize = str(y.dtype).removeprefix("torch."), y.element_size()
        shape = tuple(y.shape)
        self.calls[shape] = self.calls.get(shape, 0) + 1
        exact = y.double()
        power = torch.ones_like(exact)
        for i in range(5):
            self.powers[i] += float(power.sum())
            power *= exact
        if y.numel():
            self.peak = max(self.peak, float(exact.abs().max()))

    def result(self) -> SiteScore:
        formats = tuple(
            FormatScore(spec, *self.first[spec], *self.second[spec])  # type: ignore[arg-type]
            for spec in self.first
        )
        facts = self.dtype, self.itemsize, self.calls, tuple(self.powers), self.peak
        return SiteScore(self.site, *facts, formats)


def error_of(y: Tensor, spec: str) -> Tensor:
    """The quantization error of a tensor in a format, in float32."""
    return round_trip(y, spec).float() - y.float()


def dot(a: Tensor, b: Tensor) -> float:
    """``sum_i a_i b_i``: products in float32, their sum in float64."""
    return float((a * b).sum(dtype=torch.float64))
