"""Adapters: the rewrite that adds low-rank adapters to the linears of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from rfcompile.errors import OptionError
from rfcompile.graph.boundaries import blocks_of_graph
from rfcompile.graph.capture import Inputs
from rfcompile.graph.models import without_wrappers
from rfcompile.graph.modules import Modules, as_modules
from rfcompile.graph.pipeline import run
from rfcompile.passes.factor_weights import FactoredWeight, FactorWeights
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.adapters.factor import AnyFactor, Factor
from rfcompile.rewrites.adapters.linear import AdaptedLinear, adapted
from rfcompile.rewrites.low_rank.graph_linears import find_graph_linears
from rfcompile.rewrites.low_rank.rewrite import check_positive_integer, check_rank, check_scale
from rfcompile.rewrites.low_rank.targets import (
    blocks_of,
    find_linears,
    matrices_left,
    matrix_of,
)


@dataclass(frozen=True)
class AdapterSite:
    """A linear that got an adapter."""

    path: str
    shape: tuple[int, int]
    rank: int
    omega: float | None
    gain: float
    parameters: int


@dataclass(frozen=True)
class AdapterReport(TableReport):
    """The adapters of a model; ``left`` are matrices of its blocks without one."""

    sites: tuple[AdapterSite, ...]
    parameters: int
    left: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        trained = sum(site.parameters for site in self.sites)
        share = trained / max(self.parameters, 1)
        yield (
            f"{len(self.sites)} adapters: {trained:,} parameters to train beside "
            f"{self.parameters:,} frozen ones ({share:.2%})"
        )
        rows = [["linear", "shape", "rank", "omega", "gain", "parameters"]]
        for site in self.sites:
            omega = "none" if site.omega is None else f"{site.omega:.4g}"
            shape = "x".join(map(str, site.shape))
            rows.append([site.path, shape, str(site.rank), omega, f"{site.gain:.4g}"])
            rows[-1].append(f"{site.parameters:,}")
        yield from table(rows)
        if self.left:
            yield f"without an adapter: {', '.join(self.left)}"


@dataclass(frozen=True)
class Adapters:
    """``W`` becomes ``W + alpha / rank * sin(omega B A) / sqrt(n_in)``; ``W + alpha / rank * B A``
    without a sine. A starts as U(-1, 1) / sqrt(n_in), B at zero: at first nothing changes.

    The new model shares the memory of every parameter of the old one, but has them frozen:
    ``[p for p in new.parameters() if p.requires_grad]`` are the adapters. What comes after (merge,
    quantize, save, load, send) is in :mod:`rfcompile.adapters`.

    Args:
        rank: rows of A, columns of B.
        alpha: None: ``2 * rank``.
        sine: the sine-activated adapter.
        omega: of the sine. "auto": ``growth * sqrt(n_in)``.
        growth: how many times as fast as a plain adapter a small one with a sine grows; 31 in the
            authors' script (omega 2000 at n_in 4096). It matters for omega="auto" only.
        modules: which linears: paths, patterns, the last part of names (PEFT's
            ``target_modules=["q_proj", "v_proj"]``), or a function of (path, module).
        dora: a trained magnitude for each row of the weight, as in DoRA.
        seed: of A.

    Source: arXiv:2505.21895 and the code of arXiv:2403.19243 (its Sine-LoRA); LoRA is
    arXiv:2106.09685, DoRA arXiv:2402.09353. The papers give no rule for omega; the authors'
    released Sine-DoRA applies the sine to the output, ours to the weight, so that it can be merged.
    """

    rank: int = 8
    alpha: float | None = None
    sine: bool = False
    omega: float | Literal["auto"] = "auto"
    growth: float = 30.0
    modules: Modules = "auto"
    dora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", as_modules(self.modules))
        check_positive_integer("rank", self.rank)
        check_scale("omega", self.omega, or_auto=True)
        check_scale("growth", self.growth)
        if self.alpha is not None:
            check_scale("alpha", self.alpha)
        if self.omega != "auto" and not self.sine:
            raise OptionError("omega", self.omega, "there is no omega without sine=True.")

    @property
    def keeps_parameters(self) -> bool:
        return True

    def on_module(self, model: nn.Module, inputs: Callable[[], Inputs]) -> AdapterReport:
        """Add the adapters in place. The model's parameters become frozen ones that share memory
        with those that it had, so another model that holds those stays trainable.

        Raises:
            OptionError: as :meth:`~rfcompile.LowRank.on_module`; or there are
            adapters.
        """
        with without_wrappers(model), torch.no_grad():
            refuse_adapted(model)
            found = find_linears(model, self.modules)
            left = matrices_left(model, self.modules, found, lambda: blocks_of(model))
            new = {}
            for place, (path, module) in enumerate(found.items()):
                matrix = matrix_of(module)
                scale = self.scale(path, matrix)
                b, a = self._factors(matrix, place)
                norms = _row_norms(path, matrix) if self.dora else None
                new[path] = NewAdapter(Factor(b), Factor(a), *scale, norms)
            return attach(model, found, new, left)

    def on_graph(self, gm: fx.GraphModule) -> AdapterReport:
        """Add the adapters to a graph in place: parameters ``lora_B`` and ``lora_A`` beside each
        weight.

        Raises:
            OptionError: as :meth:`on_module`; or ``dora``, which a graph cannot have.
        """
        if self.dora:
            raise OptionError("dora", True, "a graph takes no magnitude: transform the module.")
        refuse_adapted(gm)
        sites, weights = [], []
        with torch.no_grad():
            found = find_graph_linears(gm, self.modules)
            paths = [linear.path for linear in found]
            left = matrices_left(gm, self.modules, paths, lambda: blocks_of_graph(gm))
            for place, linear in enumerate(found):
                matrix, path = linear.matrix, linear.path
                omega, gain = self.scale(path, matrix)
                parameters = self.rank * sum(matrix.shape)
                shape = (matrix.shape[0], matrix.shape[1])
                sites.append(AdapterSite(path, shape, self.rank, omega, gain, parameters))
                b, a = self._factors(matrix, place)
                turned, names = linear.is_transposed, ("lora_B", "lora_A")
                weights.append(FactoredWeight(path, b, a, omega, gain, turned, True, names))
            number = _freeze(gm)
        run(gm, [FactorWeights(tuple(weights))])
        return AdapterReport(tuple(sites), number, left)

    def scale(self, path: str, matrix: Tensor) -> tuple[float | None, float]:
        """Omega, and what the sine or the product is divided by."""
        check_rank(self.rank, path, matrix)
        scaling = (2 * self.rank if self.alpha is None else self.alpha) / self.rank
        root = math.sqrt(matrix.shape[1])
        if not self.sine:
            return None, 1 / scaling
        return (self.growth * root if self.omega == "auto" else float(self.omega)), root / scaling

    def _factors(self, matrix: Tensor, place: int) -> tuple[Tensor, Tensor]:
        outputs, inputs = matrix.shape
        generator = torch.Generator().manual_seed(self.seed + place)
        a = (2 * torch.rand(self.rank, inputs, generator=generator) - 1) * inputs**-0.5
        b = torch.zeros(outputs, self.rank)
        return b.to(matrix.device, matrix.dtype), a.to(matrix.device, matrix.dtype)


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """What :meth:`AdaptedLinear.become` takes: ``left`` is B, ``right`` is A."""

    left: AnyFactor
    right: AnyFactor
    omega: float | None
    gain: float
    magnitude: Tensor | None = None


def refuse_adapted(model: nn.Module) -> None:
    """One adapter a linear.

    Raises:
        OptionError: the model has adapters.
    """
    is_graph = isinstance(model, fx.GraphModule)
    names = (name for parameter, _ in model.named_parameters() for name in parameter.split("."))
    if adapted(model) or (is_graph and "lora_A" in names):
        name = type(model).__name__
        raise OptionError("model", name, "it has adapters: merge them first (rf.adapters.merge).")


def attach(
    model: nn.Module,
    found: Mapping[str, nn.Module],
    new: Mapping[str, NewAdapter],
    left: tuple[str, ...] = (),
) -> AdapterReport:
    """Freeze ``model`` and give the linears that were found their adapters, in place."""
    number = _freeze(model)
    sites = []
    for path, module in found.items():
        shape = matrix_of(module).shape
        how = new[path]
        adapter = AdaptedLinear.become(
            module, how.left, how.right, how.omega, how.gain, how.magnitude
        )
        trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
        rank = adapter.lora_A().shape[0]
        sites.append(AdapterSite(path, (shape[0], shape[1]), rank, how.omega, how.gain, trained))
    return AdapterReport(tuple(sites), number, left)


def _row_norms(path: str, matrix: Tensor) -> Tensor:
    if not bool(matrix.any(dim=1).all()):
        rule = f"the weight of {path} has rows of zeros, which have no direction."
        raise OptionError("dora", True, rule)
    norms: Tensor = matrix.norm(dim=1)
    return norms


def _freeze(model: nn.Module) -> int:
    """Put a frozen parameter of the same memory in the place of each; how many elements that is."""
    frozen: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if parameter not in frozen:
                    frozen[parameter] = nn.Parameter(parameter.detach(), requires_grad=False)
                setattr(module, name, frozen[parameter])
    return sum(parameter.numel() for parameter in frozen)


def merge_adapters(model: nn.Module) -> tuple[str, ...]:
    """Add every adapter of ``model`` to its weight, in place, and return the paths; a model that
    shares the weights keeps its own. The same function: exactly with a sine or a magnitude,
    otherwise but for one rounding of the sum. No adapters: an empty tuple.
    """
    found = adapted(model)
    for module in found.values():
        module.merge()
    return tuple(found)
