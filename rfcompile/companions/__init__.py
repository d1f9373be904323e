"""Companion methods: weights of low rank with a sine, and adapters that are small on disk."""

from rfcompile.companions.low_rank import LowRankReport, Rank
from rfcompile.companions.low_rank_linear import LowRankLinear, merge_low_rank
from rfcompile.companions.ranks import effective_ranks, stable_rank_bounds

__all__ = [
    "LowRankLinear",
    "LowRankReport",
    "Rank",
    "effective_ranks",
    "merge_low_rank",
    "stable_rank_bounds",
]
