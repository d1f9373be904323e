"""LowRank: the rewrite that gives linears a low-rank weight, its options and its report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from rfcompile.errors import OptionError, RFCompileWarning
from rfcompile.graph.boundaries import blocks_of_graph
from rfcompile.graph.capture import Inputs
from rfcompile.graph.models import without_wrappers
from rfcompile.graph.modules import Modules, as_modules
from rfcompile.graph.pipeline import run
from rfcompile.nn.low_rank import low_rank_weight
from rfcompile.passes.factor_weights import FactoredWeight, FactorWeights
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.low_rank.factors import Factors, drawn, fitted, omega_for
from rfcompile.rewrites.low_rank.graph_linears import find_graph_linears
from rfcompile.rewrites.low_rank.linear import LowRankLinear
from rfcompile.rewrites.low_rank.ranks import effective_ranks
from rfcompile.rewrites.low_rank.targets import (
    blocks_of,
    find_linears,
    matrices_left,
    matrix_of,
)


@dataclass(frozen=True)
class LowRankSite:
    """A linear whose weight is computed now; ``spread`` is that of the phase, in radians. Ranks are
    those of the dense weight: stable and numerical, as :func:`effective_ranks` has them.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    omega: float | None
    gain: float
    spread: float
    ranks_before: tuple[float, int]
    ranks_after: tuple[float, int]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    error: float | None
    svd_error: float | None


@dataclass(frozen=True)
class LowRankReport(TableReport):
    """What became of a model's linears; ``left`` are matrices of its blocks that stay dense."""

    sites: tuple[LowRankSite, ...]
    left: tuple[str, ...] = ()

    @property
    def parameters(self) -> tuple[int, int]:
        """Of these weights, before and after."""
        before, after = zip(*(site.parameters for site in self.sites), strict=True)
        return sum(before), sum(after)

    @property
    def nbytes(self) -> tuple[int, int]:
        before, after = zip(*(site.nbytes for site in self.sites), strict=True)
        return sum(before), sum(after)

    def lines(self) -> Iterator[str]:
        (before, after), (nbytes, fewer) = self.parameters, self.nbytes
        yield (
            f"{len(self.sites)} linears of low rank: {before:,} -> {after:,} parameters, "
            f"{nbytes:,} -> {fewer:,} bytes ({before / after:.2f}x less)"
        )
        heads = "linear,shape,rank,omega,gain,phase,stable rank,numerical rank,fit error,of an SVD"
        rows = [heads.split(",")]
        for site in self.sites:
            (stable, numerical), (stable_now, numerical_now) = site.ranks_before, site.ranks_after
            row = [site.path, "x".join(map(str, site.shape)), str(site.rank)]
            row += ["none" if site.omega is None else f"{site.omega:.4g}", f"{site.gain:.4g}"]
            row += [f"{site.spread:.2f}", f"{stable:.1f} -> {stable_now:.1f}"]
            row += [f"{numerical} -> {numerical_now}", _number(site.error), _number(site.svd_error)]
            rows.append(row)
        yield from table(rows)
        if self.left:
            yield f"dense as they were: {', '.join(self.left)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@dataclass(frozen=True)
