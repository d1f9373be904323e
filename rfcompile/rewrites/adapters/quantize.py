"""Quantizes trained adapters: each factor becomes codes of a few bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from rfcompile.codec.formats import QuantFormat
from rfcompile.errors import OptionError, RFCompileWarning
from rfcompile.graph.models import copy_of, uncompiled
from rfcompile.report.table import TableReport, table
from rfcompile.rewrites.adapters.codebooks import BITS
from rfcompile.rewrites.adapters.factor import (
    AnyFactor,
    CodebookFactor,
    Factor,
    WireFactor,
    nbytes_of,
)
from rfcompile.rewrites.adapters.linear import AdaptedLinear, adapters_of
from rfcompile.rewrites.low_rank.ranks import stable_rank
from rfcompile.rewrites.protocol import add_report

PHASE_ERROR = 0.3
_WIRE_GROUP = 64

Codebooks = Literal["kmeans", "uniform", "wire"] | QuantFormat


@dataclass(frozen=True)
class QuantizedSite:
    """An adapter of a few bits.

    Args:
        phase_error: ``omega * std(error of B A)``, in radians; 0 without a sine.
        error: ``|error of dW|_F / |dW|_F``; 0 where both are zero.
        stable_ranks: of ``dW`` before and after.
        nbytes: of the factors, before and after.
    """

    path: str
    rank: int
    phase_error: float
    error: float
    stable_ranks: tuple[float, float]
    nbytes: tuple[int, int]


@dataclass(frozen=True)
class QuantizedReport(TableReport):
    """What quantization did to the adapters of a model."""

    codebook: str
    sites: tuple[QuantizedSite, ...]

    @property
    def nbytes(self) -> tuple[int, int]:
        before, after = zip(*(site.nbytes for site in self.sites), strict=True)
        return sum(before), sum(after)

    def lines(self) -> Iterator[str]:
        before, after = self.nbytes
        yield (
            f"{len(self.sites)} adapters in {self.codebook}: {before:,} -> {after:,} bytes "
            f"({before / max(after, 1):.2f}x less)"
        )
        rows = [["adapter", "rank", "phase error", "error of dW", "stable rank", "bytes"]]
        for site in self.sites:
            row = [site.path, str(site.rank), f"{site.phase_error:.3f}", f"{site.error:.3f}"]
            row += [" -> ".join(f"{rank:.1f}" for rank in site.stable_ranks)]
            rows.append([*row, " -> ".join(f"{size:,}" for size in site.nbytes)])
        yield from table(rows)
        yield "codes are not trained: train the model that was quantized, and quantize it anew"


def quantize_adapters(model: nn.Module, bits: int, *, codebook: Codebooks = "kmeans") -> nn.Module:
    """A model like ``model`` whose adapters' factors are codes; ``model`` stays as it is.

    ``dW = scale * sin(omega Q(B) Q(A))``: the factors are quantized, the sine is applied to their
    product. The factors are decoded at each call and are not trained any more; magnitudes and
    everything else stay as they are. :func:`~rfcompile.adapters.save` stores the codes.

    Args:
        bits: 1 to 8 bits an element; 2, 3, 4, 5, 6 or 8 with a format of the wire.
        codebook: "kmeans": a codebook for each factor, ``2**bits`` float32 levels at most.
            "uniform": the same in even steps. "wire": :func:`~rfcompile.quantize` with a scale for
            64 elements. Or a :class:`~rfcompile.QuantFormat` of these bits. Zeros stay zero on
            both, unless the format names mid-rise.

    Warns:
        RFCompileWarning: the phase of an adapter is off by more than 0.3 radians: omega is too
        large for these bits.

    Raises:
        OptionError: no adapters, or they are quantized; bits; codebook. FormatError: the wire has
        no such format. NonFiniteError: a factor has NaN or Inf.

    Source: arXiv:2505.21895. The bound of 0.3 is ours: a phase error ``e`` moves an element by
    ``e * scale`` at most, that is by 30 % of the largest one.
    """
    fmt = _format(bits, codebook)
    twin = copy_of(model, share=True)
    sites = []
    with torch.no_grad():
        for path, module in adapters_of(twin).items():
            if not (isinstance(module.lora_A, Factor) and isinstance(module.lora_B, Factor)):
                raise OptionError("model", path, "the adapter is quantized before.")
            sites.append(_quantize(path, module, bits, codebook, fmt))
    _warn(sites, bits)
    kind = fmt.spec if fmt is not None else f"{bits} bits, {codebook}"
    add_report(uncompiled(twin), QuantizedReport(kind, tuple(sites)))
    return twin


def _format(bits: int, codebook: Codebooks) -> QuantFormat | None:
    if type(bits) is not int or bits not in BITS:
        raise OptionError("bits", bits, "choose one of 1 to 8.")
    if codebook == "wire":
        return QuantFormat(bits, group_size=_WIRE_GROUP).for_kind("weights")
    if isinstance(codebook, QuantFormat):
        if codebook.bits != bits:
            raise OptionError("bits", bits, f"the format {codebook.spec} has others.")
        return codebook.for_kind("weights")
    if codebook not in ("kmeans", "uniform"):
        rule = "choose 'kmeans', 'uniform', 'wire', or give a QuantFormat."
        raise OptionError("codebook", codebook, rule)
    return None


def _quantize(
    path: str, module: AdaptedLinear, bits: int, codebook: Codebooks, fmt: QuantFormat | None
) -> QuantizedSite:
    factors: tuple[AnyFactor, AnyFactor] = (module.lora_B, module.lora_A)
    product, delta = module.lora_B() @ module.lora_A(), module.delta()
    made: list[AnyFactor] = []
    for factor in factors:
        if fmt is not None:
            made.append(WireFactor.of(factor(), fmt))
        else:
            assert codebook == "kmeans" or codebook == "uniform"
            made.append(CodebookFactor.of(factor(), bits, codebook))
    rank = factors[1]().shape[0]
    module.lora_B, module.lora_A = made
    new_product, new = module.lora_B() @ module.lora_A(), module.delta()
    spread = float((new_product - product).float().std(correction=0))
    off, size = float((new - delta).float().norm()), float(delta.float().norm())
    return QuantizedSite(
        path,
        rank,
        (module.omega or 0.0) * spread,
        off / size if size else off,
        (stable_rank(delta), stable_rank(new)),
        (sum(map(nbytes_of, factors)), sum(map(nbytes_of, made))),
    )


def _warn(sites: list[QuantizedSite], bits: int) -> None:
    off = [site for site in sites if not site.phase_error <= PHASE_ERROR]  # NaN, too
    if off:
        worst = max(off, key=lambda site: (math.isnan(site.phase_error), site.phase_error))
        warnings.warn(
            f"at {bits} bits the phase of {worst.path} is off by {worst.phase_error:.2f} radians "
            f"(omega * std of the error), and {len(off)} of {len(sites)} adapters are off by more "
            f"than {PHASE_ERROR}: take more bits, or train with a smaller omega.",
            RFCompileWarning,
            stacklevel=3,
        )
