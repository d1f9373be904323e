"""Public functions for low-rank linears: merge them and measure them."""

from rfcompile.rewrites.low_rank.linear import LowRankLinear
from rfcompile.rewrites.low_rank.linear import merge_low_rank as merge
from rfcompile.rewrites.low_rank.ranks import effective_ranks, stable_rank_bounds
from rfcompile.rewrites.low_rank.rewrite import LowRankReport

__all__ = [
    "LowRankLinear",
    "LowRankReport",
    "effective_ranks",
    "merge",
    "stable_rank_bounds",
]