class LowRank:
    """Linears get the weight ``sin(omega * left @ right) / g`` of ``rank * (n_in + n_out)``
    parameters; forward stays ``y = x W^T + b``.

    The weight is formed at each call, so neither time nor activation memory is saved: what shrinks
    is what is kept and sent.

    Args:
        rank: columns of ``left`` [n_out, rank], rows of ``right`` [rank, n_in].
        omega: "auto": ``spread * n_in / sqrt(rank)``; see
            :func:`~rfcompile.rewrites.low_rank.factors.omega_for`.
        spread: standard deviation of the phase at the start of a training, in radians; 2 to 3 suits
            most ranks. It matters for omega="auto" only.
        g: "auto": ``sqrt(n_in)``, as in the authors' code; of a fit, the better of
            ``1 / max|W|`` and ``0.7 / std(W)``.
        start: "fit": nearest to the weights that the model has; the report has the error, and that
            of a plain SVD. "fresh": drawn anew, for a training from scratch; weights of zeros
            start at zero.
        sine: False: plain low rank, ``left @ right / g``.
        fit_steps: of Adam, after the SVD.
        modules: which linears; ``transform(modules=...)`` says the same.
        seed: of what is drawn.

    Source: arXiv:2403.19243; the paper has no rule for omega and no fit: both are ours.
    """

    rank: int
    omega: float | Literal["auto"] = "auto"
    spread: float = 2.5
    g: float | Literal["auto"] = "auto"
    start: Literal["fit", "fresh"] = "fit"
    sine: bool = True
    fit_steps: int = 300
    modules: Modules = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", as_modules(self.modules))
        check_positive_integer("rank", self.rank)
        if self.omega != "auto" and not self.sine:
            raise OptionError("omega", self.omega, "there is no omega without a sine.")
        for option in ("omega", "g"):
            check_scale(option, getattr(self, option), or_auto=True)
        check_scale("spread", self.spread)
        if self.start not in ("fit", "fresh"):
            raise OptionError("start", self.start, "choose 'fit' or 'fresh'.")
        if type(self.fit_steps) is not int or self.fit_steps < 0:
            raise OptionError("fit_steps", self.fit_steps, "give a number of steps, 0 or more.")

    @property
    def keeps_parameters(self) -> bool:
        return False

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> LowRankReport:
        """Rewrite ``model`` in place.

        Raises:
            OptionError: a rank larger than its matrix; linears that are tied, sharded, on the meta
            device, or not there. NonFiniteError: a weight to fit has NaN or Inf.
        """
        with without_wrappers(model), torch.no_grad():
            found = find_linears(model, self.modules)
            # All are made before one is changed.
            made = {p: self._factors(p, matrix_of(m), i) for i, (p, m) in enumerate(found.items())}
            left = matrices_left(model, self.modules, found, lambda: blocks_of(model))
            sites = [_site(path, matrix_of(found[path]), made[path]) for path in found]
            for path, module in found.items():
                new = made[path]
                LowRankLinear.become(module, new.left, new.right, new.omega, new.gain)
        return LowRankReport(tuple(sites), left)

    def on_graph(self, gm: fx.GraphModule) -> LowRankReport:
        """Rewrite a graph in place, as :meth:`on_module`."""
        sites, weights = [], []
        with torch.no_grad():
            found = find_graph_linears(gm, self.modules)
            paths = [linear.path for linear in found]
            dense = matrices_left(gm, self.modules, paths, lambda: blocks_of_graph(gm))
            for number, linear in enumerate(found):
                matrix, path = linear.matrix, linear.path
                new = self._factors(path, matrix, number)
                sites.append(_site(path, matrix, new))
                left, right = (f.to(matrix.device, matrix.dtype) for f in (new.left, new.right))
                turned = linear.is_transposed
                weights.append(FactoredWeight(path, left, right, new.omega, new.gain, turned))
        run(gm, [FactorWeights(tuple(weights))])
        return LowRankReport(tuple(sites), dense)

    def _factors(self, path: str, weight: Tensor, number: int) -> Factors:
        check_rank(self.rank, path, weight)
        cost = self.rank * sum(weight.shape)
        if cost >= weight.numel():
            warnings.warn(
                f"{path}: rank {self.rank} takes {cost:,} parameters in place of "
                f"{weight.numel():,}: it saves nothing.",
                RFCompileWarning,
                stacklevel=2,
            )
        inputs = weight.shape[1]
        omega = omega_for(self.spread, inputs, self.rank) if self.omega == "auto" else self.omega
        gain = None if self.g == "auto" else self.g
        generator = torch.Generator().manual_seed(self.seed + number)
        used = omega if self.sine else None
        if self.start == "fit":
            return fitted(weight, self.rank, used, gain, generator, self.fit_steps)
        return drawn(weight, self.rank, used, gain, generator)


def check_positive_integer(option: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise OptionError(option, value, "give a whole number from 1.")


def check_scale(option: str, value: object, or_auto: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 < float(value) < math.inf:  # type: ignore[arg-type]
        return
    if not (or_auto and value == "auto"):
        rule = "give a positive number, or 'auto'." if or_auto else "give a positive number."
        raise OptionError(option, value, rule)


def check_rank(rank: int, path: str, weight: Tensor) -> None:
    if rank > min(weight.shape):
        shape = " x ".join(map(str, weight.shape))
        rule = f"the weight of {path} is {shape}: the rank is at most {min(weight.shape)}."
        raise OptionError("rank", rank, rule)


def _site(path: str, before: Tensor, new: Factors) -> LowRankSite:
    after = low_rank_weight(new.left, new.right, new.omega, new.gain)
    parameters = before.numel(), new.left.numel() + new.right.numel()
    return LowRankSite(
        path,
        (before.shape[0], before.shape[1]),
        new.left.shape[1],
        new.omega,
        new.gain,
        new.spread,
        effective_ranks(before),
        effective_ranks(after),
        parameters,
        (parameters[0] * before.element_size(), parameters[1] * before.element_size()),
        new.error,
        new.svd_error,
    )
