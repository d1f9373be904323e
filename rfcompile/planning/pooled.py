"""Pooling: what a unit of squared error costs at each site and format, with chance taken out.

A plan that had an estimate of its own for each of hundreds of pairs would choose those that are low
by chance (docs/measured/plan.md). Two things are common to them. Where no outliers stand out, a
unit of squared error costs about the same in all formats of a site; and coarse formats cost more
than their squared error at all sites. So ``log c = site + format + rest``, and of each ``rest`` the
share stays that chance does not explain.
"""

from __future__ import annotations

import numpy as np


def pooled_costs(
    probes: np.ndarray, noise: np.ndarray, second: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """Estimates of ``c`` from the number of probes, ``sum e^2``, ``sum s`` and ``sum s^2 / e^2``.

    ``s`` is the second-order term that a probe found, ``e^2`` the squared error there, and ``c`` is
    ``sum s / sum e^2``. Each is an array [sites, formats], and so is the result.

    ``site`` and ``format`` are a least-squares fit of ``log c``, weighted by the number of probes;
    one more site where ``format`` is zero keeps it small where there are few sites. The relative
    variance ``v`` of a probe is that of repeated ones at the site, weighted by ``e^2``, and counts
    the mean of all sites as one repetition. ``rest`` is multiplied by ``t / (t + v / n)`` after
    ``n`` probes, with ``t`` its mean square at the site less the mean of ``v / n`` (James and Stein
    1961; the two-way form is ours). An estimate that is smaller than its chance, ``sqrt(v / n)``
    times the median of the site, counts as that: chance alone makes some near zero or negative.

    Where nothing was probed twice nothing is known of chance, and estimates stay as they are; a
    negative one, and a format without a probe, have ``rest = 0``. Magnitudes count: where the sum
    of a site is negative, its estimates are turned around.
    """
    mean = np.divide(second, noise, out=np.zeros_like(second), where=noise > 0)
    mean = mean * np.where(mean.sum(1, keepdims=True) < 0, -1.0, 1.0)
    chance = _chance(probes, noise, mean, squares)[:, None] / np.maximum(probes, 1)
    least = np.sqrt(chance) * _median_of_positive(mean)
    mean = np.where(probes > 0, np.maximum(mean, least), 0.0)
    known = mean > 0
    if not known.any():
        return np.zeros_like(mean)
    log = np.log(np.where(known, mean, 1.0))
    fitted = _fit(log, np.where(known, probes, 0))
    rest = np.where(known, log - fitted, 0.0)
    count = np.maximum(known.sum(1, keepdims=True), 1)
    spread = (rest**2 - np.where(known, chance, 0.0)).sum(1, keepdims=True) / count
    spread = np.maximum(spread, 0.0)
    kept = np.divide(spread, spread + chance, out=np.zeros_like(rest), where=spread > 0)
    costs: np.ndarray = np.where(known.any(1, keepdims=True), np.exp(fitted + kept * rest), 0.0)
    return costs


def _median_of_positive(values: np.ndarray) -> np.ndarray:
    """Of each row, as a column; 0 where there is none."""
    return np.array([[np.median(row[row > 0]) if (row > 0).any() else 0.0] for row in values])


def _fit(log: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``site + format`` for all pairs; pairs of weight 0 do not count."""
    sites, formats = log.shape
    i, f = np.nonzero(weights)
    pairs = np.arange(len(i))
    rows = np.zeros((len(i) + formats, sites + formats))
    rows[pairs, i] = rows[pairs, sites + f] = np.sqrt(weights[i, f])
    rows[len(i) + np.arange(formats), sites + np.arange(formats)] = 1.0
    wanted = np.concatenate([log[i, f] * np.sqrt(weights[i, f]), np.zeros(formats)])
    found: np.ndarray = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    fitted: np.ndarray = found[:sites, None] + found[None, sites:]
    return fitted


def _chance(
    probes: np.ndarray, noise: np.ndarray, mean: np.ndarray, squares: np.ndarray
) -> np.ndarray:
    """The relative variance of one probe at each site; 0 where nothing was probed twice."""
    again = np.maximum(probes - 1, 0)
    each = noise / np.maximum(probes, 1)
    off = np.divide(squares, each, out=np.zeros_like(squares), where=each > 0) - probes * mean**2
    varied = np.where(again > 0, np.maximum(off, 0.0), 0.0).sum(1)
    size = (again * mean**2).sum(1)
    own = np.divide(varied, size, out=np.zeros_like(varied), where=size > 0)
    times = np.where(size > 0, again.sum(1), 0)
    if not times.any():
        return np.zeros_like(own)
    chance: np.ndarray = (times * own + np.average(own, weights=times)) / (times + 1)
    return chance
