"""Methods that stand beside residual-free training: options of ``rfcompile.transform``."""

from rfcompile.rewrites.adapters.exchange import broadcast_adapters
from rfcompile.rewrites.adapters.linear import AdaptedLinear
from rfcompile.rewrites.adapters.quantize import QuantizedReport, quantize_adapters
from rfcompile.rewrites.adapters.rewrite import (
    AdapterReport,
    Adapters,
    add_adapters,
    merge_adapters,
)
from rfcompile.rewrites.adapters.storage import load_adapters, save_adapters
from rfcompile.rewrites.attention.rewrite import PolynomialAttention, PolynomialReport
from rfcompile.rewrites.graying.rewrite import GrayingReport, TokenGraying
from rfcompile.rewrites.low_rank.linear import LowRankLinear, merge_low_rank
from rfcompile.rewrites.low_rank.ranks import effective_ranks, stable_rank_bounds
from rfcompile.rewrites.low_rank.rewrite import LowRankReport, Rank

__all__ = [
    "AdaptedLinear",
    "AdapterReport",
    "Adapters",
    "GrayingReport",
    "LowRankLinear",
    "LowRankReport",
    "PolynomialAttention",
    "PolynomialReport",
    "QuantizedReport",
    "Rank",
    "TokenGraying",
    "add_adapters",
    "broadcast_adapters",
    "effective_ranks",
    "load_adapters",
    "merge_adapters",
    "merge_low_rank",
    "quantize_adapters",
    "save_adapters",
    "stable_rank_bounds",
]
